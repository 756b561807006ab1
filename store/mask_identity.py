"""Whose masks are these? Decided by the token hash of the ids beside them, whatever place they are in."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from exactivations.store.mask_folder import MaskBatches
from exactivations.store.mask_layout import LaidMasks, SampleTable
from exactivations.store.token_hash import hash_of_ids


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
