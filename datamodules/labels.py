"""Labels of a store's samples or tokens: as class numbers, or as real values."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from exactivations.datamodules.examples import ActivationSource
from exactivations.datamodules.label_files import IntArray, LabelColumn, label_column
from exactivations.store.errors import InvalidInputError, shown

FloatArray = npt.NDArray[np.float64]
Kind = Literal["auto", "classes", "values"]

MOST_CLASSES = 1000
MOST_FLOAT_CLASSES = 20  # of a column of floats that is taken for classes unasked
NOT_LABELLED = -1
LARGEST_EXACT = 2**53  # above it float64 leaves out whole numbers
TYPES: dict[type, str] = {bool: "a bool", int: "a whole number", float: "a float", str: "text"}


@dataclass(frozen=True)
class Labels:
    """One label per sample of a store, in the order of store.sample_index.

    Attributes:
        name: The column.
        kind: "classes" or "values".
        classes: The names of the classes [K]; empty for values. Numbers are in numerical order, text in that of its code points,
            False comes before True.
        numbers: int64 [n], the number of each sample's class; None for values.
        values: float64 [n]; None for classes.
    """

    name: str
    kind: Literal["classes", "values"]
    classes: list[str]
    numbers: IntArray | None
    values: FloatArray | None


@dataclass(frozen=True)
class TokenLabels:
    """One label per token of a store's samples.

    Attributes:
        name: The column.
        classes: The names of the classes [K], ordered as in `Labels`.
        numbers: int64 [T], the number of each token's class, samples one after the other in the order of store.sample_index;
            -1 where a token is not labelled.
        start: int64 [n+1]: sample i has numbers[start[i]:start[i + 1]].
    """

    name: str
    classes: list[str]
    numbers: IntArray
    start: IntArray
    kind: Literal["token classes"] = "token classes"


def labels_of(store: ActivationSource, label: str, file: str | Path | None = None, *, kind: Kind = "auto") -> Labels:
    """Returns the labels of all samples of a store, joined by identity and never by position.

    Args:
        store: The store.
        label: The column that holds them: one that was kept in extraction, or one of the file.
        file: A .jsonl, .csv or .parquet file with a column `sample_index` or `token_hash` that says whose a label is. If both are
            there, both must agree with the store. Samples with the same tokens share the label of their token hash. A .csv's labels
            are numbers if all of them are written as numbers without leading zeros, else text; its empty fields are no labels.
            sample_index alone cannot tell the labels of another dataset of as many samples: token_hash can.
        kind: "values" takes numbers for real values, "classes" takes everything for classes. "auto" takes floats with more than 20
            different values for values, and everything else for classes: whole numbers, bools, text, and floats with at most 20.
            Whole numbers among floats are floats, since JSON writes them so.

    Raises:
        InvalidInputError: Naming the first offender and how many there are: if a sample has no label, or one that is NaN or
            infinite; a key is there twice, or the store has no such sample; nothing says whose the labels are; types are mixed;
            there is one label only, or more than 1,000 classes; the file cannot be read or has another suffix; there is no such
            column.
    """
    if kind not in ("auto", "classes", "values"):
        raise InvalidInputError(f"kind must be auto, classes or values, got {kind!r}")
    column = label_column(store, label, file)
    entries = list(column)
    found = _Found(column)
    numbers = found.update(entries, lambda at: f"sample {column.sample_index[at]}")
    found.check()
    if kind == "values" or (kind == "auto" and float in found.types and len(found.numbers) > MOST_FLOAT_CLASSES):
        return Labels(label, "values", [], None, _values(column, found, entries))
    classes, new_numbers = found.classes()
    return Labels(label, "classes", classes, new_numbers[numbers], None)


def token_labels_of(store: ActivationSource, label: str, file: str | Path | None = None) -> TokenLabels:
    """Returns the labels of all tokens of a store's samples: a column with a list per sample, of as many labels as it has tokens.

    A None in a list means that this token is not labelled; its number is -1. Classes are made as in `labels_of`; there are no real
    values. Labels are held as Python objects for one sample at a time, but for those of a .jsonl, which is read whole.

    Args:
        store: The store.
        label: As in `labels_of`.
        file: As in `labels_of`; not .csv, which has no lists.

    Raises:
        InvalidInputError: As in `labels_of`, and if a sample has no list, or one of another length, naming both lengths.
    """
    column = label_column(store, label, file)
    if column.is_text:
        raise InvalidInputError(
            f"{column.source}: a .csv cannot hold a list per sample; write labels of tokens as .jsonl or .parquet"
        )
    lengths = store.samples.column("n_tokens").to_numpy().astype(np.int64)
    found = _Found(column)
    numbers: list[IntArray] = []
    wrong: list[str] = []
    for index, n_tokens, entry in zip(store.sample_index.tolist(), lengths.tolist(), column, strict=True):
        if not isinstance(entry, list):
            wrong.append(f"sample {index} has one label, {shown(entry)}, expected a list of {n_tokens:,}, one per token")
        elif len(entry) != n_tokens:
            wrong.append(f"sample {index} has {len(entry):,} labels, but {n_tokens:,} tokens")
        elif not wrong:
            numbers.append(found.update(entry, partial(_token, index)))
    if wrong:
        raise InvalidInputError(
            f"{column.source}: {wrong[0]} ({len(wrong):,} of {len(store):,} samples do not fit): labels of tokens belong to one "
            "tokenization, so make them with the tokens of this store"
        )
    found.check()
    classes, new_numbers = found.classes()
    joined = np.concatenate(numbers)
    return TokenLabels(
        name=label,
        classes=classes,
        numbers=np.where(joined == NOT_LABELLED, NOT_LABELLED, new_numbers[joined]),
        start=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def class_numbers(
    store: ActivationSource, label: str, file: str | Path | None, classes: Sequence[str], of: str, *, per_token: bool = False
) -> IntArray:
    """Returns the number of each sample's class among classes that are known already, int64 [n]; not all need be there.

    Args:
        store: The store.
        label: As in `labels_of`.
        file: As in `labels_of`.
        classes: The names of the known ones, in their order.
        of: What knows them, for messages.
        per_token: Of each token [T], and -1 where it is not labelled; see `token_labels_of`.

    Raises:
        InvalidInputError: If there is a label of another class, and as in `labels_of` and `token_labels_of`, but that samples (not
            tokens) may all have the same label.
    """
    if per_token:
        of_tokens = token_labels_of(store, label, file)
        named, numbers = of_tokens.classes, of_tokens.numbers
    else:
        entries = list(label_column(store, label, file))
        if all(entry == entries[0] for entry in entries):
            named, numbers = [str(entries[0])], np.zeros(len(entries), dtype=np.int64)
        else:
            of_samples = labels_of(store, label, file, kind="classes")
            assert of_samples.numbers is not None  # they are classes
            named, numbers = of_samples.classes, of_samples.numbers
    unknown = [name for name in named if name not in classes]
    if unknown:
        raise InvalidInputError(
            f"{store.title}: label {label!r} has the class {unknown[0]!r} (of {_listed(named)}), and {of} knows "
            f"{_listed(classes)} only: name the column or file whose labels say the same, spelled alike"
        )
    known = np.array([classes.index(name) for name in named], dtype=np.int64)
    return np.where(numbers == NOT_LABELLED, NOT_LABELLED, known[numbers])


class _Found:
    """What different labels were found, numbered as they came, and what is wrong with them."""

    def __init__(self, column: LabelColumn) -> None:
        self.source = column.source
        self.numbers: dict[Any, int] = {}
        self.types: dict[type, str] = {}  # with the place where it came first
        self.not_finite: list[str] = []
        self.inexact: list[str] = []  # whole numbers that float64 cannot hold

    def update(self, entries: list[Any], place: Callable[[int], str]) -> IntArray:
        """Returns their numbers for now [n], and -1 for None."""
        for kind in dict.fromkeys(map(type, entries)):
            if kind is type(None) or kind in self.types:
                continue
            at = next(at for at, entry in enumerate(entries) if type(entry) is kind)
            if kind not in TYPES:
                hint = "; labels of tokens are read with token_labels_of (--unit token)" if kind is list else ""
                raise InvalidInputError(
                    f"{self.source}: {place(at)} has {shown(entries[at])}, of type {kind.__name__}, as its label, expected text, "
                    f"a number or a bool{hint}"
                )
            self.types[kind] = f"{place(at)} has {shown(entries[at])}, {TYPES[kind]}"
        if float in self.types:
            self.not_finite += [
                f"{place(at)} has {entry}"
                for at, entry in enumerate(entries)
                if isinstance(entry, float) and not math.isfinite(entry)
            ]
        for entry in dict.fromkeys(entries):
            if entry is None or entry in self.numbers:
                continue
            self.numbers[entry] = len(self.numbers)
            if isinstance(entry, int) and abs(entry) > LARGEST_EXACT:
                self.inexact.append(f"{place(entries.index(entry))} has {shown(entry)}")
        return np.array([NOT_LABELLED if entry is None else self.numbers[entry] for entry in entries], dtype=np.int64)

    def check(self) -> None:
        """Refuses labels that are not finite, of several types, all the same, or not exact where they become floats."""
        if self.not_finite:
            raise InvalidInputError(
                f"{self.source}: {self.not_finite[0]} as its label ({len(self.not_finite):,} are not finite): every label must "
                "be a finite number, or another column be used"
            )
        if len(self.types) > 1 and self.types.keys() != {int, float}:
            raise InvalidInputError(f"{self.source}: labels must be of one type, but {', '.join(self.types.values())}")
        if float in self.types:
            self.check_exact()
        if len(self.numbers) < 2:
            only = f"every label is {shown(next(iter(self.numbers)))}" if self.numbers else "there is not one label"
            raise InvalidInputError(f"{self.source}: {only}; at least two different ones are needed")

    def check_exact(self) -> None:
        """Refuses whole numbers that change when they become floats."""
        if self.inexact:
            raise InvalidInputError(
                f"{self.source}: {self.inexact[0]} as its label, which float64 cannot hold exactly ({len(self.inexact):,} such "
                "labels): is it an id?"
            )

    def classes(self) -> tuple[list[str], IntArray]:
        """Returns the names of the classes, sorted, and the number in this order by the number for now."""
        if len(self.numbers) > MOST_CLASSES:
            raise InvalidInputError(
                f"{self.source}: there are {len(self.numbers):,} different labels, classes are {MOST_CLASSES:,} at most: is it an "
                'id? Real values are read with kind="values" (--label-kind values)'
            )
        in_order = sorted(self.numbers)
        numbers = np.empty(len(in_order), dtype=np.int64)
        numbers[[self.numbers[entry] for entry in in_order]] = np.arange(len(in_order))
        return [str(entry + 0.0 if float in self.types else entry) for entry in in_order], numbers  # -0.0 and 0.0 are one


def _values(column: LabelColumn, found: _Found, entries: list[Any]) -> FloatArray:
    other = [text for kind, text in found.types.items() if kind not in (int, float)]
    if other:
        raise InvalidInputError(f'{column.source}: real values must be numbers, but {other[0]}: use kind="classes"')
    found.check_exact()
    return np.array(entries, dtype=np.float64)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10:,} more" if len(names) > 10 else "")


def _token(index: int, at: int) -> str:
    return f"token {at} of sample {index}"
