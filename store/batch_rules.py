"""What code that finds masks by batch number picks: kept to show what it does, never to find a mask.

Such code counts the samples it has seen, divides by some batch size, and takes the mask batch of that number, row by row beside
the batch at hand. That is right only while all batches before have exactly that size.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from exactivations.store.mask_folder import MaskBatches

NO_BATCH, NO_ROW = -1, -2
OUTCOMES = {
    "own": "their own mask",
    "ones": "no such batch: every position counts, padding and special tokens too, silently",
    "row": "IndexError: the batch that is picked has fewer rows",
    "length": "IndexError: the mask marks a position that the activations do not have",
    "nothing": "a mask that marks nothing: no token counts, silently",
    "other": "the mask of other tokens, silently",
}


@dataclass(frozen=True)
class Picks:
    """What one rule picks for samples 0 to N-1.

    Attributes:
        rule: The rule in words.
        batch: int64 [N], the mask batch it computes, whether there is one or not.
        sample: int64 [N], the sample whose mask that truly is; NO_BATCH or NO_ROW if there is none.
    """

    rule: str
    batch: npt.NDArray[np.int64]
    sample: npt.NDArray[np.int64]

    @property
    def mismatched(self) -> npt.NDArray[np.int64]:
        """The samples that do not get their own mask, ascending."""
        return np.flatnonzero(self.sample != np.arange(len(self.sample)))


def pick_by_division(rule: str, saved: list[int], read: list[int], divisor: int | None) -> Picks:
    """Picks masks by (samples seen before this batch) // divisor.

    Args:
        rule: Its name.
        saved: Sizes of the mask batches, as saved.
        read: Sizes of the batches that the activations come in.
        divisor: What is divided by; None for the size of the batch at hand.
    """
    starts = np.cumsum([0, *saved])
    batches, samples, seen = [], [], 0
    for size in read:
        batch, rows = seen // (divisor or size), np.arange(size)
        if batch < len(saved):
            samples.append(np.where(rows < saved[batch], starts[batch] + rows, NO_ROW))
        else:
            samples.append(np.full(size, NO_BATCH))
        batches.append(np.full(size, batch))
        seen += size
    return Picks(rule, np.concatenate(batches).astype(np.int64), np.concatenate(samples).astype(np.int64))


@dataclass(frozen=True)
class OldRule:
    """A rule's picks, with what becomes of each sample.

    Attributes:
        picks: What it picks.
        outcome: A key of OUTCOMES for each of samples 0 to N-1.
        first_error: Of the first sample whose mask marks too much: its number, the last position that is marked, and how many
            positions the activations of its batch have.
    """

    picks: Picks
    outcome: list[str]
    first_error: tuple[int, int, int] | None

    def samples(self, outcome: str) -> list[int]:
        """The samples that end like this."""
        return [sample for sample, found in enumerate(self.outcome) if found == outcome]


@dataclass(frozen=True)
class Activations:
    """The activations that masks are laid over, padded to the longest sample of their batch.

    Attributes:
        lengths: int64 [N], tokens of each sample; -1 where that is not known.
        fits: bool [N], whether the mask that was saved for a sample fits it.
        marks_count_from_the_left: Whether padding stands on the right, so that a mark too far to the right has no activation.
    """

    lengths: npt.NDArray[np.int64]
    fits: npt.NDArray[np.bool_]
    marks_count_from_the_left: bool

    def too_short_for(self, last: int, first_sample: int, end: int) -> bool:
        """Whether a mark at this position is known to lie beyond the batch of samples first_sample to end - 1."""
        together = self.lengths[first_sample:end]
        return self.marks_count_from_the_left and bool((together >= 0).all()) and last >= int(together.max())


def old_rules(batches: MaskBatches, activations: Activations, batch_size: int | None, divisor: int) -> list[OldRule]:
    """Returns what becomes of each sample under each of the rules that were in use.

    Args:
        batches: The masks, N of them.
        activations: What they are laid over.
        batch_size: Size of the batches in which the activations are read; None for those of the masks.
        divisor: The number that was written into the code.
    """
    saved, n = batches.sizes, len(batches)
    read = saved if batch_size is None else [min(batch_size, n - start) for start in range(0, n, batch_size)]
    rules: dict[str, int | None] = {f"divided by {divisor}": divisor}
    if saved[0] != divisor:
        rules[f"divided by the first batch's size, {saved[0]}"] = saved[0]
    rules["divided by the size of the batch at hand"] = None
    return [_judged(pick_by_division(rule, saved, read, number), batches, activations, read) for rule, number in rules.items()]


def _judged(picks: Picks, batches: MaskBatches, activations: Activations, read: list[int]) -> OldRule:
    ends = np.cumsum(read)
    outcomes, first_error = [], None
    for sample, picked in enumerate(picks.sample.tolist()):
        if picked < 0 or (picked == sample and activations.fits[sample]):
            outcomes.append({NO_BATCH: "ones", NO_ROW: "row"}.get(picked, "own"))
            continue
        batch = int(np.searchsorted(ends, sample, side="right"))
        first, end = int(ends[batch]) - read[batch], int(ends[batch])
        last = max(batches.mask(picked).nonzero().flatten().tolist(), default=-1)
        if last < 0:
            outcomes.append("nothing")
        elif activations.too_short_for(last, first, end):
            outcomes.append("length")
            first_error = first_error or (sample, last, int(activations.lengths[first:end].max()))
        else:
            outcomes.append("other")
    return OldRule(picks, outcomes, first_error)
