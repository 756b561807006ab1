"""What ActivationStore gives is what plain safetensors and pandas find in the files, and what was written for each sample."""

import json
import shutil
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from exactivations.store import ActivationStore, activation_store
from exactivations.store.errors import CorruptShardError, IncompleteStoreError, InvalidInputError, StoreError, VerificationError
from exactivations.store.shard import verify_shard, write_shard
from tests.store.stores import WIDTHS, ids_of, make_store, mask_of, row, shard_tensors

INDEX = [0, 2, 3, 7, 8, 11, 12, 20, 21, 22, 40]  # selected and skipped samples leave gaps
LENGTHS = [1, 9, 2, 2, 30, 1, 5, 5, 4, 2, 17]
LABELS = list("abcdefghijk")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def path(tmp_path):
    make_store(tmp_path / "run", INDEX, LENGTHS, label=LABELS)
    return tmp_path / "run"


def read_plainly(path):
    """Reads a store without any code of ours: {sample index: (its row of samples.parquet, its tensors)}."""
    frame = pd.read_parquet(path / "samples.parquet")
    shards = {int(file.stem): load_file(file) for file in (path / "shards").glob("*.safetensors")}
    found = {}
    for record in frame.to_dict("records"):
        if record["shard"] in shards:
            tensors, place = shards[record["shard"]], record["row"]
            end = int(tensors["n_tokens"][: place + 1].sum())
            tokens = slice(end - record["n_tokens"], end)
            mine = {"sample_index": tensors["sample_index"][place]}
            for name, tensor in tensors.items():
                if name.endswith("/tokens") or name in ("input_ids", "token_mask"):
                    mine[name] = tensor[tokens]
                elif "/" in name:
                    mine[name] = tensor[place]
            found[record["sample_index"]] = (record, mine)
    return found


def check_sample(sample, record, tensors):
    assert sample.sample_index == record["sample_index"] == int(tensors["sample_index"])
    assert sample.columns == record
    assert sample.input_ids.tolist() == tensors["input_ids"].tolist() == ids_of(sample.sample_index, record["n_tokens"])
    assert sample.token_mask.tolist() == tensors["token_mask"].tolist() == mask_of(sample.sample_index, record["n_tokens"])
    assert sample.activations.keys() == WIDTHS.keys()
    for name, values in sample.activations.items():
        assert torch.equal(values, tensors[name]) and values.dtype == tensors[name].dtype
        if name.endswith("/tokens"):
            assert values.tolist() == [row(sample.sample_index, name, token) for token in range(record["n_tokens"])]
        else:
            assert values.tolist() == row(sample.sample_index, name)


def test_every_sample_by_its_index_and_in_order_is_what_the_files_hold(path):
    store, plain = ActivationStore(path), read_plainly(path)
    assert len(store) == len(plain) == len(INDEX)
    assert store.sample_index.tolist() == sorted(plain) == INDEX
    for index in reversed(INDEX):
        check_sample(store[index], *plain[index])
        check_sample(store[np.int64(index)], *plain[index])
    assert [sample.sample_index for sample in store] == INDEX
    for sample in store:
        check_sample(sample, *plain[sample.sample_index])


def test_the_table_of_samples_is_the_parquet_file(path):
    assert ActivationStore(path).samples.to_pandas().equals(pd.read_parquet(path / "samples.parquet"))


