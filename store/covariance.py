"""Full covariance in one pass over rows, in float64: for whitening, and for distances to prototypes (Mahalanobis)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from exactivations.store.activation_store import ActivationStore
from exactivations.store.errors import InvalidInputError, NotFiniteError

Shrinkage = float | Literal["ledoit-wolf"]
"""How far a covariance is drawn towards a multiple of the identity: 0 (not at all) to 1, or chosen by Ledoit and Wolf's formula."""


@dataclass(frozen=True, eq=False)
class Covariance:
    """The mean and covariance of rows.

    `matrix` divides by count - 1 unless told otherwise. Everything that takes a shrinkage (`shrunk`, `cholesky`, `whiten`) divides
    by count, as scikit-learn does for every shrinkage: Ledoit and Wolf's coefficient is derived for that divisor.

    Attributes:
        mean: float64 [d].
        scatter: float64 [d, d], the sum of outer products of the deviations from the mean; symmetric to the bit.
        count: Rows seen, at least 2.
        fourth: The sum of |row - mean|^4, which only Ledoit and Wolf's coefficient needs.
    """

    mean: Float64[Tensor, " d"]
    scatter: Float64[Tensor, "d d"]
    count: int
    fourth: float

    @property
    def width(self) -> int:
        """The dimensions of a row, d."""
        return len(self.mean)

    def matrix(self, ddof: int = 1) -> Float64[Tensor, "d d"]:
        """Returns the covariance, divided by count - ddof.

        Raises:
            InvalidInputError: If ddof is negative, or count or more.
        """
        if not 0 <= ddof < self.count:
            raise InvalidInputError(f"ddof must be from 0 to {self.count - 1}, since there are {self.count} rows; got {ddof}")
        return self.scatter / (self.count - ddof)

    @property
    def ledoit_wolf_shrinkage(self) -> float:
        """The coefficient of Ledoit and Wolf (2004, "A well-conditioned estimator for large-dimensional covariance matrices").

        The share of the covariance's squared distance from mu I (mu: the mean variance) that is to be expected from having so few
        rows, 0 to 1. It is `sklearn.covariance.ledoit_wolf_shrinkage`; rows of one dimension, or all alike, give 0.
        """
        if self.width == 1:
            return 0.0
        covariance = self.matrix(ddof=0)
        noise = (self.fourth / self.count - float(covariance.square().sum())) / self.count
        # mu comes off before the squares are taken: after it, a covariance close to mu I would have lost its digits.
        covariance.diagonal().sub_(covariance.trace() / self.width)
        distance = float(covariance.square().sum())
        return min(max(noise, 0.0) / distance, 1.0) if distance > 0 else 0.0

    def shrunk(self, shrinkage: Shrinkage) -> Float64[Tensor, "d d"]:
        """Returns (1 - s) C + s trace(C) / d I, where C is divided by count: `sklearn.covariance.shrunk_covariance`.

        Args:
            shrinkage: s from 0 to 1, or "ledoit-wolf" for `ledoit_wolf_shrinkage` (then it is `sklearn.covariance.ledoit_wolf`).

        Raises:
            InvalidInputError: If the shrinkage is neither.
        """
        share = self._share(shrinkage)
        covariance = self.matrix(ddof=0)
        level = share * covariance.trace() / self.width
        covariance.mul_(1 - share).diagonal().add_(level)
        return covariance

    def cholesky(self, shrinkage: Shrinkage) -> Float64[Tensor, "d d"]:
        """Returns the lower triangular L of `shrunk(shrinkage)` = L L^T.

        Raises:
            InvalidInputError: If the matrix is not positive definite, as far as float64 can tell.
        """
        share = self._share(shrinkage)
        if share == 0 and self.count <= self.width:  # rounding can hide it, so that the factorization goes through
            raise InvalidInputError(f"{self._singular(share)}: so few samples span at most {self.count - 1} dimensions; {_REMEDY}")
        covariance = self.shrunk(share)
        factor: Tensor
        factor, stopped = torch.linalg.cholesky_ex(covariance)
        # L_ii^2 is the variance that dimension i has left when those before it are known. It is a difference of sums of up to d
        # products, so that what is below d roundings (ten times, for those in the covariance itself) is nothing but rounding.
        nothing = 10 * self.width * torch.finfo(torch.float64).eps * covariance.diagonal()
        lost = (factor.diagonal().square() <= nothing).nonzero()
        if int(stopped) or len(lost):
            dimension = int(stopped) - 1 if int(stopped) else int(lost[0])
            raise InvalidInputError(
                f"{self._singular(share)}: dimension {dimension} is constant or follows from those before it; {_REMEDY}"
            )
        return factor

    def whiten(self, rows: Float[Tensor, "n d"], shrinkage: Shrinkage) -> Float64[Tensor, "n d"]:
        """Returns L^-1 (row - mean) for each row, L being `cholesky(shrinkage)`.

        The rows that the covariance was taken of get, with shrinkage 0, mean 0 and covariance I (divided by count).

        Raises:
            InvalidInputError: If the rows have another width, or the matrix is not positive definite.
            NotFiniteError: If there is inf or NaN in the rows.
        """
        deviations = _checked(rows, self.width) - self.mean
        white: Tensor = torch.linalg.solve_triangular(self.cholesky(shrinkage).mT, deviations, upper=True, left=False)
        return white

    def _share(self, shrinkage: Shrinkage) -> float:
        if shrinkage == "ledoit-wolf":
            return self.ledoit_wolf_shrinkage
        if isinstance(shrinkage, str) or not 0 <= shrinkage <= 1:
            raise InvalidInputError(f"shrinkage must be from 0 to 1, or 'ledoit-wolf'; got {shrinkage!r}")
        return float(shrinkage)

    def _singular(self, share: float) -> str:
        return f"the covariance of {self.count} samples in {self.width} dimensions, shrunk by {share:.3g}, is not positive definite"


