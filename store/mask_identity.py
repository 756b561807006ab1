"""Whose masks are these? Decided by the token hash of the ids beside them, whatever place they are in.

Without ids, two things speak against masks: padding masks that leave out tokens of their samples, and marks that are never those
of the store. A content mask may leave out tokens too, special ones, so neither is claimed where it could be that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from exactivations.store.activation_store import ActivationStore
from exactivations.store.mask_folder import MaskBatches
from exactivations.store.mask_layout import LaidMasks, SampleTable
from exactivations.store.run_folder import RunFolder
from exactivations.store.token_hash import hash_of_ids

PADDING_NAMES = frozenset({"attention_mask", "attention_masks"})
MOST_SPECIAL = 4  # special tokens at one end of a text: tokenizers put one or two there, chat templates up to three
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Identity:
    """Where each of a store's samples was found.

    Attributes:
        verdict: In words.
        found: bool [n], whether there is a mask of its tokens at all.
        offset: int64 [n], how many places further on than expected that is; 0 where it is not found.
        n_unknown: Masks of tokens that the store does not hold.
    """

    verdict: str
    found: npt.NDArray[np.bool_]
    offset: npt.NDArray[np.int64]
    n_unknown: int

    @property
    def is_same(self) -> bool:
        """Whether every sample of the store has its own mask in its own place."""
        return bool(self.found.all() and not self.offset.any())


def identify(table: SampleTable, places: npt.NDArray[np.int64], hashes: Mapping[int, str | None]) -> Identity:
    """Finds each sample by its hash: in its own place, else as far from it as the sample before, else wherever it is first.

    So equal texts, of which a dataset may have many, are never taken for a shift.

    Args:
        table: The samples, n of them.
        places: int64 [n], where each one's mask is expected.
        hashes: The token hash in each place, None if it is not known whose it is.
    """
    where: dict[str, list[int]] = {}
    for place, found_hash in hashes.items():
        if found_hash is not None:
            where.setdefault(found_hash, []).append(place)
    offset, found = np.zeros(len(table), dtype=np.int64), np.zeros(len(table), dtype=bool)
    before = 0
    for position, (place, token_hash) in enumerate(zip(places.tolist(), table.token_hash, strict=True)):
        if candidates := where.get(token_hash):
            likely = [near for near in (place, place + before) if hashes.get(near) == token_hash]
            before = (likely or candidates)[0] - place
            found[position], offset[position] = True, before
    known = frozenset(table.token_hash)
    n_unknown = sum(found_hash not in known for found_hash in hashes.values())
    return Identity(_verdict(table, found, offset, n_unknown), found, offset, n_unknown)


def _verdict(table: SampleTable, found: npt.NDArray[np.bool_], offset: npt.NDArray[np.int64], n_unknown: int) -> str:
    n, n_found = len(table), int(found.sum())
    moved = np.flatnonzero(offset)
    rest = f"; {n - n_found:,} of {n:,} samples have no mask" if n_found < n else ""
    rest += f"; {n_unknown:,} {'mask is' if n_unknown == 1 else 'masks are'} of tokens not in the store" if n_unknown else ""
    if n_found == 0:
        return f"a foreign dataset{rest}"
    if not len(moved):
        same = "the same samples in the same order" if n_found == n else "some of the samples, each in its place"
        return same + rest
    steps, first, last = np.unique(offset[moved]), int(moved[0]), int(moved[-1])
    if len(steps) > 1:
        return f"the same samples in another order: {len(moved):,} of {n:,} are not in their place{rest}"
    goes_on = bool((offset[first:][found[first:]] != 0).all())
    which = f"from sample {table.sample_index[first]} on" if goes_on else f"{len(moved):,} samples"
    which += "" if goes_on else f" from {table.sample_index[first]} to {table.sample_index[last]}"
    return f"a shifted order: {which}, masks are {how_far(int(steps[0]))}{rest}"


def how_far(offset: int) -> str:
    """Returns "1 place later" or "30 places earlier"."""
    return f"{abs(offset):,} place{'' if abs(offset) == 1 else 's'} {'later' if offset > 0 else 'earlier'}"


def row_hashes(batches: MaskBatches, table: SampleTable, places: npt.NDArray[np.int64], laid: LaidMasks) -> dict[int, str | None]:
    """Returns for each row the token hash of the store's samples that its ids have once padding is cut off; None if none."""
    known, lengths = frozenset(table.token_hash), np.unique(table.n_tokens)
    proven = {int(row): table.token_hash[position] for position, row in enumerate(places) if laid.proven[position]}
    return {row: proven.get(row) or _known_hash(batches.row_ids(row), lengths, known) for row in range(len(batches))}


