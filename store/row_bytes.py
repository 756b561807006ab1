"""Rows of a tensor as opaque items, so that they are copied by index at the speed of memory, in any dtype."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def row_bytes(tensor: Tensor) -> npt.NDArray[Any]:
    """Returns the rows of a contiguous tensor [n, ...] on the host, n at least 1, as an array [n] that shares their memory.

    Indexing it by an array moves each row with one copy: some two times as fast as indexing the tensor, and NumPy has no bfloat16.
    """
    flat = tensor.reshape(len(tensor), -1).view(torch.uint8).numpy()
    rows: npt.NDArray[Any] = flat.view(np.dtype((np.void, flat.shape[1])))[:, 0]
    return rows