@pytest.mark.parametrize("n_threads", [1, 2, 3, 100])
@pytest.mark.parametrize("name", ["resid_post.1/mean", "final_norm/last"])
def test_pooled_rows_are_in_dataset_order(path, name, n_threads, monkeypatch):
    monkeypatch.setattr(activation_store, "BYTES_FOR_THREADS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    store, plain = ActivationStore(path), read_plainly(path)
    pooled = store.pooled(*name.split("/"))
    assert torch.equal(pooled, torch.stack([plain[index][1][name] for index in INDEX]))
    assert pooled.tolist() == [row(index, name) for index in INDEX]
    numpy = store.to_numpy(*name.split("/"))
    assert isinstance(numpy, np.ndarray) and numpy.dtype == np.float32 and numpy.tolist() == pooled.tolist()


@pytest.mark.parametrize("block_tokens", [1, 2, 7, 30, 31, 10**9])
def test_token_blocks_hold_every_token_of_whole_samples_once_and_no_more_than_asked(path, block_tokens):
    store, plain = ActivationStore(path), read_plainly(path)
    seen = []
    for block in store.tokens("resid_post.1", block_tokens):
        n = block.n_tokens.tolist()
        assert sum(n) == len(block.values) == len(block.input_ids) == len(block.token_mask)
        assert sum(n) <= block_tokens or len(n) == 1
        parts = zip(
            block.sample_index.tolist(), block.values.split(n), block.input_ids.split(n), block.token_mask.split(n), strict=True
        )
        for index, values, ids, mask in parts:
            seen.append(index)
            tensors = plain[index][1]
            assert torch.equal(values, tensors["resid_post.1/tokens"])
            assert torch.equal(ids, tensors["input_ids"]) and torch.equal(mask, tensors["token_mask"])
    assert sorted(seen) == INDEX
    if block_tokens == 10**9:
        assert len(list(store.tokens("resid_post.1", block_tokens))) == 3  # one a shard, as large as can be


def test_blocks_and_samples_share_memory_with_the_map_of_the_file(path):
    store = ActivationStore(path)
    blocks = list(store.tokens("resid_post.1", 5))
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(".safetensors")]
    ranges = [tuple(int(x, 16) for x in parts[0].split("-")) for parts in maps if parts[-1].startswith(str(path))]
    assert ranges

    def is_mapped(tensor):
        return any(start <= tensor.data_ptr() < stop for start, stop in ranges)

    for block in blocks:
        assert is_mapped(block.values) and is_mapped(block.input_ids) and is_mapped(block.token_mask)
    for index in INDEX:
        sample = store[index]
        assert all(is_mapped(values) for values in sample.activations.values()) and is_mapped(sample.input_ids)
    assert not is_mapped(store.pooled("resid_post.1", "mean"))  # gathered from several files: here a copy is needed


def test_writing_into_what_was_read_does_not_reach_the_file(path):
    store = ActivationStore(path)
    before = {p: p.read_bytes() for p in (path / "shards").iterdir()}
    for block in store.tokens("resid_post.1"):
        block.values.zero_()
    assert {p: p.read_bytes() for p in (path / "shards").iterdir()} == before


def test_as_a_hugging_face_dataset(path):
    store, plain = ActivationStore(path), read_plainly(path)
    dataset = store.to_dataset()
    assert len(dataset) == len(INDEX)
    for index, example in zip(INDEX, dataset, strict=True):
        record, tensors = plain[index]
        assert {name: example[name] for name in record} == record
        assert example.keys() == {*record, "input_ids", "token_mask", *WIDTHS}
        for name in (*WIDTHS, "input_ids", "token_mask"):
            assert example[name] == tensors[name].tolist()


def test_the_cached_dataset_follows_labels_and_shards(tmp_path):
    make_store(tmp_path / "run", INDEX, LENGTHS, label=LABELS)
    assert ActivationStore(tmp_path / "run").to_dataset()["label"][:] == LABELS
    shutil.rmtree(tmp_path / "run")
    make_store(tmp_path / "run", INDEX, LENGTHS, label=LABELS[::-1])  # same path, fingerprint and activations
    assert ActivationStore(tmp_path / "run").to_dataset()["label"][:] == LABELS[::-1]
    (tmp_path / "run" / "shards" / "00001.safetensors").unlink()
    partial = ActivationStore(tmp_path / "run", allow_incomplete=True)
    assert partial.to_dataset()["sample_index"][:] == partial.sample_index.tolist()


def test_a_column_that_the_dataset_would_overwrite_is_refused(tmp_path):
    make_store(tmp_path / "run", [0, 1, 2], [1, 2, 3], input_ids=[[1], [2], [3]])
    with pytest.raises(InvalidInputError, match="column 'input_ids'"):
        ActivationStore(tmp_path / "run").to_dataset()


