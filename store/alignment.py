"""Do another run's masks belong to the samples they would be laid over? What can be told is reported; what cannot is said."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from exactivations.store.activation_store import ActivationStore
from exactivations.store.batch_rules import Activations, OldRule, old_rules
from exactivations.store.errors import InvalidInputError
from exactivations.store.mask_folder import MaskBatches, read_mask_batches
from exactivations.store.mask_identity import Identity, identify, judge_marks, row_hashes
from exactivations.store.mask_layout import LaidMasks, Rows, SampleTable, Side, lay_masks
from exactivations.store.run_folder import RunFolder


@dataclass(frozen=True)
class AlignmentReport:
    """How a store and another run's masks fit each other.

    Attributes:
        store: The store's samples.
        masks: Path of the other run.
        n_masks: Its samples.
        sizes: Its batch sizes; None if it is one of our stores.
        wrong_number: What is wrong with the number of masks.
        rules: What code that goes by batch numbers would pick; empty for one of our stores.
        problems: By sample index: why the mask in its place cannot be its own.
        side: On which side the masks are padded, if that is known.
        side_problem: Why it is not.
        identity: Whose masks they are; None if there are no ids, so that it cannot be told.
        same_marks: How many samples have the same tokens marked as in the store, and how many were compared; None if the store
            (or the other one) holds no token rows.
        marks_fault: Why what is marked cannot be of the store's tokens, though lengths fit and nothing says whose the masks are.
        warnings: What was assumed, and what cannot be told; decides nothing.
    """

    store: SampleTable
    masks: Path
    n_masks: int
    sizes: list[int] | None
    wrong_number: str | None
    rules: list[OldRule]
    problems: dict[int, str]
    side: Side | None
    side_problem: str | None
    identity: Identity | None
    same_marks: tuple[int, int] | None
    marks_fault: str | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """What keeps the masks from being laid over the store's samples by sample index; empty if nothing was found."""
        faults = [self.wrong_number] if self.wrong_number else []
        if self.identity is not None and not self.identity.is_same:
            faults.append(f"by token hash the masks are {self.identity.verdict}")
        if self.problems:
            first = min(self.problems)
            more = f" (and {len(self.problems) - 1:,} more samples)" if len(self.problems) > 1 else ""
            faults.append(f"sample {first}: {self.problems[first]}{more}")
        return [*faults, *(fault for fault in (self.side_problem, self.marks_fault) if fault)]


def compare(
    store: str | Path,
    masks: str | Path,
    *,
    mask_name: str | None = None,
    padding_side: Side | None = None,
    rows: Rows = "dataset",
    more_rows: bool = False,
    batch_size: int | None = None,
    divisor: int = 64,
) -> AlignmentReport:
    """Compares a store with another run's masks: a folder of per-batch masks, or another store.

    Args:
        store: The run folder. Shards that are missing do not matter.
        masks: The other run.
        mask_name: As in `read_mask_batches`.
        padding_side: As in `lay_masks`.
        rows: What the masks count: the dataset as given, or the samples that the store kept of it.
        more_rows: Whether there may be masks after the store's last sample.
        batch_size: For the old rules: the size of the batches in which activations are read. Default: as the masks were saved.
        divisor: For the old rules: the number that was written into the code.

    Raises:
        InvalidInputError: If the masks cannot be read, or an option does not apply.
        StoreError: If a store cannot be read.
    """
    for name, value in (("batch_size", batch_size), ("divisor", divisor)):
        if value is not None and value < 1:
            raise InvalidInputError(f"{name} must be at least 1, got {value}")
    table = SampleTable.of(store)
    if RunFolder(masks).exists:
        if (mask_name, padding_side, rows, more_rows, batch_size) != (None, None, "dataset", False, None):
            raise InvalidInputError(
                f"{masks} is a store, whose masks have sample indices and no padding: leave out mask_name, padding_side, rows, "
                "more_rows and batch_size, which are for folders of per-batch masks"
            )
        return _compare_stores(table, SampleTable.of(masks))
    return _compare_batches(table, read_mask_batches(masks, mask_name), padding_side, rows, more_rows, batch_size, divisor)


def _compare_batches(
    table: SampleTable,
    batches: MaskBatches,
    padding_side: Side | None,
    rows: Rows,
    more_rows: bool,
    batch_size: int | None,
    divisor: int,
) -> AlignmentReport:
    places = table.rows(rows)
    marks = judge_marks(batches, table, places, lay_masks(batches, table, places, padding_side))
    laid = marks.laid
    return AlignmentReport(
        store=table,
        masks=batches.folder,
        n_masks=len(batches),
        sizes=batches.sizes,
        wrong_number=table.wrong_number(len(batches), rows, more_rows=more_rows),
        rules=old_rules(batches, _activations(table, places, len(batches), laid), batch_size, divisor),
        problems={int(table.sample_index[position]): problem for position, problem in laid.problems.items()},
        side=laid.side,
        side_problem=laid.side_problem,
        identity=None if batches.ids is None else identify(table, places, row_hashes(batches, table, places, laid)),
        same_marks=marks.same,
        marks_fault=marks.fault,
        warnings=marks.warnings,
    )


def _activations(table: SampleTable, places: npt.NDArray[np.int64], n_rows: int, laid: LaidMasks) -> Activations:
    lengths, fits = np.full(n_rows, -1, dtype=np.int64), np.ones(n_rows, dtype=bool)
    inside = places < n_rows
    lengths[places[inside]] = table.n_tokens[inside]
    fits[[place for position in laid.problems if (place := int(places[position])) < n_rows]] = False
    return Activations(lengths, fits, marks_count_from_the_left=laid.side != "left")


def _compare_stores(table: SampleTable, other: SampleTable) -> AlignmentReport:
    hashes: dict[int, str | None] = dict(zip(other.sample_index.tolist(), other.token_hash, strict=True))
    lengths = dict(zip(other.sample_index.tolist(), other.n_tokens.tolist(), strict=True))
    problems = {}
    for index, n_tokens, token_hash in zip(table.sample_index.tolist(), table.n_tokens.tolist(), table.token_hash, strict=True):
        if index not in lengths:
            problems[index] = "the other store does not have it"
        elif lengths[index] != n_tokens:
            problems[index] = f"{lengths[index]:,} tokens in the other store, {n_tokens:,} in this one"
        elif hashes[index] != token_hash:
            problems[index] = f"other tokens in the other store, {n_tokens:,} too (token hash differs)"
    number = None if len(other) == len(table) else f"there are {len(other):,} masks, the store has {len(table):,} samples"
    return AlignmentReport(
        store=table,
        masks=other.path,
        n_masks=len(other),
        sizes=None,
        wrong_number=number,
        rules=[],
        problems=problems,
        side=None,
        side_problem=None,
        identity=identify(table, table.sample_index, hashes),
        same_marks=_same_marks_of_stores(table, other, problems),
    )


def _same_marks_of_stores(table: SampleTable, other: SampleTable, problems: dict[int, str]) -> tuple[int, int] | None:
    here, there = (ActivationStore(path, allow_incomplete=True, allow_unverified=True) for path in (table.path, other.path))
    same = compared = 0
    for index in (int(index) for index in np.intersect1d(here.sample_index, there.sample_index) if int(index) not in problems):
        mine, theirs = here[index].token_mask, there[index].token_mask
        if mine is None or theirs is None:
            return None
        compared += 1
        same += torch.equal(mine, theirs)
    return (same, compared) if compared else None
