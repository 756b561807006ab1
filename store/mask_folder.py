"""Reading a folder of per-batch masks as other tools save them: `batch_<i>/…` or `batch_<i>.safetensors`, or .pt.

Such a folder says nowhere which sample a row is. The only rule that holds for every list of batch sizes is to count: row r of
batch b is sample (sizes of the batches before b) + r. Nothing in a file is ever unpickled.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor

from exactivations.store.errors import InvalidInputError

MASK_NAMES = ("attention_mask", "attention_masks", "token_mask", "mask")
IDS_NAME = "input_ids"
UNNAMED = "tensor"  # what a tensor is called inside a file that is itself named after it
SUFFIXES = (".safetensors", ".pt")
BATCH = re.compile(r"batch_([0-9]+)")


@dataclass(frozen=True)
class MaskBatches:
    """The masks of one run, in numeric order of its batches.

    Attributes:
        folder: Where they were read.
        masks: bool [B, L] of each batch; B and L differ from batch to batch.
        ids: int32 [B, L] of each batch, padding included; None if the folder holds none.
        names: What the masks are called in there; almost always one name.
    """

    folder: Path
    masks: tuple[Tensor, ...]
    ids: tuple[Tensor, ...] | None
    names: frozenset[str]

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def sizes(self) -> list[int]:
        """Samples in each batch."""
        return [len(mask) for mask in self.masks]

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """int64 [batches + 1], how many samples come before each batch; the last one is their number."""
        return np.cumsum([0, *self.sizes], dtype=np.int64)

    def place(self, sample: int) -> tuple[int, int]:
        """Returns the batch that holds a sample, counted from 0 over all batches, and its row in there."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} is not in {self.folder}: it holds {len(self)}")
        batch = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return batch, sample - int(self.starts[batch])

    def mask(self, sample: int) -> Tensor:
        """Returns a sample's mask with its padding, bool [L]."""
        batch, row = self.place(sample)
        return self.masks[batch][row]

    def row_ids(self, sample: int) -> npt.NDArray[np.int32]:
        """Returns a sample's ids with their padding, int32 [L]."""
        assert self.ids is not None
        batch, row = self.place(sample)
        ids: npt.NDArray[np.int32] = self.ids[batch][row].numpy()
        return ids


def read_mask_batches(folder: str | Path, mask_name: str | None = None) -> MaskBatches:
    """Reads all masks of a folder, and the input_ids that lie beside them, into memory (one byte and four for each position).

    A batch is a folder `batch_<i>` (searched with all its subfolders) or a file `batch_<i>.safetensors` or `.pt`. Its mask is
    the tensor named attention_mask, attention_masks, token_mask or mask, in this order, or else the only one there is. In files
    with one tensor called "tensor", and in .pt files that are a bare tensor, the name is the file's.

    Args:
        folder: The run's folder, in which the batches lie.
        mask_name: The mask's name, or its place as an error message lists it, if it is none of those.

    Raises:
        InvalidInputError: If there are no batches, one is missing or doubled, a file cannot be read without running code of
            its own, or a tensor is no [B, L] of zeros and ones; or if only some batches have ids, or ids of another shape.
    """
    folder = Path(folder)
    batches = [_read_batch(path, mask_name) for path in _batch_paths(folder)]
    ids = [batch.ids for batch in batches if batch.ids is not None]
    if ids and len(ids) < len(batches):
        without = next(number for number, batch in enumerate(batches) if batch.ids is None)
        raise InvalidInputError(
            f"{folder}: {len(ids)} of {len(batches)} batches hold {IDS_NAME}, batch {without} does not; "
            "save the ids of every batch, or remove them from all"
        )
    names = frozenset(batch.name for batch in batches)
    return MaskBatches(folder, tuple(batch.mask for batch in batches), tuple(ids) or None, names)


