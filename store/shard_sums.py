"""What a shard contributes to means: a pure function of its rows, so that the order in which they came cannot matter."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from exactivations.store.errors import CorruptShardError, InvalidInputError, StoreError
from exactivations.store.moments import FloatArray, IntArray, Moments
from exactivations.store.tensor_file import checksum
from exactivations.store.vectors import Vector, mean_over

PREFIX, GROUPS, POSITIONS = "sums/", "@groups", "@positions"
CHECKSUM = "sums_checksum"
ROUNDING = 1e-9  # of the sum of sizes: another order of adding does about 1e-14 in float64
MOST_GROUPS = 1024  # every shard holds sums for each


@dataclass(frozen=True)
class MeanOptions:
    """What means are taken of.

    Attributes:
        vectors: See `Vector`; each gets a mean, a variance and a count.
        group_column: A kept column: each of its values gets a mean of its own, too.
        n_positions: For each place, means of the states at so many positions, counted from the end over the tokens that count (so
            that BOS, a special token, is in none of them unless token_mask="all"). Needs the pooling `tokens`. 0: none.
    """

    vectors: tuple[Vector, ...]
    group_column: str | None = None
    n_positions: int = 0

    def __post_init__(self) -> None:
        names = [vector.name for vector in self.vectors]
        if not names or len(set(names)) != len(names):
            raise InvalidInputError(f"means need vectors, each named once, got {names}")
        if not all(vector.hook_points for vector in self.vectors):
            raise InvalidInputError(f"every vector needs hook points, got {names}")
        if self.n_positions < 0:
            raise InvalidInputError(f"n_positions must be at least 0, got {self.n_positions}")

    @property
    def places(self) -> dict[str, tuple[str, ...]]:
        """The hook points that are averaged at each place."""
        return {vector.place: vector.hook_points for vector in self.vectors}

    def check_stored(self, activations: Mapping[str, Any]) -> None:
        """Refuses options that need more than is extracted.

        Raises:
            InvalidInputError: Naming what is missing.
        """
        wanted = [f"{point}/{pooling}" for v in self.vectors for point in v.hook_points for pooling in v.poolings]
        wanted += [f"{point}/tokens" for points in self.places.values() for point in points] if self.n_positions else []
        per_token = [v.name for v in self.vectors if "tokens" in v.poolings]
        if per_token:
            raise InvalidInputError(f"{per_token[0]} has a row per token: means are taken of vectors per sample, or by position")
        missing = [name for name in dict.fromkeys(wanted) if name not in activations]
        if missing:
            raise InvalidInputError(f"the means need {', '.join(missing)}, extracted are {', '.join(activations)}")
        for place, points in self.places.items():
            widths = {
                point: spec["width"] for name, spec in activations.items() for point in points if name.startswith(f"{point}/")
            }
            if len(set(widths.values())) > 1:
                raise InvalidInputError(f"{place} cannot be averaged: its hook points are of different widths ({widths})")

    def to_json(self) -> dict[str, Any]:
        """Returns the options as JSON takes them."""
        return {**asdict(self), "vectors": [{"hook_points": list(v.hook_points), "pooling": v.pooling} for v in self.vectors]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "MeanOptions":
        """Makes the options again from what `to_json` gave."""
        vectors = tuple(Vector(tuple(v["hook_points"]), v["pooling"]) for v in content["vectors"])
        return cls(vectors, content["group_column"], content["n_positions"])


@dataclass(frozen=True)
class Groups:
    """Which group each sample is in: names, sorted, and int64 [n], one number per sample."""

    names: list[str]
    numbers: IntArray

    @property
    def digest(self) -> str:
        """A hash of which sample is in which group, in dataset order."""
        return xxhash.xxh3_128(json.dumps([self.names, self.numbers.tolist()]).encode()).hexdigest()

    def at(self, positions: IntArray) -> "Groups":
        """Returns the groups of these samples, with all names."""
        return Groups(self.names, self.numbers[positions])

    @classmethod
    def of(cls, values: list[Any], sample_index: IntArray, column: str) -> "Groups":
        """Makes groups of a column's values, written as text.

        Raises:
            InvalidInputError: If a sample has none, or there are too many different ones.
        """
        absent = [int(i) for i, value in zip(sample_index, values, strict=True) if value is None]
        if absent:
            raise InvalidInputError(f"sample {absent[0]} has no value in column {column!r} ({len(absent)} samples have none)")
        texts = [str(value) for value in values]  # no numpy array of text: it drops a NUL at the end, and is as wide as the longest
        names = sorted(set(texts))
        if len(names) > MOST_GROUPS:
            raise InvalidInputError(
                f"column {column!r} has {len(names):,} different values, means are kept for {MOST_GROUPS:,} at most: is it a label?"
            )
        number = {name: i for i, name in enumerate(names)}
        return cls(names, np.array([number[text] for text in texts], dtype=np.int64))


def sums_of_shard(tensors: Mapping[str, Tensor], options: MeanOptions, groups: Groups | None) -> dict[str, Moments]:
    """Returns the moments of a shard's rows.

    Args:
        tensors: The shard, as it is stored when rows are kept.
        options: What is wanted.
        groups: The groups of this shard's rows, in row order.

    Returns:
        By name: "<vector>", "<vector>@groups" (a bin per group) and "<place>@positions" (a bin per position, means only).
    """
    sums: dict[str, Moments] = {}
    for vector in options.vectors:
        rows = vector.rows(tensors)
        sums[vector.name] = Moments.of(rows)
        if groups is not None:
            sums[vector.name + GROUPS] = Moments.of(rows, groups.numbers, len(groups.names))
    if options.n_positions:
        ends = np.cumsum(tensors["n_tokens"].numpy().astype(np.int64))
        for place, points in options.places.items():
            states = [tensors[f"{point}/tokens"] for point in points]
            sums[place + POSITIONS] = _by_position(states, tensors["token_mask"], ends, options.n_positions)
    return sums


class ArrivedSums:
    """What arrived of a shard, added up batch by batch as it came: the sums that are published are held against it.

    Double entry: another order and another way of adding, before anything was put into its place in the shard.
    """

    def __init__(self, options: MeanOptions) -> None:
        self._vectors = options.vectors
        self._total: dict[str, FloatArray] = {}
        self._size: dict[str, FloatArray] = {}

    def update(self, activations: Mapping[str, Tensor]) -> None:
        """Adds a batch, which is on the host."""
        for vector in self._vectors:
            rows = vector.rows(activations)
            self._total[vector.name] = self._total.get(vector.name, 0) + rows.sum(axis=0)
            self._size[vector.name] = self._size.get(vector.name, 0) + np.abs(rows).sum(axis=0)

    def check(self, shard: int, sums: Mapping[str, Moments]) -> None:
        """Refuses sums that are not those of what arrived.

        Raises:
            StoreError: Naming shard and vector.
        """
        for name, total in self._total.items():
            for found in (sums[name], *([sums[name + GROUPS]] if name + GROUPS in sums else [])):
                if (np.abs(found.total.sum(axis=0) - total) > ROUNDING * self._size[name]).any():
                    raise StoreError(
                        f"shard {shard}: the sums of {name} are not those of the batches that were computed; it is not published. "
                        "Start the same command again; if that does not help, this machine's memory is at fault, or we are"
                    )


def _by_position(states: list[Tensor], token_mask: Tensor, ends: IntArray, n_positions: int) -> Moments:
    """Adds sample after sample, each in one step: a sample has every position at most once."""
    count, total = np.zeros(n_positions, dtype=np.int64), np.zeros((n_positions, states[0].shape[1]))
    for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        counted = token_mask[start:end].nonzero()[:, 0].flip(0)[:n_positions] + start
        n = len(counted)
        total[:n] += mean_over([values[counted] for values in states])
        count[:n] += 1
    return Moments(count, total, None)


def to_tensors(sums: Mapping[str, Moments]) -> dict[str, Tensor]:
    """Returns moments as tensors of a file. Of groups and positions, those without rows are left out."""
    arrays: dict[str, IntArray | FloatArray | None] = {}
    for name, moments in sums.items():
        bins = np.flatnonzero(moments.count) if name.endswith((GROUPS, POSITIONS)) else np.arange(len(moments.count))
        squares = None if moments.squares is None else moments.squares[bins]
        arrays |= {f"{name}/count": moments.count, f"{name}/total": moments.total[bins], f"{name}/squares": squares}
    return {f"{PREFIX}{name}": torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items() if a is not None}


def sealed(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of sums with a checksum of their own: they are read without all the rows that may lie beside them."""
    return {**sums, CHECKSUM: _checksum(sums)}


