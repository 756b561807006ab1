"""Joining results: further samples added to one, or results of separate runs merged."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from exactivations.store.errors import IdentityError, InvalidInputError
from exactivations.store.means_file import MeansFile, alone_with, duplicates, keys_of, read_means, refuse_another_origin
from exactivations.store.means_fold import fold_onto, stored_sums_of
from exactivations.store.moments import IntArray, Moments
from exactivations.store.run_folder import RunFolder
from exactivations.store.shard_sums import GROUPS, MeanOptions


def add_to(path: Path, folder: RunFolder, *, allow_duplicates: bool = False) -> None:
    """Adds a complete run to the result in a file; see `add`."""
    with alone_with(path):
        add(read_means(path), folder, allow_duplicates=allow_duplicates).write(path)


def add(result: MeansFile, folder: RunFolder, *, allow_duplicates: bool = False) -> MeansFile:
    """Adds a complete run to a result, shard by shard: the bits of one run whose shards are those of both.

    Raises:
        IdentityError: If the run has another model, tokenizer, option or vector.
        InvalidInputError: If samples of it are in the result already, by token hash, and that was not allowed.
        IncompleteStoreError, VerificationError: See `fold`.
    """
    further, sums = stored_sums_of(folder)
    return _joined(result, further, sums, allow_duplicates)


def merge(results: list[MeansFile], *, allow_duplicates: bool = False) -> MeansFile:
    """Joins results of separate runs, in their order.

    Raises:
        IdentityError, InvalidInputError: See `add`.
    """
    first, *others = results
    for other in others:
        first = _joined(first, other, [other.sums], allow_duplicates)
    return first


def _joined(ours: MeansFile, other: MeansFile, sums: Iterable[dict[str, Moments]], allow_duplicates: bool) -> MeansFile:
    """Returns ours with the other's samples and these sums of theirs."""
    start = _join(ours, other, allow_duplicates)
    return fold_onto(start, (_regrouped(some, other.groups, start.groups) for some in sums))


def _join(ours: MeansFile, other: MeansFile, allow_duplicates: bool) -> MeansFile:
    """Returns ours with the other's samples listed and room for its groups; its sums are not added yet."""
    refuse_another_origin(ours.identity, other.identity, "the other part")
    if ours.options != other.options:
        raise IdentityError(
            "these means are not of the same vectors, and cannot be joined:\n"
            f"  {options_in_words(ours.options)} in the one\n  {options_in_words(other.options)} in the other"
        )
    known = {part.contents for part in ours.parts}
    again = [part for part in other.parts if part.contents in known]
    if again:
        raise InvalidInputError(
            f"the {again[0].n_samples:,} samples of {again[0].dataset} are in the means already, of this very run: leave it out"
        )
    doubled = duplicates(ours, other.token_hash)
    if len(doubled) and not allow_duplicates:
        raise InvalidInputError(duplicates_in_words(ours, other.token_hash, other.sample_index, doubled))
    groups = sorted({*ours.groups, *other.groups})
    return replace(
        ours,
        groups=groups,
        parts=[*ours.parts, *other.parts],
        sums=_regrouped(ours.sums, ours.groups, groups),
        token_hash=np.concatenate([ours.token_hash, other.token_hash]),
        sample_index=np.concatenate([ours.sample_index, other.sample_index]),
        part=np.concatenate([ours.part, (other.part + len(ours.parts)).astype(np.int32)]),
    )


def duplicates_in_words(result: MeansFile, token_hash: npt.NDArray[np.uint8], sample_index: IntArray, doubled: IntArray) -> str:
    """Says which samples are in a result already."""
    first = int(doubled[0])
    there = int(np.flatnonzero(keys_of(result.token_hash) == keys_of(token_hash[first : first + 1]))[0])
    part = result.parts[int(result.part[there])]
    return (
        f"{len(doubled):,} of {len(token_hash):,} samples are in the means already, by the hash of their tokens: sample "
        f"{int(sample_index[first])} is sample {int(result.sample_index[there])} of {part.dataset}. Leave them out, or let them "
        "count twice (--allow-duplicates)"
    )


def options_in_words(options: MeanOptions) -> str:
    """Names what means are taken of."""
    vectors = ", ".join(vector.name for vector in options.vectors)
    groups = f" by {options.group_column}" if options.group_column else ""
    return f"{vectors}{groups}, {options.n_positions} positions"


def _regrouped(sums: Mapping[str, Moments], groups: list[str], all_groups: list[str]) -> dict[str, Moments]:
    where = np.array([all_groups.index(name) for name in groups], dtype=np.int64)
    return {name: moments.in_bins(where, len(all_groups)) if name.endswith(GROUPS) else moments for name, moments in sums.items()}
