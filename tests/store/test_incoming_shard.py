"""A shard takes the batches of its plan in their order, whole, and nothing else; both kinds keep what came bit for bit."""

import gc
import os
import stat
import weakref
from pathlib import Path

import pytest
import safetensors.torch
import torch

from exactivations.store import shard as shard_module
from exactivations.store.batches import ActivationBatch, ActivationSpec, Place
from exactivations.store.errors import NotFiniteError, StoreError
from exactivations.store.incoming_shard import ShardPlan
from exactivations.store.shard import open_shard, verify_shard, write_shard
from exactivations.store.shard_content import ShardContent
from exactivations.store.shard_sums import MeanOptions
from exactivations.store.streamed_shard import StreamedShard
from exactivations.store.summed_shard import ShardMemory, SummedShard
from exactivations.store.vectors import Vector

SPECS = {"h/mean": ActivationSpec(False, 2, torch.float32), "h/tokens": ActivationSpec(True, 2, torch.float32)}
METADATA = {"shard": 4, "fingerprint": "abc"}


def batch(index, length, first_row, first_token, **changes):
    n, tokens = len(index), len(index) * length
    content = {
        "sample_index": torch.tensor(index),
        "n_tokens": torch.full((n,), length),
        "input_ids": torch.arange(tokens) + 100 * first_row,
        "token_mask": torch.arange(tokens) % 2 == 0,
        "activations": {
            "h/mean": torch.arange(n * 2.0).reshape(n, 2) + 10 * first_row,
            "h/tokens": torch.arange(tokens * 2.0).reshape(tokens, 2) + 100 * first_row,
        },
        "place": Place(4, first_row, first_token),
    }
    return ActivationBatch(**(content | changes))


BATCHES = [batch([5, 3], 3, 0, 0), batch([9], 2, 2, 6)]
TENSORS = {
    "sample_index": torch.tensor([5, 3, 9]),
    "n_tokens": torch.tensor([3, 3, 2], dtype=torch.int32),
    "input_ids": torch.cat([b.input_ids for b in BATCHES]).int(),
    "token_mask": torch.cat([b.token_mask for b in BATCHES]),
    **{name: torch.cat([b.activations[name] for b in BATCHES]) for name in SPECS},
}


def streamed(path, n_rows, n_tokens, specs=SPECS):
    return StreamedShard(path, ShardPlan(4, n_rows, n_tokens, specs), METADATA)


def summed(path, n_rows, n_tokens, specs=SPECS):
    memory = ShardMemory(specs, n_rows + 3, n_tokens + 5)
    for values in memory.of(ShardPlan(4, n_rows + 3, n_tokens + 5, specs)).values():
        values.fill_(1)  # it was used before
    content = ShardContent(MeanOptions((Vector(("h",), "mean"),)))
    return SummedShard(path, ShardPlan(4, n_rows, n_tokens, specs), METADATA, content, memory)


KINDS = pytest.mark.parametrize("kind", [streamed, summed])


@KINDS
def test_what_comes_is_published_bit_for_bit(tmp_path, kind):
    shard = kind(tmp_path / "s", 3, 8)
    for coming in BATCHES:
        assert not shard.is_full and not (tmp_path / "s").exists()
        shard.put(coming)
    assert shard.is_full and not (tmp_path / "s").exists()
    shard.publish()
    shard.discard()
    verify_shard(tmp_path / "s")
    found = {name: values for name, values in open_shard(tmp_path / "s")[0].items() if not name.startswith("sums")}
    assert found.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        assert found[name].dtype == expected.dtype and torch.equal(found[name], expected)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_shard_that_was_streamed_has_the_bytes_of_one_that_was_written_at_once(tmp_path):
    shard = streamed(tmp_path / "streamed", 3, 8)
    for coming in BATCHES:
        shard.put(coming)
    shard.publish()
    write_shard(tmp_path / "whole", TENSORS, METADATA)
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "whole").read_bytes()


@KINDS
def test_pooled_rows_alone_store_no_tokens(tmp_path, kind):
    shard = kind(tmp_path / "s", 2, 6, {"h/mean": SPECS["h/mean"]})
    shard.put(batch([5, 3], 3, 0, 0, activations={"h/mean": torch.ones(2, 2)}))
    assert shard.is_full
    shard.publish()
    names = {name for name in safetensors.torch.load_file(tmp_path / "s") if not name.startswith("sums")}
    assert names == {"sample_index", "n_tokens", "h/mean"}


@KINDS
def test_nothing_is_left_of_a_shard_that_misses_a_row(tmp_path, kind):
    shard = kind(tmp_path / "s", 3, 8)
    shard.put(BATCHES[0])
    assert not shard.is_full
    shard.discard()
    assert list(tmp_path.iterdir()) == []


@KINDS
@pytest.mark.parametrize("wrong", [BATCHES[0], batch([8, 9], 3, 1, 3), batch([8], 3, 3, 6), batch([8], 3, 2, 5)])
def test_a_row_that_comes_twice_or_too_early_is_refused(tmp_path, kind, wrong):
    shard = kind(tmp_path / "s", 5, 15)
    shard.put(BATCHES[0])
    with pytest.raises(AssertionError, match=r"\(4, \d, \d\) came, the next one is \(4, 2, 6\)"):
        shard.put(wrong)
    shard.discard()


