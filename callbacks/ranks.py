"""Exchange between the ranks of one run."""

from typing import Any

import torch


def gather(value: Any) -> list[Any]:
    """Returns every rank's value, in rank order, to all of them. Every rank has to call it, also one that failed."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
