"""Splits that a dataset brings along: a column that says of each sample in which part it is."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exactivations.datamodules.dealing import FloatArray, IntArray, deal_groups, deal_samples
from exactivations.datamodules.splits import PARTS, Split, group_numbers, strata_of
from exactivations.store.errors import InvalidInputError, shown

NAMES = {"train": "train", **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"), "test": "test"}


def official_split(
    values: Sequence[Any],
    labels: IntArray | FloatArray,
    groups: Sequence[Any] | None = None,
    *,
    column: str,
    sample_index: IntArray,
    shares: Sequence[float] = (0.6, 0.2, 0.2),
    seed: int = 0,
    group_column: str | None = None,
    classes: Sequence[str] | None = None,
    every_class: bool = True,
) -> tuple[Split, bool]:
    """Returns the split that a column says, and whether its validation part was drawn.

    Where no sample is of validation, it is drawn from train: whole groups, every class in both, the share that validation has of
    train and validation in `shares`.

    Args:
        values: [n], what the column says: train, test, and validation, valid, val or dev.
        labels: int64 [n], class numbers, or float [n], real values.
        groups: [n]; none may be in two parts.
        column: The name of the column, or of the file that says it, for messages.
        sample_index: int64 [n], for messages.
        shares: Of train, validation and test, if validation is drawn.
        seed: What that depends on.
        group_column: The groups' name.
        classes: The names of the classes [K], for messages.
        every_class: Whether every class must be in every part.

    Raises:
        InvalidInputError: If a sample has another value, train or test is empty, a group is in two parts, or a class is absent from
            a part; naming it.
    """
    wrong = [at for at, value in enumerate(values) if not isinstance(value, str) or value not in NAMES]
    if wrong:
        raise InvalidInputError(
            f"{column!r} says of sample {sample_index[wrong[0]]} that it is in {shown(values[wrong[0]])} ({len(wrong):,} of "
            f"{len(values):,} samples are in no known part): it must say {', '.join(NAMES)}"
        )
    part = np.array([PARTS.index(NAMES[value]) for value in values], dtype=np.int64)
    for number, name in enumerate(PARTS):
        if name != "validation" and not (part == number).any():
            raise InvalidInputError(f"{column!r} says of no sample that it is in {name}: there is nothing to {name} on")
    units = np.arange(len(labels)) if groups is None else group_numbers(groups, len(labels), group_column)
    of_unit: dict[int, tuple[int, int]] = {}  # the part and the first sample of each
    for unit, number, index in zip(units.tolist(), part.tolist(), sample_index.tolist(), strict=True):
        if of_unit.setdefault(unit, (number, index))[0] != number:
            first, other = of_unit[unit]
            raise InvalidInputError(
                f"samples {other} and {index} are of one group of column {group_column!r}, and {column!r} puts them into "
                f"{PARTS[first]} and {PARTS[number]}: take another --group, or none if the official split is not by group"
            )
    is_drawn = not (part == 1).any()
    if is_drawn:
        train = np.flatnonzero(part == 0)
        numbers = np.unique(units[train], return_inverse=True)[1]
        if numbers.max() < 1:
            raise InvalidInputError(f"validation cannot be drawn from train, which has one group of column {group_column!r} only")
        strata = np.unique(strata_of(labels[train], int(numbers.max()) + 1), return_inverse=True)[1]
        of_both = shares[0] + shares[1]
        wanted, dice = (shares[0] / of_both, shares[1] / of_both), np.random.default_rng(seed)
        dealt = deal_samples(strata, wanted, dice) if groups is None else deal_groups(strata, numbers, wanted, dice)
        part[train] = dealt
    if every_class and labels.dtype.kind != "f":
        _refuse_absent(labels, part, column, classes)
    train, validation, test = (np.flatnonzero(part == number) for number in range(len(PARTS)))
    n = len(part)
    found = (len(train) / n, len(validation) / n, len(test) / n)
    return Split(train, validation, test, seed, found, group_column), is_drawn


def read_split(path: str | Path, sample_index: IntArray) -> Split:
    """Reads a split.json; see `Split.from_json`.

    Raises:
        InvalidInputError: If it cannot be read, or is of other samples than these.
    """
    path = Path(path).expanduser()
    path = path / "split.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path} cannot be read as a split: {error}; name the split.json that `probe` wrote") from error
    try:
        return Split.from_json(content, sample_index)
    except InvalidInputError as error:
        raise InvalidInputError(f"{path}: {error}") from error


def parts_of(recorded: Split) -> list[str]:
    """Returns the name of each sample's part [n]."""
    values = [""] * sum(len(getattr(recorded, part)) for part in PARTS)
    for part in PARTS:
        for place in getattr(recorded, part).tolist():
            values[place] = part
    return values


def _refuse_absent(labels: IntArray | FloatArray, part: IntArray, column: str, classes: Sequence[str] | None) -> None:
    counts = np.stack([np.bincount(labels[part == number], minlength=int(labels.max()) + 1) for number in range(len(PARTS))])
    for number, of_class in enumerate(counts.T):
        absent = [name for name, n in zip(PARTS, of_class.tolist(), strict=True) if not n]
        if absent and of_class.any():
            name = f"class {number}" if classes is None else f"class {classes[number]!r}"
            raise InvalidInputError(
                f"{name} is absent from {absent[0]}, as {column!r} has it ({of_class[0]:,} samples of it are in train, "
                f"{of_class[1]:,} in validation, {of_class[2]:,} in test): leave the class out, or split otherwise"
            )
