"""means.safetensors: moments folded over shards, with what they were made of. One file, which exists whole or not at all."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from exactivations.store.errors import (
    IdentityError,
    IncompleteStoreError,
    InvalidInputError,
    StoreError,
)
from exactivations.store.moments import IntArray, Moments
from exactivations.store.run_folder import ENVIRONMENT_FIELDS, MEANS_FILE, RunFolder, RunInfo, contents_of
from exactivations.store.shard import open_shard, verify_shard, write_shard
from exactivations.store.shard_sums import GROUPS, Groups, MeanOptions, from_tensors, sums_of_shard, to_tensors, unsealed
from exactivations.store.verification import read_verification, refuse_failed

FORMAT_VERSION = 1
# What differs between runs whose means may be joined all the same: which samples, how they were planned, where they were computed,
# and what else was read besides the vectors, which are compared by name.
FREE_FIELDS = ENVIRONMENT_FIELDS | {
    "dataset", "n_samples", "token_budget", "shard_tokens", "padding", "max_padded_share", "hook_points", "hook_paths", "poolings",
    "float32_matmul_precision", "means",
}  # fmt: skip
MODEL_ABOUT = (
    "model", "revision", "attn_implementation", "trust_remote_code", "tokenizer", "tokenizer_revision", "text_column",
    "messages_column",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A run whose samples are in a result.

    Attributes:
        fingerprint, contents: Of the run, and of its files' bytes.
        n_samples, n_tokens: What it added.
        dataset: What it was made of, in words.
        verified: Whether samples of it were computed again alone and agreed.
    """

    fingerprint: str
    contents: str
    n_samples: int
    n_tokens: int
    dataset: str
    verified: bool


