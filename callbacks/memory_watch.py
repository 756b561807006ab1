"""MemoryWatch: tells how much memory a run took at most, and stops it before there is none left."""

import math
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import lightning.pytorch as pl
import psutil
import torch
from lightning.pytorch.callbacks import Callback

from exactivations.store.errors import InvalidInputError, StoreError

LOOK_SECONDS = 1.0  # a look costs a few system calls: too much for every batch of a tiny model, nothing once a second
MOST_KEPT_FREE = 4 * 2**30  # a share of a huge machine would be more than any batch or shard takes
PROC, SYS = Path("/proc"), Path("/sys")


class MemoryWatch(Callback):
    """Stops a run with a clear message before the machine swaps, or the system ends a process of a container or a job.

    After a batch, but at most once a second, it looks at what is left of the machine's memory and under the limit of each control
    group around this process. Every rank watches for itself. Afterwards `host_peak`, `device_peak` and `in_words` tell the most
    that this process held.

    Args:
        least_free: Share of the memory that must stay free, though never more than 4 GiB; 0 watches nothing.

    Raises:
        StoreError: After a batch, on this rank, if less is left.
    """

    def __init__(self, least_free: float = 0.05) -> None:
        if not 0 <= least_free < 1:
            raise InvalidInputError(
                f"least_free is a share of the memory, at least 0 (which watches nothing) and below 1, got {least_free}"
            )
        self.least_free = least_free
        self._device: torch.device | None = None
        self._next_look = -math.inf

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets the device's earlier peak; the weights are loaded by now, and stay counted."""
        self._device, self._next_look = pl_module.device, -math.inf
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Looks, if the last look was long enough ago."""
        now = time.monotonic()
        if self.least_free and now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            refuse_shortage(self.least_free)

    @property
    def host_peak(self) -> int:
        """The most bytes that this process had in the host's memory at once, since it was started."""
        return peak_resident()

    @property
    def device_peak(self) -> int | None:
        """The most bytes that tensors took on the device at once, since the run began; None on CPU, or if there was no run."""
        if self._device is None or self._device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self._device)

    def in_words(self) -> str:
        """Returns this rank's peaks: "peak memory 1.2 GiB host, 3.4 GiB device", the device only if it is a GPU."""
        device = "" if self.device_peak is None else f", {self.device_peak / 2**30:.1f} GiB device"
        return f"peak memory {self.host_peak / 2**30:.1f} GiB host{device}"


@dataclass(frozen=True)
class Room:
    """Memory from which this process may take: the machine's, or what a control group may hold; in bytes."""

    owner: str
    total: int
    left: int

    def must_stay(self, share: float) -> int:
        """Returns how much of it must stay free."""
        return min(int(share * self.total), MOST_KEPT_FREE)


def refuse_shortage(share: float) -> None:
    """Looks once.

    Raises:
        StoreError: If less than this share, or less than 4 GiB if that is less, is left of any memory from which we may take.
    """
    # each against its own total: a machine may be short of memory though a small container in it has even less left
    room = min(rooms(), key=lambda room: room.left - room.must_stay(share))
    if room.left < room.must_stay(share):
        left, total, must, held = (n / 2**30 for n in (room.left, room.total, room.must_stay(share), _resident()))
        raise StoreError(
            f"stopped before {room.owner} runs out of memory: {left:.2f} GiB of {total:.2f} GiB are left "
            f"(at least {must:.2f} GiB must stay free), this process holds {held:.2f} GiB. What was published stays: free memory "
            "and start the same command again, and it goes on from there; or begin anew with --overwrite and a smaller "
            "--token-budget (or, where means are taken, --shard-tokens)"
        )


def rooms(proc: Path = PROC, sys_folder: Path = SYS) -> list[Room]:
    """Returns the machine's memory, and that of each control group around this process that has a limit.

    Args:
        proc: Where the system tells about processes.
        sys_folder: Where control groups are mounted, in fs/cgroup.
    """
    machine = psutil.virtual_memory()
    return [Room("the machine", machine.total, machine.available), *_limited_groups(proc, sys_folder)]


@dataclass(frozen=True)
class _Files:
    mount: str
    limit: str
    used: str
    cache: tuple[str, ...]


# What the kernel drops when a group is at its limit. The active pages belong to it, as in the kernel's own MemAvailable: of a
# long run's cache nearly all can be active, and a job that had only read and written files would seem to be out of memory.
_V1 = _Files("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = _Files("", "memory.max", "memory.current", ("inactive_file", "active_file"))


def _limited_groups(proc: Path, sys_folder: Path) -> Iterator[Room]:
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        files, group = _V1 if controllers else _V2, PurePosixPath(path)
        # inside a container the path is often the host's: of it only the root is there, and that is the container's own group
        for ancestor in (group, *group.parents):
            room = _room_of(str(ancestor), sys_folder / "fs/cgroup" / files.mount / str(ancestor).lstrip("/"), files)
            if room is not None:
                yield room


def _room_of(group: str, folder: Path, files: _Files) -> Room | None:
    try:
        limit, used = (folder / files.limit).read_text().strip(), int((folder / files.used).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # the machine's root group has no limit, and a group may end while we look
        return None
    if limit == "max":
        return None
    cache = sum(int(statistics.get(name, 0)) for name in files.cache)
    return Room(f"the control group {group}", int(limit), int(limit) - max(0, used - cache))


def _resident() -> int:
    resident: int = psutil.Process().memory_info().rss
    return resident


def peak_resident(proc: Path = PROC) -> int:
    """Returns the most bytes that this process had in memory at once.

    On Linux that is VmHWM: what getrusage tells there includes the parent's, from before the program was started in its child.
    """
    if sys.platform == "win32":
        peak: int = psutil.Process().memory_info().peak_wset
        return peak
    import resource  # not on Windows

    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB$", (proc / "self" / "status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
