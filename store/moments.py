"""Counts, sums and squared deviations in float64: what means and variances are made of, shard by shard."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

ROWS_AT_ONCE = 4096  # widened to float64 together; part of the order of summation, so a change changes last bits


@dataclass(frozen=True)
class Moments:
    """Moments of rows, in one or several bins (groups of samples, or positions of tokens).

    Rows are added one after the other, on one thread, and shards are merged in shard order: the same rows in the same shards give
    the same bits anywhere, whatever order they were computed in. Squares are kept about the bin's own mean (Chan, Golub and
    LeVeque 1983): about zero, a mean that is large beside the deviation would leave no digits of a variance.

    Attributes:
        count: int64 [bins], rows seen.
        total: float64 [bins, d], their sum.
        squares: float64 [bins, d], the sum of their squared deviations from the bin's mean; None where only means are kept.
    """

    count: IntArray
    total: FloatArray
    squares: FloatArray | None

    @classmethod
    def of(cls, rows: FloatArray, bins: IntArray | None = None, n_bins: int = 1) -> "Moments":
        """Returns the moments of rows float64 [n, d]; bins int64 [n] says which bin each belongs to (None: the first)."""
        count = np.zeros(n_bins, dtype=np.int64)
        total, squares = np.zeros((n_bins, rows.shape[1])), np.zeros((n_bins, rows.shape[1]))
        for number in range(n_bins):
            inside = rows if bins is None else rows[bins == number]
            if not len(inside):
                continue
            count[number] = len(inside)
            total[number] = _sum(inside)
            squares[number] = _sum(inside, about=total[number] / len(inside))
        return cls(count, total, squares)

    def merge(self, other: "Moments") -> "Moments":
        """Returns the moments of both together."""
        assert self.total.shape == other.total.shape, f"{other.total.shape} merged into {self.total.shape}"
        count, total = self.count + other.count, self.total + other.total
        if self.squares is None or other.squares is None:
            return Moments(count, total, None)
        between = np.zeros_like(total)
        both = (self.count > 0) & (other.count > 0)
        share = (self.count[both] * (other.count[both] / count[both]))[:, None]
        between[both] = (other.mean[both] - self.mean[both]) ** 2 * share
        return Moments(count, total, self.squares + other.squares + between)

    def is_same(self, other: "Moments") -> bool:
        """Whether the other's are the same, to the last bit."""
        if self.squares is None or other.squares is None:
            squares_agree = self.squares is other.squares
        else:
            squares_agree = np.array_equal(self.squares, other.squares)
        return squares_agree and np.array_equal(self.count, other.count) and np.array_equal(self.total, other.total)

    def in_bins(self, where: IntArray, n_bins: int) -> "Moments":
        """Returns the same moments in n_bins bins, bin i of these in bin where[i]; the others are empty."""
        count = np.zeros(n_bins, dtype=np.int64)
        total = np.zeros((n_bins, self.total.shape[1]))
        count[where], total[where] = self.count, self.total
        squares = None
        if self.squares is not None:
            squares = np.zeros_like(total)
            squares[where] = self.squares
        return Moments(count, total, squares)

    @property
    def mean(self) -> FloatArray:
        """float64 [bins, d]; NaN in a bin without rows."""
        with np.errstate(invalid="ignore", divide="ignore"):
            mean: FloatArray = self.total / self.count[:, None]
        return mean

    @property
    def variance(self) -> FloatArray:
        """float64 [bins, d], divided by count - 1; NaN in a bin of fewer than two rows."""
        assert self.squares is not None, "only means are kept here"
        out: FloatArray = np.full_like(self.squares, np.nan)
        enough = self.count > 1
        out[enough] = self.squares[enough] / (self.count[enough, None] - 1)
        return out


def _sum(rows: FloatArray, about: FloatArray | None = None) -> FloatArray:
    """Returns the sum of rows [n, d], or of their squared deviations, row after row."""
    total = np.zeros((1, rows.shape[1]))
    for start in range(0, len(rows), ROWS_AT_ONCE):
        block = rows[start : start + ROWS_AT_ONCE]
        values = block if about is None else (block - about) ** 2
        block = np.ascontiguousarray(np.concatenate([total, values]))
        # A reduction over the first axis adds whole rows one after the other, whatever the number of threads; but a single column
        # lies together in memory, and is added in pairs. Accumulating never does that, and is slow for many columns.
        total[0] = np.add.reduce(block, axis=0) if block.shape[1] > 1 else np.add.accumulate(block, axis=0)[-1]
    out: FloatArray = total[0]
    return out
