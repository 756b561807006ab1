"""What is made of activations and saved to be applied again: one safetensors file, its description for people, and the split."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from exactivations.datamodules.activations import ActivationDataModule
from exactivations.store.described_file import write_described
from exactivations.store.shard import write_text_atomically

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
    """Writes <kind>.safetensors, its description as <kind>.json for people, and the data's split.json; see `read_described`.

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
    write_text_atomically(folder / SPLIT_FILE, json.dumps(data.split.to_json(data.source.sample_index)) + "\n")
    write_described(folder, kind, version, content, tensors)