@dataclass(frozen=True)
class MeansFile:
    """Folded moments and their origin.

    Attributes:
        identity: What decides the values, without what belongs to the data.
        about: How model and tokenizer were called.
        options: What means were taken of.
        groups: Names of the groups, one bin each in the moments "<vector>@groups".
        parts: The runs, in the order in which they were added.
        sums: Moments by name, as `sums_of_shard` gives them.
        token_hash: uint8 [n, 16], each sample's content key; sample_index: int64 [n], its index in its dataset; part: int32 [n].
    """

    identity: dict[str, Any]
    about: dict[str, Any]
    options: MeanOptions
    groups: list[str]
    parts: list[Part]
    sums: dict[str, Moments]
    token_hash: npt.NDArray[np.uint8]
    sample_index: IntArray
    part: npt.NDArray[np.int32]

    @property
    def n_samples(self) -> int:
        """Samples in the means."""
        return len(self.sample_index)

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all. The same content gives the same bytes."""
        tensors: dict[str, Tensor] = to_tensors(self.sums)
        tensors |= {
            "token_hash": torch.from_numpy(np.ascontiguousarray(self.token_hash)),
            "sample_index": torch.from_numpy(self.sample_index),
            "part": torch.from_numpy(self.part),
        }
        metadata = {
            "format_version": FORMAT_VERSION,
            "kind": "means",
            "identity": self.identity,
            "about": self.about,
            "options": self.options.to_json(),
            "groups": self.groups,
            "parts": [asdict(part) for part in self.parts],
        }
        write_shard(path, tensors, metadata)


def path_of(result: str | Path) -> Path:
    """Returns the file of a result that may be named by its run folder."""
    path = Path(result)
    return path / MEANS_FILE if path.is_dir() else path


def read_means(result: str | Path) -> MeansFile:
    """Reads a result, and its every byte against its checksum.

    Raises:
        StoreError: If there is none, with the reason; IncompleteStoreError if its run is not finished.
        CorruptShardError: If the file is damaged.
    """
    path = path_of(result)
    if not path.is_file():
        raise _no_result(Path(result))
    verify_shard(path)
    tensors, metadata = open_shard(path)
    if metadata.get("kind") != "means" or metadata.get("format_version") != FORMAT_VERSION:
        found = f"version {metadata.get('format_version')}" if metadata.get("kind") == "means" else "something else"
        raise StoreError(f"{path} is no means file of version {FORMAT_VERSION} ({found}): compute the means anew")
    return MeansFile(
        metadata["identity"],
        metadata["about"],
        MeanOptions.from_json(metadata["options"]),
        metadata["groups"],
        [Part(**part) for part in metadata["parts"]],
        from_tensors(tensors),
        tensors["token_hash"].numpy(),
        tensors["sample_index"].numpy(),
        tensors["part"].numpy(),
    )


def _no_result(path: Path) -> StoreError:
    folder = RunFolder(path)
    if not path.is_dir() or not folder.exists:
        return StoreError(f"{path} holds no means: there is no {MEANS_FILE}")
    info = folder.read_info()
    missing = info.n_shards - len(folder.published(info))
    if missing:
        return IncompleteStoreError(
            f"the means of {path} are not finished: {missing} of {info.n_shards} shards are missing. Start the same command again"
        )
    if info.means is None:
        return StoreError(f"{path} holds rows, and no means of them: exactivations means from-store {path}")
    return StoreError(f"the means of {path} are not folded yet: start the same command again, or exactivations verify {path}")


def fold(folder: RunFolder) -> MeansFile:
    """Folds the sums of a complete run's shards in shard order.

    Raises:
        IncompleteStoreError: If shards are missing.
        VerificationError: If the run failed its verification.
    """
    info = folder.read_info()
    assert info.means is not None, "a run that takes means"
    start, shards = _frame(folder, info, MeanOptions.from_json(info.means), info.means["groups"])
    return _fold_onto(start, (_sums(folder, shard, info) for shard in shards))


def publish_fold(folder: RunFolder) -> None:
    """Folds a complete run and writes its result; samples that were added to that before stay in it.

    Raises:
        StoreError: If others were added, and the run is no longer the one that they were added to.
    """
    path, own = folder.path / MEANS_FILE, fold(folder)
    there = read_means(path) if path.is_file() else own
    if len(there.parts) > 1:
        part = own.parts[0]
        if part.contents not in {known.contents for known in there.parts}:
            raise StoreError(
                f"{path} has samples that were added to other shards than those that are there now: move it away, start the same "
                "command again, and add them again"
            )
        own = replace(there, parts=[part if known.contents == part.contents else known for known in there.parts])
    own.write(path)


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
    rows = _Rows(folder, info, options)
    start, shards = _frame(folder, info, options, rows.groups.names if rows.groups else [])
    return _fold_onto(start, map(rows.sums, shards))


def sums_that_differ(folder: RunFolder, shards: list[int]) -> dict[int, str]:
    """Returns shards whose sums are not those of their rows (or, where rows were not kept, count other samples), with a message."""
    info = folder.read_info()
    assert info.means is not None, "a run that takes means"
    rows = _Rows(folder, info, MeanOptions.from_json(info.means))
    found = {}
    for shard in shards:
        there = _sums(folder, shard, info)
        if info.keeps_rows:
            wrong = [name for name, sums in rows.sums(shard).items() if not sums.is_same(there[name])]
        else:
            expected = rows.counts(shard)
            wrong = [name for name, moments in there.items() if name in expected and expected[name] != moments.count.tolist()]
        if wrong:
            found[shard] = f"shard {shard}: its sums of {', '.join(wrong[:3])} are not those of its samples: compute it anew"
    return found


class _Rows:
    """The rows of a run's shards, and which samples they are of."""

    def __init__(self, folder: RunFolder, info: RunInfo, options: MeanOptions) -> None:
        self._folder, self._info, self._options = folder, info, options
        self.groups = groups_of(folder, options)
        places = folder.read_samples(["shard", "row"])
        self._shard, self._row = places.column("shard").to_numpy(), places.column("row").to_numpy()

    def samples_of(self, shard: int) -> IntArray:
        """Returns a shard's samples, by their place in samples.parquet, in row order."""
        inside = np.flatnonzero(self._shard == shard)
        return inside[np.argsort(self._row[inside])]

    def sums(self, shard: int) -> dict[str, Moments]:
        """Returns the sums of a shard's rows."""
        groups = None if self.groups is None else self.groups.at(self.samples_of(shard))
        return sums_of_shard(_whole_shard(self._folder, shard, self._info), self._options, groups)

    def counts(self, shard: int) -> dict[str, list[int]]:
        """Returns how many samples the sums of a shard must count."""
        samples = self.samples_of(shard)
        out = {vector.name: [len(samples)] for vector in self._options.vectors}
        if self.groups is not None:
            by_group = np.bincount(self.groups.numbers[samples], minlength=len(self.groups.names)).tolist()
            out |= {vector.name + GROUPS: by_group for vector in self._options.vectors}
        return out


