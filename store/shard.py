"""One shard: a safetensors file that exists whole or not at all, and carries a checksum of everything in it."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from exactivations.store.batches import ActivationBatch, ActivationSpec
from exactivations.store.errors import CorruptShardError, StoreError
from exactivations.store.finite import refuse_not_finite

_UMASK = os.umask(0)
os.umask(_UMASK)  # it can only be read by setting it
METADATA_KEY = "exactivations"  # one key only: safetensors does not keep the order of several, and files must be byte-identical


class ShardBuffer:
    """A shard that is being filled, in host memory: every tensor has its final size from the start.

    Batches may arrive in any order; each goes to the place that the plan gave it. A row that is written twice or never is
    an error of ours and cannot be published. The memory is taken once and used for shard after shard: what is allocated and
    freed for each of them, in another size every time, makes the process grow.

    Args:
        n_rows: Rows of the largest shard that is to be filled; it begins as one of this size.
        n_tokens: Tokens of the largest shard.
        specs: What is stored.
    """

    def __init__(self, n_rows: int, n_tokens: int, specs: Mapping[str, ActivationSpec]) -> None:
        self._specs = dict(specs)
        self._has_tokens = any(spec.per_token for spec in specs.values())
        self._by_row = {"sample_index": torch.empty(n_rows, dtype=torch.int64), "n_tokens": torch.empty(n_rows, dtype=torch.int32)}
        self._by_token: dict[str, Tensor] = {}
        if self._has_tokens:
            self._by_token["input_ids"] = torch.empty(n_tokens, dtype=torch.int32)
            self._by_token["token_mask"] = torch.empty(n_tokens, dtype=torch.bool)
        for name, spec in specs.items():
            memory, n = (self._by_token, n_tokens) if spec.per_token else (self._by_row, n_rows)
            memory[name] = torch.empty(n, spec.width, dtype=spec.dtype)
        self.begin(n_rows, n_tokens)

    def begin(self, n_rows: int, n_tokens: int) -> None:
        """Begins a shard of this size; what was in the buffer is gone."""
        self.tensors = {name: memory[:n_rows] for name, memory in self._by_row.items()}
        self.tensors |= {name: memory[:n_tokens] for name, memory in self._by_token.items()}
        self.tensors["sample_index"].fill_(-1)
        self._missing_rows, self._missing_tokens = n_rows, n_tokens
        assert all(len(self.tensors[name]) == n_rows for name in self._by_row), "a shard larger than was said"
        assert all(len(self.tensors[name]) == n_tokens for name in self._by_token), "a shard larger than was said"

    def put(self, batch: ActivationBatch) -> None:
        """Copies a batch, whose tensors are on the host, to its place.

        Raises:
            NotFiniteError: If it holds inf or NaN.
        """
        assert batch.place is not None, "a batch without a place in a plan cannot be stored"
        rows = slice(batch.place.first_row, batch.place.first_row + len(batch.sample_index))
        tokens = slice(batch.place.first_token, batch.place.first_token + len(batch.input_ids))
        assert (self.tensors["sample_index"][rows] == -1).all(), f"rows {rows} of shard {batch.place.shard} written twice"
        assert batch.activations.keys() == self._specs.keys(), f"got {list(batch.activations)}, planned {list(self._specs)}"
        assert int(batch.n_tokens.sum()) == len(batch.input_ids), "lengths and tokens of a batch disagree"
        refuse_not_finite(batch)
        _fill(self.tensors["sample_index"], rows, batch.sample_index)
        _fill(self.tensors["n_tokens"], rows, batch.n_tokens)
        if self._has_tokens:
            _fill(self.tensors["input_ids"], tokens, batch.input_ids)
            _fill(self.tensors["token_mask"], tokens, batch.token_mask)
        for name, values in batch.activations.items():
            assert values.dtype == self._specs[name].dtype, f"{name}: planned {self._specs[name].dtype}, got {values.dtype}"
            _fill(self.tensors[name], tokens if self._specs[name].per_token else rows, values)
        self._missing_rows -= len(batch.sample_index)
        self._missing_tokens -= len(batch.input_ids)

    @property
    def is_full(self) -> bool:
        """Whether every row and token has arrived."""
        assert (self._missing_rows == 0) == (self._missing_tokens == 0), "rows and tokens of a shard disagree"
        return self._missing_rows == 0


def _fill(target: Tensor, where: slice, values: Tensor) -> None:
    part = target[where]
    assert part.shape == values.shape, f"planned {list(part.shape)}, got {list(values.shape)}"
    part.copy_(values)


def write_shard(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes a shard beside its final name, flushes it to disk, and renames it.

    Raises:
        StoreError: If that fails, with the cause. Under the final name there is then nothing, or (if only the folder could not be
            flushed after the rename) the whole shard; never a part of it.
    """
    header = {METADATA_KEY: json.dumps({**metadata, "checksum": checksum(tensors, metadata)}, sort_keys=True)}
    try:
        with publishing(path) as temporary:
            save_file(dict(tensors), temporary, metadata=header)
            temporary.chmod(0o666 & ~_UMASK)  # safetensors makes it readable by its owner only
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"cannot write {path}: {error}; {_free_space(path)}. Nothing that was published is lost: "
            "make room and start the same command again, and it goes on from here"
        ) from error


def write_text_atomically(path: Path, text: str) -> None:
    """Writes a small text file beside its final name, flushes it to disk, and renames it: it is there whole, or as it was."""
    with publishing(path) as temporary:
        temporary.write_text(text)


@contextlib.contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """Gives a name beside a file's final one to write to, and publishes what was written; after an error nothing is left of it."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        yield temporary
        publish(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # after a rename there is none


def publish(temporary: Path, path: Path) -> None:
    """Flushes a file that was written beside its final name to disk, and renames it."""
    flush_to_disk(temporary)
    temporary.replace(path)
    flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """Waits until a file's or folder's content has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_space(path: Path) -> str:
    try:
        status = os.statvfs(path.parent)
    except OSError:
        return "the folder is not there"
    return f"{status.f_bavail * status.f_frsize / 1e6:,.0f} MB are free there"


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Returns the xxh3-128 over names, dtypes, shapes, bytes and metadata, in the order of names."""
    digest = xxhash.xxh3_128(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def open_shard(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns a shard's tensors, mapped from the file without reading them, and its metadata (with the checksum).

    Raises:
        StoreError: If there is no such file.
        CorruptShardError: If the file is truncated or not a shard.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})[METADATA_KEY])
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118  # not a mapping
    except FileNotFoundError as error:
        raise StoreError(f"there is no shard {path}: it was removed, or its folder is not there") from error
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CorruptShardError(
            f"{path} is not a whole shard ({type(error).__name__}: {error}). Delete it and start the run again: "
            "only what it held is computed anew"
        ) from error


def verify_shard(path: Path) -> None:
    """Reads a whole shard and compares it with its checksum.

    Raises:
        CorruptShardError: If a single bit differs.
    """
    tensors, metadata = open_shard(path)
    expected = metadata.pop("checksum", None)
    found = checksum(tensors, metadata)
    if found != expected:
        raise CorruptShardError(
            f"{path} is damaged: its checksum is {found}, written was {expected}. Delete it and start the run again: "
            "only what it held is computed anew"
        )
