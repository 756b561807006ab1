"""A column of labels, beside a store or in a file, joined to the store's samples by identity and never by position."""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from exactivations.datamodules.examples import ActivationSource
from exactivations.store.errors import InvalidInputError

IntArray = npt.NDArray[np.int64]
Columns = dict[str, Sequence[Any]]

INDEX, HASH = "sample_index", "token_hash"
# What is a number in a .csv: nothing that two texts could share ("01" and "1", or more digits than float64 holds).
WHOLE = re.compile(r"-?[1-9][0-9]{0,17}|0")
NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,14})(\.[0-9]*)?(e[+-]?[0-9]+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)


@dataclass(frozen=True)
class LabelColumn:
    """The labels of a store's samples, as they are written: iterating gives one per sample, in the order of store.sample_index.

    None of them is None, but a list may hold some.

    Attributes:
        source: What messages call it.
        sample_index: int64 [n], the store's samples.
        values: The column's entries, in their own order.
        rows: int64 [n], the entry of each sample.
        is_text: Whether it came from a .csv, which says nothing of types and cannot hold lists.
    """

    source: str
    sample_index: IntArray
    values: Sequence[Any]
    rows: IntArray
    is_text: bool = False

    def __iter__(self) -> Iterator[Any]:
        for row in self.rows.tolist():
            value = self.values[row]
            yield value.as_py() if isinstance(value, pa.Scalar) else value

    def check_present(self) -> None:
        """Refuses samples whose label is None.

        Raises:
            InvalidInputError: Naming the first, and how many there are.
        """
        is_none = [not value.is_valid if isinstance(value, pa.Scalar) else value is None for value in self.values]
        absent = self.sample_index[np.array(is_none, dtype=bool)[self.rows]]
        if len(absent):
            raise InvalidInputError(
                f"{self.source}: sample {absent[0]} has no label, its entry is empty ({len(absent):,} of "
                f"{len(self.rows):,} samples): every sample needs one"
            )


def column_of(store: ActivationSource, column: str) -> pa.ChunkedArray:
    """Returns a kept column of a store, in the order of store.sample_index.

    Raises:
        InvalidInputError: If there is none of that name.
    """
    names = store.samples.column_names
    if column not in names:
        raise InvalidInputError(
            f"{store.title} has no column {column!r}; it has {', '.join(names)}. Labels that were not kept in extraction can "
            f"be read from a file with a column {INDEX} or {HASH}"
        )
    return store.samples.column(column)


def groups_in(store: ActivationSource, column: str | None) -> list[Any]:
    """Returns the group of each sample in a kept column, in the order of store.sample_index; without one each sample is its own.

    Raises:
        InvalidInputError: If there is no such column, or a sample has nothing there.
    """
    if column is None:
        return list(store.sample_index.tolist())
    groups = list(column_of(store, column).to_pylist())
    if None in groups:
        raise InvalidInputError(
            f"sample {store.sample_index[groups.index(None)]} has nothing in column {column!r} "
            f"({groups.count(None):,} of {len(groups):,} samples): every sample needs a group"
        )
    return groups


def label_column(store: ActivationSource, label: str, file: str | Path | None) -> LabelColumn:
    """Returns the labels of all samples of a store, from a kept column or from a file (see `labels_of`).

    Raises:
        InvalidInputError: If there is no such column, the file cannot be read, its keys are not those of the store, or a sample has
            no label.
    """
    if file is None:
        values = column_of(store, label)
        column = LabelColumn(f"{store.title}, column {label!r}", store.sample_index, values, np.arange(len(store)))
        column.check_present()
        return column
    path = Path(file).expanduser()
    if label in (INDEX, HASH):
        raise InvalidInputError(f"{path}: {label} says whose an entry is; name the column that holds the labels")
    columns, names = _read(path, (label, INDEX, HASH))
    if label not in columns:
        raise InvalidInputError(f"{path} has no column {label!r}; it has {', '.join(names)}: name the one that holds the labels")
    if INDEX not in columns and HASH not in columns:
        raise InvalidInputError(
            f"{path} has neither a column {INDEX} nor {HASH} (it has {', '.join(names)}), so nothing says whose its "
            "labels are: their order proves nothing. Add one of them; both are in the store's samples.parquet"
        )
    is_text = path.suffix.lower() == ".csv"
    rows = _rows_of_samples(path, store, {name: _keys(path, name, columns[name], is_text) for name in columns if name != label})
    values = _typed(columns[label]) if is_text else columns[label]
    column = LabelColumn(f"{path}, column {label!r}", store.sample_index, values, rows, is_text)
    column.check_present()
    return column


