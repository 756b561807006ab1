"""Ranks that another process started end with it, also while they wait for it in a collective."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PARENT_VARIABLE = "EXACTIVATIONS_RANK_0"
_watching = threading.Event()


@contextmanager
def named_to_children() -> Iterator[None]:
    """Tells the processes that are started inside the `with` block this process's number, as the parent that they watch.

    So a child whose parent is gone before the child has started knows it, too.
    """
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[PARENT_VARIABLE]


def end_with_parent(local_rank: int, poll_seconds: float = 1.0) -> None:
    """Ends this process at once when its parent is gone, if it is not the first rank of its node. Calling it twice is harmless.

    A killed rank 0 would otherwise leave its children waiting for it until a time-out, some of them with the run folder's lock.
    Ending at once loses nothing: a shard is published whole or not at all.
    """
    if local_rank and not _watching.is_set():
        _watching.set()
        parent = int(os.environ.get(PARENT_VARIABLE, os.getppid()))
        threading.Thread(target=_watch, args=(parent, poll_seconds), name="process-watch", daemon=True).start()


def _watch(parent: int, poll_seconds: float) -> None:
    while os.getppid() == parent:
        time.sleep(poll_seconds)
    os._exit(1)
