"""Folding the sums of a run's shards, in shard order, into a result; and holding them against what they are sums of."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from exactivations.store.errors import CorruptShardError, IdentityError, IncompleteStoreError, InvalidInputError, StoreError
from exactivations.store.means_file import (
    MODEL_ABOUT,
    MeansFile,
    Part,
    alone_with,
    hashes_as_bytes,
    origin_of,
    read_means,
)
from exactivations.store.moments import IntArray, Moments
from exactivations.store.run_folder import ENVIRONMENT_FIELDS, MEANS_FILE, RunFolder, RunInfo, contents_of, places_of_shards
from exactivations.store.shard import verify_shard
from exactivations.store.shard_sums import GROUPS, POSITIONS, Groups, MeanOptions, sums_of_shard, unsealed
from exactivations.store.verification import read_verification, refuse_failed

ANEW = "delete it and start the run again: only what it held is computed anew"


def fold(folder: RunFolder) -> MeansFile:
    """Folds the sums of a complete run's shards in shard order.

    Raises:
        IncompleteStoreError: If shards are missing.
        VerificationError: If the run failed its verification.
    """
    start, sums = stored_sums_of(folder)
    return fold_onto(start, sums)


def stored_sums_of(folder: RunFolder) -> tuple[MeansFile, Iterator[dict[str, Moments]]]:
    """Returns a result without sums for a complete run that takes means, and the sums of its shards in their order."""
    info = folder.read_info()
    assert info.means is not None, "a run that takes means"
    start, shards = frame(folder, info, MeanOptions.from_json(info.means), info.means["groups"])
    return start, map(RowsOfRun(folder, info, start.options).stored_sums, shards)


def publish_fold(folder: RunFolder) -> None:
    """Folds a complete run and writes its result; samples that were added to that before stay in it.

    Raises:
        StoreError: If others were added, and the run is no longer the one that they were added to.
    """
    path = folder.path / MEANS_FILE
    with alone_with(path):
        there = read_means(path) if path.is_file() else None
        if there is not None and len(there.parts) == 1:
            there = None  # nothing but this run is in it
        own = fold(folder)
        if there is None:
            return own.write(path)
        part = own.parts[0]
        if part.contents not in {known.contents for known in there.parts}:
            raise StoreError(
                f"{path} has samples that were added to other shards than those that are there now: move it away, start the same "
                "command again, and add them again"
            )
        replace(there, parts=[part if known.contents == part.contents else known for known in there.parts]).write(path)


def withdraw_result(folder: RunFolder, info: RunInfo) -> None:
    """Marks a run's part of its result as not verified, since its verification failed; a result of nothing else is removed."""
    path = folder.path / MEANS_FILE
    if not path.is_file():
        return
    with alone_with(path):
        if not path.is_file():  # another node was faster
            return
        there = read_means(path)
        if len(there.parts) == 1:
            return path.unlink()
        parts = [replace(part, verified=part.verified and part.fingerprint not in info.fingerprints) for part in there.parts]
        replace(there, parts=parts).write(path)


def fold_rows(folder: RunFolder, options: MeanOptions) -> MeansFile:
    """Takes means of a finished store's rows: the same bits as if they had been taken while it was written.

    Raises:
        IncompleteStoreError: If shards are missing.
        VerificationError: If the store failed its verification.
        InvalidInputError: If it does not hold what the means need.
    """
    info = folder.read_info()
    if not info.keeps_rows:
        raise StoreError(f"{folder.path} keeps means only, and not the rows of its samples: run `exactivations means` for others")
    options.check_stored(info.activations)
    rows = RowsOfRun(folder, info, options)
    start, shards = frame(folder, info, options, rows.groups.names if rows.groups else [])

    def sums(shard: int) -> dict[str, Moments]:
        verify_shard(folder.shard_path(shard))  # a result lives on without its shards
        return rows.sums(shard)

    return fold_onto(start, map(sums, shards))


def sums_that_differ(folder: RunFolder, shards: list[int]) -> dict[int, str]:
    """Returns shards whose sums are not those of their rows (or, where rows were not kept, count other samples), with a message."""
    info = folder.read_info()
    assert info.means is not None, "a run that takes means"
    rows = RowsOfRun(folder, info, MeanOptions.from_json(info.means))
    found = {}
    for shard in shards:
        try:
            there = rows.stored_sums(shard)
            wrong = [name for name, sums in rows.sums(shard).items() if not sums.is_same(there[name])] if info.keeps_rows else []
        except CorruptShardError as error:
            found[shard] = str(error)
            continue
        if wrong:
            found[shard] = f"shard {shard}: its sums of {', '.join(wrong[:3])} are not those of its rows: {ANEW}"
    return found


