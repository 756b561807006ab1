"""One run at a time in a folder; its processes share it; a dead process holds nothing."""

import json
import multiprocessing
import os
import signal
import threading
import time

import pytest

from exactivations.store.errors import LockedRunError, StoreError
from exactivations.store.lock import RunLock

FORK = multiprocessing.get_context("fork")  # the children only take locks; they compute nothing


def nothing():
    pass


def acquire(folder, run_id, prepare=nothing, patience=0.2):
    lock = RunLock(folder, run_id)
    lock.acquire(prepare, patience)
    return lock


def child(target, *args):
    process = FORK.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def hold(folder, run_id, connection, slow=0.0):
    """Takes the lock, reports whether this process prepared the folder, and holds it until it is told to end."""
    prepared = []
    lock = RunLock(folder, run_id)
    try:
        lock.acquire(lambda: (time.sleep(slow), prepared.append(True)), patience=0.2)
    except LockedRunError as error:
        connection.send(error)
        return
    connection.send(bool(prepared))
    connection.recv()
    lock.release()


def holder(folder, run_id, slow=0.0):
    ours, theirs = FORK.Pipe()
    process = child(hold, folder, run_id, theirs, slow)
    return process, ours


def answer_of(connection):
    assert connection.poll(60)
    return connection.recv()


def test_a_second_run_is_refused_with_the_pid_of_the_first_while_that_lives(tmp_path):
    process, connection = holder(tmp_path, "first")
    assert answer_of(connection) is True
    with pytest.raises(LockedRunError, match=rf"in use by another run \(process {process.pid} on .*\)"):
        acquire(tmp_path, "second", prepare=lambda: pytest.fail("prepared a folder that another run holds"))
    connection.send("end")
    process.join()
    acquire(tmp_path, "second").release()


def test_another_process_is_refused_and_the_holder_is_not_disturbed(tmp_path):
    lock = acquire(tmp_path, "ours")
    _, connection = holder(tmp_path, "theirs")
    refusal = answer_of(connection)
    assert isinstance(refusal, LockedRunError) and f"process {os.getpid()} " in str(refusal)
    acquire(tmp_path, "ours", prepare=lambda: pytest.fail("prepared twice")).release()
    lock.release()


def test_siblings_of_one_run_share_the_lock_and_exactly_one_prepares(tmp_path):
    siblings = [holder(tmp_path, "run", slow=0.5) for _ in range(4)]  # slower than their patience: they wait for their own
    assert sorted(answer_of(connection) for _, connection in siblings) == [False, False, False, True]
    for process, connection in siblings:
        connection.send("end")
        process.join()


def test_a_sibling_that_finds_the_folder_prepared_but_unlocked_does_not_prepare_it_again(tmp_path):
    """What a kernel may do between holding a lock alone and sharing it."""
    acquire(tmp_path, "run").release()
    acquire(tmp_path, "run", prepare=lambda: pytest.fail("prepared twice")).release()


def test_the_run_is_locked_until_its_last_process_has_ended(tmp_path):
    (first, to_first), (second, to_second) = siblings = [holder(tmp_path, "run") for _ in range(2)]
    assert [answer_of(connection) for _, connection in siblings].count(True) == 1
    to_first.send("end")
    first.join()
    with pytest.raises(LockedRunError):
        acquire(tmp_path, "other")
    to_second.send("end")
    second.join()
    acquire(tmp_path, "other").release()


def test_a_process_killed_while_it_holds_the_lock_holds_nothing(tmp_path):
    process, connection = holder(tmp_path, "killed")
    answer_of(connection)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    prepared = []
    acquire(tmp_path, "next", prepare=lambda: prepared.append(True)).release()
    assert prepared == [True]


def test_a_process_killed_while_it_prepares_leaves_that_to_a_sibling(tmp_path):
    process, _ = holder(tmp_path, "run", slow=60)
    deadline = time.monotonic() + 30
    while '"pid"' not in ((tmp_path / ".lock").read_text() if (tmp_path / ".lock").exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    prepared = []
    acquire(tmp_path, "run", prepare=lambda: prepared.append(True)).release()
    assert prepared == [True]


def test_whoever_comes_while_the_first_run_ends_gets_the_folder_within_its_patience(tmp_path):
    lock = acquire(tmp_path, "first")
    timer = threading.Timer(0.3, lock.release)
    timer.start()
    acquire(tmp_path, "second", patience=30).release()
    timer.join()


def test_a_preparation_that_fails_gives_the_lock_back(tmp_path):
    def fail():
        raise ValueError("cannot prepare")

    with pytest.raises(ValueError, match="cannot prepare"):
        acquire(tmp_path, "first", prepare=fail)
    for run_id in ("first", "second"):  # a sibling, and a stranger
        prepared = []
        acquire(tmp_path, run_id, prepare=lambda done=prepared: done.append(True)).release()
        assert prepared == [True]


def test_releasing_twice_is_no_error(tmp_path):
    lock = acquire(tmp_path, "run")
    lock.release()
    lock.release()


def test_the_folder_is_made_and_the_lock_names_its_holder(tmp_path):
    lock = acquire(tmp_path / "a" / "b", "run")
    assert json.loads((tmp_path / "a" / "b" / ".lock").read_text())["pid"] == os.getpid()
    lock.release()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write to the run folder"):
        acquire(tmp_path / "file" / "run", "run")


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    import fcntl

    def refuse(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StoreError, match=r"cannot be locked: .*Operation not supported"):
        acquire(tmp_path, "run")
