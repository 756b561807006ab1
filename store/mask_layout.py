"""Another run's padded masks laid over a store's samples.

A row [L] belongs to a sample of n tokens if what is cut from it, on the right or on the left, is padding. With ids beside the
masks that is proven, and so is whose row it is: the store's token hash decides. Without ids, only the shape can be looked at.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from exactivations.store.mask_folder import MaskBatches
from exactivations.store.run_folder import RunFolder
from exactivations.store.token_hash import hash_of_ids

Side = Literal["right", "left"]
Rows = Literal["dataset", "store"]
SIDES: tuple[Side, Side] = ("right", "left")
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class SampleTable:
    """What a store knows of all its planned samples, whether their shards are there or not.

    Attributes:
        path: The run folder.
        sample_index: int64 [n], positions in the dataset as given, ascending.
        n_tokens: int64 [n].
        token_hash: The hash of each sample's ids.
        skipped: Indices of empty samples that were left out.
    """

    path: Path
    sample_index: npt.NDArray[np.int64]
    n_tokens: npt.NDArray[np.int64]
    token_hash: list[str]
    skipped: list[int]

    @classmethod
    def of(cls, run: str | Path) -> "SampleTable":
        """Reads it from a run folder.

        Raises:
            StoreError: If that is no run folder, or cannot be read.
        """
        folder = RunFolder(run)
        info = folder.read_info()
        rows = folder.read_samples(["sample_index", "n_tokens", "token_hash"])
        index, n_tokens = (rows.column(name).to_numpy().astype(np.int64) for name in ("sample_index", "n_tokens"))
        return cls(folder.path, index, n_tokens, rows.column("token_hash").to_pylist(), list(info.skipped))

    def __len__(self) -> int:
        return len(self.sample_index)

    @property
    def n_dataset(self) -> int:
        """How many samples the dataset as given has at least: up to the last one that the store took or skipped."""
        return 1 + max([*self.sample_index[-1:].tolist(), *self.skipped], default=-1)

    def rows(self, count: Rows) -> npt.NDArray[np.int64]:
        """Returns int64 [n], which row of a list of masks each sample has, if that counts the dataset or the store's samples."""
        return self.sample_index if count == "dataset" else np.arange(len(self), dtype=np.int64)

    def wrong_number(self, n_rows: int, count: Rows, *, more_rows: bool) -> str | None:
        """Says what is wrong with so many masks for this store, or None."""
        expected = self.n_dataset if count == "dataset" else len(self)
        if n_rows == expected or (n_rows > expected and more_rows):
            return None
        is_whole = self.n_dataset == len(self)
        of = "" if is_whole else f" (samples of a dataset of at least {self.n_dataset:,}; {len(self.skipped):,} skipped as empty)"
        hint = ""
        if count == "dataset" and n_rows == len(self):
            hint = "; if row k is the k-th sample that the store kept, pass --rows store"
        elif n_rows > expected:
            hint = "; if the store holds only the first samples of the masks' dataset, pass --more-rows"
        return f"there are {n_rows:,} masks, expected {expected:,}: the store has {len(self):,} samples{of}{hint}"


@dataclass(frozen=True)
class LaidMasks:
    """Another run's masks over a store's samples.

    Attributes:
        masks: bool [n_tokens] of each of the store's samples; None where it has none, or where `side` is not known.
        side: The side on which all rows are padded; None if that cannot be told.
        proven: bool [n], whether the ids beside the mask are this sample's.
        problems: By position in the store's samples: why the row that it was given cannot be its mask.
        side_problem: Why the side is not known.
    """

    masks: list[Tensor | None]
    side: Side | None
    proven: Bools
    problems: dict[int, str]
    side_problem: str | None = None


def lay_masks(batches: MaskBatches, table: SampleTable, rows: npt.NDArray[np.int64], padding_side: Side | None = None) -> LaidMasks:
    """Cuts the padding from each sample's row, on the one side that all rows of the folder agree on.

    Args:
        batches: The masks.
        table: The samples, n of them.
        rows: int64 [n], which row is given to each sample, counted over all batches.
        padding_side: The side, if it is known. Else it is found: by ids where they are, by what masks mark where not.
    """
    can, proven, problems = _possible_sides(batches, table, rows)
    fitting = np.array([position for position in range(len(table)) if position not in problems], dtype=np.int64)
    side, side_problem = _common_side(batches, table, rows, can, fitting, padding_side)
    masks: list[Tensor | None] = [None] * len(table)
    if side is None:
        return LaidMasks(masks, None, proven, problems, side_problem)
    for position in fitting.tolist():
        if can[position, SIDES.index(side)]:
            masks[position] = _cut(batches.mask(int(rows[position])), int(table.n_tokens[position]), side)
        else:
            problems[position] = f"its row is not padded on the {side}"
    return LaidMasks(masks, side, proven, problems)


