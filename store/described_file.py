"""One safetensors file with its description inside, and the description again as JSON beside it, for people."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from exactivations.store.errors import CorruptShardError, StoreError
from exactivations.store.shard import open_shard, verify_shard, write_shard, write_text_atomically


def write_described(path: str | Path, kind: str, version: int, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Writes tensors and their description, and the description beside them with the suffix .json.

    Args:
        path: The file, *.safetensors, or a folder, where it is called by its kind. Folders are made.
        kind: What it is.
        version: Of the format of this kind.
        content: The description. No order of names is kept: what has one is a list.
        tensors: By name.

    Returns:
        The path of the file.

    Raises:
        StoreError: If it cannot be written.
    """
    path = path_of(path, kind)
    described = {"format_version": version, "kind": kind, **content}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_shard(path, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, described)
        write_text_atomically(path.with_suffix(".json"), json.dumps(described, indent=1) + "\n")
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error}") from error
    return path


def read_described(path: str | Path, kind: str, version: int, command: str) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Reads what `write_described` wrote, every byte against its checksum: the file's path, tensors and description.

    Args:
        path: The folder, or the file.
        kind: What it must be.
        version: Of the format that is read.
        command: Which command writes it, for messages.

    Raises:
        StoreError: If there is none, or it is of another kind or version.
        CorruptShardError: If the file is damaged.
    """
    path = path_of(path, kind)
    if not path.is_file():
        raise StoreError(f"{path} does not exist: name what `exactivations {command}` wrote (--out)")
    try:
        verify_shard(path)
        tensors, content = open_shard(path)
    except CorruptShardError as error:
        raise CorruptShardError(f"{path} is damaged, or was not written by `exactivations {command}`: copy it again") from error
    if content.get("kind") != kind or content.get("format_version") != version:
        raise StoreError(
            f"{path} holds no {kind} of version {version}, but {content.get('kind')} of version {content.get('format_version')}: "
            f"make it anew with `exactivations {command}`"
        )
    return path, tensors, content


def path_of(path: str | Path, kind: str) -> Path:
    """Returns the file's path: the path itself if it ends in .safetensors, or else <path>/<kind>.safetensors."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / f"{kind}.safetensors"