@pytest.mark.parametrize(("dtype", "numpy_dtype"), [("bfloat16", np.float32), ("float16", np.float16), ("float32", np.float32)])
def test_every_dtype_is_kept_and_read_exactly(tmp_path, dtype, numpy_dtype):
    make_store(tmp_path / "run", INDEX, LENGTHS, dtype=dtype)
    store = ActivationStore(tmp_path / "run", verify_checksums=True)
    assert store.pooled("resid_post.1", "mean").dtype == getattr(torch, dtype)
    array = store.to_numpy("resid_post.1", "mean")
    assert array.dtype == numpy_dtype and array.tolist() == [row(index, "resid_post.1/mean") for index in INDEX]
    assert store.to_dataset()["resid_post.1/mean"][:] == array.tolist()
    assert all(block.values.dtype == getattr(torch, dtype) for block in store.tokens("resid_post.1"))


def test_a_store_of_pooled_rows_alone_has_no_tokens(tmp_path):
    make_store(tmp_path / "run", INDEX, LENGTHS, names=["final_norm/last"])
    store = ActivationStore(tmp_path / "run")
    assert store[7].input_ids is None and store[7].token_mask is None
    assert store[7].activations["final_norm/last"].tolist() == row(7, "final_norm/last")
    assert "input_ids" not in store.to_dataset().column_names
    with pytest.raises(InvalidInputError, match=r"holds no resid_post\.1/tokens; it holds final_norm/last"):
        store.tokens("resid_post.1")


def test_asking_for_what_is_not_there_says_what_is(path):
    store = ActivationStore(path)
    with pytest.raises(
        InvalidInputError, match=r"holds no resid_post\.9/mean; it holds resid_post.1/mean, resid_post.1/tokens, final_norm/last"
    ):
        store.pooled("resid_post.9", "mean")
    with pytest.raises(InvalidInputError, match=r"one row per token: read it with tokens\(\)"):
        store.pooled("resid_post.1", "tokens")
    assert "11 samples, resid_post.1/mean" in repr(store)


def test_a_sample_that_is_not_there_says_why(tmp_path):
    make_store(tmp_path / "run", INDEX, LENGTHS, skipped=[1, 9])
    store = ActivationStore(tmp_path / "run")
    with pytest.raises(IndexError, match="sample 9 was skipped in extraction"):
        store[9]
    for index in (-1, 4, 41, 10**9):
        with pytest.raises(IndexError, match=f"sample {index} is not in this store: it holds 11 samples with indices from 0 to 40"):
            store[index]


def test_an_incomplete_store_is_refused_and_where_allowed_right_for_what_is_there(tmp_path):
    make_store(tmp_path / "run", INDEX, LENGTHS, leave_out=[1], label=LABELS)
    with pytest.raises(IncompleteStoreError, match=r"not complete: 1 of 3 shards are missing.*allow_incomplete=True"):
        ActivationStore(tmp_path / "run")
    store, plain = ActivationStore(tmp_path / "run", allow_incomplete=True), read_plainly(tmp_path / "run")
    assert 0 < len(store) == len(plain) < len(INDEX)
    assert store.sample_index.tolist() == sorted(plain) == store.samples.column("sample_index").to_pylist()
    for sample in store:
        check_sample(sample, *plain[sample.sample_index])
    assert store.pooled("resid_post.1", "mean").tolist() == [row(index, "resid_post.1/mean") for index in sorted(plain)]
    assert sorted(i for block in store.tokens("resid_post.1", 6) for i in block.sample_index.tolist()) == sorted(plain)
    absent = next(index for index in INDEX if index not in plain)
    with pytest.raises(IndexError, match=f"sample {absent} is not in this incomplete store"):
        store[absent]


def test_a_run_without_any_shard_can_be_opened_if_allowed(tmp_path):
    make_store(tmp_path / "run", INDEX, LENGTHS, leave_out=[0, 1, 2])
    store = ActivationStore(tmp_path / "run", allow_incomplete=True)
    assert len(store) == 0 and list(store) == [] and store.pooled("final_norm", "last").shape == (0, 2)
    with pytest.raises(IndexError):
        store[0]


def test_a_flipped_bit_is_found_by_checksum_before_anything_is_read(path):
    file = path / "shards" / "00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    ActivationStore(path)  # only looks at headers, unless asked
    with pytest.raises(CorruptShardError, match=r"00002\.safetensors is damaged: its checksum is"):
        ActivationStore(path, verify_checksums=True)


