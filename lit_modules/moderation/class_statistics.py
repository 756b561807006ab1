"""Counts, means and scatters of rows by class, in one pass and float64: all that prototypes are made of."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from exactivations.lit_modules.probes.probe_inputs import class_numbers, finite
from exactivations.store.covariance import Covariance, PowerSums
from exactivations.store.errors import InvalidInputError

POWERS = ("centre", "first", "second", "third", "fourth")


@dataclass(frozen=True, eq=False)
class ClassMoments:
    """What rows of K classes have in common with their class, and what is left within the classes.

    Attributes:
        count: int64 [K], rows of each class, at least 1.
        means: float64 [K, d].
        within: float64 [d, d], the sum over all rows of the outer product of the deviation from the class's mean (pooled
            within-class scatter); symmetric to the bit, and of a rank of at most N - K.
        fourth: The sum over all rows of |deviation|^4, which only Ledoit and Wolf's coefficient needs.
    """

    count: Int64[Tensor, " k"]
    means: Float64[Tensor, "k d"]
    within: Float64[Tensor, "d d"]
    fourth: float

    @property
    def total(self) -> int:
        """Rows of all classes, N."""
        return int(self.count.sum())

    @property
    def pooled(self) -> Covariance:
        """The covariance of the rows' deviations from their classes' means, which are 0 on average. It has the shrinkages.

        Its count is N, and knows nothing of the K means: a divisor of N - K is `pooled.matrix(ddof=K)`.
        """
        return Covariance(torch.zeros_like(self.means[0]), self.within, self.total, self.fourth)


class ClassStatistics:
    """Takes rows with class numbers in blocks and gives their moments, whatever the blocks, and however large the means.

    Sums are kept about each class's own running mean, as in `CovarianceAccumulator`: results of other blocks, orders or merges
    agree to 1e-12 of their norm, also when means are 1e4 deviations from zero. A fixed order of merges (shards by number, ranks by
    rank) fixes the last bits, on one number of threads.

    Memory: K matrices float64 [d, d], and two more while it works (d = 4096: 128 MiB each), each of which an update goes over: some
    thousand rows at a time are fast. The scatter is kept for each class, and not only pooled, for Ledoit and Wolf's coefficient:
    moving a class's mean changes its sum of fourth powers by its own scatter.

    Args:
        n_classes: K, at least 2.
        width: The dimensions of a row, d, at least 1.

    Raises:
        InvalidInputError: If there are fewer.
    """

    def __init__(self, n_classes: int, width: int) -> None:
        if n_classes < 2 or width < 1:
            raise InvalidInputError(f"prototypes need at least 2 classes and 1 dimension, got {n_classes} and {width}")
        self.n_classes, self.width = n_classes, width
        self._sums = [PowerSums.of(torch.zeros(0, width, dtype=torch.float64)) for _ in range(n_classes)]

    @property
    def count(self) -> Int64[Tensor, " k"]:
        """int64 [K], the rows of each class so far."""
        return torch.tensor([sums.count for sums in self._sums])

    def update(self, rows: Float[Tensor, "n d"], labels: Int64[Tensor, " n"]) -> "ClassStatistics":
        """Adds rows [n, d] of any float dtype and device with their class numbers; none at all are welcome.

        Rows that are refused leave no trace.

        Raises:
            InvalidInputError: If rows are not of this width or not finite (naming the row and dimension in this block), or if
                labels are not one a row, from 0 to K - 1.
        """
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise InvalidInputError(
                f"rows must be [n, {self.width}], got {list(rows.shape)}: they come from another hook point or model"
            )
        if not len(rows) and not len(labels):
            return self
        values, numbers = finite("rows", rows), class_numbers(labels, self.n_classes, len(rows))
        for number, sums in enumerate(self._sums):
            sums.add(PowerSums.of(values[numbers == number]))
        return self

    def merge(self, other: "ClassStatistics") -> "ClassStatistics":
        """Adds all that another one has seen, which stays as it is.

        Raises:
            InvalidInputError: If it has another number of classes or another width.
        """
        if (other.n_classes, other.width) != (self.n_classes, self.width):
            raise InvalidInputError(
                f"statistics of {other.n_classes} classes in {other.width} dimensions cannot be merged with those of "
                f"{self.n_classes} classes in {self.width}: they are of another hook point, model or label"
            )
        for mine, others in zip(self._sums, other._sums, strict=True):
            mine.add(others.copy())
        return self

    @classmethod
    def fold(cls, parts: Iterable["ClassStatistics"]) -> "ClassStatistics":
        """Returns the statistics of all parts (shards, ranks, folds) together, merged in their order; the parts stay as they are.

        Raises:
            InvalidInputError: If there are none, or they differ in classes or width.
        """
        folded: ClassStatistics | None = None
        for part in parts:
            folded = (cls(part.n_classes, part.width) if folded is None else folded).merge(part)
        if folded is None:
            raise InvalidInputError("there are no statistics to fold: no shard, rank or fold gave any")
        return folded

    def tensors(self) -> dict[str, Tensor]:
        """Returns the whole state, to save or to send: "count" int64 [K], and float64 sums of powers, the largest [K, d, d]."""
        stacked = {name: torch.stack([getattr(sums, name) for sums in self._sums]) for name in POWERS}
        return {"count": self.count, **stacked}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "ClassStatistics":
        """Makes the statistics again from what `tensors` gave, to the last bit.

        Raises:
            InvalidInputError: If a tensor is missing, or of another shape or dtype than `tensors` gives.
        """
        absent = [name for name in ("count", *POWERS) if name not in tensors]
        if absent:
            raise InvalidInputError(f"statistics of classes lack {', '.join(absent)}: they were not written by ClassStatistics")
        n_classes, width = tensors["centre"].shape if tensors["centre"].ndim == 2 else (0, 0)
        made = cls(n_classes, width)
        for name, blank in made.tensors().items():
            if tensors[name].shape != blank.shape or tensors[name].dtype != blank.dtype:
                raise InvalidInputError(
                    f"{name} of statistics of {n_classes} classes in {width} dimensions must be {blank.dtype} {list(blank.shape)}, "
                    f"got {tensors[name].dtype} {list(tensors[name].shape)}: they were not written by ClassStatistics"
                )
        powers = zip(*(tensors[name].clone() for name in POWERS), strict=True)
        made._sums = [PowerSums(int(count), *values) for count, values in zip(tensors["count"], powers, strict=True)]
        return made

    def result(self) -> ClassMoments:
        """Returns the moments of the rows so far; more may be added afterwards.

        Raises:
            InvalidInputError: If a class has no row.
        """
        absent = (self.count == 0).nonzero().flatten().tolist()
        if absent:
            raise InvalidInputError(
                f"no row is of class {', '.join(map(str, absent))} (of {self.n_classes} classes, {int(self.count.sum()):,} rows): "
                "a class needs at least one to have a prototype; add samples, or leave the class out"
            )
        means, fourth = [], 0.0
        within = torch.zeros(self.width, self.width, dtype=torch.float64)
        for kept in self._sums:
            sums = kept.copy()
            rest = sums.first / sums.count  # what the centre, being rounded, misses of the mean
            sums.shift(-rest)
            means.append(sums.centre + rest)
            within += sums.second
            fourth += float(sums.fourth)
        # A matrix product need not round both halves alike, and a scatter is symmetric.
        return ClassMoments(self.count, torch.stack(means), (within + within.mT) / 2, fourth)
