"""How good prototypes are with few samples per class: prototypes of random choices of the training samples, on one test part."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from exactivations.datamodules.activations import ActivationDataModule
from exactivations.datamodules.examples import Examples, IntArray
from exactivations.lit_modules.moderation.class_statistics import ClassStatistics
from exactivations.lit_modules.moderation.prototype_grid import entry_name, prototypes_by, scores_of
from exactivations.lit_modules.probes.probe_metrics import f1
from exactivations.lit_modules.probes.probe_scores import headline, probabilities
from exactivations.store.errors import InvalidInputError

LEVEL = 0.95  # of draws whose values are between low and high


@dataclass(frozen=True)
class CurvePoint:
    """What prototypes of so many samples per class are worth on test, over several draws of them.

    Attributes:
        entry: The vector and metric.
        n_per_class: At most so many of each class; None: all there are.
        counts: How many of each class there were. A class with fewer than n_per_class gave all it has.
        n_draws: How many draws; 1 where nothing is left to chance.
        auroc: Mean, and the bounds between which 95 % of draws are.
        f1: Likewise.
    """

    entry: str
    n_per_class: int | None
    counts: list[int]
    n_draws: int
    auroc: tuple[float, float, float]
    f1: tuple[float, float, float]


def sample_curve(
    data: ActivationDataModule, vector: str, metrics: Sequence[str], sizes: Sequence[int], *, n_draws: int = 20
) -> list[CurvePoint]:
    """Returns a point for each metric and size, and one of all training samples.

    It looks at the test part, as an evaluation of the same data does. Draws are of samples, whatever their group. They say how
    much the choice of training samples matters; the test part stays as it is.

    Args:
        data: Of whole vectors (no batch_size).
        vector: Which activation.
        metrics: Of `prototype_grid.METRICS`.
        sizes: Samples per class; those that no class exceeds are the same as all, and are refused.
        n_draws: Of each size, each with a seed of its own.

    Raises:
        InvalidInputError: If a size is below 1 or no class has more samples, labels are no classes, or a covariance is not positive
            definite with so few samples: the size and draw are named.
    """
    refuse_other_sizes(data, sizes, n_draws)
    train, test = (data.examples(part, [vector], data.numbers(part)) for part in ("train", "test"))
    labels, n_classes = train.labels[0].numpy(), len(data.classes)
    points = []
    for metric in metrics:
        for size in [*sorted(set(sizes)), None]:
            draws = [draw_of(labels, n_classes, size, data.seed, number) for number in range(1 if size is None else n_draws)]
            counts = np.bincount(labels[draws[0]], minlength=n_classes).tolist()
            try:
                values = np.array([_values(train, test, draw, vector, metric, n_classes) for draw in draws])
            except InvalidInputError as error:
                raise InvalidInputError(f"{vector} by {metric} of {size} samples per class: {error}") from error
            spans = [(float(v.mean()), *np.quantile(v, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()) for v in values.T]
            points.append(CurvePoint(entry_name(vector, metric), size, counts, len(draws), spans[0], spans[1]))
    return points


def refuse_other_sizes(data: ActivationDataModule, sizes: Sequence[int], n_draws: int) -> None:
    """Refuses sizes and draws that give no curve, before anything is read; see `sample_curve`."""
    n_classes = len(data.classes)
    if not n_classes or n_draws < 2:
        raise InvalidInputError(
            f"a curve is of labels that are classes and of at least 2 draws, got {n_classes} classes and {n_draws} draws"
        )
    largest = int(data.targets("train")[0].bincount().max())
    wrong = [size for size in sizes if not 1 <= size < largest]
    if wrong:
        raise InvalidInputError(
            f"{wrong[0]:,} samples per class are none, or all there are: train has {largest:,} of its largest class. Leave this "
            "size out; all samples are a point of the curve anyway"
        )


def draw_of(labels: IntArray, n_classes: int, size: int | None, seed: int, number: int) -> IntArray:
    """Returns places of a random choice of at most so many samples of each class, ascending; a larger one holds the smaller one."""
    if size is None:
        return np.arange(len(labels))
    dice = np.random.default_rng([seed, number])
    chosen = [dice.permutation(np.flatnonzero(labels == at))[:size] for at in range(n_classes)]
    return np.sort(np.concatenate(chosen))


def _values(train: Examples, test: Examples, draw: IntArray, vector: str, metric: str, n_classes: int) -> tuple[float, float]:
    """Returns AUROC and F1 on test of prototypes of a draw."""
    at, rows = torch.from_numpy(draw), train.rows[vector]
    moments = ClassStatistics(n_classes, rows.shape[1]).update(rows[at], train.labels[0][at]).result()
    scores = scores_of(prototypes_by(metric, moments).log_probabilities(test.rows[vector]))
    return float(headline(scores[None], test.labels[0], n_classes)[0]), f1(probabilities(scores, n_classes), test.labels[0])