def _known_hash(ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64], known: frozenset[str]) -> str | None:
    """Tries all lengths of the store's samples for which what is cut off is one id repeated."""
    total = len(ids)
    for side, line in (("right", ids), ("left", ids[::-1])):
        others = np.flatnonzero(line != line[-1])
        shortest = int(others[-1]) + 1 if len(others) else 0
        for n in lengths[(lengths >= shortest) & (lengths <= total)].tolist():
            if (found := hash_of_ids(ids[:n] if side == "right" else ids[total - n :])) in known:
                return found
    return None


@dataclass(frozen=True)
class OwnMasks:
    """The token masks that a store itself holds, where it holds token rows.

    Attributes:
        masks: bool [n_tokens] by position in the store's samples; without those whose shard is missing.
        kind: Which tokens they count, as the run was told: "content", "assistant" or "all"; None if it does not say.
    """

    masks: dict[int, Tensor]
    kind: str | None

    @classmethod
    def of(cls, table: SampleTable) -> "OwnMasks":
        """Reads them from the store."""
        store = ActivationStore(table.path, allow_incomplete=True, allow_unverified=True)
        masks: dict[int, Tensor] = {}
        for index in store.sample_index.tolist():
            if (mask := store.read(index).token_mask) is None:
                break
            masks[int(np.searchsorted(table.sample_index, index))] = mask
        return cls(masks, RunFolder(table.path).read_info().present_identity.get("token_mask"))

    @property
    def counts_everything(self) -> bool:
        """Whether these masks tell no more than how many tokens there are."""
        return self.kind == "all" or (self.kind is None and all(bool(mask.all()) for mask in self.masks.values()))


@dataclass(frozen=True)
class MarkEvidence:
    """What is marked, held against the store.

    Attributes:
        laid: The masks, with the problems that were found here added to theirs.
        same: How many samples have the same tokens marked as in the store, and how many were compared; None if it has no rows.
        fault: Why these marks cannot be of the store's tokens, where no ids say whose they are.
        warnings: What was assumed, and what cannot be told; decides nothing.
    """

    laid: LaidMasks
    same: tuple[int, int] | None = None
    fault: str | None = None
    warnings: list[str] = field(default_factory=list)


def judge_marks(batches: MaskBatches, table: SampleTable, places: Ints, laid: LaidMasks) -> MarkEvidence:
    """Looks for padding masks that are too short for their samples, and for marks that are never the store's."""
    own = OwnMasks.of(table)
    masks = {position: mask for position, mask in enumerate(laid.masks) if mask is not None}
    both = [position for position in masks if position in own.masks]
    same = sum(torch.equal(masks[position], own.masks[position]) for position in both)
    short, warnings = _short_masks(batches, table, places, laid, own)
    fault = None
    if both and not same and batches.ids is None and not own.counts_everything:
        n_apart = sum(bool((own.masks[position] & ~masks[position]).any()) for position in both)
        if n_apart:
            fault = (
                f"no mask marks the tokens that the store's own token_mask does (0 of {len(both):,}), {n_apart:,} leave out tokens "
                "that it counts, and no input_ids say whose they are: masks of other samples. If it is only that they count other "
                "kinds of tokens, save the input_ids beside them, which prove it"
            )
        else:
            warnings.append(
                f"all {len(both):,} masks that were compared mark more tokens than the store's own token_mask, among them all of "
                "its: another kind of mask, so that they differ from it says nothing"
            )
    problems = laid.problems | short
    return MarkEvidence(replace(laid, problems=problems), (same, len(both)) if both else None, fault, warnings)


