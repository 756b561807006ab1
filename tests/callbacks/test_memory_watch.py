"""A run stops before memory runs out, wherever the limit is, and goes on to the same bytes; its peaks are told."""

import resource
from types import SimpleNamespace

import psutil
import pytest
import torch

from exactivations.callbacks import memory_watch
from exactivations.callbacks.memory_watch import MemoryWatch, Room, peak_resident, refuse_shortage, rooms
from exactivations.store.errors import InvalidInputError, StoreError
from tests.callbacks.conftest import content, stamps

MIB, GIB = 2**20, 2**30
# The kernel counts pages on each core by itself and adds them up now and then: its own figures differ by that much.
SLACK = 16 * MIB
NO_LIMIT_V1 = 9223372036854771712  # what the kernel writes: the largest whole number of pages


@pytest.fixture
def machine(monkeypatch):
    """A machine of 24 GiB of which 20 are free, whatever the tests run on."""
    machine = SimpleNamespace(total=24 * GIB, available=20 * GIB)
    monkeypatch.setattr(memory_watch.psutil, "virtual_memory", lambda: machine)
    return machine


@pytest.fixture
def tree(tmp_path, machine):
    """Makes fake /proc and /sys; returns the rooms that are found in them, after the machine's."""

    def tree(lines, files):
        for name, text in {"proc/self/cgroup": "\n".join(lines), **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")
        first, *groups = rooms(tmp_path / "proc", tmp_path / "sys")
        assert first == Room("the machine", 24 * GIB, 20 * GIB)
        return groups

    return tree


def v2(group, limit, used, inactive=0, active=0):
    folder = f"sys/fs/cgroup/{group}"
    stat = f"anon 5\nfile 7\ninactive_anon 11\ninactive_file {inactive}\nactive_file {active}"
    return {f"{folder}/memory.max": limit, f"{folder}/memory.current": used, f"{folder}/memory.stat": stat}


def v1(group, limit, used, inactive=0, active=0):
    folder = f"sys/fs/cgroup/memory/{group}"
    stat = f"cache 5\ninactive_file 13\nactive_file 17\ntotal_inactive_file {inactive}\ntotal_active_file {active}"
    files = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}
    return {f"{folder}/{name}": text for name, text in files.items()}


def test_v2_tells_what_is_left_under_the_limit_without_the_cache(tree):
    found = tree(["0::/job"], v2("job", 1000 * MIB, 900 * MIB, inactive=30 * MIB, active=500 * MIB))
    assert found == [Room("the control group /job", 1000 * MIB, 630 * MIB)]


def test_v1_tells_what_is_left_under_the_limit_without_the_cache_of_the_group_and_those_in_it(tree):
    lines = ["11:cpu,cpuacct:/job", "4:memory:/job", "1:name=systemd:/job", "0::/job"]
    found = tree(lines, v1("job", 1000 * MIB, 900 * MIB, inactive=30 * MIB, active=500 * MIB))
    assert found == [Room("the control group /job", 1000 * MIB, 630 * MIB)]


def test_v1_is_found_among_other_controllers_of_its_hierarchy_and_by_a_path_with_a_colon(tree):
    found = tree(["4:hugetlb,memory:/a:b"], v1("a:b", 1000, 900))
    assert found == [Room("the control group /a:b", 1000, 100)]


@pytest.mark.parametrize("make, line", [(v1, "4:memory:"), (v2, "0::")])
def test_every_group_up_to_the_root_is_looked_at(tree, make, line):
    files = make("slurm/job/step", 3000, 500) | make("slurm/job", 1000, 600) | make("slurm", 9000, 8900) | make("", 20000, 500)
    names = {room.owner.removeprefix("the control group "): room.left for room in tree([f"{line}/slurm/job/step"], files)}
    assert names == {"/slurm/job/step": 2500, "/slurm/job": 400, "/slurm": 100, "/": 19500}


def test_a_group_without_a_limit_is_left_out_and_those_around_it_are_not(tree):
    files = v2("a/b/c", "max", 500) | v2("a/b", 1000, 600) | v2("a", "max", 700)  # and the root has no such files
    assert tree(["0::/a/b/c"], files) == [Room("the control group /a/b", 1000, 400)]


