"""What is made of activations and saved to be applied again: one safetensors file, its description for people, and the split."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from exactivations.datamodules.activations import ActivationDataModule
from exactivations.store.errors import CorruptShardError, StoreError
from exactivations.store.shard import open_shard, verify_shard, write_shard, write_text_atomically

SPLIT_FILE = "split.json"


@dataclass(frozen=True)
class Saved:
    """What is known of something saved.

    Attributes:
        path: The file it is in.
        content: Its description, as in the .json beside it.
    """

    path: Path
    content: dict[str, Any]

    @property
    def about(self) -> dict[str, Any]:
        """How model and tokenizer were called."""
        return dict(self.content["about"])

    @property
    def identity(self) -> dict[str, Any]:
        """What they are; see `origin_of`."""
        return dict(self.content["identity"])

    @property
    def classes(self) -> list[str]:
        """The names of the classes; empty for real values."""
        return list(self.content["classes"])


def write_saved(
    folder: str | Path,
    kind: str,
    version: int,
    content: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    data: ActivationDataModule,
) -> None:
    """Writes <kind>.safetensors, its description as <kind>.json for people, and the data's split.json.

    Args:
        folder: Where; it is made.
        kind: What it is.
        version: Of the format of this kind.
        content: The description.
        tensors: By name.
        data: What it was made of.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    described = {"format_version": version, "kind": kind, **content}
    write_text_atomically(folder / SPLIT_FILE, json.dumps(data.split.to_json(data.source.sample_index)) + "\n")
    write_shard(folder / f"{kind}.safetensors", {name: tensor.contiguous() for name, tensor in tensors.items()}, described)
    write_text_atomically(folder / f"{kind}.json", json.dumps(described, indent=1) + "\n")


def read_saved(path: str | Path, kind: str, version: int, command: str) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Reads what `write_saved` wrote, and every byte of it against its checksum: the file's path, tensors and description.

    Args:
        path: The folder, or the file.
        kind: What it must be.
        version: Of the format that is read.
        command: Which command writes it, for messages.

    Raises:
        StoreError: If there is none, or it is of another kind or version.
        CorruptShardError: If the file is damaged.
    """
    path = Path(path)
    path = path / f"{kind}.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise StoreError(f"{path} does not exist: name the folder that `exactivations {command}` wrote (--out)")
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
