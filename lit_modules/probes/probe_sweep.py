"""ProbeSweep: probes of every vector, setting and variant of the labels in one fit; chosen on validation, tested once."""

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from exactivations.datamodules.activations import ActivationDataModule
from exactivations.datamodules.examples import Examples
from exactivations.lit_modules.probes.probe_heads import Activation, Kind, Probes, probe_of_state
from exactivations.lit_modules.probes.probe_scores import headline, headline_of
from exactivations.lit_modules.ranks import gather
from exactivations.store.errors import InvalidInputError


@dataclass(frozen=True)
class Setting:
    """What a probe was trained with beside its data: the strength (the larger, the less regularised), and the seed of its start."""

    strength: float
    seed: int = 0


@dataclass(frozen=True)
class Form:
    """What kind of function a probe is, and between the layers of an mlp."""

    kind: Kind
    activation: Activation = "gelu"


@dataclass(frozen=True)
class Validated:
    """What validation said of one vector's probes, and what was chosen.

    Attributes:
        values: float64 [V, S], the headline metric of each.
        chosen: int64 [V], the best setting of each variant; the first one of equals, which is the most regularised.
        scores: float32 [V, n, K'], of the chosen ones, in the order of the part's numbers.
    """

    values: Float64[Tensor, "v s"]
    chosen: Int64[Tensor, " v"]
    scores: Float[Tensor, "v n k"]