def groups_of(folder: RunFolder, options: MeanOptions) -> Groups | None:
    """Returns the groups of a run's samples in dataset order, or None if there are to be none."""
    column = options.group_column
    if column is None:
        return None
    samples = folder.read_samples()
    if column not in samples.column_names:
        raise InvalidInputError(f"{folder.path} has no column {column!r} to group by; it has {', '.join(samples.column_names)}")
    return Groups.of(samples.column(column).to_pylist(), samples.column("sample_index").to_numpy(), column)


def add(result: MeansFile, folder: RunFolder, *, allow_duplicates: bool = False) -> MeansFile:
    """Adds a complete run to a result, shard by shard: the bits of one run whose shards are those of both.

    Raises:
        IdentityError: If the run has another model, tokenizer, option or vector.
        InvalidInputError: If samples of it are in the result already, by token hash, and that was not allowed.
        IncompleteStoreError, VerificationError: See `fold`.
    """
    info = folder.read_info()
    assert info.means is not None, "a run that takes means"
    frame, shards = _frame(folder, info, MeanOptions.from_json(info.means), info.means["groups"])
    start = _join(result, frame, allow_duplicates)
    where = np.array([start.groups.index(name) for name in frame.groups], dtype=np.int64)

    def sums(shard: int) -> dict[str, Moments]:
        return _regrouped(_sums(folder, shard, info), where, len(start.groups))

    return _fold_onto(start, map(sums, shards))


def merge(results: list[MeansFile], *, allow_duplicates: bool = False) -> MeansFile:
    """Joins results of separate runs, in their order.

    Raises:
        IdentityError, InvalidInputError: See `add`.
    """
    first, *others = results
    for other in others:
        joined = _join(first, other, allow_duplicates)
        where = np.array([joined.groups.index(name) for name in other.groups], dtype=np.int64)
        first = _fold_onto(joined, [_regrouped(other.sums, where, len(joined.groups))])
    return first


def duplicates(result: MeansFile, token_hash: npt.NDArray[np.uint8]) -> IntArray:
    """Returns int64 [m], which of these content keys, uint8 [n, 16], are in a result already."""
    there, now = _as_keys(result.token_hash), _as_keys(token_hash)
    return np.flatnonzero(np.isin(now, there))


def hashes_as_bytes(token_hash: Any) -> npt.NDArray[np.uint8]:
    """Returns content keys in hexadecimal as uint8 [n, 16]."""
    return np.frombuffer(bytes.fromhex("".join(token_hash)), dtype=np.uint8).reshape(-1, 16).copy()


def refuse_another_origin(ours: Mapping[str, Any], other: Mapping[str, Any], what: str, here: str = "the means") -> None:
    """Refuses values of another model, tokenizer, dtype or text option.

    Raises:
        IdentityError: Naming every field that differs, with both values.
    """
    names = sorted((ours.keys() | other.keys()) - FREE_FIELDS)
    lines = [f"  {n}: {ours.get(n)!r} in {here}, {other.get(n)!r} in {what}" for n in names if ours.get(n) != other.get(n)]
    if lines:
        raise IdentityError(f"{what} does not belong to {here}: it was computed otherwise:\n" + "\n".join(lines))


