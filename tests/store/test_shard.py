"""A shard exists whole or not at all, has the same bytes wherever it is written, and no changed bit in it goes unnoticed."""

import os
import stat
import subprocess
import sys

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exactivations.store import shard as shard_module
from exactivations.store.errors import CorruptShardError, StoreError
from exactivations.store.shard import open_shard, verify_shard, write_shard

METADATA = {"shard": 3, "fingerprint": "abc"}
TENSORS = {
    "sample_index": torch.tensor([7, 1, 4]),
    "n_tokens": torch.tensor([2, 1, 1], dtype=torch.int32),
    "token_mask": torch.tensor([True, False, True, True]),
    "h/tokens": torch.tensor([[1.5, -2.0], [float("nan"), float("inf")], [0.0, -0.0], [3e38, 1e-40]]),
    "h/mean": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.bfloat16),
}


def same_bytes(a, b):
    return (
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "00003.safetensors"
    write_shard(path, TENSORS, METADATA)
    return path


def test_a_shard_is_read_back_bit_for_bit_by_us_and_by_plain_safetensors(path):
    verify_shard(path)
    ours, metadata = open_shard(path)
    plain = safetensors.torch.load_file(path)
    assert ours.keys() == plain.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        assert same_bytes(ours[name], expected) and same_bytes(plain[name], expected)
    assert metadata | METADATA == metadata and metadata.keys() == {*METADATA, "checksum"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.bool, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (1, 1), (4, 3)])
def test_every_dtype_and_empty_tensors_survive(tmp_path, dtype, shape):
    tensor = torch.arange(shape[0] * (shape[1] if len(shape) > 1 else 1)).reshape(shape).to(dtype)
    write_shard(tmp_path / "s", {"x": tensor}, METADATA)
    verify_shard(tmp_path / "s")
    assert same_bytes(open_shard(tmp_path / "s")[0]["x"], tensor)


def test_another_process_with_another_hash_seed_and_order_of_names_writes_the_same_bytes(path):
    program = (
        "import sys, pathlib, safetensors.torch\n"
        "from exactivations.store.shard import write_shard\n"
        "source, target = map(pathlib.Path, sys.argv[1:])\n"
        "tensors = safetensors.torch.load_file(source)\n"
        "write_shard(target, {n: tensors[n] for n in sorted(tensors, reverse=True)}, {'fingerprint': 'abc', 'shard': 3})\n"
    )
    other = path.with_name("other")
    subprocess.run([sys.executable, "-c", program, path, other], check=True, env={**os.environ, "PYTHONHASHSEED": "1"}, timeout=120)
    assert other.read_bytes() == path.read_bytes()


def test_every_single_flipped_bit_in_the_whole_file_is_found(tmp_path):
    path = tmp_path / "00003.safetensors"
    write_shard(path, {"h": TENSORS["h/mean"][:2]}, METADATA)  # small, so that every bit can be tried
    whole = path.read_bytes()
    damaged = bytearray(whole)
    for position in range(len(whole)):
        for bit in range(8):
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(CorruptShardError, match=r"00003\.safetensors"):
                verify_shard(path)
            damaged[position] ^= 1 << bit
    path.write_bytes(damaged)
    verify_shard(path)


@pytest.mark.parametrize("what", ["swapped", "renamed", "reshaped", "of another dtype"])
def test_tensors_that_were_changed_as_a_whole_are_found(tmp_path, what):
    """The file is sound for safetensors, and every byte of every tensor is still there."""
    tensors = {"a": torch.arange(16.0).reshape(2, 8), "b": torch.arange(16.0).reshape(2, 8) + 1}
    write_shard(tmp_path / "s", tensors, METADATA)
    with safetensors.safe_open(tmp_path / "s", framework="pt") as file:
        metadata = file.metadata()
    changed = {
        "swapped": {"a": tensors["b"], "b": tensors["a"]},
        "renamed": {"a": tensors["a"], "c": tensors["b"]},
        "reshaped": {"a": tensors["a"].reshape(4, 4), "b": tensors["b"]},
        "of another dtype": {"a": tensors["a"].view(torch.int32), "b": tensors["b"]},
    }[what]
    safetensors.torch.save_file(tensors, tmp_path / "same", metadata)
    verify_shard(tmp_path / "same")
    safetensors.torch.save_file(changed, tmp_path / "s", metadata)
    with pytest.raises(CorruptShardError, match="is damaged"):
        verify_shard(tmp_path / "s")


