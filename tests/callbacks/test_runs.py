"""Whole runs in processes of their own: any number of ranks, any crash, two nodes, a full disk; the bytes are always the same."""

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exactivations.store import ActivationStore
from exactivations.store.errors import IncompleteStoreError
from tests.callbacks.conftest import content, stamps, wait_for_shards

SLOW = 0.03  # seconds a batch, so that there is time to kill
PROGRAM = Path(sys.executable).with_name("exactivations")


def one_line(run):
    """The one line that a failed run may say."""
    lines = [line for line in run.stderr.splitlines() if not line.startswith("[rank: ")]  # Lightning notes each signal
    assert len(lines) == 1 and lines[0].startswith("exactivations: error: "), run.stderr
    return lines[0]


def test_two_ranks_from_the_command_line_write_the_bytes_of_one(tmp_path, arguments, cache, reference):
    done = subprocess.run(
        [PROGRAM, *arguments, "--devices", "2", "--out", tmp_path / "run"],
        env={**os.environ, "HF_DATASETS_CACHE": str(cache)}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert content(tmp_path / "run") == reference
    assert f"wrote {len(reference) - 1} shards" in done.stdout


def test_a_run_killed_at_random_moments_and_resumed_with_other_numbers_of_ranks_writes_the_same_bytes(tmp_path, start, reference):
    dice, out, published = random.Random(0), tmp_path / "run", {}
    for ranks in (2, 1, 3, 1):
        run = start(out, ranks, seconds_per_batch=SLOW)
        wait_for_shards(out, len(published) + dice.randint(1, 3), run)
        time.sleep(dice.uniform(0, 2 * SLOW))
        assert any(process.is_alive() for process in run.processes), run.stderr
        run.kill()
        now = stamps(out)
        assert published.items() <= now.items()  # no published shard was written again
        assert len(published) < len(now) < len(reference) - 1
        published = now
    run = start(out, 2).succeed()
    assert published.items() <= stamps(out).items()
    assert content(out) == reference
    assert f"({len(published)} were there already)" in run.stdout


def test_a_run_killed_before_its_first_shard_can_be_started_again(tmp_path, start, reference):
    out = tmp_path / "run"
    run = start(out, seconds_per_batch=60)
    while not (out / "samples.parquet").exists():
        assert run.processes[0].is_alive(), run.stderr
        time.sleep(0.001)
    run.kill()
    start(out).succeed()
    assert content(out) == reference


def test_a_run_killed_in_the_middle_of_a_shard_leaves_a_part_that_nobody_reads_and_the_next_start_removes(tmp_path, start):
    out, several_steps = tmp_path / "run", ("--shard-tokens", "400")
    start(tmp_path / "whole", 1, *several_steps).succeed()
    run = start(out, 1, *several_steps, seconds_per_batch=0.3)
    while not any(part.stat().st_size for part in (out / "shards").glob(".*.tmp")):
        assert run.processes[0].is_alive(), run.stderr
        time.sleep(0.001)
    run.kill()
    assert len(list((out / "shards").glob(".*.tmp"))) == 1 and stamps(out) == {}
    start(out, 1, *several_steps).succeed()
    assert content(out) == content(tmp_path / "whole")


def test_when_only_the_first_rank_is_killed_the_others_end_and_the_run_can_go_on(tmp_path, arguments, cache, start, reference):
    """Under Lightning's own launcher, where rank 0 is the other ranks' parent."""
    out = tmp_path / "run"
    script = tmp_path / "slow.py"
    script.write_text(
        "import time\nfrom exactivations.scripts.main import main\n"
        "from exactivations.lit_modules.extraction.extractor import ActivationExtractor\n"
        "step = ActivationExtractor.predict_step\n"
        "ActivationExtractor.predict_step = lambda *args: (time.sleep(0.5), step(*args))[1]\nmain()\n"
    )
    with (tmp_path / "err").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, script, *arguments, "--devices", "2", "--out", out],
            env={**os.environ, "HF_DATASETS_CACHE": str(cache)}, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not stamps(out):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "err").read_text()
            time.sleep(0.01)
        process.kill()
        process.wait()
        published = stamps(out)
        start(out).succeed()  # waits at the lock until rank 1 has noticed and ended
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert published.items() <= stamps(out).items()
    assert content(out) == reference


def test_a_rank_that_outlives_another_tells_so_in_one_line(tmp_path, start, reference):
    out = tmp_path / "run"
    run = start(out, 2, seconds_per_batch=SLOW)
    wait_for_shards(out, 2, run)
    run.kill(1)
    assert run.wait()[0] == 1
    assert "another rank ended before it had written all of its shards" in one_line(run)
    start(out).succeed()
    assert content(out) == reference


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_ends_the_run_soon_in_one_line(tmp_path, start, reference, ranks):
    out = tmp_path / "run"
    run = start(out, ranks, seconds_per_batch=0.2)
    wait_for_shards(out, 1, run)
    for process in run.processes:
        os.kill(process.pid, signal.SIGTERM)
    assert run.wait() == [1] * ranks
    assert "ended by SIGTERM. What was published stays" in one_line(run)
    assert 0 < len(stamps(out)) < len(reference) - 1
    start(out).succeed()
    assert content(out) == reference


def test_more_ranks_than_shards(tmp_path, start):
    small = ("--num-samples", "3", "--shard-tokens", "100000")
    start(tmp_path / "one", 1, *small).succeed()
    start(tmp_path / "three", 3, *small).succeed()
    assert content(tmp_path / "three") == content(tmp_path / "one")
    assert len(content(tmp_path / "three")) == 2