def _rows_of_samples(path: Path, store: ActivationSource, keys: dict[str, list[Any]]) -> IntArray:
    """Returns the entry of each sample [n]; both keys must agree where both are given."""
    hashes = column_of(store, HASH).to_pylist()
    indices = store.sample_index.tolist()
    name, of_samples = (INDEX, indices) if INDEX in keys else (HASH, hashes)
    row_of: dict[Any, int] = {}
    doubled: dict[Any, tuple[int, int]] = {}
    for row, key in enumerate(keys[name]):
        if row_of.setdefault(key, row) != row:
            doubled.setdefault(key, (row_of[key] + 1, row + 1))
    if doubled:
        key, (first, second) = next(iter(doubled.items()))
        raise InvalidInputError(
            f"{path}: {name} {key} is listed twice, in entries {first} and {second} ({len(doubled):,} of {len(row_of):,} keys); "
            f"list each once{'' if name == INDEX else f', or go by {INDEX} where samples have the same tokens'}"
        )
    known = set(of_samples)
    foreign = [key for key in row_of if key not in known]
    if foreign:
        raise InvalidInputError(
            f"{path}: {name} {foreign[0]} is no sample of {store.title} ({len(foreign):,} of {len(row_of):,} entries): these "
            "are labels of another dataset, or of samples that were not extracted; give the labels of this store's samples only"
        )
    missing = [index for index, key in zip(indices, of_samples, strict=True) if key not in row_of]
    if missing:
        raise InvalidInputError(
            f"{path}: sample {missing[0]} of {store.title} is not in it ({len(missing):,} of {len(indices):,} samples): "
            "every sample needs a label"
        )
    rows = np.array([row_of[key] for key in of_samples], dtype=np.int64)
    if len(keys) == 2:
        _check_hashes(path, indices, hashes, [keys[HASH][row] for row in rows])
    return rows


def _check_hashes(path: Path, indices: list[int], hashes: list[str], listed: list[str]) -> None:
    pairs = zip(indices, hashes, listed, strict=True)
    wrong = [(index, here, there) for index, here, there in pairs if here != there]
    if wrong:
        index, here, there = wrong[0]
        raise InvalidInputError(
            f"{path}: sample {index} has {HASH} {there} there, {here} in the store ({len(wrong):,} of {len(indices):,} samples): "
            "these are labels of other texts, or of the same ones in another order or otherwise tokenized"
        )


def _keys(path: Path, name: str, values: Sequence[Any], is_text: bool) -> list[Any]:
    """Returns the keys as whole numbers (sample_index) or text (token_hash)."""
    keys: list[Any] = values.to_pylist() if isinstance(values, pa.ChunkedArray) else list(values)
    if name == INDEX and is_text:
        keys = [int(key) if key is not None and WHOLE.fullmatch(key) else key for key in keys]
    wrong = [row for row, key in enumerate(keys) if type(key) is not (int if name == INDEX else str)]
    if wrong:
        found = "nothing" if keys[wrong[0]] is None else repr(keys[wrong[0]])
        raise InvalidInputError(
            f"{path}: entry {wrong[0] + 1} has {found} as {name} ({len(wrong):,} of {len(keys):,} entries), expected "
            f"{'a whole number' if name == INDEX else 'text'}"
        )
    return keys


def _typed(texts: Sequence[str | None]) -> list[Any]:
    """Makes numbers of a .csv's texts if all of them are written as numbers; else they all stay text."""
    present = [text for text in texts if text is not None]
    kind: Any = str
    if all(map(WHOLE.fullmatch, present)):
        kind = int
    elif all(map(NUMBER.fullmatch, present)):
        kind = float
    return [None if text is None else kind(text) for text in texts]


def _read(path: Path, wanted: tuple[str, ...]) -> tuple[Columns, list[str]]:
    """Returns those of the wanted columns that the file has, and the names of all."""
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InvalidInputError(f"{path}: files of labels end in {', '.join(readers)}; this one ends in {path.suffix!r}")
    try:
        return reader(path, wanted)
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
        raise InvalidInputError(f"{path} cannot be read: {' '.join(str(error).split()) or type(error).__name__}") from error


def _read_jsonl(path: Path, wanted: tuple[str, ...]) -> tuple[Columns, list[str]]:
    """Reads line by line with `json`: Arrow makes dates of texts that look like dates, and one type of several."""
    columns: dict[str, list[Any]] = {name: [] for name in wanted}
    found: dict[str, None] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line, object_pairs_hook=_each_once)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            if not isinstance(entry, dict):
                raise ValueError(f"line {number} is no object, but of type {type(entry).__name__}")
            found |= dict.fromkeys(entry)
            for name in wanted:
                columns[name].append(entry.get(name))
    return {name: values for name, values in columns.items() if name in found}, list(found)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    return dict(zip(_distinct(names), (value for _, value in pairs), strict=True))


def _read_csv(path: Path, wanted: tuple[str, ...]) -> tuple[Columns, list[str]]:
    """Reads with `csv`, all as text; an empty field is None."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = _distinct(next(reader, []))
        places = {name: header.index(name) for name in wanted if name in header}
        columns: dict[str, list[str | None]] = {name: [] for name in places}
        for entry in reader:
            if entry and len(entry) != len(header):  # a blank line is none
                raise ValueError(f"line {reader.line_num} has {len(entry)} fields, the header has {len(header)}")
            for name, place in places.items() if entry else ():
                columns[name].append(entry[place] or None)
    return dict(columns), header


def _read_parquet(path: Path, wanted: tuple[str, ...]) -> tuple[Columns, list[str]]:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:  # no dataset: its folders' names would become columns
        names = _distinct(file.schema_arrow.names)
        table = file.read(columns=[name for name in wanted if name in names])
    return {name: table.column(name) for name in table.column_names}, names


def _distinct(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        doubled = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {doubled!r} more than once")
    return names