def test_a_truncated_shard_is_found_on_opening(path):
    file = path / "shards" / "00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptShardError, match=r"00000\.safetensors is not a whole shard"):
        ActivationStore(path)


@pytest.mark.parametrize("name", ["sample_index", "n_tokens"])
def test_damaged_identity_is_found_without_checksums(path, name):
    """A flipped bit in whose rows these are would otherwise file them under another sample."""
    file = path / "shards" / "00001.safetensors"
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    tensors[name] = tensors[name].flip(0)
    from safetensors.torch import save_file

    save_file(tensors, file, header)
    with pytest.raises(CorruptShardError):
        verify_shard(file)
    store = ActivationStore(path)
    for read in (lambda: store.pooled("final_norm", "last"), lambda: list(store.tokens("resid_post.1")), lambda: list(store)):
        with pytest.raises(CorruptShardError, match=f"00001.safetensors and samples.parquet disagree on {name}"):
            read()


def test_shards_that_several_folders_hold_are_merged_by_copying(tmp_path):
    for number in range(3):
        make_store(tmp_path / f"node{number}", INDEX, LENGTHS, leave_out={0, 1, 2} - {number}, label=LABELS)
    for number in (1, 2):
        shutil.copytree(tmp_path / f"node{number}", tmp_path / "node0", dirs_exist_ok=True)
    with pytest.raises(VerificationError, match="changed after"):  # each of these verdicts is about one node's shards
        ActivationStore(tmp_path / "node0")
    store = ActivationStore(tmp_path / "node0", allow_unverified=True, verify_checksums=True)
    plain = read_plainly(tmp_path / "node0")
    assert store.sample_index.tolist() == INDEX
    for sample in store:
        check_sample(sample, *plain[sample.sample_index])


@pytest.mark.parametrize("name", ["resid_post.1/mean", "resid_post.1/tokens"])
@pytest.mark.parametrize("spoil", [lambda t: torch.cat([t, t[:1]]), lambda t: t[:-1], lambda t: t[:, :-1], lambda t: t.double()])
def test_a_shard_whose_rows_are_of_another_number_width_or_dtype_is_refused(path, name, spoil):
    file = path / "shards" / "00001.safetensors"
    with safe_open(file, framework="pt") as shard:
        metadata = json.loads(shard.metadata()["exactivations"])
    tensors = load_file(file)
    del metadata["checksum"]  # it is made anew, and right: only what run.json says can tell
    write_shard(file, tensors | {name: spoil(tensors[name]).contiguous()}, metadata)
    store = ActivationStore(path, allow_unverified=True, verify_checksums=True)
    with pytest.raises(CorruptShardError, match=f"00001.safetensors holds {name} as float.*expected float32"):
        list(store)


def test_a_shard_of_another_run_that_was_copied_in_is_refused(path):
    folder = path / "shards"
    write_shard(folder / "00000.safetensors", shard_tensors([0], [1]), {"shard": 0, "fingerprint": "other"})
    with pytest.raises(StoreError, match="made by another run"):
        ActivationStore(path)


def test_a_store_whose_environment_was_allowed_to_change_reads_all_its_shards(path):
    content = json.loads((path / "run.json").read_text())
    content["changes"] = [{"fields": {"torch": ["2.0", "2.1"]}, "fingerprint": "later"}]
    (path / "run.json").write_text(json.dumps(content))
    file = path / "shards" / "00001.safetensors"
    write_shard(file, load_file(file), {"shard": 1, "fingerprint": "later"})
    assert ActivationStore(path, allow_unverified=True, verify_checksums=True).sample_index.tolist() == INDEX


@settings(max_examples=25, deadline=None)
@given(
    samples=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 40)), min_size=1, max_size=40, unique_by=lambda s: s[0]),
    n_shards=st.integers(1, 6),
    block_tokens=st.integers(1, 100),
    seed=st.integers(0, 1000),
)
def test_any_lengths_indices_and_shards_read_back(tmp_path_factory, samples, n_shards, block_tokens, seed):
    path = tmp_path_factory.mktemp("store")
    index, lengths = map(list, zip(*sorted(samples), strict=True))
    make_store(path, index, lengths, n_shards=min(n_shards, len(index)), seed=seed)
    store, plain = ActivationStore(path, verify_checksums=True), read_plainly(path)
    assert store.sample_index.tolist() == index == sorted(plain)
    for sample in store:
        check_sample(sample, *plain[sample.sample_index])
    assert store.pooled("final_norm", "last").tolist() == [row(i, "final_norm/last") for i in index]
    blocks = list(store.tokens("resid_post.1", block_tokens))
    assert sorted(i for block in blocks for i in block.sample_index.tolist()) == index


