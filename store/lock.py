"""One run at a time in a folder, however many processes the run has; a dead process holds nothing.

The lock is the kernel's (`flock`), so it goes away with the process that holds it. All processes of one run know a common
run id. The first one there has the folder to itself while it prepares it; then all of them share the lock. Whoever comes with
another run id is refused as long as any process of the first run lives. The lock file tells who holds it and whether the folder
is prepared: a kernel may let another process in between holding the lock alone and sharing it.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from exactivations.store.errors import LockedRunError, StoreError

PATIENCE_SECONDS = 10.0  # a killed run's other processes need a moment to notice


class RunLock:
    """A lock on a run folder, shared by the processes of one run.

    Args:
        folder: The run folder; it is made if it is not there.
        run_id: Common to the processes of one run, different from that of any other.
    """

    def __init__(self, folder: Path, run_id: str) -> None:
        self._path = folder / ".lock"
        self._run_id = run_id
        self._descriptor: int | None = None

    def acquire(self, prepare: Callable[[], None], patience: float = PATIENCE_SECONDS) -> None:
        """Takes the lock. Exactly one process of a run, the first, calls `prepare` while it is alone in the folder.

        If `prepare` raises, the lock is given back, and the next process of the run tries anew.

        Raises:
            LockedRunError: If another run still holds the folder after `patience` seconds.
            StoreError: If the folder cannot be made or written to.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StoreError(f"cannot write to the run folder {self._path.parent}: {error}") from error
        self._descriptor = descriptor
        deadline = time.monotonic() + patience
        while True:
            if self._try(fcntl.LOCK_EX) and not self._is_prepared():
                self._write_holder(prepared=False)
                try:
                    prepare()
                except BaseException:
                    self.release()
                    raise
                self._write_holder(prepared=True)
            if self._try(fcntl.LOCK_SH):
                if self._is_prepared():
                    return
                self._try(fcntl.LOCK_UN)
            elif self._read_holder().get("run_id") == self._run_id:
                deadline = time.monotonic() + patience  # our own first process is preparing the folder
            if time.monotonic() > deadline:
                holder = self._read_holder()
                self.release()
                raise LockedRunError(
                    f"{self._path.parent} is in use by another run (process {holder.get('pid')} on {holder.get('host')}). "
                    "Wait for it, end it, or write to another folder"
                )
            time.sleep(0.05)

    def release(self) -> None:
        """Gives the lock back; without effect if it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _try(self, operation: int) -> bool:
        assert self._descriptor is not None
        try:
            fcntl.flock(self._descriptor, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise StoreError(f"{self._path} cannot be locked: {error}; choose a folder on a file system with locks") from error
        return True

    def _is_prepared(self) -> bool:
        holder = self._read_holder()
        return holder.get("run_id") == self._run_id and holder.get("prepared") is True

    def _write_holder(self, *, prepared: bool) -> None:
        assert self._descriptor is not None
        holder = {"run_id": self._run_id, "pid": os.getpid(), "host": socket.gethostname(), "prepared": prepared}
        try:
            os.pwrite(self._descriptor, json.dumps(holder).encode().ljust(512), 0)
        except OSError as error:
            self.release()
            raise StoreError(f"cannot write to the run folder {self._path.parent}: {error}") from error

    def _read_holder(self) -> dict[str, str | int | bool]:
        assert self._descriptor is not None
        text = os.pread(self._descriptor, 512, 0).decode(errors="replace").strip()
        try:
            holder: dict[str, str | int | bool] = json.loads(text or "{}")
        except ValueError:  # being written at this moment
            return {}
        return holder
