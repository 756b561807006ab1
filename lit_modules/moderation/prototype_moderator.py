"""PrototypeModerator: latent prototypes of every vector and metric, and mixtures of layers, in one fit; chosen on validation.

Chrabaszcz et al. 2025, "Efficient LLM Moderation with Multi-Layer Latent Prototypes" (arXiv 2502.16174).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import psutil
import torch
from jaxtyping import Float64
from torch import Tensor, nn

from exactivations.datamodules.activations import ActivationDataModule
from exactivations.datamodules.example_order import ExamplesInOrder
from exactivations.datamodules.examples import Examples, IntArray
from exactivations.datamodules.folds import folds_of_train
from exactivations.lit_modules.moderation.class_statistics import ClassMoments, ClassStatistics
from exactivations.lit_modules.moderation.layer_mixture import fit_layer_mixture, held_out_prototypes, out_of_fold
from exactivations.lit_modules.moderation.prototype_diagnosis import PrototypeFinding, diagnose_predictions, diagnose_prototypes
from exactivations.lit_modules.moderation.prototype_grid import (
    Mixture,
    PrototypeGrid,
    by_aggregation,
    checked_metrics,
    entry_name,
    mixture_name,
    prototypes_by,
    scores_of,
)
from exactivations.lit_modules.probes.probe_scores import headline
from exactivations.lit_modules.ranks import gather
from exactivations.store.errors import InvalidInputError

DEFAULT_METRICS = ("euclidean", "mahalanobis:ridge", "mahalanobis:ledoit-wolf")
STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Up to the one of which results are published. With ridge probabilities, which hardly differ, larger ones can miss the optimum."""

TRAINER = "Use Trainer(use_distributed_sampler=False), and do not limit its batches"
BLOCK = 4096  # rows that become float64 at a time; each block costs a few passes over a matrix [d, d]