class ProbeSweep(pl.LightningModule):
    """What all kinds of probes share: validation, the choice among settings, one test, and their exchange between ranks.

    `trainer.fit(sweep, datamodule)` and then `trainer.test(sweep, datamodule)`, with an `ActivationDataModule`, give
    `validated` and `tested` on every rank. Settings are chosen for each vector and each variant of the labels, on validation.

    Args:
        settings: What is tried for each vector, the most regularised first.
    """

    kind: str

    def __init__(self, settings: list[Setting]) -> None:
        super().__init__()
        if not settings or not all(setting.strength > 0 for setting in settings):
            raise InvalidInputError(f"strengths must be above 0, and there must be one, got {[s.strength for s in settings]}")
        self.settings = settings
        self.validated: dict[str, Validated] = {}
        self.tested: dict[str, Tensor] = {}
        """float32 [V, n, K'], of the chosen probes, in the order of the part's numbers, by vector."""
        self._collected: dict[str, tuple[Tensor, Tensor]] = {}  # scores [V, S, n, K'], and how often each example came [n]

    @property
    def data(self) -> ActivationDataModule:
        """The trainer's data module."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ActivationDataModule):
            raise InvalidInputError(f"{type(self).__name__} is trained and tested with an ActivationDataModule")
        return data

    @property
    def n_classes(self) -> int:
        """Of the labels; 0 for real values."""
        return len(self.data.classes)

    def scores(self, name: str, batch: Examples) -> Float[Tensor, "v s n k"]:
        """Returns the scores float32 of a vector's probes: logits (of two classes: of the second), or values."""
        raise NotImplementedError

    def keep(self, name: str, better: Tensor) -> None:
        """Told after each validation which of a vector's probes [V, S] were the best so far."""

    def on_validation_epoch_start(self) -> None:
        """Forgets what was collected."""
        self._collected = {}

    def validation_step(self, batch: Examples, batch_idx: int = 0) -> None:
        """Collects scores."""
        self._collect(batch, "validation")

    def on_validation_epoch_end(self) -> None:
        """Values every probe, and chooses the best setting of each vector and variant."""
        data, labels = self.data, self.data.targets("validation")
        values: dict[str, Tensor] = {}
        for name, scores in self._gathered("validation").items():
            values[name] = torch.stack(
                [headline(of_variant, labels[variant], self.n_classes) for variant, of_variant in enumerate(scores)]
            )
            before = self.validated.get(name)
            better = torch.ones_like(values[name], dtype=torch.bool) if before is None else values[name] > before.values
            best = values[name] if before is None else torch.where(better, values[name], before.values)
            self.keep(name, better)
            chosen = best.argmax(dim=1)
            of_chosen = _chosen(scores, chosen)
            if before is not None:  # another setting is only ever chosen because it became better now
                is_new = better[torch.arange(len(chosen)), chosen]
                of_chosen = torch.where(is_new[:, None, None], of_chosen, before.scores)
            self.validated[name] = Validated(best, chosen, of_chosen)
        what = headline_of(self.n_classes)
        for name in data.names:
            self.log(f"validation {what}/{name}", self.validated[name].values[0].max().to(self.device), sync_dist=True)

    def on_test_epoch_start(self) -> None:
        """Refuses to test what was not validated."""
        missing = [name for name in self.data.names if name not in self.validated]
        if missing:
            raise InvalidInputError(f"{missing[0]} was not validated: call trainer.fit(sweep, datamodule) before trainer.test")
        self._collected = {}

    def test_step(self, batch: Examples, batch_idx: int = 0) -> None:
        """Collects the scores of the chosen probes."""
        self._collect(batch, "test", only_chosen=True)

    def on_test_epoch_end(self) -> None:
        """Makes `tested`."""
        labels, what = self.data.targets("test"), headline_of(self.n_classes)
        self.tested = {name: scores[:, 0] for name, scores in self._gathered("test").items()}
        for name, scores in self.tested.items():
            value = headline(scores[:1], labels[0], self.n_classes)[0]
            self.log(f"test {what}/{name}", value.to(self.device), sync_dist=True)

    def _collect(self, batch: Examples, part: str, *, only_chosen: bool = False) -> None:
        numbers = self.data.numbers(part)
        places = torch.from_numpy(np.searchsorted(numbers, batch.number.numpy()))
        for name in batch.rows:
            scores = self.scores(name, batch).cpu()
            if only_chosen:
                scores = _chosen(scores, self.validated[name].chosen)[:, None]
            if (
                name not in self._collected
            ):  # at once in its whole size: small pieces between large ones keep memory from being freed
                v, s, _, k = scores.shape
                self._collected[name] = torch.zeros(v, s, len(numbers), k), torch.zeros(len(numbers), dtype=torch.int64)
            found, times = self._collected[name]
            found[:, :, places] = scores
            times[places] += 1

    def _gathered(self, part: str) -> dict[str, Tensor]:
        """Returns the scores [V, S, n, K'] of all ranks by vector, in the order of the part's numbers.

        Raises:
            InvalidInputError: If an example did not come, or came twice.
        """
        of_ranks, self._collected = gather(self._collected), {}
        out = {}
        for name in self.data.names:
            pieces = [of_rank[name] for of_rank in of_ranks if name in of_rank]
            times = sum((times for _, times in pieces), torch.zeros(len(self.data.numbers(part)), dtype=torch.int64))
            if not (times == 1).all():
                place = int((times != 1).nonzero()[0])
                raise InvalidInputError(
                    f"{name}: example {self.data.numbers(part)[place]} of {part} came {int(times[place])} times: use "
                    "Trainer(use_distributed_sampler=False), and do not limit its batches"
                )
            out[name] = sum((scores for scores, _ in pieces[1:]), pieces[0][0])
        return out

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Returns what is to be saved of the chosen probes of the true labels, by vector; see `probe_of_state`."""
        raise NotImplementedError

    @property
    def form(self) -> Form:
        """What kind of function the probes are."""
        raise NotImplementedError

    def probe(self, name: str) -> Probes:
        """Returns the chosen probe of the true labels of a vector."""
        return probe_of_state(self.form.kind, self.state()[name], self.form.activation)

    def configure_optimizers(self) -> Any:
        """None: exact kinds have no use for one."""
        return None


def _chosen(scores: Tensor, chosen: Tensor) -> Tensor:
    """Returns [V, n, K'] of [V, S, n, K'], with setting chosen[v] of variant v."""
    return scores[torch.arange(len(chosen)), chosen]