def test_v1_writes_a_huge_number_for_no_limit_and_that_stops_nothing(tree, machine, monkeypatch):
    found = tree(["4:memory:/a"], v1("a", NO_LIMIT_V1, 5 * GIB))
    monkeypatch.setattr(memory_watch, "rooms", lambda: [*found, Room("the machine", machine.total, machine.available)])
    refuse_shortage(0.999)


@pytest.mark.parametrize("path", ["/host/path/of/container", "/../../elsewhere", "/a/step (deleted)"])
def test_of_a_path_that_is_not_there_the_root_still_counts(tree, path):
    assert tree([f"0::{path}"], v2("", 1000, 600)) == [Room("the control group /", 1000, 400)]


def test_more_cache_than_use_is_not_more_than_the_limit(tree):
    """The two files are read one after the other."""
    assert tree(["0::/a"], v2("a", 1000, 600, active=700)) == [Room("the control group /a", 1000, 1000)]


@pytest.mark.parametrize("missing", ["memory.max", "memory.current", "memory.stat"])
def test_a_missing_file_is_no_limit(tree, missing):
    files = v2("a", 1000, 600)
    del files[f"sys/fs/cgroup/a/{missing}"]
    assert tree(["0::/a"], files) == []


def test_where_there_are_no_control_groups_only_the_machine_counts(tmp_path, machine):
    assert rooms(tmp_path / "proc", tmp_path / "sys") == [Room("the machine", machine.total, machine.available)]


def test_this_machine_is_looked_at_as_it_is():
    first, *groups = rooms()
    now = psutil.virtual_memory()
    assert first.total == now.total and 0 < first.left <= now.total
    assert all(group.left <= group.total for group in groups)
    refuse_shortage(1e-9)


def stops(monkeypatch, share, *found):
    monkeypatch.setattr(memory_watch, "rooms", lambda: list(found))
    try:
        refuse_shortage(share)
    except StoreError as error:
        return str(error)
    return ""


def test_the_share_must_stay_free_and_never_more_than_4_gib(monkeypatch):
    assert not stops(monkeypatch, 0.05, Room("x", 1000, 50))
    assert stops(monkeypatch, 0.05, Room("x", 1000, 49))
    assert not stops(monkeypatch, 0.05, Room("x", 1024 * GIB, 4 * GIB))
    assert stops(monkeypatch, 0.05, Room("x", 1024 * GIB, 4 * GIB - 1))
    assert stops(monkeypatch, 0.05, Room("x", 1000, -1))  # a limit can be lowered below what is in use