def _possible_sides(batches: MaskBatches, table: SampleTable, rows: npt.NDArray[np.int64]) -> tuple[Bools, Bools, dict[int, str]]:
    """Returns for each sample on which SIDES its row can be padded [n, 2], whether ids prove that it is its own [n], and faults."""
    can, proven = np.zeros((len(table), 2), dtype=bool), np.zeros(len(table), dtype=bool)
    problems: dict[int, str] = {}
    for position, row in enumerate(rows.tolist()):
        if row >= len(batches):
            problems[position] = f"there is no token_mask: it would be in row {row}, the last one is row {len(batches) - 1}"
            continue
        n = int(table.n_tokens[position])
        can[position], problem = _sides(batches.mask(row), n)
        if batches.ids is not None:
            of_ids = _sides_by_ids(batches.row_ids(row), n, table.token_hash[position])
            proven[position] = of_ids.any()
            if not proven[position]:
                problem = f"{problem}; it" if problem else "token_mask"
                problem += " belongs to other tokens (token hash differs)"
            elif not (can[position] & of_ids).any():
                problem = "token_mask marks what is padding by the ids beside it"
            can[position] &= of_ids | ~proven[position]
        if problem is not None:
            problems[position] = problem
    return can, proven, problems


def _cut(row: Any, n: int, side: Side) -> Any:
    return row[:n] if side == "right" else row[len(row) - n :]


def _sides(mask: Tensor, n: int) -> tuple[Bools, str | None]:
    """Says whether a row can be padded on the right, and on the left, for a sample of n tokens; and what is wrong with it."""
    length = len(mask)
    if length < n:
        return np.zeros(2, dtype=bool), f"token_mask has {length} positions, activations have {n}"
    if not mask.any():
        return np.ones(2, dtype=bool), f"token_mask marks nothing: none of its sample's {n} tokens would count"
    sides = np.array([not mask[n:].any(), not mask[: length - n].any()])
    if sides.any():
        return sides, None
    first, last = mask.nonzero()[[0, -1], 0].tolist()
    return sides, f"token_mask has {length} positions and marks some from {first} to {last}, activations have {n}"


def _sides_by_ids(ids: npt.NDArray[np.int32], n: int, token_hash: str) -> Bools:
    if len(ids) < n:
        return np.zeros(2, dtype=bool)
    return np.array([hash_of_ids(_cut(ids, n, "right")) == token_hash, hash_of_ids(_cut(ids, n, "left")) == token_hash])


def _common_side(
    batches: MaskBatches,
    table: SampleTable,
    rows: npt.NDArray[np.int64],
    can: Bools,
    fitting: npt.NDArray[np.int64],
    given: Side | None,
) -> tuple[Side | None, str | None]:
    """Returns the side on which all fitting rows can be padded, or why there is none."""
    if given is not None:
        return given, None
    right, left = bool(can[fitting, 0].all()), bool(can[fitting, 1].all())
    if right and left:
        for position in fitting.tolist():
            mask, n = batches.mask(int(rows[position])), int(table.n_tokens[position])
            if not torch.equal(_cut(mask, n, "right"), _cut(mask, n, "left")):
                return None, (
                    f"the masks could be padded on the right or on the left: sample {table.sample_index[position]} has "
                    f"{len(mask)} positions for {n} tokens and marks fewer; say which with --padding-side right or left"
                )
    if right or left:
        return ("right" if right else "left"), None
    only = [table.sample_index[fitting[can[fitting, side] & ~can[fitting, 1 - side]]] for side in (0, 1)]
    return None, (
        f"not all masks are padded on one side: {named(only[0])} on the right, {named(only[1])} on the left. "
        "One folder is padded on one side: some of these are other samples' masks"
    )


def named(samples: npt.NDArray[np.int64] | list[int], most: int = 5) -> str:
    """Returns "sample 3" or "12 samples (3, 4, 9, ...)"."""
    shown = ", ".join(str(int(sample)) for sample in samples[:most]) + (", ..." if len(samples) > most else "")
    return f"sample {shown}" if len(samples) == 1 else f"{len(samples):,} samples ({shown})"