def _short_masks(
    batches: MaskBatches, table: SampleTable, places: Ints, laid: LaidMasks, own: OwnMasks
) -> tuple[dict[int, str], list[str]]:
    """Returns by position the padding masks that have fewer tokens than their samples, and warnings.

    Padding masks mark one run of tokens. So do content masks if special tokens stand only at the ends; those that are left out
    where padding is look like padding. But they are few, and equally many in all samples but for some that were cut or end in one.
    """
    positions = [position for position, mask in enumerate(laid.masks) if mask is not None]
    if not positions:
        return {}, []
    sides = ["right", "left"] if laid.side == "right" else ["left", "right"]
    has_padding = any(len(batches.mask(int(places[position]))) != table.n_tokens[position] for position in positions)
    for side in sides[:1] if has_padding else sides:
        lines = {position: _from_text_to_padding(laid.masks[position], side) for position in positions}
        if (ends := _ends_of_runs(list(lines.values()))) is not None:
            break
    else:
        return {}, []
    gaps = table.n_tokens[positions] - ends
    for at, position in enumerate(positions):
        mine = own.masks.get(position)
        if mine is not None and np.array_equal(_from_text_to_padding(mine, side), lines[position]):
            gaps[at] = 0  # it leaves out what the store does
        elif mine is not None and own.kind == "content":
            gaps[at] = _from_text_to_padding(mine, side)[ends[at] :].sum()
    if not gaps.any():
        return {}, []
    is_known_content = own.kind == "content" and all(position in own.masks for position in positions)
    too_many = bool(gaps.max() > MOST_SPECIAL) and (is_known_content or len(np.unique(gaps)) > 1)
    short = [(position, int(end)) for position, end, gap in zip(positions, ends, gaps, strict=True) if gap]
    is_named = batches.names <= PADDING_NAMES
    if is_named and not laid.proven.all() and (too_many or _is_scattered(gaps)):
        return {
            position: f"token_mask is a padding mask of {end:,} tokens, activations have {table.n_tokens[position]:,}; laid over "
            "them, it would count real tokens as padding, silently"
            for position, end in short
        }, [
            f"taken for padding masks, by their name {' and '.join(sorted(batches.names))} and because {_amount(gaps)} "
            f"at the end where padding is: special tokens would be at most {MOST_SPECIAL}, and equally many in most samples"
        ]
    first, end = short[0]
    why = f"up to {MOST_SPECIAL}, or equally many in all samples, can be special tokens" if is_named else "its name says nothing"
    if laid.proven.all():
        why = "the input_ids say whose they are, so it is taken for what they mean to count"
    return {}, [
        f"{len(short):,} of {len(positions):,} masks leave out tokens at the end where padding is: {_amount(gaps)}. Sample "
        f"{table.sample_index[first]} has {table.n_tokens[first]:,} tokens, its mask ends after {end:,}. Special tokens that do "
        f"not count, or a padding mask of a shorter sample: not counted as a fault ({why})"
    ]


def _from_text_to_padding(mask: Tensor | None, side: str) -> npt.NDArray[np.bool_]:
    assert mask is not None
    line: npt.NDArray[np.bool_] = mask.numpy()
    return line if side == "right" else line[::-1]


def _ends_of_runs(lines: list[npt.NDArray[np.bool_]]) -> Ints | None:
    """Returns where each line's run of marks ends; None unless each has just one, begun after the same few positions in all."""
    marked = [np.flatnonzero(line) for line in lines]
    first, last = (np.array([places[at] for places in marked], dtype=np.int64) for at in (0, -1))
    is_one_run = last - first + 1 == [len(places) for places in marked]
    if not is_one_run.all() or first.min() != first.max() or first[0] > MOST_SPECIAL:
        return None
    return last + 1


def _is_scattered(gaps: Ints) -> bool:
    """Whether more than a quarter of the samples leave out another number of tokens than the two most frequent ones."""
    counts = np.sort(np.unique(gaps, return_counts=True)[1])
    return bool(counts[:-2].sum() > len(gaps) / 4)


def _amount(gaps: Ints) -> str:
    low, high = int(gaps.min()), int(gaps.max())
    return f"they leave out {low:,} to {high:,} tokens" if low < high else f"all leave out {low:,}"
