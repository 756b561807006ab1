"""Getting activations off the device without stopping it: copies into reused pinned buffers, beside the computation."""

import queue
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from exactivations.store.batches import ActivationBatch


class HostCopier:
    """Starts copies of batches to the host and says when they may be read.

    On a CUDA device a copy goes through one of `n_slots` pinned buffers on a stream of its own. When all are in use, `start`
    waits for one to be released: back-pressure, nothing is dropped. Batches on the host pass through as they are; from other
    devices they are copied at once.

    Args:
        device: Where the batches are.
        n_slots: How many copies may be under way or waiting to be read.
    """

    def __init__(self, device: torch.device, n_slots: int = 4) -> None:
        self._device = device
        # torch has no annotations there
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._free: queue.SimpleQueue[dict[str, Tensor]] = queue.SimpleQueue()
        for _ in range(n_slots):
            self._free.put({})

    def start(self, batch: ActivationBatch, check: Callable[[], None]) -> "HostCopy":
        """Starts the copy of a batch; `check` is called while waiting for a buffer, and may raise."""
        if self._stream is None:
            if self._device.type != "cpu":
                batch = replace(batch, activations={name: values.cpu() for name, values in batch.activations.items()})
            return HostCopy(batch, wait=lambda: None, release=lambda: None)
        slot = self._wait_for_slot(check)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        copied = {}
        with torch.cuda.stream(self._stream):
            for name, values in batch.activations.items():
                values.record_stream(self._stream)  # its memory is not reused before the copy has read it
                copied[name] = _buffer(slot, name, values).copy_(values, non_blocking=True)
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record(self._stream)
        return HostCopy(replace(batch, activations=copied), wait=done.synchronize, release=lambda: self._free.put(slot))

    def _wait_for_slot(self, check: Callable[[], None]) -> dict[str, Tensor]:
        while True:
            check()
            try:
                return self._free.get(timeout=0.5)
            except queue.Empty:
                continue


class HostCopy:
    """A batch on its way to the host. Read it after `wait()` and before `release()` only."""

    def __init__(self, batch: ActivationBatch, wait: Callable[[], None], release: Callable[[], None]) -> None:
        self.batch, self.wait, self.release = batch, wait, release


def _buffer(slot: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """Returns pinned memory of the shape and dtype of `like`, the slot's own as long as it is large enough."""
    held = slot.get(name)
    if held is None or held.numel() < like.numel() or held.dtype != like.dtype:
        held = slot[name] = torch.empty(like.numel(), dtype=like.dtype, pin_memory=True)
    return held[: like.numel()].view(like.shape)
