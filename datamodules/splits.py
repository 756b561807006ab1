"""Train, validation and test parts of samples: groups never straddle them, classes are spread over them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from exactivations.datamodules.dealing import FloatArray, IntArray, deal_groups, deal_samples
from exactivations.store.errors import InvalidInputError

PARTS = ("train", "validation", "test")
MOST_BINS, UNITS_OF_BIN = 10, 20  # quantile bins of real values, and how many groups one has at least


@dataclass(frozen=True)
class Split:
    """Which samples are in which part: every sample is in exactly one.

    Attributes:
        train: int64, positions in the order of store.sample_index, ascending. validation, test: likewise.
        seed: What it was drawn with.
        shares: What was asked of each part.
        group_column: The column of which no value is in two parts; None if every sample went alone, or the column has no name.
    """

    train: IntArray
    validation: IntArray
    test: IntArray
    seed: int
    shares: tuple[float, float, float]
    group_column: str | None

    def to_json(self, sample_index: IntArray) -> dict[str, Any]:
        """Returns the split by sample index, as JSON takes it.

        Args:
            sample_index: int64 [n], of the samples that were split: store.sample_index.

        Raises:
            InvalidInputError: If it is of another number of samples.
        """
        n = sum(len(getattr(self, part)) for part in PARTS)
        if len(sample_index) != n:
            raise InvalidInputError(
                f"the split is of {n:,} samples, sample_index has {len(sample_index):,}: it is of another store"
            )
        samples = {part: sample_index[getattr(self, part)].tolist() for part in PARTS}
        return {**samples, "seed": self.seed, "shares": list(self.shares), "group_column": self.group_column}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], sample_index: IntArray) -> "Split":
        """Makes the split again from what `to_json` gave, for samples that may be in another order.

        Args:
            content: What `to_json` gave.
            sample_index: int64 [n]: store.sample_index.

        Raises:
            InvalidInputError: If a sample of the split is not there, is in it twice, or a sample that is there is in no part; if
                something is missing in the content.
        """
        absent = [name for name in (*PARTS, "seed", "shares", "group_column") if name not in content]
        if absent:
            raise InvalidInputError(f"a recorded split lacks {', '.join(absent)}: it was not written by Split.to_json")
        wrong = [part for part in PARTS if not isinstance(content[part], list) or {*map(type, content[part])} - {int}]
        if wrong or type(content["seed"]) is not int or not isinstance(content["group_column"], str | None):
            raise InvalidInputError(
                f"a recorded split must hold lists of sample indices, a seed and the name of a column, its "
                f"{(*wrong, 'seed or group_column')[0]} is something else: it was not written by Split.to_json"
            )
        position = {index: at for at, index in enumerate(sample_index.tolist())}
        part_of: dict[int, str] = {}
        unknown = []
        for part in PARTS:
            for index in content[part]:
                if index in part_of:
                    raise InvalidInputError(
                        f"the recorded split has sample {index} in {part_of[index]} and in {part}: it was changed"
                    )
                part_of[index] = part
                unknown += [] if index in position else [index]
        if unknown:
            raise InvalidInputError(
                f"sample {unknown[0]} of the recorded split is not there ({len(unknown):,} of its {len(part_of):,} are not): "
                "it was made of another store; split this one anew"
            )
        left_out = [index for index in position if index not in part_of]
        if left_out:
            raise InvalidInputError(
                f"sample {left_out[0]} is in no part of the recorded split ({len(left_out):,} of {len(position):,} samples are in "
                "none): it was made of another store; split this one anew"
            )
        train, validation, test = (np.sort(np.array([position[i] for i in content[part]], dtype=np.int64)) for part in PARTS)
        return cls(train, validation, test, content["seed"], _checked_shares(content["shares"]), content["group_column"])


def split(
    labels: IntArray | FloatArray,
    groups: Sequence[Any] | npt.NDArray[Any] | None = None,
    *,
    shares: Sequence[float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    group_column: str | None = None,
    classes: Sequence[str] | None = None,
) -> Split:
    """Deals samples to train, validation and test; all of a group go together, and every class is in every part.

    Groups are dealt greedily, see `deal_groups`: a part exceeds its share by less than one group, but for groups that it got so
    that no class is absent from it. scikit-learn's StratifiedGroupKFold, 20 folds put together, was tried: it missed the shares
    by up to 15 % of all samples where groups differ much in size (this by 0.2 % there), chi-square was ten times as large or more,
    it refuses fewer groups than folds, and depends on the order of rows.

    The same arguments give the same split. With groups the order of samples does not matter: only their values, sorted, and what
    is in them. Without groups a sample is known by its position alone, so the order does matter.

    Args:
        labels: int64 [n], class numbers. Or float [n], real values, which are spread by up to 10 quantile bins.
            Without labels, give zeros.
        groups: [n], what each sample belongs to, all whole numbers or all text. None: every sample goes alone.
        shares: Of train, validation and test; they sum to 1.
        seed: What the random order depends on.
        group_column: The groups' name, for the record and for messages.
        classes: The names of the classes [K], for messages.

    Raises:
        InvalidInputError: If shares do not sum to 1 or are not positive, there are fewer than three groups (or samples, without),
            or a class is absent from a part; if labels are negative or not finite, or groups are of another number than labels,
            have none for a sample or are of mixed types.
    """
    wanted = _checked_shares(shares)
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise InvalidInputError(f"the seed must be a whole number of at least 0, got {seed!r}")
    is_class = _check_labels(labels)
    units = None if groups is None else group_numbers(groups, len(labels), group_column)
    n_units = len(labels) if units is None else int(units.max(initial=-1)) + 1
    if n_units < len(PARTS):
        what = "samples" if units is None else f"groups{_named(group_column)}"
        hint = "" if units is None else ", or another group column"
        raise InvalidInputError(f"there are {n_units} {what}, which cannot make three parts: at least three are needed{hint}")
    strata = np.unique(strata_of(labels, n_units), return_inverse=True)[1]
    dice = np.random.default_rng(int(seed))
    part = deal_samples(strata, wanted, dice) if units is None else deal_groups(strata, units, wanted, dice)
    if is_class:
        _check_classes(labels, units, part, group_column, classes)
    train, validation, test = (np.flatnonzero(part == number) for number in range(len(PARTS)))
    assert len(train) + len(validation) + len(test) == len(labels)
    return Split(train, validation, test, int(seed), wanted, group_column)


def class_weights(numbers: IntArray, n_classes: int) -> FloatArray:
    """Returns weights [K] under which all classes weigh the same, n / (K * count): "balanced" in scikit-learn.

    Raises:
        InvalidInputError: If a number is not in 0 to K-1 (-1 is a token without a label: leave it out), or a class has no sample.
    """
    wrong = numbers[(numbers < 0) | (numbers >= n_classes)]
    if len(wrong):
        raise InvalidInputError(
            f"class numbers must be 0 to {n_classes - 1}, found {wrong[0]} ({len(wrong):,} of {len(numbers):,} are outside); -1 is "
            "a token without a label: leave those out"
        )
    counts = np.bincount(numbers, minlength=n_classes)
    if not counts.all():
        raise InvalidInputError(
            f"class {np.flatnonzero(counts == 0)[0]} has no sample, so it has no weight ({(counts == 0).sum()} of {n_classes} "
            "classes have none)"
        )
    weights: FloatArray = len(numbers) / (n_classes * counts.astype(np.float64))
    return weights


def _check_classes(
    labels: IntArray | FloatArray, units: IntArray | None, part: IntArray, group_column: str | None, classes: Sequence[str] | None
) -> None:
    is_in = np.zeros((int(labels.max()) + 1, len(PARTS)), dtype=bool)
    is_in[labels, part] = True
    absent = [(int(number), int(where)) for number, where in np.argwhere(~is_in & is_in.any(axis=1, keepdims=True))]
    if not absent:
        return
    number, where = absent[0]
    name = f"class {number}" if classes is None else f"class {classes[number]!r}"
    mine = labels == number
    n = int(mine.sum()) if units is None else len(np.unique(units[mine]))
    what = f"sample{'s' * (n != 1)}" if units is None else f"group{'s' * (n != 1)}{_named(group_column)}"
    if n < len(PARTS):
        hint = "it can never be in all three: leave the class out" + ("" if units is None else ", or use another group column")
    else:
        hint = "try another seed, larger shares" + ("" if units is None else " or another group column")
    n_classes = len({number for number, _ in absent})
    raise InvalidInputError(
        f"{name} is absent from {PARTS[where]}, it is in {n:,} {what} ({n_classes:,} of {len(np.unique(labels)):,} classes are "
        f"absent from some part): {hint}"
    )


def _check_labels(labels: IntArray | FloatArray) -> bool:
    """Returns whether they are class numbers, and not real values."""
    if labels.ndim != 1 or labels.dtype.kind not in "iuf":
        raise InvalidInputError(f"labels must be whole numbers or floats [n], got {labels.dtype} of shape {list(labels.shape)}")
    wrong = np.flatnonzero(~np.isfinite(labels) | ((labels < 0) & (labels.dtype.kind != "f")))
    if len(wrong):
        raise InvalidInputError(
            f"labels must be class numbers from 0, or finite values: position {wrong[0]} has {labels[wrong[0]]} ({len(wrong):,} of "
            f"{len(labels):,} are neither)"
        )
    return bool(labels.dtype.kind != "f")


def strata_of(labels: IntArray | FloatArray, n_units: int) -> IntArray | FloatArray:
    """Returns what is to be spread over parts: class numbers as they are, or the quantile bins of real values [n].

    Args:
        labels: int64 or float [n].
        n_units: How many groups (or samples, without) there are.
    """
    return _bins(labels, n_units) if labels.dtype.kind == "f" else labels


def _bins(values: IntArray | FloatArray, n_units: int) -> IntArray:
    """Returns the quantile bin of each value; equal values are in the same one."""
    n_bins = max(1, min(MOST_BINS, n_units // UNITS_OF_BIN))
    edges = np.quantile(values, np.arange(1, n_bins) / n_bins)
    bins: IntArray = np.searchsorted(edges, values, side="right")
    return bins


def group_numbers(groups: Sequence[Any] | npt.NDArray[Any], n: int, column: str | None) -> IntArray:
    """Returns the number of each sample's group, int64 [n], in the order of the groups' values.

    Raises:
        InvalidInputError: If there are more or fewer groups than n, a sample has none, or they are of mixed types.
    """
    values = groups.tolist() if isinstance(groups, np.ndarray) else list(groups)
    if len(values) != n:
        raise InvalidInputError(f"there are {len(values):,} groups{_named(column)} for {n:,} labels: each sample needs one")
    absent = [at for at, value in enumerate(values) if value is None]
    if absent:
        raise InvalidInputError(f"position {absent[0]} has no group{_named(column)} ({len(absent):,} of {n:,} samples have none)")
    types = sorted({type(value).__name__ for value in values})
    if len(types) > 1 or not {*types} <= {"int", "str", "bool"}:
        raise InvalidInputError(
            f"groups{_named(column)} must be all whole numbers or all text, found {', '.join(types)}: make them text"
        )
    number = {value: at for at, value in enumerate(sorted(set(values)))}
    return np.array([number[value] for value in values], dtype=np.int64)


def _named(column: str | None) -> str:
    return "" if column is None else f" of column {column!r}"


def _checked_shares(shares: Sequence[float]) -> tuple[float, float, float]:
    try:
        values = [float(share) for share in shares]
    except (TypeError, ValueError):
        values = []
    if len(values) != len(PARTS) or not all(share > 0 for share in values) or not math.isclose(sum(values), 1, abs_tol=1e-6):
        raise InvalidInputError(f"shares of train, validation and test must be three positive numbers that sum to 1, got {shares}")
    train, validation, test = values
    return train, validation, test