@KINDS
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"place": None}, "without a place"),
        ({"place": Place(3, 0, 0)}, "came, the next one is"),
        ({"token_mask": torch.ones(5, dtype=torch.bool)}, "token_mask: planned"),
        ({"token_mask": torch.ones(6)}, r"token_mask: planned \(torch\.bool"),
        ({"n_tokens": torch.tensor([3, 2])}, "disagree"),
        ({"activations": {"h/mean": torch.ones(2, 2)}}, "planned"),
        ({"activations": {"h/mean": torch.ones(2, 3), "h/tokens": torch.ones(6, 2)}}, "h/mean: planned"),
        ({"activations": {"h/mean": torch.ones(1, 2), "h/tokens": torch.ones(6, 2)}}, "h/mean: planned"),
        ({"activations": {"h/mean": torch.ones(2, 2), "h/tokens": torch.ones(5, 2)}}, "h/tokens: planned"),
        ({"activations": {"h/mean": torch.ones(2, 2).double(), "h/tokens": torch.ones(6, 2)}}, r"h/mean: planned \(torch\.float32"),
    ],
)
def test_what_does_not_fit_its_place_is_refused(tmp_path, kind, changes, message):
    shard = kind(tmp_path / "s", 3, 8)
    with pytest.raises(AssertionError, match=message):
        shard.put(batch([5, 3], 3, 0, 0, **changes))
    shard.discard()


@KINDS
def test_more_rows_than_were_planned_are_refused(tmp_path, kind):
    shard = kind(tmp_path / "s", 2, 6)
    with pytest.raises(AssertionError, match="more rows than were planned"):
        shard.put(batch([5, 3, 1], 3, 0, 0))
    shard.discard()


@KINDS
def test_what_is_not_finite_is_refused_before_any_of_its_batch_is_kept(tmp_path, kind):
    shard = kind(tmp_path / "s", 3, 8)
    bad = torch.ones(6, 2)
    bad[4, 1] = torch.nan
    with pytest.raises(NotFiniteError, match="sample 3: h/tokens is nan at token 1, dimension 1"):
        shard.put(batch([5, 3], 3, 0, 0, activations={"h/mean": torch.ones(2, 2), "h/tokens": bad}))
    for coming in BATCHES:
        shard.put(coming)
    shard.publish()
    assert torch.equal(open_shard(tmp_path / "s")[0]["h/tokens"], TENSORS["h/tokens"])
    shard.discard()


def open_files():
    return sorted(
        os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")
    )


def test_rows_are_in_the_file_and_not_in_memory_as_soon_as_they_came(tmp_path):
    before, shard, coming = open_files(), streamed(tmp_path / "s", 3, 8), batch([5, 3], 3, 0, 0)
    shard.put(coming)
    tensors = [weakref.ref(values) for values in coming.activations.values()]
    (temporary,) = tmp_path.iterdir()
    for name in SPECS:
        assert coming.activations[name].numpy().tobytes() in temporary.read_bytes()
    del coming
    gc.collect()
    assert [tensor() for tensor in tensors] == [None, None]
    shard.discard()
    assert list(tmp_path.iterdir()) == [] and open_files() == before


@pytest.mark.parametrize("step", ["write", "close", "fsync", "rename", "folder"])
def test_a_failure_at_the_end_leaves_nothing_behind_and_no_file_open(tmp_path, monkeypatch, step):
    """After a rename the shard is there whole: only that the folder reached the disk is not known."""
    before, shard = open_files(), streamed(tmp_path / "s", 3, 8)
    for coming in BATCHES:
        shard.put(coming)
    close, fsync = os.close, os.fsync

    def fail(*args):
        raise OSError(28, "No space left on device")

    def close_and_fail(descriptor):
        close(descriptor)
        fail()

    def fail_on_folders(descriptor):
        fail() if stat.S_ISDIR(os.fstat(descriptor).st_mode) else fsync(descriptor)

    place, wrong = {
        "write": ((os, "pwrite"), fail),
        "close": ((os, "close"), close_and_fail),
        "fsync": ((os, "fsync"), fail),
        "rename": ((Path, "replace"), fail),
        "folder": ((os, "fsync"), fail_on_folders),
    }[step]
    with monkeypatch.context() as patch:
        patch.setattr(*place, wrong)
        with pytest.raises(StoreError, match=r"cannot write .*/s: .*No space left"):
            shard.publish()
        shard.discard()
    assert [path.name for path in tmp_path.iterdir()] == (["s"] if step == "folder" else []) and open_files() == before
    if step == "folder":
        verify_shard(tmp_path / "s")


def test_content_is_flushed_before_the_name_and_the_name_after_it(tmp_path, monkeypatch):
    shard, steps = streamed(tmp_path / "s", 3, 8), []
    for coming in BATCHES:
        shard.put(coming)
    replace, flush = Path.replace, shard_module.flush_to_disk
    monkeypatch.setattr(shard_module, "flush_to_disk", lambda p: (steps.append(("flush", p.is_dir())), flush(p))[1])
    monkeypatch.setattr(Path, "replace", lambda a, b: (steps.append(("rename", None)), replace(a, b))[1])
    shard.publish()
    assert steps == [("flush", False), ("rename", None), ("flush", True)]


def test_a_disk_that_is_full_is_told_with_the_first_row_that_does_not_fit(tmp_path, monkeypatch):
    shard = streamed(tmp_path / "s", 3, 8)
    shard.put(BATCHES[0])

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(StoreError, match=r"cannot write .*/s: .*No space left.* MB are free there.*start the same command again"):
        shard.put(BATCHES[1])
    shard.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_told_when_the_shard_begins(tmp_path):
    with pytest.raises(StoreError, match=r"cannot write .*the folder is not there"):
        streamed(tmp_path / "absent" / "s", 3, 8)
