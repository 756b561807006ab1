"""Exchange between the ranks of one run."""

from typing import Any

import lightning.pytorch as pl
import torch

from exactivations.store.errors import StoreError


def gather(value: Any) -> list[Any]:
    """Returns every rank's value, in rank order, to all of them. Every rank has to call it, also one that failed."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def wait_for_all_ranks(trainer: pl.Trainer) -> None:
    """Waits until every rank has published its shards.

    Raises:
        StoreError: If another rank ended before.
    """
    try:
        trainer.strategy.barrier("activations_written")
    except RuntimeError as error:  # what torch.distributed raises when the other side is gone
        raise StoreError(
            "another rank ended before it had written all of its shards; what was published stays. Start the same command "
            "again, and it goes on from here"
        ) from error