_REMEDY = "pass a (larger) shrinkage, such as 0.1 or 'ledoit-wolf', or add samples"


class CovarianceAccumulator:
    """Takes rows in blocks and gives their covariance, whatever the blocks, their order, and how large the mean is.

    Results of other blocks or orders agree to 1e-12 of the covariance's norm, also when the mean is 1e4 standard deviations or
    more from zero. The last bits depend on the blocks, and may depend on the number of threads of the matrix product (BLAS).
    Memory, in float64: up to four matrices [d, d], and three copies of a block.

    Args:
        width: The dimensions of a row, d.

    Raises:
        InvalidInputError: If the width is below 1.
    """

    def __init__(self, width: int) -> None:
        if width < 1:
            raise InvalidInputError(f"rows need at least one dimension, got width {width}")
        self.width = width
        self._sums = PowerSums.of(torch.zeros(0, width, dtype=torch.float64))

    @property
    def count(self) -> int:
        """Rows seen so far."""
        return self._sums.count

    def update(self, rows: Float[Tensor, "n d"]) -> "CovarianceAccumulator":
        """Adds rows [n, d], in any float dtype, on the host; none at all are welcome. Rows that are refused leave no trace.

        Raises:
            InvalidInputError: If they are not of this width, not of a float dtype, or on a device.
            NotFiniteError: If there is inf or NaN in them.
        """
        self._sums.add(PowerSums.of(_checked(rows, self.width, before=self.count)))
        return self

    def merge(self, other: "CovarianceAccumulator") -> "CovarianceAccumulator":
        """Adds all that another one has seen, which stays as it is.

        Raises:
            InvalidInputError: If its width is another.
        """
        if other.width != self.width:
            raise InvalidInputError(f"rows of width {other.width} cannot be merged with rows of width {self.width}")
        self._sums.add(other._sums.copy())
        return self

    def result(self) -> Covariance:
        """Returns the covariance of the rows so far; more may be added afterwards.

        Raises:
            InvalidInputError: If there are fewer than two.
        """
        if self.count < 2:
            raise InvalidInputError(f"a covariance needs at least 2 rows, found {self.count}")
        sums = self._sums.copy()
        rest = sums.first / sums.count  # what the centre, being rounded, misses of the mean
        sums.shift(-rest)
        # A matrix product need not round both halves alike, and a covariance is symmetric.
        return Covariance(sums.centre + rest, (sums.second + sums.second.mT) / 2, sums.count, float(sums.fourth))


def covariance_of(store: ActivationStore, hook_point: str, pooling: str, *, block_rows: int = 8192) -> Covariance:
    """Returns the covariance of a store's pooled rows or, for "tokens", of the rows of tokens that token_mask marks.

    Shards are read in ascending order, block by block, so that the rows are never in memory all at once.

    Args:
        store: A finished store; of one that was opened incomplete, the samples that are there count.
        hook_point: Such as "resid_post.5".
        pooling: Such as "mean", or "tokens".
        block_rows: Rows taken at a time. A sample of more tokens is taken whole.

    Raises:
        InvalidInputError: If the store does not hold it, if there are fewer than two rows, or if block_rows is below 1.
        NotFiniteError: If there is inf or NaN in the rows, which can only be if the store is damaged.
    """
    if block_rows < 1:
        raise InvalidInputError(f"block_rows must be at least 1, got {block_rows}")
    if not store.info.keeps_rows:
        raise InvalidInputError(f"{store.folder.path} keeps means and a few rows only: a covariance needs the rows of all samples")
    name = store._name(hook_point, pooling, per_token=pooling == "tokens")
    accumulator = CovarianceAccumulator(store.info.activations[name]["width"])
    blocks = _token_blocks(store, hook_point, block_rows) if pooling == "tokens" else _pooled_blocks(store, name, block_rows)
    try:
        for rows in blocks:
            accumulator.update(rows)
        return accumulator.result()
    except (InvalidInputError, NotFiniteError) as error:
        raise type(error)(f"{store.folder.path}, {name} in the order of the shards: {error}") from error