def test_each_room_is_held_against_its_own_total(monkeypatch):
    machine, job = Room("the machine", 24 * GIB, 1 * GIB), Room("the control group /job", 2 * GIB, GIB // 2)
    assert "before the machine runs out" in stops(monkeypatch, 0.05, machine, job)  # though the job has less left
    assert "before the control group /job runs" in stops(
        monkeypatch, 0.05, Room("the machine", 24 * GIB, 20 * GIB), Room(job.owner, 2 * GIB, 9)
    )


def test_the_message_says_what_is_left_what_must_be_what_is_held_and_what_to_do(monkeypatch):
    monkeypatch.setattr(memory_watch, "_resident", lambda: 20 * GIB + GIB // 10)
    assert stops(monkeypatch, 0.05, Room("the machine", 24 * GIB, 9 * GIB // 10)) == (
        "stopped before the machine runs out of memory: 0.90 GiB of 24.00 GiB are left (at least 1.20 GiB must stay free), "
        "this process holds 20.10 GiB. What was published stays: free memory and start the same command again, and it goes on "
        "from there; or begin anew with --overwrite and a smaller --token-budget (or, where means are taken, --shard-tokens)"
    )


@pytest.mark.parametrize("share", [-0.01, 1, 1.5, 5, float("nan"), float("inf")])
def test_a_share_outside_0_to_1_is_refused(share):
    with pytest.raises(InvalidInputError, match=rf"least_free is a share .* below 1, got {share}"):
        MemoryWatch(share)


@pytest.fixture
def looks(monkeypatch):
    """The times of all looks, and the clock that they go by."""
    looks = SimpleNamespace(now=100.0, at=[], left=GIB)
    monkeypatch.setattr(memory_watch.time, "monotonic", lambda: looks.now)
    monkeypatch.setattr(memory_watch, "rooms", lambda: (looks.at.append(looks.now), [Room("the machine", GIB, looks.left)])[1])
    return looks


def test_it_looks_after_the_first_batch_and_then_at_most_once_in_an_interval(looks):
    watch = MemoryWatch()
    watch.on_predict_start(None, SimpleNamespace(device=torch.device("cpu")))
    for now in (100.0, 100.0, 100.5, 100.99, 101.0, 101.5, 107.0, 107.9, 108.0):
        looks.now = now
        watch.on_predict_batch_end(None, None, None, None, 0)
    assert looks.at == [100.0, 101.0, 107.0, 108.0]
    looks.left, looks.now = 0, 108.5
    watch.on_predict_batch_end(None, None, None, None, 0)  # not its time yet
    watch.on_predict_start(None, SimpleNamespace(device=torch.device("cpu")))
    with pytest.raises(StoreError, match="stopped before the machine runs out of memory"):
        watch.on_predict_batch_end(None, None, None, None, 0)


def test_a_share_of_0_never_looks(looks):
    looks.left = 0
    watch = MemoryWatch(0)
    watch.on_predict_batch_end(None, None, None, None, 0)
    assert looks.at == []


def test_a_run_stopped_for_memory_keeps_its_shards_and_goes_on_to_the_same_bytes(tmp_path, predict, monkeypatch):
    predict(tmp_path / "whole")
    out, machine = tmp_path / "run", Room("the machine", 24 * GIB, 20 * GIB)
    # memory falls when two shards are there, which is before the end: few batches wait for the writer
    fallen = Room("the machine", 24 * GIB, GIB)
    monkeypatch.setattr(memory_watch, "rooms", lambda: [fallen if len(stamps(out)) >= 2 else machine])
    monkeypatch.setattr(memory_watch, "LOOK_SECONDS", 0)
    with pytest.raises(StoreError, match=r"1\.00 GiB of 24\.00 GiB are left \(at least 1\.20 GiB must stay free\)"):
        predict(out, MemoryWatch())
    whole, before = content(tmp_path / "whole"), stamps(out)
    assert len(before) >= 2 and content(out).keys() < whole.keys()
    assert content(out).items() <= whole.items()
    monkeypatch.setattr(memory_watch, "rooms", lambda: [machine])
    predict(out, MemoryWatch())
    assert content(out) == whole
    assert before.items() <= stamps(out).items()  # what was there was not written again


def test_the_hosts_peak_lies_between_what_is_held_now_and_what_the_system_ever_counted(tmp_path, predict):
    watch = MemoryWatch()
    predict(tmp_path / "run", watch)
    held = psutil.Process().memory_info().rss
    unit = 1 if psutil.MACOS else 1024
    ever = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    assert held - SLACK <= watch.host_peak <= ever + SLACK < psutil.virtual_memory().total
    assert watch.device_peak is None
    assert watch.in_words() == f"peak memory {watch.host_peak / GIB:.1f} GiB host"


@pytest.mark.skipif(not psutil.LINUX, reason="the file is Linux's")
def test_the_peak_is_this_programs_and_not_its_parents(tmp_path):
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "status").write_text("Name:\tx\nVmPeak:\t  900 kB\nVmHWM:\t  700 kB\nVmRSS:\t  600 kB\n")
    assert peak_resident(tmp_path) == 700 * 1024
    (tmp_path / "self" / "status").write_text("Name:\tx\n")
    elsewhere = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert abs(peak_resident(tmp_path) - elsewhere) < SLACK and abs(peak_resident(tmp_path / "nowhere") - elsewhere) < SLACK


def test_on_a_gpu_the_peak_is_counted_from_the_start_of_the_run(monkeypatch):
    gpu, calls = torch.device("cuda", 1), []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(device))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: {gpu: int(3.4 * GIB)}[device])
    monkeypatch.setattr(memory_watch, "peak_resident", lambda: int(1.2 * GIB))
    watch = MemoryWatch()
    assert watch.device_peak is None and watch.in_words() == "peak memory 1.2 GiB host"
    watch.on_predict_start(None, SimpleNamespace(device=gpu))
    assert calls == [gpu] and watch.device_peak == int(3.4 * GIB)
    assert watch.in_words() == "peak memory 1.2 GiB host, 3.4 GiB device"
