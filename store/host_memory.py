"""Memory for tensors that are large and written once."""

import math

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, as in torch's own memory: kernels may sum in another order where a tensor begins elsewhere


def empty_on_host(*shape: int, dtype: torch.dtype) -> Tensor:
    """Returns a tensor [*shape] on the host whose content is arbitrary, in NumPy's memory.

    NumPy asks the system for huge pages where an array is large, torch does not: to write to a fresh tensor of some MB then
    takes several times as long as to copy it.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(n_bytes + ALIGNMENT, dtype=np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    return torch.from_numpy(memory)[first : first + n_bytes].view(dtype).view(shape)


def empty_on(device: torch.device, *shape: int, dtype: torch.dtype) -> Tensor:
    """Returns a tensor [*shape] whose content is arbitrary on a device; on the host see `empty_on_host`."""
    return empty_on_host(*shape, dtype=dtype) if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)
