"""ExactProbeSweep: linear probes, each solved to its optimum as soon as its vector's rows are there."""

from typing import Literal

import torch
from torch import Tensor, nn

from exactivations.datamodules.examples import Examples
from exactivations.datamodules.splits import class_weights
from exactivations.lit_modules.probes.linear_probes import KINDS, LinearProbes
from exactivations.lit_modules.probes.probe_sweep import Form, ProbeSweep, Setting
from exactivations.lit_modules.ranks import gather
from exactivations.store.errors import InvalidInputError

Kind = Literal["logistic", "mass-mean", "ridge"]
STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


class ExactProbeSweep(ProbeSweep):
    """Logistic regression, mass-mean or ridge probes of every vector, strength and variant of the labels.

    One epoch fits everything: a step is one vector with all its rows. Ranks fit different vectors, and exchange what they found.

    Args:
        kind: "logistic" (classes), "mass-mean" (classes) or "ridge" (values); see `linear_probes`.
        strengths: The larger, the less regularised: scikit-learn's C, or 1 / alpha of ridge. Mass-mean has none to choose.
        balanced: Weigh samples so that all classes weigh the same.

    Raises:
        InvalidInputError: If the kind does not fit the labels, or the data module does not give whole vectors.
    """

    def __init__(self, kind: Kind = "logistic", strengths: tuple[float, ...] = STRENGTHS, *, balanced: bool = False) -> None:
        if kind not in KINDS:
            raise InvalidInputError(f"kind must be {', '.join(KINDS)}, got {kind!r}")
        super().__init__([Setting(strength) for strength in ((1.0,) if kind == "mass-mean" else sorted(strengths))])
        self.kind, self.balanced = kind, balanced
        self.fitted: dict[str, LinearProbes] = {}
        self.automatic_optimization = False
        self.anchor = nn.Parameter(torch.zeros(()))  # DistributedDataParallel refuses a module without parameters

    def on_fit_start(self) -> None:
        """Holds kind and data against each other, and forgets an earlier fit."""
        if self.data.batch_size is not None:
            raise InvalidInputError(f"{self.kind} probes need whole vectors: leave the data module's batch_size None")
        if self.trainer.max_epochs != 1:
            raise InvalidInputError(f"one epoch fits everything: make the trainer with max_epochs=1, got {self.trainer.max_epochs}")
        if (self.kind == "ridge") != (self.n_classes == 0):
            what = f"{self.n_classes} classes" if self.n_classes else "real values"
            raise InvalidInputError(f"{self.kind} probes cannot be trained on {self.data.label}, which has {what}")
        if self.balanced and not self.n_classes:
            raise InvalidInputError(f"{self.data.label} has real values, and so no classes to balance")
        self.fitted, self.validated = {}, {}

    def training_step(self, batch: Examples, batch_idx: int = 0) -> None:
        """Fits all probes of the batch's vector."""
        weight = self._sample_weight(batch.labels) if self.balanced else None
        for name, rows in batch.rows.items():
            strengths = [setting.strength for setting in self.settings]
            self.fitted[name] = KINDS[self.kind](rows, batch.labels, self.n_classes, strengths, weight).to("cpu")

    def on_train_end(self) -> None:
        """Gives every rank all probes."""
        for of_rank in gather(self.fitted):
            self.fitted |= of_rank

    def scores(self, name: str, batch: Examples) -> Tensor:
        """Returns the scores of a vector's probes [V, S, n, K']."""
        return self.fitted[name].to(batch.rows[name].device).scores(batch.rows[name])

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Returns mean [d], scale [d], weight [K', d] and bias [K'] of the chosen probe of the true labels, by vector."""
        found = {}
        for name, probes in self.fitted.items():
            chosen = int(self.validated[name].chosen[0])
            found[name] = {
                "mean": probes.mean, "scale": probes.scale, "weight": probes.weight[0, chosen], "bias": probes.bias[0, chosen]
            }  # fmt: skip
        return found

    @property
    def form(self) -> Form:
        """Linear."""
        return Form("linear")

    def _sample_weight(self, labels: Tensor) -> Tensor:
        on_host = labels.cpu()
        weights = [torch.from_numpy(class_weights(numbers.numpy(), self.n_classes))[numbers] for numbers in on_host]
        return torch.stack(weights).to(labels.device)
