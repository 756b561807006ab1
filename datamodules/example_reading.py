"""The items that an ActivationDataModule's loaders give: whole vectors, or the examples of a step."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import psutil
import torch
from torch import Tensor
from torch.utils.data import Dataset

from exactivations.datamodules.examples import Examples, IntArray
from exactivations.store.errors import InvalidInputError


class Read(Protocol):
    """Reads examples of a part by number, of some vectors."""

    def __call__(self, names: Sequence[str], numbers: IntArray) -> Examples: ...  # noqa: D102


class WholeVectors(Dataset[Examples]):
    """Each vector's rows of a part, dealt to the ranks.

    Every rank has as many items, the last of which may be without vectors: after each step of a fit Lightning waits for all ranks.

    Args:
        read: Reads examples.
        numbers: int64 [n], those of the part.
        names: The vectors of all ranks.
        part: Its name, for messages.
        rank: Whose vectors are given.
        world_size: How many ranks there are.
    """

    def __init__(self, read: Read, numbers: IntArray, names: Sequence[str], part: str, rank: int = 0, world_size: int = 1) -> None:
        self._read, self._numbers, self._part = read, numbers, part
        self._names, self._n_items = list(names)[rank::world_size], math.ceil(len(names) / world_size)

    def __len__(self) -> int:
        return self._n_items

    def __getitem__(self, item: int) -> Examples:
        if item >= self._n_items:
            raise IndexError(item)
        if item >= len(self._names):
            return self._read([], self._numbers)
        name = self._names[item]
        width = self._read([name], self._numbers[:1]).rows[name].shape[1]
        needed, free = 8 * len(self._numbers) * width, psutil.virtual_memory().available
        if needed > free:
            raise InvalidInputError(
                f"{name} has {len(self._numbers):,} rows of {width:,} values for {self._part}: {needed / 2**30:.1f} GiB at once, "
                f"and {free / 2**30:.1f} GiB of memory are free. Train in steps (--batch-size), or on fewer samples"
            )
        return self._read([name], self._numbers)


class Steps(Dataset[Examples]):
    """The examples that a sampler chooses, of all vectors.

    Args:
        read: Reads examples by number, of a step of so many on all ranks.
    """

    def __init__(self, read: Callable[[IntArray, int], Examples]) -> None:
        self._read = read

    def __getitem__(self, item: tuple[IntArray, int]) -> Examples:
        return self._read(*item)


def refuse_not_finite_rows(name: str, rows: Tensor, sample_index: IntArray) -> None:
    """Refuses rows [n, D] with inf or NaN in them.

    Args:
        name: The vector.
        rows: Its rows.
        sample_index: int64 [n], whose each is.

    Raises:
        InvalidInputError: Naming the first one's sample.
    """
    if not rows.numel() or torch.isfinite(torch.stack(torch.aminmax(rows))).all():  # NaN comes through; isfinite of all takes long
        return
    wrong = (~torch.isfinite(rows)).any(dim=1).nonzero().flatten()
    raise InvalidInputError(
        f"sample {sample_index[int(wrong[0])]}: {name} is not finite ({len(wrong):,} of {len(rows):,} rows): leave the sample out, "
        "or extract in a dtype with more range"
    )