def _batch_paths(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InvalidInputError(f"{folder} is not a folder; name the one that holds batch_0, batch_1, ...")
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if not path.name.startswith("batch_") or not (path.is_dir() or path.suffix in SUFFIXES):
            continue
        match = BATCH.fullmatch(path.name if path.is_dir() else path.stem)
        if match is None:
            raise InvalidInputError(f"{path} is neither batch_<number> nor a file of that name: rename it or move it elsewhere")
        number = int(match[1])
        if number in found:
            raise InvalidInputError(f"{folder} holds batch {number} twice, {found[number].name} and {path.name}: remove one")
        found[number] = path
    if not found:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise InvalidInputError(f"{folder} holds no batch_<i> folders and no batch_<i>.safetensors or .pt files, but {there}")
    numbers = sorted(found)
    for expected, number in enumerate(numbers):
        if number != expected:
            raise InvalidInputError(
                f"{folder}: batch_{expected} is missing, the next one there is {found[number].name} (of {len(found)} batches). "
                "Samples are counted over all batches from batch_0 on, so each one is needed: complete the folder, or save it anew"
            )
    return [found[number] for number in numbers]


@dataclass(frozen=True)
class _Found:
    """A tensor in a batch: what it is called, where it is (unique within its batch), and how to read it."""

    name: str
    place: str
    read: Callable[[], Tensor]


class _Batch(NamedTuple):
    name: str
    mask: Tensor
    ids: Tensor | None


def _read_batch(path: Path, mask_name: str | None) -> _Batch:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    found = [tensor for file in files for tensor in _tensors_of(file, path)]
    mask = _find_mask(found, path, mask_name)
    where = f"{path}: {mask.place}"
    values = _as_mask(mask.read(), where)
    ids = _find_ids([tensor for tensor in found if tensor.name == IDS_NAME], mask, path)
    return _Batch(mask.name, values, None if ids is None else _as_ids(ids.read(), values, f"{path}: {ids.place}"))


def _tensors_of(file: Path, batch: Path) -> list[_Found]:
    inside = file.relative_to(batch) if file != batch else None
    if file.suffix == ".pt":
        readers: dict[str, Callable[[], Tensor]] = {key: partial(_same, tensor) for key, tensor in _load_pt(file).items()}
    else:
        readers = {key: partial(_read_safetensor, file, key) for key in _safetensors_keys(file)}
    found = []
    for key, read in readers.items():
        if inside is None:
            found.append(_Found(key, key, read))
        elif key == UNNAMED:
            found.append(_Found(inside.stem, inside.with_suffix("").as_posix(), read))
        else:
            found.append(_Found(key, f"{inside.as_posix()}:{key}", read))
    return found


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _safetensors_keys(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except Exception as error:  # SafetensorError, OSError, and what else a damaged header raises
        raise InvalidInputError(f"{file} cannot be read: {error}; save this batch anew") from error


def _read_safetensor(file: Path, key: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(key)
        return tensor


def _load_pt(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of arbitrary bytes can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidInputError(
            f"{file} holds more than tensors, or is damaged; it is not opened: unpickling runs what it holds ({reason}). "
            "Save this batch as safetensors, or as a dict of tensors"
        ) from error
    tensors = _flat(content, "")
    if not tensors:
        raise InvalidInputError(f"{file} holds a {type(content).__name__} without a tensor; expected a tensor or a dict of tensors")
    return tensors


def _flat(content: Any, prefix: str) -> dict[str, Tensor]:
    if isinstance(content, Tensor):
        return {prefix or UNNAMED: content}
    if not isinstance(content, dict):
        return {}
    nested = [_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in content.items()]
    return {name: tensor for tensors in nested for name, tensor in tensors.items()}


def _find_mask(found: list[_Found], path: Path, mask_name: str | None) -> _Found:
    others = [tensor for tensor in found if tensor.name != IDS_NAME]
    names = MASK_NAMES if mask_name is None else (mask_name,)
    matches = next((m for name in names if (m := [t for t in found if name in (t.name, t.place)])), [])
    if not matches and mask_name is None and len(others) == 1:
        matches = others
    if len(matches) == 1:
        return matches[0]
    there = ", ".join(tensor.place for tensor in found) or "no tensor in a .safetensors or .pt file"
    problem = "more than one mask could be meant" if matches else f"there is no tensor named {' or '.join(names)}"
    raise InvalidInputError(f"{path}: {problem}; it holds {there}. Say which one with --mask-name")


def _find_ids(found: list[_Found], mask: _Found, path: Path) -> _Found | None:
    """Returns the ids in the mask's own folder if there are several."""
    if len(found) > 1:
        folder = mask.place.rpartition("/")[0]
        found = [ids for ids in found if ids.place.rpartition("/")[0] == folder] or found
    if len(found) > 1:
        raise InvalidInputError(
            f"{path}: more than one {IDS_NAME} could belong to {mask.place}: {', '.join(ids.place for ids in found)}; keep one"
        )
    return found[0] if found else None


def _as_mask(tensor: Tensor, where: str) -> Tensor:
    if tensor.layout != torch.strided or tensor.ndim != 2 or 0 in tensor.shape:
        raise InvalidInputError(f"{where} must be [B, L], a row of positions for each sample; got shape {list(tensor.shape)}")
    wrong = ((tensor != 0) & (tensor != 1)).nonzero()
    if len(wrong):
        row, position = wrong[0].tolist()
        raise InvalidInputError(
            f"{where} has {tensor[row, position].item()} in row {row} at position {position}; a mask has only 0 and 1. "
            "If it is another tensor, say which one is the mask with --mask-name"
        )
    return tensor.bool()


def _as_ids(tensor: Tensor, mask: Tensor, where: str) -> Tensor:
    if tensor.layout != torch.strided or tensor.shape != mask.shape:
        raise InvalidInputError(f"{where} has shape {list(tensor.shape)}, its mask {list(mask.shape)}; they must be equal")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise InvalidInputError(f"{where} has dtype {tensor.dtype}; token ids are integers")
    if int(tensor.max()) >= 2**31 or int(tensor.min()) < -(2**31):
        raise InvalidInputError(f"{where} has values from {int(tensor.min())} to {int(tensor.max())}, which are no token ids")
    return tensor.to(torch.int32).contiguous()