def test_every_truncation_is_found_without_reading_the_tensors(path):
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptShardError, match="not a whole shard"):
            open_shard(path)


def test_trailing_bytes_are_found(path):
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CorruptShardError):
        open_shard(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(1, 200), width=st.integers(1, 16), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_flipped_bit_is_found_in_shards_of_any_size_and_content(tmp_path_factory, data, rows, width, dtype):
    path = tmp_path_factory.mktemp("shard") / "s"
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32), label="seed"))
    write_shard(path, {"x": torch.randn(rows, width, generator=generator).to(dtype), "i": torch.arange(rows)}, METADATA)
    verify_shard(path)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1), label="position")] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    path.write_bytes(content)
    with pytest.raises(CorruptShardError):
        verify_shard(path)


@pytest.mark.parametrize("step", ["save", "fsync", "rename"])
def test_a_failure_on_the_way_leaves_nothing_behind_and_what_was_there_untouched(tmp_path, monkeypatch, step):
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(folder / "00000.safetensors", TENSORS, METADATA)
    before = (folder / "00000.safetensors").read_bytes()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    pwrite, written = os.pwrite, []

    def write_half(*args):
        written.append(pwrite(*args))
        if len(written) > 2:
            fail()
        return written[-1]

    if step == "save":
        monkeypatch.setattr(os, "pwrite", write_half)
    elif step == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(type(folder), "replace", fail)
    with pytest.raises(StoreError, match=r"cannot write .*00001\.safetensors: .*No space left.* MB are free"):
        write_shard(folder / "00001.safetensors", TENSORS, METADATA)
    assert [p.name for p in folder.iterdir()] == ["00000.safetensors"]
    assert (folder / "00000.safetensors").read_bytes() == before


def test_when_only_the_folder_cannot_be_flushed_the_shard_is_there_whole(tmp_path, monkeypatch):
    fsync = os.fsync

    def fail_on_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_on_folders)
    with pytest.raises(StoreError, match="Input/output error"):
        write_shard(tmp_path / "s", TENSORS, METADATA)
    verify_shard(tmp_path / "s")
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_an_interruption_that_is_no_error_of_the_disk_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(shard_module, "flush_to_disk", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "s", TENSORS, METADATA)
    assert list(tmp_path.iterdir()) == []


def test_content_is_flushed_before_the_name_and_the_name_after_it(tmp_path, monkeypatch):
    steps = []
    replace, flush = type(tmp_path).replace, shard_module.flush_to_disk
    monkeypatch.setattr(shard_module, "flush_to_disk", lambda p: (steps.append(("flush", p.is_dir())), flush(p))[1])
    monkeypatch.setattr(type(tmp_path), "replace", lambda a, b: (steps.append(("rename", None)), replace(a, b))[1])
    write_shard(tmp_path / "s", TENSORS, METADATA)
    assert steps == [("flush", False), ("rename", None), ("flush", True)]


def test_the_file_mode_follows_the_umask(tmp_path):
    program = (
        "import os, sys, pathlib, torch\n"
        "for umask in (0o022, 0o077, 0o002):\n"
        "    if os.fork() == 0:\n"
        "        os.umask(umask)\n"
        "        from exactivations.store.shard import write_shard\n"
        "        write_shard(pathlib.Path(sys.argv[1], oct(umask)), {'x': torch.ones(1)}, {})\n"
        "        os._exit(0)\n"
        "    assert os.wait()[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path], check=True, timeout=120)
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in tmp_path.iterdir()}
    assert modes == {"0o22": "0o644", "0o77": "0o600", "0o2": "0o664"}


def test_a_file_of_another_origin_is_refused(tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / "foreign.safetensors")
    with pytest.raises(CorruptShardError, match="not a whole shard"):
        open_shard(tmp_path / "foreign.safetensors")
    with pytest.raises(StoreError, match="there is no shard"):
        open_shard(tmp_path / "absent.safetensors")