def unsealed(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Moments]:
    """Returns the moments that a shard holds, if they are what was written.

    Raises:
        CorruptShardError: If a bit differs.
    """
    sums = {name: values for name, values in tensors.items() if name.startswith(PREFIX)}
    if CHECKSUM not in tensors or not torch.equal(tensors[CHECKSUM], _checksum(sums)):
        raise CorruptShardError(
            f"{path} is damaged: its sums are not what was written. Delete it and start the run again: only what it held is "
            "computed anew"
        )
    return from_tensors(sums)


def _checksum(sums: Mapping[str, Tensor]) -> Tensor:
    return torch.tensor(list(bytes.fromhex(checksum(sums, {}))), dtype=torch.uint8)


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Moments]:
    """Returns the moments that a file holds, by name."""
    parts = {name.removeprefix(PREFIX): values.numpy() for name, values in tensors.items() if name.startswith(PREFIX)}
    sums = {}
    for name in dict.fromkeys(name.rpartition("/")[0] for name in parts):
        count, total, squares = parts[f"{name}/count"], parts[f"{name}/total"], parts.get(f"{name}/squares")
        if len(total) < len(count):
            bins = np.flatnonzero(count)
            some = Moments(count[bins], total, squares)
            sums[name] = some.in_bins(bins, len(count))
        else:
            sums[name] = Moments(count, total, squares)
    return sums
