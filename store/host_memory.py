"""Memory for tensors that are large and written once."""

import numpy as np
import torch
from torch import Tensor


def empty_on_host(*shape: int, dtype: torch.dtype) -> Tensor:
    """Returns a tensor [*shape] on the host whose content is arbitrary, in NumPy's memory.

    NumPy asks the system for huge pages where an array is large, torch does not: to write to a fresh tensor of some MB then
    takes several times as long as to copy it.
    """
    return torch.from_numpy(np.empty(shape, dtype=f"i{dtype.itemsize}")).view(dtype)


def empty_on(device: torch.device, *shape: int, dtype: torch.dtype) -> Tensor:
    """Returns a tensor [*shape] whose content is arbitrary on a device; on the host see `empty_on_host`."""
    return empty_on_host(*shape, dtype=dtype) if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)