def _token_blocks(store: ActivationStore, hook_point: str, block_rows: int) -> Iterator[Tensor]:
    return (block.values[block.token_mask] for block in store.tokens(hook_point, block_tokens=block_rows))


def _pooled_blocks(store: ActivationStore, name: str, block_rows: int) -> Iterator[Tensor]:
    for shard in sorted(store.published):
        rows = store._tensors(shard)[name]  # held against samples.parquet there
        yield from (rows[start : start + block_rows] for start in range(0, len(rows), block_rows))


def _checked(rows: Tensor, width: int, before: int = 0) -> Float64[Tensor, "n d"]:
    """Returns the rows in float64; `before` rows came earlier, which an error counts in."""
    if rows.ndim != 2 or rows.shape[1] != width or not rows.is_floating_point() or rows.device.type != "cpu":
        raise InvalidInputError(
            f"rows must be floats [n, {width}] on the host, got {rows.dtype} {list(rows.shape)} on {rows.device}: they come from "
            "another hook point or model, or need .cpu()"
        )
    rows = rows.detach().to(torch.float64)
    if len(rows) and not all(map(torch.isfinite, torch.aminmax(rows))):  # NaN comes through aminmax
        row, dimension = (int(place) for place in (~torch.isfinite(rows)).nonzero()[0])
        raise NotFiniteError(
            f"row {before + row}, dimension {dimension} is {rows[row, dimension].item()}: it would make the whole covariance NaN; "
            "find out what made it, or leave the row out"
        )
    return rows


@dataclass(eq=False)
class PowerSums:
    """Sums over rows x of powers of y = x - centre, which say as much as the rows themselves do here.

    The centre is the mean as rounded to float64, and `first` keeps what the rounding left out. Were that taken for zero, each merge
    would be off by a rounding of the mean times the distance of the means, which shows when means are large. Centres are
    subtracted from each other and from rows with one rounding each, of the small difference.

    Attributes:
        count: Rows, n.
        centre: float64 [d].
        first: float64 [d], the sum of y.
        second: float64 [d, d], of y y^T.
        third: float64 [d], of |y|^2 y: what moving the centre adds to `fourth`.
        fourth: float64 scalar, of |y|^4.
    """

    count: int
    centre: Float64[Tensor, " d"]
    first: Float64[Tensor, " d"]
    second: Float64[Tensor, "d d"]
    third: Float64[Tensor, " d"]
    fourth: Float64[Tensor, ""]

    @classmethod
    def of(cls, rows: Float64[Tensor, "n d"]) -> "PowerSums":
        """Returns the sums of rows, about their mean."""
        centre = rows.mean(0) if len(rows) else rows.new_zeros(rows.shape[1])
        y = rows - centre
        lengths = y.square().sum(1)
        return cls(len(rows), centre, y.sum(0), y.mT @ y, y.mT @ lengths, lengths.square().sum())

    def copy(self) -> "PowerSums":
        """Returns the same sums in memory of their own."""
        tensors = (self.centre, self.first, self.second, self.third, self.fourth)
        return PowerSums(self.count, *(tensor.clone() for tensor in tensors))

    def add(self, other: "PowerSums") -> None:
        """Adds the other's rows; the other is used up (its centre moves)."""
        if not other.count:
            return
        count = self.count + other.count
        gap = other.centre - self.centre
        centre = self.centre + (self.first + other.first + other.count * gap) / count
        for sums in (self, other):
            sums.shift(sums.centre - centre)
            sums.centre = centre
        self.count = count
        for mine, others in zip(self._powers(), other._powers(), strict=True):
            mine.add_(others)

    def _powers(self) -> tuple[Tensor, ...]:
        return self.first, self.second, self.third, self.fourth

    def shift(self, delta: Float64[Tensor, " d"]) -> None:
        """Makes every y into y + delta, by multiplying the powers of y + delta out; the centre is the caller's."""
        square, along, trace = delta @ delta, delta @ self.first, self.second.trace()
        second_delta = self.second @ delta
        self.fourth += 4 * (delta @ second_delta + delta @ self.third + square * along)
        self.fourth += 2 * square * trace + self.count * square.square()
        self.third += (trace + 2 * along + self.count * square) * delta + 2 * second_delta + square * self.first
        half = self.first + self.count / 2 * delta
        self.second.addr_(delta, half).addr_(half, delta)
        self.first += self.count * delta