@settings(max_examples=40, deadline=None)
@given(
    samples=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 12)), min_size=1, max_size=25, unique_by=lambda s: s[0]),
    n_shards=st.integers(1, 5),
    leave_out=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    n_threads=st.sampled_from([1, 2, 5]),
    data=st.data(),
)
def test_rows_by_number_are_those_of_a_plain_loop_in_any_order_and_as_often_as_asked(
    tmp_path_factory, samples, n_shards, leave_out, dtype, n_threads, data
):
    path = tmp_path_factory.mktemp("store")
    index, lengths = map(list, zip(*sorted(samples), strict=True))
    n_shards = min(n_shards, len(index))
    make_store(path, index, lengths, n_shards=n_shards, dtype=dtype, leave_out=[0] if leave_out and n_shards > 1 else [])
    store, plain = ActivationStore(path, allow_incomplete=True), read_plainly(path)
    present = sorted(plain)
    tokens = [(sample, token) for sample in present for token in range(plain[sample][0]["n_tokens"])]
    assert store.token_start.tolist() == np.cumsum([0, *(plain[sample][0]["n_tokens"] for sample in present)]).tolist()

    def numbers(n):
        return np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=2 * n)), dtype=np.int64)

    threads = mock.patch.object(torch, "get_num_threads", return_value=n_threads)
    with mock.patch.object(activation_store, "BYTES_FOR_THREADS", 0), threads:
        check_rows(store, present, tokens, dtype, numbers)


def check_rows(store, present, tokens, dtype, numbers):
    """Holds rows by number against the rule by which they were made."""
    for name in ("resid_post.1/mean", "final_norm/last"):
        asked = numbers(len(present))
        found = store.rows(name, asked)
        assert found.dtype == getattr(torch, dtype) and found.shape == (len(asked), WIDTHS[name])
        assert found.tolist() == [row(present[number], name) for number in asked]
    asked = numbers(len(tokens))
    assert store.rows("resid_post.1/tokens", asked).tolist() == [
        row(s, "resid_post.1/tokens", t) for s, t in map(tokens.__getitem__, asked)
    ]
    assert store.token_ids(asked).tolist() == [ids_of(s, t + 1)[t] for s, t in map(tokens.__getitem__, asked)]
    assert store.are_content(asked).tolist() == [mask_of(s, t + 1)[t] for s, t in map(tokens.__getitem__, asked)]
    assert (store.token_ids(asked).dtype, store.are_content(asked).dtype) == (torch.int32, torch.bool)


def test_rows_that_are_not_there_are_refused(path, tmp_path):
    store = ActivationStore(path)
    assert store.title == str(path)
    assert store.per_token == {"resid_post.1/mean": False, "resid_post.1/tokens": True, "final_norm/last": False}
    with pytest.raises(InvalidInputError, match=r"run holds no a/b; it holds resid_post\.1/mean, "):
        store.rows("a/b", np.array([0]))
    for wrong in ([-1], [3, 11]):
        with pytest.raises(InvalidInputError, match=rf"final_norm/last of rows 0 to 10, asked for {wrong[0]} to {wrong[-1]}"):
            store.rows("final_norm/last", np.array(wrong))
    for read in (store.token_ids, store.are_content, lambda numbers: store.rows("resid_post.1/tokens", numbers)):
        assert len(read(np.array([77]))) == 1
        with pytest.raises(InvalidInputError, match="of rows 0 to 77, asked for 78 to 78"):
            read(np.array([78]))
    make_store(tmp_path / "pooled", INDEX, LENGTHS, names=["final_norm/last"])
    for read in (ActivationStore(tmp_path / "pooled").token_ids, ActivationStore(tmp_path / "pooled").are_content):
        with pytest.raises(
            InvalidInputError, match="pooled holds no tokens: extract with --pooling tokens; it holds final_norm/last"
        ):
            read(np.array([0]))
