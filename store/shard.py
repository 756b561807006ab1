"""One shard: a safetensors file that exists whole or not at all, and carries a checksum of everything in it."""

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from exactivations.store.errors import CorruptShardError, StoreError
from exactivations.store.tensor_file import METADATA_KEY, TensorFile, checksum, shapes_of

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_shard(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes a shard beside its final name, flushes it to disk, and renames it.

    Raises:
        StoreError: If that fails, with the cause. Under the final name there is then nothing, or (if only the folder could not be
            flushed after the rename) the whole shard; never a part of it.
    """
    with (
        writing(path),
        publishing(path) as temporary,
        contextlib.closing(TensorFile(temporary, shapes_of(tensors), metadata)) as file,
    ):
        for name, tensor in tensors.items():
            file.append(name, tensor)
        file.finish()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the system says when a shard cannot be written into an error that says what to do."""
    try:
        yield
    except OSError as error:
        remedy = "make room" if error.errno in NO_ROOM else "see what ails that file system"
        raise StoreError(
            f"cannot write {path}: {error}; {_free_space(path)}. Nothing that was published is lost: {remedy} and start the same "
            "command again, and it goes on from here"
        ) from error


def write_text_atomically(path: Path, text: str) -> None:
    """Writes a small text file beside its final name, flushes it to disk, and renames it: it is there whole, or as it was."""
    with publishing(path) as temporary:
        temporary.write_text(text)


@contextlib.contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """Gives a name beside a file's final one to write to, and publishes what was written; after an error nothing is left of it."""
    temporary = temporary_name(path)
    try:
        yield temporary
        publish(temporary, path)
    finally:
        remove(temporary)


def temporary_name(path: Path) -> Path:
    """Returns a name beside a file's final one that no other process uses."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def remove(temporary: Path) -> None:
    """Removes a file beside its final name, if it is still there (after a rename it is not) and can be removed."""
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


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