class PrototypeModerator(pl.LightningModule):
    """Class prototypes of every vector by every metric, and mixtures of each aggregation's layers.

    `trainer.fit(moderator, datamodule)` and then `trainer.test(moderator, datamodule)`, with an `ActivationDataModule` of samples
    with classes and `max_epochs=1`, give `grid`, `validated`, `chosen` and `tested` on every rank. `trainer.predict(moderator,
    data)` with `StoredSamples` gives `predicted`.

    One pass over the training rows takes counts, sums and products by vector, class and fold, in float64. Where vectors come
    whole, each is one rank's, and its sums are taken in the order of the samples: the result is the same to the last bit on any
    number of ranks, and one vector's F x K matrices [d, d] are in memory at a time. Where they come in steps, each rank sums what
    it is given, of all vectors, and ranks are merged in their order: another number of ranks, or another size of step, agrees to
    1e-12. Only mixtures look at training rows again: at those of each fold, by prototypes of the others.

    Args:
        metrics: Of `prototype_grid.METRICS`.
        n_folds: Of the training samples, for mixtures of layers; None makes no mixtures. They are made of every aggregation that
            has two vectors or more.
        strengths: That mixtures choose from, by held-out folds: scikit-learn's C, the smaller, the fewer layers.

    Raises:
        InvalidInputError: If a metric is none; in the fit, if labels are no classes, a class is missing, there are too few groups
            for the folds, the sums do not fit into memory, a covariance is not positive definite (the vector is named), or the
            trainer reads less or more than every sample once.
    """

    def __init__(
        self, metrics: Sequence[str] = DEFAULT_METRICS, *, n_folds: int | None = 5, strengths: Sequence[float] = STRENGTHS
    ) -> None:
        super().__init__()
        self.metrics, self.n_folds, self.strengths = checked_metrics(metrics), n_folds, tuple(strengths)
        self.automatic_optimization = False
        self.anchor = nn.Parameter(torch.zeros(()))  # DistributedDataParallel refuses a module without parameters
        self.grid = PrototypeGrid()
        self.validated: dict[str, Tensor] = {}
        """float64 [n, K], the distances of the validation part, in the order of its numbers, by entry."""
        self.validation: dict[str, float] = {}
        """The AUROC on validation by entry and mixture (of more than two classes, the mean of each against the rest)."""
        self.chosen = ""
        """The entry or mixture that is best on validation, the first one of equals."""
        self.tested: dict[str, Tensor] = {}
        """Distances of the test part, likewise."""
        self.predicted: dict[str, Tensor] = {}
        """Distances of all samples of `StoredSamples`, likewise."""
        self.findings: dict[str, list[PrototypeFinding]] = {}
        """What makes prototypes useless, by entry."""
        self._statistics: dict[str, list[ClassStatistics]] = {}
        self._held_out: dict[str, Float64[Tensor, "n k"]] = {}  # of training rows, by entry
        self._collected: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._is_complete = True

    @property
    def data(self) -> ActivationDataModule:
        """The trainer's data module."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ActivationDataModule) or data.over_tokens or data.unit != "sample" or not data.classes:
            raise InvalidInputError("prototypes are made and tested with an ActivationDataModule of samples that have classes")
        return data

    def on_fit_start(self) -> None:
        """Deals the folds, and forgets an earlier fit."""
        data, trainer = self.data, self.trainer
        if trainer.max_epochs != 1:
            raise InvalidInputError(f"prototypes take one pass: make the trainer with max_epochs=1, got {trainer.max_epochs}")
        self._folds = np.zeros(len(data.numbers("train")), dtype=np.int64)
        if self.n_folds is not None:
            self._folds = folds_of_train(data, self.n_folds)
        self._refuse_little_memory()
        self.grid = PrototypeGrid()
        self.findings, self._statistics, self._held_out, self._is_complete = {}, {}, {}, False

    def training_step(self, batch: Examples, batch_idx: int = 0) -> None:
        """Adds the rows of a step; a vector that came whole is done with."""
        folds = self._folds[self._places(batch.number.numpy())]
        for name, rows in batch.rows.items():
            by_fold = self._statistics.setdefault(name, self._blank(rows.shape[1]))
            for fold, statistics in enumerate(by_fold):
                for block in torch.split(torch.from_numpy(np.flatnonzero(folds == fold)), BLOCK):
                    statistics.update(rows[block], batch.labels[0][block])
            if self.data.batch_size is None:
                self._finish(name, self._statistics.pop(name))

    def on_validation_epoch_start(self) -> None:
        """Completes the fit: Lightning validates before it ends the epoch."""
        if not self._is_complete:
            self._complete()
        self._collected = {}

    def validation_step(self, batch: Examples, batch_idx: int = 0) -> None:
        """Takes distances."""
        self._collect(batch)

    def on_validation_epoch_end(self) -> None:
        """Values all entries and mixtures, and chooses the best."""
        data = self.data
        self.validated = self._gathered(data.numbers("validation"))
        labels, n_classes = data.targets("validation")[0], len(data.classes)
        for entry, distances in self.validated.items():
            vector, metric = self.grid.entries[entry]
            self.findings.setdefault(entry, []).extend(diagnose_predictions(self.grid.prototypes[vector][metric], distances))
        self.validation = {
            name: float(headline(scores_of(self.grid.log_probabilities(name, self.validated))[None], labels, n_classes)[0])
            for name in self.grid.names
        }
        self.chosen = max(self.validation, key=self.validation.__getitem__)
        self.log("validation auroc", self.validation[self.chosen], sync_dist=True)

    def on_test_epoch_start(self) -> None:
        """Refuses to test what was not validated."""
        if not self.chosen:
            raise InvalidInputError("nothing was chosen on validation: call trainer.fit(moderator, datamodule) before trainer.test")
        self._collected = {}

    def test_step(self, batch: Examples, batch_idx: int = 0) -> None:
        """Takes distances."""
        self._collect(batch)

    def on_test_epoch_end(self) -> None:
        """Makes `tested`."""
        self.tested = self._gathered(self.data.numbers("test"))

    def on_predict_epoch_start(self) -> None:
        """Refuses to predict by nothing."""
        if not self.grid.prototypes:
            raise InvalidInputError("there are no prototypes to predict by: call trainer.fit first, or give it those of a file")
        self._collected = {}

    def predict_step(self, batch: Examples, batch_idx: int = 0) -> None:
        """Takes distances."""
        self._collect(batch)

    def on_predict_epoch_end(self) -> None:
        """Makes `predicted`, which all ranks have."""
        data: Any = getattr(self.trainer, "datamodule", None)
        self.predicted = self._gathered(np.arange(len(data.source)))

    def log_probabilities(self, name: str, distances: Mapping[str, Tensor]) -> Float64[Tensor, "n k"]:
        """Returns the log of each class's probability by an entry or mixture, of `validated`, `tested` or `predicted`."""
        return self.grid.log_probabilities(name, distances)

    def configure_optimizers(self) -> Any:
        """None: nothing is trained in steps."""
        return None

    def _refuse_little_memory(self) -> None:
        """Refuses sums [d, d] by class and fold that are larger than what is free: of all vectors in steps, else of one."""
        data, one = self.data, self.data.numbers("train")[:1]
        of_each = {}
        for name in data.names:
            width = data.examples("train", [name], one).rows[name].shape[1]
            of_each[name] = 8 * (self.n_folds or 1) * len(data.classes) * width**2
        steps = data.batch_size is not None
        needed = (sum if steps else max)(of_each.values()) * self.trainer.num_devices
        free = psutil.virtual_memory().available
        if needed > free:
            raise InvalidInputError(
                f"the sums of {len(of_each) if steps else 1} vectors x {len(data.classes)} classes x {self.n_folds or 1} folds on "
                f"{self.trainer.num_devices} devices take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of memory are free: "
                + ("read whole vectors (without --batch-size), or name fewer vectors" if steps else "take fewer folds or devices")
            )

    def _blank(self, width: int) -> list[ClassStatistics]:
        return [ClassStatistics(len(self.data.classes), width) for _ in range(self.n_folds or 1)]

    def _places(self, numbers: IntArray) -> IntArray:
        places: IntArray = np.searchsorted(self.data.numbers("train"), numbers)
        return places

    def _complete(self) -> None:
        """Reduces what ranks summed, makes what is missing, and gives every rank all of it."""
        rank, world_size, names = self.trainer.global_rank, self.trainer.world_size, self.data.names
        if self.data.batch_size is not None:
            for at, name in enumerate(names):
                of_ranks = gather([statistics.tensors() for statistics in self._statistics.pop(name)])
                if at % world_size == rank:
                    by_fold = zip(*of_ranks, strict=True)
                    self._finish(name, [ClassStatistics.fold(map(ClassStatistics.from_tensors, of_fold)) for of_fold in by_fold])
        made, held_out = dict(self.grid.prototypes), dict[str, Tensor]()
        for prototypes, of_rank, findings in gather((self.grid.prototypes, self._held_out, self.findings)):
            made |= prototypes
            held_out |= of_rank
            self.findings |= findings
        absent = [name for name in names if name not in made]
        if absent:
            raise InvalidInputError(f"no row of {absent[0]} came. {TRAINER}")
        self.grid = PrototypeGrid({name: made[name] for name in names})  # in one order, by which equals are told, on all ranks
        if self.n_folds is not None:
            mixed = [
                (aggregation, metric, vectors)
                for aggregation, vectors in by_aggregation(names).items()
                for metric in (self.metrics if len(vectors) > 1 else [])
            ]
            mine = {mixture_name(a, m): self._mixture(vectors, m, held_out) for a, m, vectors in mixed[rank::world_size]}
            every = {name: mixture for of_rank in gather(mine) for name, mixture in of_rank.items()}
            self.grid.mixtures.update({mixture_name(a, m): every[mixture_name(a, m)] for a, m, _ in mixed})
        self._held_out, self._is_complete = {}, True

    def _finish(self, name: str, by_fold: list[ClassStatistics]) -> None:
        """Makes a vector's prototypes, and the probabilities of its training rows by prototypes of other folds."""
        try:
            moments = ClassStatistics.fold(by_fold).result()
            if moments.total != len(self._folds):
                raise InvalidInputError(f"{moments.total:,} rows came, of {len(self._folds):,} samples of train. {TRAINER}")
            self.grid.prototypes[name] = {metric: prototypes_by(metric, moments) for metric in self.metrics}
            for metric, prototypes in self.grid.prototypes[name].items():
                self.findings[entry_name(name, metric)] = diagnose_prototypes(prototypes, moments)
            if self.n_folds is not None and len(by_aggregation(self.data.names)[name.rpartition("/")[2]]) > 1:
                self._hold_out(name, by_fold)
        except InvalidInputError as error:
            raise InvalidInputError(f"{name}: {error} (classes of {self.data.label}: {_numbered(self.data.classes)})") from error

    def _hold_out(self, name: str, by_fold: list[ClassStatistics]) -> None:
        data, numbers = self.data, self.data.numbers("train")
        for metric in self.metrics:

            def make(moments: ClassMoments, metric: str = metric) -> Any:
                return prototypes_by(metric, moments)

            made = held_out_prototypes(by_fold, make)
            found = [
                out_of_fold(
                    made, data.examples("train", [name], block).rows[name], torch.from_numpy(self._folds[self._places(block)])
                )
                for block, _ in ExamplesInOrder(numbers, BLOCK)
            ]
            self._held_out[entry_name(name, metric)] = torch.cat(found)

    def _mixture(self, vectors: list[str], metric: str, held_out: Mapping[str, Tensor]) -> Mixture:
        of_layers = torch.stack([held_out[entry_name(vector, metric)] for vector in vectors], dim=1)
        try:
            weights = fit_layer_mixture(
                of_layers, self.data.targets("train")[0], torch.from_numpy(self._folds), strengths=self.strengths
            )
        except InvalidInputError as error:
            raise InvalidInputError(f"the mixture of {', '.join(vectors)} by {metric}: {error}") from error
        return Mixture(vectors, metric, weights)

    def _collect(self, batch: Examples) -> None:
        for name, rows in batch.rows.items():
            for entry, distances in self.grid.distances(name, rows).items():
                self._collected.setdefault(entry, []).append((batch.number, distances))

    def _gathered(self, expected: IntArray) -> dict[str, Tensor]:
        """Returns the distances [n, K] of all ranks by entry, each example once, in the order of their numbers.

        Raises:
            InvalidInputError: If a sample did not come, or came twice.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        found: dict[str, list[tuple[Tensor, Tensor]]] = {entry: [] for entry in self.grid.entries}
        for of_rank in gather(self._collected):
            for entry, pieces in of_rank.items():
                found[entry].extend(pieces)
        self._collected = {}
        out = {}
        for entry in self.grid.entries:
            numbers = torch.cat([torch.empty(0, dtype=torch.int64), *(number for number, _ in found[entry])])
            times = np.bincount(numbers.numpy(), minlength=len(data.source))[expected]
            if not (times == 1).all():
                place = int(np.flatnonzero(times != 1)[0])
                sample = data.source.sample_index[expected[place]]
                raise InvalidInputError(f"{entry}: sample {sample} came {times[place]} times. {TRAINER}")
            order = numbers.argsort()
            out[entry] = torch.cat([distances for _, distances in found[entry]])[order]
        return out


def _numbered(classes: Sequence[str]) -> str:
    return ", ".join(f"{number} is {name!r}" for number, name in enumerate(classes))