class RowsOfRun:
    """The samples and rows of a run's shards, and what sums they must give.

    Raises:
        IdentityError: If samples.parquet groups the samples otherwise than the run did.
    """

    def __init__(self, folder: RunFolder, info: RunInfo, options: MeanOptions) -> None:
        self._folder, self._info, self._options = folder, info, options
        self.groups = groups_of(folder, options)
        there = self.groups.digest if self.groups is not None else None
        if info.means is not None and options == MeanOptions.from_json(info.means) and there != info.means["groups_digest"]:
            raise IdentityError(
                f"{folder.path}: the samples are not in the groups that the run put them in (column {options.group_column!r} of "
                "samples.parquet was changed): copy samples.parquet from another copy of this run"
            )
        places = folder.read_samples(["shard", "row"])
        self._samples = places_of_shards(places.column("shard").to_numpy(), places.column("row").to_numpy(), info.n_shards)

    def sums(self, shard: int) -> dict[str, Moments]:
        """Returns the sums of a shard's rows, which are not compared with the shard's checksum here."""
        groups = None if self.groups is None else self.groups.at(self._samples[shard])
        return sums_of_shard(self._folder.open_shard(shard, self._info), self._options, groups)

    def stored_sums(self, shard: int) -> dict[str, Moments]:
        """Returns the sums that a shard holds.

        Raises:
            CorruptShardError: If they are not what was written, some are missing, or they count other samples than the shard's.
        """
        path = self._folder.shard_path(shard)
        sums = unsealed(self._folder.open_shard(shard, self._info), path)
        expected = self._counts(shard)
        if sums.keys() != expected.keys():
            raise CorruptShardError(
                f"{path} has sums of {', '.join(sums) or 'nothing'}; expected are {', '.join(expected)}: {ANEW}"
            )
        for name, count in expected.items():
            found = sums[name].count
            if not (np.array_equal(found, count) if count is not None else _are_positions(found, len(self._samples[shard]))):
                raise CorruptShardError(f"{path}: its sums of {name} do not count the samples of the shard: {ANEW}")
        return sums

    def _counts(self, shard: int) -> dict[str, IntArray | None]:
        """Returns how many samples each sum must count; None for positions, whose counts depend on the tokens."""
        samples = self._samples[shard]
        out: dict[str, IntArray | None] = {}
        for vector in self._options.vectors:
            out[vector.name] = np.array([len(samples)])
            if self.groups is not None:
                out[vector.name + GROUPS] = np.bincount(self.groups.numbers[samples], minlength=len(self.groups.names))
        if self._options.n_positions:
            out |= {place + POSITIONS: None for place in self._options.places}
        return out


def _are_positions(count: IntArray, n_samples: int) -> bool:
    """Every sample has a last token that counts, and none has a position without having those behind it."""
    return int(count[0]) == n_samples and bool((np.diff(count) <= 0).all())


def groups_of(folder: RunFolder, options: MeanOptions) -> Groups | None:
    """Returns the groups of a run's samples in dataset order, or None if there are to be none."""
    column = options.group_column
    if column is None:
        return None
    names = folder.columns()
    if column not in names:
        raise InvalidInputError(f"{folder.path} has no column {column!r} to group by; it has {', '.join(names)}")
    samples = folder.read_samples(["sample_index", column])
    return Groups.of(samples.column(column).to_pylist(), samples.column("sample_index").to_numpy(), column)


def frame(folder: RunFolder, info: RunInfo, options: MeanOptions, groups: list[str]) -> tuple[MeansFile, list[int]]:
    """Returns a result without sums for a run, and the run's shards in order."""
    checksums = folder.checksums(info)
    if len(checksums) < info.n_shards:
        raise IncompleteStoreError(
            f"{folder.path} is not complete: {info.n_shards - len(checksums)} of {info.n_shards} shards are missing. Start the "
            "same command again to finish it"
        )
    contents = contents_of(checksums, folder.samples_footer())
    verification = read_verification(folder, info)
    if verification is not None:
        refuse_failed(folder, verification)
    samples = folder.read_samples(["sample_index", "token_hash"])
    n = len(samples)
    about = info.about
    dataset = " ".join(str(about[name]) for name in ("dataset", "config", "split") if about.get(name))
    part = Part(
        info.fingerprint, contents, n, info.n_tokens, dataset or f"a {about.get('dataset_kind')} in Python",
        verification is not None and verification.contents == contents,
        {name: info.present_identity.get(name) for name in sorted(ENVIRONMENT_FIELDS)},
    )  # fmt: skip
    frame = MeansFile(
        origin_of(info.present_identity, (point for vector in options.vectors for point in vector.hook_points)),
        {name: about.get(name) for name in MODEL_ABOUT},
        options,
        groups,
        [part],
        {},
        hashes_as_bytes(samples.column("token_hash").to_pylist()),
        samples.column("sample_index").to_numpy().copy(),
        np.zeros(n, dtype=np.int32),
    )
    return frame, sorted(checksums)


def fold_onto(start: MeansFile, shards: Iterable[dict[str, Moments]]) -> MeansFile:
    """Merges sums into those of a result, one after the other. All must be of the same names."""
    sums = start.sums
    for shard in shards:
        assert not sums or sums.keys() == shard.keys(), f"sums of {list(shard)} added to sums of {list(sums)}"
        sums = {name: sums[name].merge(moments) for name, moments in shard.items()} if sums else shard
    return replace(start, sums=sums)