def test_two_nodes_with_a_folder_each_are_merged_by_copying(tmp_path, start, reference):
    nodes = [{"NODE_RANK": str(node), "OUT": tmp_path / f"node{node}"} for node in (0, 1)]
    run = start(None, 1, "--num-nodes", "2", environments=nodes).succeed()
    found = [content(tmp_path / f"node{node}") for node in (0, 1)]
    assert found[0]["samples.parquet"] == found[1]["samples.parquet"]
    shards = [{name for name in files if name != "samples.parquet"} for files in found]
    assert shards[0] and shards[1] and not shards[0] & shards[1]
    assert f"{len(shards[1])} shards are in other nodes' folders" in run.stdout
    with pytest.raises(IncompleteStoreError):
        ActivationStore(tmp_path / "node0")
    shutil.copytree(tmp_path / "node1", tmp_path / "node0", dirs_exist_ok=True)
    assert content(tmp_path / "node0") == reference
    assert len(ActivationStore(tmp_path / "node0", verify_checksums=True)) == 90


def test_two_nodes_that_were_killed_compute_nothing_again_that_either_of_them_has(tmp_path, start, reference):
    nodes = [{"NODE_RANK": str(node), "OUT": tmp_path / f"node{node}"} for node in (0, 1)]
    run = start(None, 1, "--num-nodes", "2", environments=nodes, seconds_per_batch=SLOW)
    for node in (0, 1):
        wait_for_shards(tmp_path / f"node{node}", 2, run)
    run.kill()
    published = [stamps(tmp_path / f"node{node}") for node in (0, 1)]
    assert 4 <= len(published[0]) + len(published[1]) < len(reference) - 1
    start(None, 1, "--num-nodes", "2", environments=nodes).succeed()
    now = [stamps(tmp_path / f"node{node}") for node in (0, 1)]
    assert all(before.items() <= after.items() for before, after in zip(published, now, strict=True))
    assert not now[0].keys() & now[1].keys()
    shutil.copytree(tmp_path / "node1", tmp_path / "node0", dirs_exist_ok=True)
    assert content(tmp_path / "node0") == reference


def test_nodes_that_read_different_data_are_refused_before_anything_is_computed(tmp_path, start, texts_path):
    other = tmp_path / "other.jsonl"
    other.write_text(texts_path.read_text().replace('"w', '"w1 w', 1))
    nodes = [{"NODE_RANK": str(node), "OUT": tmp_path / f"node{node}"} for node in (0, 1)]
    run = start(None, 1, "--num-nodes", "2", environments=nodes, before=different_data(other))
    assert run.wait() == [1, 1]
    assert "rank 1 on " in run.stderr and "does not compute the same as rank 0" in run.stderr
    assert "\n  dataset: '" in run.stderr and "Traceback" not in run.stderr
    assert stamps(tmp_path / "node0") == stamps(tmp_path / "node1") == {}


def different_data(other):
    """Lets node 1 read another file under the same arguments, as on a machine whose local copy is stale."""
    return (
        "from exactivations.datamodules import text\n"
        "load = text.load_source\n"
        "if os.environ['NODE_RANK'] == '1':\n"
        f"    text.load_source = lambda source, *args: load({str(other)!r}, *args)\n"
    )


def test_a_second_run_into_the_same_folder_is_refused_and_the_first_is_not_disturbed(tmp_path, start, reference):
    out = tmp_path / "run"
    first = start(out, seconds_per_batch=0.25)
    wait_for_shards(out, 1, first)
    for more in ((), ("--overwrite",)):
        second = start(out, 1, *more, patience=0.1)
        assert second.wait() == [1]
        assert f"is in use by another run (process {first.processes[0].pid} on " in one_line(second)
    assert first.processes[0].is_alive()
    first.succeed()
    assert content(out) == reference


# --- a full disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system that is really full after a few shards."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("may not mount a file system here; RLIMIT_FSIZE is tried below")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_loses_nothing_and_the_run_goes_on_when_there_is_room(small_disk, start, reference, ranks):
    out = small_disk / "run"
    run = start(out, ranks)
    assert set(run.wait()) == {1}
    assert "Traceback" not in run.stderr
    lines = run.stderr.splitlines()
    assert 1 <= len(lines) <= ranks  # a line for each rank that met it by itself
    assert all(line.startswith("exactivations: error: ") for line in lines)
    assert "No space left on device" in run.stderr and "make room and start the same command again" in run.stderr
    published = stamps(out)
    assert 0 < len(published) < len(reference) - 1
    assert content(out).items() <= reference.items()  # whole shards, and no temporary file
    again = start(out)  # still no room: it says so again, and still loses nothing
    assert again.wait() == [1] and "No space left on device" in one_line(again)
    assert published.items() <= stamps(out).items()
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    start(out).succeed()
    assert published.items() <= stamps(out).items()
    assert content(out) == reference


def test_a_file_that_may_not_grow_is_told_in_one_line_and_nothing_half_is_left(tmp_path, start, reference):
    out = tmp_path / "run"
    sizes = sorted(len(data) for name, data in reference.items() if name != "samples.parquet")
    limit = sizes[-1] - 1  # the largest shard does not fit
    assert limit > len(reference["samples.parquet"])
    run = start(out, before=f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {resource.RLIM_INFINITY}))")
    assert run.wait() == [1]
    assert "File too large" in one_line(run)
    assert content(out).items() <= reference.items()
    start(out).succeed()
    assert content(out) == reference


def test_an_unwritable_folder_is_told_in_one_line(tmp_path, start):
    (tmp_path / "file").write_text("")
    for ranks in (1, 2):
        run = start(tmp_path / "file" / "run", ranks)
        assert run.wait() == [1] * ranks
        assert "cannot write to the run folder" in one_line(run)
