"""Exchange between the ranks of one run."""

import traceback
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch

from exactivations.store.errors import ExactivationsError, StoreError


def gather(value: Any) -> list[Any]:
    """Returns every rank's value, in rank order, to all of them. Every rank has to call it, also one that failed.

    Raises:
        StoreError: If another rank is gone.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    try:
        torch.distributed.all_gather_object(values, value)
    except RuntimeError as error:  # what torch.distributed raises when the other side is gone
        raise StoreError("another rank ended before; it says why. Start the same command again when that is mended") from error
    return values


def failure_of(work: Callable[[], None], doing: str, note: str = "") -> ExactivationsError | None:
    """Does a rank's work and returns what went wrong, for `raise_together`: the other ranks wait for this one.

    Args:
        work: What is done.
        doing: Says of an error that we did not foresee who failed to do what.
        note: What that means, at the end of what is said.
    """
    try:
        work()
    except ExactivationsError as error:
        return error
    except Exception as error:
        traceback.print_exc()
        return StoreError(f"{doing}: {type(error).__name__}: {error}{note}")
    return None


def raise_together(failures: Iterable[ExactivationsError | None]) -> None:
    """Raises the first failure of any rank; called on all of them with the same ones."""
    failure = next((failure for failure in failures if failure is not None), None)
    if failure is not None:
        failure.known_to_all_ranks = True
        raise failure


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
