"""Ranks that another process started end with it, also while they wait for it in a collective."""

import os
import threading
import time

PARENT_VARIABLE = "EXACTIVATIONS_RANK_0"
_watching = threading.Event()


def end_with_parent(local_rank: int, poll_seconds: float = 1.0) -> None:
    """Ends this process at once when its parent is gone, if it is not the first rank of its node. Calling it twice is harmless.

    A killed rank 0 would otherwise leave its children waiting for it until a time-out, some of them with the run folder's lock.
    Ending at once loses nothing: a shard is published whole or not at all. The first rank leaves its process number in the
    environment, so that a child that starts when its parent is gone already knows.
    """
    if local_rank == 0:
        os.environ[PARENT_VARIABLE] = str(os.getpid())
    elif not _watching.is_set():
        _watching.set()
        parent = int(os.environ.get(PARENT_VARIABLE, os.getppid()))
        threading.Thread(target=_watch, args=(parent, poll_seconds), name="process-watch", daemon=True).start()


def _watch(parent: int, poll_seconds: float) -> None:
    while os.getppid() == parent:
        time.sleep(poll_seconds)
    os._exit(1)
