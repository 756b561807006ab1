"""TrainedProbeSweep: probes trained in steps by Adam, for data larger than memory and for kinds without an exact solution."""

import json
from collections.abc import Iterable
from functools import reduce
from typing import Any, cast, get_args

import numpy as np
import torch
import xxhash
from jaxtyping import Float
from torch import Tensor, nn

from exactivations.datamodules.example_order import ExamplesInOrder
from exactivations.datamodules.examples import Examples
from exactivations.lit_modules.probes.probe_heads import (
    ACTIVATIONS,
    Activation,
    Kind,
    ProbeHead,
    ProbeLoss,
    Probes,
    probes_of,
    scores_of,
)
from exactivations.lit_modules.probes.probe_sweep import Form, ProbeSweep, Setting, Validated
from exactivations.lit_modules.ranks import gather
from exactivations.store.errors import InvalidInputError
from exactivations.store.moments import Moments

STRENGTHS = (1e-3, 1e-1, 10.0)
SHARES = 64
"""Into so many parts training examples are cut for the moments: each is summed by one rank, and they are merged in their order."""


class TrainedProbeSweep(ProbeSweep):
    """Probes of every vector, strength, seed and variant of the labels, trained together in steps by Adam.

    Each probe minimises (mean loss of the training examples) + |weights|^2 / (2 C n), with cross-entropy, or half the squared
    error in units of the labels' standard deviation. That is scikit-learn's logistic regression with its C, and ridge regression
    with alpha = 1 / C; biases are not regularised. The losses of all probes are summed. Adam works on each number by itself, so
    that no probe feels another; clipping gradients by their common norm would end that, and is refused.

    Training is in float64. What ranks sum in another order then differs by 1e-16, and the steps of Adam, which divide by the size
    of the gradient, make of that 1e-14 of the weights (200 steps of an mlp; in float32, 5e-6): one rank and two train one probe.

    The learning rate falls to 0 by half a cosine over the trainer's max_epochs. Each probe's parameters are kept as they were
    after the epoch in which its validation was best, which is an early end of training for each by itself; those are tested.

    Args:
        kind: "logistic" (classes), "linear" (values), "mlp" (one hidden layer; classes or values), or "attention" (over a sample's
            tokens; classes or values; needs the data module's over_tokens).
        strengths: C: the larger, the less regularised.
        seeds: Of the starts that are tried with each strength.
        learning_rate: Of Adam, at first.
        n_hidden: Units of the hidden layer of an mlp.
        activation: Of those units, "gelu" or "relu".
        patience: Training ends when no probe's validation became better for so many epochs; None lets it go on to max_epochs.
        balanced: Weigh samples so that all classes weigh the same.

    Raises:
        InvalidInputError: If an option is out of range; at setup, if the kind does not fit the labels or the data module.
    """

    def __init__(
        self,
        kind: Kind,
        strengths: Iterable[float] = STRENGTHS,
        seeds: Iterable[int] = (0,),
        *,
        learning_rate: float = 1e-2,
        n_hidden: int = 64,
        activation: Activation = "gelu",
        patience: int | None = 10,
        balanced: bool = False,
    ) -> None:
        if kind not in get_args(Kind) or activation not in ACTIVATIONS:
            raise InvalidInputError(
                f"kind must be {', '.join(get_args(Kind))} and activation {' or '.join(ACTIVATIONS)}, got {kind!r}, {activation!r}"
            )
        if learning_rate <= 0 or n_hidden < 1 or (patience is not None and patience < 1):
            raise InvalidInputError(
                f"learning_rate, n_hidden and patience must be above 0, got {learning_rate}, {n_hidden} and {patience}"
            )
        super().__init__([Setting(strength, seed) for strength in sorted(strengths) for seed in seeds])
        self.kind: Kind = kind
        self.learning_rate, self.n_hidden, self.activation, self.balanced = learning_rate, n_hidden, activation, balanced
        self.patience = patience
        self.heads = nn.ModuleList()
        self._kept: dict[str, dict[str, Tensor]] = {}  # the best parameters so far, on the host, by vector
        self._since_better = 0  # epochs
        self._is_better = False
        self._is_resumed = False

    def setup(self, stage: str) -> None:
        """Holds kind, data and trainer against each other."""
        data, over_tokens, trainer = self.data, self.kind == "attention", self.trainer
        if data.batch_size is None:
            raise InvalidInputError(f"{self.kind} probes are trained in steps: give the data module a batch_size")
        if data.over_tokens != over_tokens:
            what = "rows of all content tokens" if over_tokens else "one row an example"
            raise InvalidInputError(f"{self.kind} probes need {what}: give the data module over_tokens={over_tokens}")
        needed, found = {"logistic": "classes", "linear": "real values"}, "classes" if self.n_classes else "real values"
        if needed.get(self.kind, found) != found or (self.balanced and not self.n_classes):
            kind = "balanced " * self.balanced + self.kind
            raise InvalidInputError(f"{kind} probes cannot be trained on {data.label}, which has {found}")
        if trainer.gradient_clip_val is not None or trainer.precision != "32-true":
            raise InvalidInputError(
                "probes are trained in float64, and no gradient is clipped by what others are: leave the trainer's precision and "
                f"gradient_clip_val as they are by default, got {trainer.precision} and {trainer.gradient_clip_val}"
            )

    def configure_model(self) -> None:
        """Makes the parameters; their shapes are known when the data are."""
        if len(self.heads):
            return
        data, n_outputs = self.data, self.n_classes if self.n_classes > 2 else 1
        self.loss = ProbeLoss(
            data.targets("train"), self.n_classes, [setting.strength for setting in self.settings], balanced=self.balanced
        )
        first, seeds = data.examples("train", data.names, data.numbers("train")[:1]), [setting.seed for setting in self.settings]
        for name in data.names:
            width = first.rows[name].shape[1]
            self.heads.append(ProbeHead(self.kind, width, n_outputs, self.n_hidden, seeds, len(data.variants)))

    @property
    def _by_name(self) -> dict[str, ProbeHead]:
        return dict(zip(self.data.names, cast(Iterable[ProbeHead], self.heads), strict=True))

    def on_fit_start(self) -> None:
        """Takes mean and standard deviation of all training rows, in a pass of its own, unless they came with a checkpoint."""
        if self._is_resumed:
            return
        if self._kept:
            raise InvalidInputError(
                "these probes were trained before, maybe on what is tested now: make a new sweep for another fit"
            )
        moments = self._moments()
        for name, head in self._by_name.items():
            of_rows = moments[name]
            assert of_rows.squares is not None
            head.standardise(torch.from_numpy(of_rows.mean[0]), torch.from_numpy(of_rows.squares[0] / of_rows.count[0]))

    def _moments(self) -> dict[str, Moments]:
        """Returns the moments of each vector's training rows, to the bit the same on any number of ranks."""
        data, found = self.data, dict[str, Moments]()
        assert data.batch_size is not None
        shares = np.array_split(data.numbers("train"), SHARES)
        for at in range(self.trainer.global_rank, SHARES, self.trainer.world_size):
            for block, _ in ExamplesInOrder(shares[at], data.batch_size):
                for name, rows in data.examples("train", data.names, block).rows.items():
                    moments = Moments.of(rows.double().numpy()).in_bins(np.array([at]), SHARES)
                    found[name] = found[name].merge(moments) if name in found else moments
        ranks = [of_rank for of_rank in gather(found) if of_rank]  # there may be more ranks than shares with rows
        return {name: _folded(reduce(Moments.merge, [of_rank[name] for of_rank in ranks])) for name in data.names}

    def probes(self, name: str) -> Probes:
        """Returns a vector's probes as they are now."""
        return self._assembled(self._by_name[name], dict(self._by_name[name].trained.items()))

    def _assembled(self, head: ProbeHead, trained: dict[str, Tensor]) -> Probes:
        """Returns probes that score in units of the labels."""
        mean, scale = self.loss.label_mean[:, None, None], self.loss.label_scale[:, None, None]
        in_units = {"weight": trained["weight"] * scale[..., None], "bias": trained["bias"] * scale + mean}
        return probes_of(self.kind, {**trained, **in_units, "mean": head.mean, "scale": head.scale}, self.activation)

    def training_step(self, batch: Examples, batch_idx: int = 0) -> Tensor:
        """Returns the sum of all probes' losses, this rank's part of it; the mean over ranks is the whole."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        share = self.trainer.world_size / batch.n_in_step
        for name, head in self._by_name.items():
            # A rank may have no example of a step: a sum, and not a mean, is then 0, and yet of all parameters.
            loss = self.loss(self.scores(name, batch), batch.labels).sum(dim=2) * share
            total = total + (loss + self.loss.penalty(head)).sum()
            of_true = loss[0].mean().detach()
            self.log(f"training loss/{name}", of_true, on_step=False, on_epoch=True, sync_dist=True, batch_size=batch.n_in_step)
        return total

    def scores(self, name: str, batch: Examples) -> Float[Tensor, "v s n k"]:
        """Returns the scores of a vector's probes."""
        if batch.n_tokens is not None and not batch.n_tokens.all():
            place = int(batch.number[int((batch.n_tokens == 0).nonzero()[0])])
            raise InvalidInputError(
                f"sample {self.data.source.sample_index[place]} has no content token, so nothing to attend to: leave it out"
            )
        return scores_of(self.probes(name), batch.rows[name], batch.n_tokens)

    def configure_optimizers(self) -> Any:
        """Adam, its rate falling to 0 over all steps."""
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise InvalidInputError("the learning rate falls until training ends: give the trainer max_epochs")
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def keep(self, name: str, better: Tensor) -> None:
        """Keeps the parameters of the probes [V, S] that were the best so far."""
        now = {key: tensor.detach().cpu().clone() for key, tensor in self._by_name[name].trained.items()}
        before = self._kept.setdefault(name, now)
        for key, tensor in now.items():
            before[key] = torch.where(better.reshape(*better.shape, *[1] * (tensor.ndim - 2)), tensor, before[key])
        self._is_better |= bool(better.any())

    def on_validation_epoch_end(self) -> None:
        """Values every probe, and ends training if none became better for long."""
        self._is_better = False
        super().on_validation_epoch_end()
        self._since_better = 0 if self._is_better else self._since_better + 1
        if self.patience is not None and self._since_better >= self.patience:
            self.trainer.should_stop = True

    def on_test_start(self) -> None:
        """Takes the parameters that were kept."""
        with torch.no_grad():
            for name, head in self._by_name.items():
                for key, tensor in self._kept.get(name, {}).items():
                    head.trained[key].copy_(tensor)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what is best so far, and what it is of."""
        validated = {name: (found.values, found.chosen, found.scores) for name, found in self.validated.items()}
        checkpoint["probes"] = {
            "of": self._identity(), "kept": self._kept, "validated": validated,
            "since_better": self._since_better,
        }  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes it back.

        Raises:
            InvalidInputError: If the checkpoint is of other probes.
        """
        saved = checkpoint["probes"]
        for what, mine in self._identity().items():
            if saved["of"][what] != mine:
                raise InvalidInputError(f"the checkpoint is of other probes: its {what} is {saved['of'][what]}, and here {mine}")
        self._kept, self._since_better = saved["kept"], saved["since_better"]
        self._is_resumed = True
        self.validated = {name: Validated(*found) for name, found in saved["validated"].items()}

    def _identity(self) -> dict[str, Any]:
        settings = [(setting.strength, setting.seed) for setting in self.settings]
        split = json.dumps(self.data.split.to_json(self.data.source.sample_index))
        return {
            "kind": self.kind, "activation": self.activation, "vectors": self.data.names, "settings": settings,
            "label": self.data.label, "variants": self.data.variants, "split": xxhash.xxh3_128(split.encode()).hexdigest(),
        }  # fmt: skip

    @property
    def form(self) -> Form:
        """The kind, and what is between an mlp's layers."""
        return Form(self.kind, self.activation)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Returns the chosen probe of the true labels by vector, float64 on the host, for `probe_of_state`.

        Of "logistic" and "linear" that is mean [d], scale [d], weight [K', d] and bias [K']; an mlp has hidden_weight [H, d] and
        hidden_bias [H] beside, and weight [K', H]; attention has a query [d] beside. They are the attributes of `LinearProbes`,
        `MlpProbes` and `AttentionProbes`.
        """
        found = {}
        for name, head in self._by_name.items():
            chosen, kept = int(self.validated[name].chosen[0]), self._kept[name]
            probes = self._assembled(head, {key: tensor.to(self.device) for key, tensor in kept.items()})
            chosen_ones = {key: getattr(probes, key)[0, chosen].cpu() for key in kept}
            found[name] = {"mean": head.mean.cpu(), "scale": head.scale.cpu(), **chosen_ones}
        return found


def _folded(bins: Moments) -> Moments:
    """Returns the moments of all bins together, merged in their order."""
    assert bins.squares is not None
    parts = zip(bins.count[:, None], bins.total[:, None], bins.squares[:, None], strict=True)
    return reduce(Moments.merge, [Moments(*part) for part in parts])
