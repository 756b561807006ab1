"""means.safetensors: moments folded over shards, with what they were made of. One file, which exists whole or not at all."""

import contextlib
import fcntl
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from exactivations.store.errors import CorruptShardError, IdentityError, IncompleteStoreError, StoreError
from exactivations.store.moments import IntArray, Moments
from exactivations.store.run_folder import ENVIRONMENT_FIELDS, MEANS_FILE, RunFolder
from exactivations.store.shard import open_shard, verify_shard, write_shard
from exactivations.store.shard_sums import MeanOptions, from_tensors, to_tensors

FORMAT_VERSION = 1
# What differs between runs whose means may be joined all the same: which samples, how they were planned, where they were computed,
# and what else was read besides the vectors, which are compared by name.
FREE_FIELDS = ENVIRONMENT_FIELDS | {
    "dataset", "n_samples", "token_budget", "shard_tokens", "padding", "max_padded_share", "hook_points", "hook_paths", "poolings",
    "means",
}  # fmt: skip
MODEL_ABOUT = (
    "model", "revision", "attn_implementation", "trust_remote_code", "random_weights", "tokenizer", "tokenizer_revision",
    "text_column", "messages_column",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A run whose samples are in a result.

    Attributes:
        fingerprint, contents: Of the run, and of its files' bytes.
        n_samples, n_tokens: What it added.
        dataset: What it was made of, in words.
        verified: Whether samples of it were computed again alone and agreed.
        environment: Where it was computed: torch, transformers, device_type, cpu_threads.
    """

    fingerprint: str
    contents: str
    n_samples: int
    n_tokens: int
    dataset: str
    verified: bool
    environment: dict[str, Any]


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

    def origin_at(self, hook_points: Iterable[str]) -> dict[str, Any]:
        """Returns the identity with the paths of these hook points only; see `origin_of`."""
        return at_points(self.identity, hook_points)

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
    try:
        tensors, metadata = open_shard(path)
    except CorruptShardError as error:
        raise CorruptShardError(f"{path} is no means file, or not a whole one: compute the means anew, or copy it again") from error
    if metadata.get("kind") == "means":
        try:
            verify_shard(path)
        except CorruptShardError as error:
            raise CorruptShardError(
                f"{path} is damaged: it is not what was written. Copy it again, or delete it and start the run again"
            ) from error
    if metadata.get("kind") != "means" or metadata.get("format_version") != FORMAT_VERSION:
        found = f"version {metadata.get('format_version')}" if metadata.get("kind") == "means" else "something else"
        raise StoreError(
            f"{path} is no means file of version {FORMAT_VERSION} ({found}): name a run folder of `means`, or its {MEANS_FILE}"
        )
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
        where = "there is no such file or folder" if not path.exists() else f"there is no {MEANS_FILE} in it"
        return StoreError(f"{path} holds no means: {where}")
    info = folder.read_info()
    missing = info.n_shards - len(folder.published(info))
    if missing:
        return IncompleteStoreError(
            f"the means of {path} are not finished: {missing} of {info.n_shards} shards are missing. Start the same command again"
        )
    if info.means is None:
        return StoreError(f"{path} holds rows, and no means of them: exactivations means from-store {path}")
    return StoreError(f"the means of {path} are not folded yet: start the same command again, or exactivations verify {path}")


@contextlib.contextmanager
def alone_with(path: Path) -> Iterator[None]:
    """Lets one process at a time read a result, change it and write it again."""
    try:
        file = path.with_name(f".{path.name}.lock").open("w")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        raise StoreError(f"cannot change {path}: {error}. Its folder must be writable, on a file system with locks") from error
    with file:
        yield


def duplicates(result: MeansFile, token_hash: npt.NDArray[np.uint8]) -> IntArray:
    """Returns int64 [m], which of these content keys, uint8 [n, 16], are in a result already."""
    there, now = keys_of(result.token_hash), keys_of(token_hash)
    return np.flatnonzero(np.isin(now, there))


def hashes_as_bytes(token_hash: Any) -> npt.NDArray[np.uint8]:
    """Returns content keys in hexadecimal as uint8 [n, 16]."""
    return np.frombuffer(bytes.fromhex("".join(token_hash)), dtype=np.uint8).reshape(-1, 16).copy()


def keys_of(token_hash: npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
    """Returns content keys, uint8 [n, 16], as single comparable values [n]."""
    keys: npt.NDArray[np.void] = np.ascontiguousarray(token_hash).view(np.dtype((np.void, 16)))[:, 0]
    return keys


def origin_of(identity: Mapping[str, Any], hook_points: Iterable[str]) -> dict[str, Any]:
    """Returns what of a run's identity decides the values at some hook points, without what belongs to its data and machine."""
    origin = {name: value for name, value in identity.items() if name not in FREE_FIELDS}
    where = dict(zip(identity.get("hook_points", []), identity.get("hook_paths", []), strict=False))
    return origin | {"hook_paths": {point: where.get(point) for point in sorted(set(hook_points))}}


def at_points(origin: Mapping[str, Any], hook_points: Iterable[str]) -> dict[str, Any]:
    """Returns an origin with the paths of these hook points only; see `origin_of`."""
    return {**origin, "hook_paths": {point: origin["hook_paths"].get(point) for point in sorted(set(hook_points))}}


def refuse_another_origin(ours: Mapping[str, Any], other: Mapping[str, Any], what: str, here: str = "the means") -> None:
    """Refuses values of another model, tokenizer, dtype or text option.

    Both are what `origin_of` gives.

    Raises:
        IdentityError: Naming every field that differs, with both values.
    """
    names = sorted(ours.keys() | other.keys())
    lines = [f"  {n}: {ours.get(n)!r} in {here}, {other.get(n)!r} in {what}" for n in names if ours.get(n) != other.get(n)]
    if lines:
        raise IdentityError(f"{what} does not belong to {here}: it was computed otherwise:\n" + "\n".join(lines))