def _frame(folder: RunFolder, info: RunInfo, options: MeanOptions, groups: list[str]) -> tuple[MeansFile, list[int]]:
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
    )  # fmt: skip
    frame = MeansFile(
        {name: value for name, value in info.present_identity.items() if name not in FREE_FIELDS},
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


def _sums(folder: RunFolder, shard: int, info: RunInfo) -> dict[str, Moments]:
    return unsealed(folder.open_shard(shard, info), folder.shard_path(shard))


def _whole_shard(folder: RunFolder, shard: int, info: RunInfo) -> dict[str, Tensor]:
    """Returns a shard's tensors after comparing them with their checksum: a result lives on without its shards."""
    verify_shard(folder.shard_path(shard))
    return folder.open_shard(shard, info)


def _join(ours: MeansFile, other: MeansFile, allow_duplicates: bool) -> MeansFile:
    """Returns ours with the other's samples listed and room for its groups; its sums are not added yet."""
    refuse_another_origin(ours.identity, other.identity, "the other part")
    if ours.options != other.options:
        raise IdentityError(
            "these means are not of the same vectors, and cannot be joined:\n"
            f"  {_in_words(ours.options)} in the one\n  {_in_words(other.options)} in the other"
        )
    known = {part.contents for part in ours.parts}
    again = [part for part in other.parts if part.contents in known]
    if again and not allow_duplicates:
        raise InvalidInputError(f"the {again[0].n_samples:,} samples of {again[0].dataset} are in the means already")
    doubled = duplicates(ours, other.token_hash)
    if len(doubled) and not allow_duplicates:
        raise InvalidInputError(in_words(ours, other.token_hash, other.sample_index, doubled))
    groups = sorted({*ours.groups, *other.groups})
    where = np.array([groups.index(name) for name in ours.groups], dtype=np.int64)
    return replace(
        ours,
        groups=groups,
        parts=[*ours.parts, *other.parts],
        sums=_regrouped(ours.sums, where, len(groups)),
        token_hash=np.concatenate([ours.token_hash, other.token_hash]),
        sample_index=np.concatenate([ours.sample_index, other.sample_index]),
        part=np.concatenate([ours.part, (other.part + len(ours.parts)).astype(np.int32)]),
    )


def in_words(result: MeansFile, token_hash: npt.NDArray[np.uint8], sample_index: IntArray, doubled: IntArray) -> str:
    """Says which samples are in a result already."""
    first = int(doubled[0])
    there = int(np.flatnonzero(_as_keys(result.token_hash) == _as_keys(token_hash[first : first + 1]))[0])
    part = result.parts[int(result.part[there])]
    return (
        f"{len(doubled):,} of {len(token_hash):,} samples are in the means already, by the hash of their tokens: sample "
        f"{int(sample_index[first])} is sample {int(result.sample_index[there])} of {part.dataset}. Leave them out, or let them "
        "count twice (--allow-duplicates)"
    )


def _fold_onto(start: MeansFile, shards: Any) -> MeansFile:
    sums = dict(start.sums)
    for shard in shards:
        sums = {name: sums[name].merge(moments) if name in sums else moments for name, moments in shard.items()}
    return replace(start, sums=sums)


def _regrouped(sums: Mapping[str, Moments], where: IntArray, n_groups: int) -> dict[str, Moments]:
    return {name: moments.in_bins(where, n_groups) if name.endswith(GROUPS) else moments for name, moments in sums.items()}


def _as_keys(token_hash: npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
    keys: npt.NDArray[np.void] = np.ascontiguousarray(token_hash).view(np.dtype((np.void, 16)))[:, 0]
    return keys


def _in_words(options: MeanOptions) -> str:
    vectors = ", ".join(vector.name for vector in options.vectors)
    groups = f" by {options.group_column}" if options.group_column else ""
    return f"{vectors}{groups}, {options.n_positions} positions"
