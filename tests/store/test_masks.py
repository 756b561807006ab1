"""Foreign folders are read as they were written, or refused by name; masks by sample index are those of a plain loop."""

import itertools

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from exactivations.store import ActivationStore
from exactivations.store.errors import InvalidInputError, StoreError
from exactivations.store.mask_folder import read_mask_batches
from exactivations.store.mask_layout import SampleTable, lay_masks
from exactivations.store.masks import read_masks, write_masks
from tests.store.mask_folders import POOLED, foreign, padded_batches, save_as_mi_crow, save_flat, store_of
from tests.store.stores import ids_of, mask_of

LENGTHS = [3, 5, 1, 4, 2, 5, 7]
SIZES = [3, 3, 1]
MASKS = [mask_of(i, n) for i, n in enumerate(LENGTHS)]
IDS = [ids_of(i, n) for i, n in enumerate(LENGTHS)]


def rows_of(batches):
    return [batches.mask(sample).tolist() for sample in range(len(batches))]


def expected_rows(batches):
    return [row for batch in batches for row in batch["attention_mask"].bool().tolist()]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_every_way_of_saving_gives_the_same_rows_in_the_same_order(tmp_path, dtype):
    batches = padded_batches(SIZES, MASKS, IDS)
    for batch in batches:
        batch["attention_mask"] = batch["attention_mask"].to(dtype)
    folders = [
        save_as_mi_crow(tmp_path / "a", batches),
        save_as_mi_crow(tmp_path / "b", batches, layer="attention_masks"),
        save_flat(tmp_path / "c", batches),
        save_flat(tmp_path / "d", batches, digits=6),
        save_flat(tmp_path / "e", batches, suffix="pt"),
    ]
    (tmp_path / "e" / "meta.json").write_text("{}")
    for folder in folders:
        found = read_mask_batches(folder)
        assert rows_of(found) == expected_rows(batches)
        assert found.sizes == SIZES
        assert [found.place(k) for k in (0, 2, 3, 5, 6)] == [(0, 0), (0, 2), (1, 0), (1, 2), (2, 0)]
        assert found.ids is not None
        assert [ids.tolist() for ids in found.ids] == [batch["input_ids"].tolist() for batch in batches]


def test_batches_follow_their_numbers_and_not_their_names(tmp_path):
    folder = foreign(tmp_path / "run", LENGTHS + LENGTHS, [1] * 14)
    assert [len(row) for row in rows_of(read_mask_batches(folder))] == LENGTHS + LENGTHS


def test_a_bare_tensor_in_a_pt_file_and_nested_dicts_are_read(tmp_path):
    (tmp_path / "batch_0").mkdir()
    torch.save(torch.ones(2, 3), tmp_path / "batch_0" / "attention_mask.pt")
    torch.save({"attention_mask": torch.ones(1, 4), "step": 3}, tmp_path / "batch_1.pt")
    assert read_mask_batches(tmp_path).sizes == [2, 1]
    (tmp_path / "nested").mkdir()
    torch.save({"inputs": {"keep": torch.ones(1, 4), "rest": torch.ones(1)}}, tmp_path / "nested" / "batch_0.pt")
    assert read_mask_batches(tmp_path / "nested", "inputs.keep").sizes == [1]


def test_the_only_tensor_is_the_mask_whatever_its_name_is_and_a_named_one_is_taken_if_said(tmp_path):
    save_file({"keep": torch.ones(2, 3)}, tmp_path / "batch_0.safetensors")
    assert read_mask_batches(tmp_path).sizes == [2]
    save_file({"keep": torch.ones(2, 3), "drop": torch.zeros(2, 3)}, tmp_path / "batch_0.safetensors")
    with pytest.raises(InvalidInputError, match=r"no tensor named attention_mask or .*it holds drop, keep.*--mask-name"):
        read_mask_batches(tmp_path)
    assert rows_of(read_mask_batches(tmp_path, "drop")) == [[False] * 3] * 2
    with pytest.raises(InvalidInputError, match="no tensor named gone; it holds drop, keep"):
        read_mask_batches(tmp_path, "gone")


def test_two_masks_of_one_name_are_told_apart_by_their_place(tmp_path):
    for layer, values in (("attention_masks", torch.ones(2, 3)), ("input_ids", torch.zeros(2, 3))):
        (tmp_path / "batch_0" / layer).mkdir(parents=True)
        save_file({"tensor": values}, tmp_path / "batch_0" / layer / "attention_mask.safetensors")
    with pytest.raises(InvalidInputError, match="it holds attention_masks/attention_mask, input_ids/attention_mask"):
        read_mask_batches(tmp_path)
    assert rows_of(read_mask_batches(tmp_path, "input_ids/attention_mask")) == [[False] * 3] * 2


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("code in a .pt file was run",))


def test_a_pt_file_that_needs_unpickling_is_refused_and_nothing_in_it_runs(tmp_path):
    torch.save({"attention_mask": torch.ones(1, 2), "extra": Malicious()}, tmp_path / "batch_0.pt")
    with pytest.raises(InvalidInputError, match=r"batch_0.pt holds more than tensors, or is damaged; it is not opened"):
        read_mask_batches(tmp_path)


ONES = {"attention_mask": torch.ones(2, 3)}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no batch_<i> folders and no batch_<i>.safetensors or .pt files, but nothing"),
        ({"masks_0.safetensors": ONES}, "but masks_0.safetensors"),
        ({"batch_0.safetensors": ONES, "batch_2.safetensors": ONES}, r"batch_1 is missing, the next one there is batch_2"),
        ({"batch_1.safetensors": ONES}, "batch_0 is missing"),
        ({"batch_1.pt": ONES, "batch_01.pt": ONES, "batch_0.pt": ONES}, "holds batch 1 twice, batch_01.pt and batch_1.pt"),
        ({"batch_0.pt": ONES, "batch_0.safetensors": ONES}, "holds batch 0 twice, batch_0.pt and batch_0.safetensors"),
        ({"batch_0/a.pt": ONES, "batch_0.pt": ONES}, "holds batch 0 twice, batch_0 and batch_0.pt"),
        ({"batch_0.pt": ONES, "batch_0_copy.pt": ONES}, "batch_0_copy.pt is neither batch_<number> nor"),
        ({"batch_0.pt": {"mask": torch.ones(2)}}, r"must be \[B, L\].*got shape \[2\]"),
        ({"batch_0.pt": {"mask": torch.ones(2, 3, 4)}}, r"got shape \[2, 3, 4\]"),
        ({"batch_0.pt": {"mask": torch.ones(0, 3)}}, r"got shape \[0, 3\]"),
        ({"batch_0.pt": {"mask": torch.tensor([[0, 1], [2, 1]])}}, "has 2 in row 1 at position 0; a mask has only 0 and 1"),
        ({"batch_0.pt": {"mask": torch.tensor([[0, float("nan")]])}}, "has nan in row 0 at position 1"),
        ({"batch_0.pt": ONES | {"input_ids": torch.ones(2, 4, dtype=int)}}, r"has shape \[2, 4\], its mask \[2, 3\]"),
        ({"batch_0.pt": ONES | {"input_ids": torch.ones(2, 3)}}, "dtype torch.float32; token ids are integers"),
        ({"batch_0.pt": ONES | {"input_ids": torch.full((2, 3), 2**31)}}, "which are no token ids"),
        (
            {"batch_0.pt": ONES | {"input_ids": torch.ones(2, 3, dtype=int)}, "batch_1.pt": ONES},
            "1 of 2 batches hold input_ids, ba",
        ),
        ({"batch_0.pt": {"step": 3}}, "holds a dict without a tensor"),
        ({"batch_0.pt": b"no file of torch"}, "batch_0.pt holds more than tensors, or is damaged"),
        ({"batch_0.pt": b""}, "batch_0.pt holds more than tensors, or is damaged"),
        ({"batch_0.safetensors": b"\xff" * 40}, "batch_0.safetensors cannot be read"),
        ({"batch_0/notes.txt": b"text"}, "it holds no tensor in a .safetensors or .pt file"),
    ],
)
def test_what_cannot_be_counted_or_is_no_mask_is_refused_by_name(tmp_path, files, message):
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif path.suffix == ".pt":
            torch.save(content, path)
        else:
            save_file(content, path)
    with pytest.raises(InvalidInputError, match=message):
        read_mask_batches(tmp_path)


def test_a_truncated_safetensors_file_is_refused(tmp_path):
    folder = save_flat(tmp_path / "run", padded_batches(SIZES, MASKS))
    path = folder / "batch_1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InvalidInputError, match=r"batch_1.safetensors cannot be read"):
        read_mask_batches(folder)


def lay(folder, store, rows="dataset", **options):
    table, batches = SampleTable.of(store), read_mask_batches(folder)
    return table, lay_masks(batches, table, table.rows(rows), **options)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=25),
    side=st.sampled_from(["right", "left"]),
    extra=st.integers(0, 3),
)
def test_with_ids_any_batch_sizes_and_sides_give_each_sample_its_own_mask(tmp_path_factory, data, lengths, side, extra):
    tmp_path = tmp_path_factory.mktemp("run")
    n = len(lengths)
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=6))) if n > 1 else []
    sizes = [b - a for a, b in itertools.pairwise([0, *cuts, n])]
    masks = [data.draw(st.lists(st.booleans(), min_size=length, max_size=length).filter(any)) for length in lengths]
    batches = padded_batches(sizes, masks, [ids_of(i, length) for i, length in enumerate(lengths)], side)
    for batch in batches:  # some tools pad to a multiple
        for name, tensor in batch.items():
            batch[name] = torch.nn.functional.pad(tensor, (0, extra) if side == "right" else (extra, 0)).contiguous()
    _, laid = lay(save_as_mi_crow(tmp_path / "masks", batches), store_of(tmp_path / "store", lengths, n_shards=1, names=POOLED))
    assert not laid.problems and laid.proven.all()
    assert [mask.tolist() for mask in laid.masks] == masks


@pytest.mark.parametrize("side", ["right", "left"])
def test_without_ids_the_side_of_the_padding_is_found_by_what_is_marked(tmp_path, side):
    masks = [[True] * n for n in LENGTHS]
    folder = foreign(tmp_path / "masks", LENGTHS, SIZES, with_ids=False, side=side, masks=masks)
    _, laid = lay(folder, store_of(tmp_path / "store", LENGTHS))
    assert laid.side == side and not laid.problems and not laid.proven.any()
    assert [mask.tolist() for mask in laid.masks] == masks


def test_without_ids_a_side_that_cannot_be_told_is_asked_for(tmp_path):
    masks = [[False] + [True] * (n - 2) + [False] for n in (4, 6)]  # BOS and EOS do not count
    store = store_of(tmp_path / "store", [4, 5], n_shards=1)
    save_flat(tmp_path / "masks", [{"attention_mask": torch.tensor([[0, 1, 1, 0, 0], [0, 1, 1, 1, 0]])}])
    _, laid = lay(tmp_path / "masks", store)
    assert laid.side is None and laid.masks == [None, None]
    assert "sample 0 has 5 positions for 4 tokens and marks fewer; say which with --padding-side" in laid.side_problem
    _, laid = lay(tmp_path / "masks", store, padding_side="right")
    assert laid.masks[0].tolist() == masks[0]
    _, laid = lay(tmp_path / "masks", store, padding_side="left")
    assert laid.masks[0].tolist() == [True, True, False, False]


def test_rows_that_are_as_long_as_their_samples_need_no_side(tmp_path):
    folder = foreign(tmp_path / "masks", [4] * 7, SIZES, with_ids=False)
    _, laid = lay(folder, store_of(tmp_path / "store", [4] * 7))
    assert [mask.tolist() for mask in laid.masks] == [mask_of(i, 4) for i in range(7)]


def test_a_folder_that_is_not_padded_on_one_side_is_refused_with_the_samples(tmp_path):
    lengths = [2, 2, 2, 4]
    rows = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    save_flat(tmp_path / "masks", [{"attention_mask": rows}])
    table, laid = lay(tmp_path / "masks", store_of(tmp_path / "store", lengths, n_shards=1))
    assert "2 samples (0, 1) on the right, sample 2 on the left" in laid.side_problem
    with pytest.raises(InvalidInputError, match="not all masks are padded on one side"):
        write_masks(tmp_path / "masks.parquet", table, laid, "masks")
    _, laid = lay(tmp_path / "masks", tmp_path / "store", padding_side="right")
    assert laid.problems == {2: "its row is not padded on the right"}


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_row_that_marks_nothing_is_refused_unless_its_sample_was_skipped(tmp_path, with_ids, side):
    store = store_of(tmp_path / "store", [3, 4, 9], [1, 2, 4], skipped=[0, 3])
    masks = [[False] * 2, [True] * 3, [False] * 4, [False] * 5, [True] * 9]
    folder = foreign(tmp_path / "masks", [2, 3, 4, 5, 9], [3, 2], with_ids=with_ids, side=side, masks=masks)
    table, laid = lay(folder, store)
    assert laid.problems == {1: "token_mask marks nothing: none of its sample's 4 tokens would count"}
    assert laid.side == side
    with pytest.raises(InvalidInputError, match="sample 2: token_mask marks nothing"):
        write_masks(tmp_path / "masks.parquet", table, laid, "masks")


def test_a_wrong_length_is_told_with_both_numbers(tmp_path):
    lengths = [4, 9, 3]
    store = store_of(tmp_path / "store", lengths, n_shards=1)
    save_flat(tmp_path / "masks", [{"attention_mask": torch.ones(3, 6)}])
    table, laid = lay(tmp_path / "masks", store)
    assert laid.problems == {
        0: "token_mask has 6 positions and marks some from 0 to 5, activations have 4",
        1: "token_mask has 6 positions, activations have 9",
        2: "token_mask has 6 positions and marks some from 0 to 5, activations have 3",
    }
    with pytest.raises(
        InvalidInputError, match=r"sample 0: token_mask has 6 positions.*sample 1: token_mask has 6 positions, activ"
    ):
        write_masks(tmp_path / "masks.parquet", table, laid, "masks")
    assert not (tmp_path / "masks.parquet").exists()


def test_a_mask_of_the_right_shape_but_other_tokens_is_refused_by_its_ids(tmp_path):
    folder = foreign(tmp_path / "masks", LENGTHS, SIZES, samples=[0, 1, 2, 3, 4, 99, 6])
    _, laid = lay(folder, store_of(tmp_path / "store", LENGTHS))
    assert laid.problems == {5: "token_mask belongs to other tokens (token hash differs)"}
    assert laid.proven.tolist() == [True] * 5 + [False, True]


def test_a_mask_that_marks_padding_is_refused_by_its_ids(tmp_path):
    batches = padded_batches([2], [[True] * 2, [True] * 4], [ids_of(0, 2), ids_of(1, 4)])
    batches[0]["attention_mask"][0, 3] = True
    save_flat(tmp_path / "masks", batches)
    _, laid = lay(tmp_path / "masks", store_of(tmp_path / "store", [2, 4], n_shards=1))
    assert laid.problems == {0: "token_mask marks what is padding by the ids beside it"}


def test_the_masks_count_the_dataset_as_given_unless_told_that_they_count_the_stores_samples(tmp_path):
    index, lengths = [1, 2, 5], [3, 2, 4]
    store = store_of(tmp_path / "store", lengths, index, skipped=[0, 4])
    table = SampleTable.of(store)
    assert table.n_dataset == 6
    every = foreign(tmp_path / "all", [1, 3, 2, 7, 1, 4], [4, 2])
    _, laid = lay(every, store)
    assert laid.proven.all() and [mask.tolist() for mask in laid.masks] == [
        mask_of(i, n) for i, n in zip(index, lengths, strict=True)
    ]
    kept = foreign(tmp_path / "kept", lengths, [2, 1], samples=index)
    _, laid = lay(kept, store, rows="store")
    assert laid.proven.all() and not laid.problems
    assert table.wrong_number(6, "dataset", more_rows=False) is None
    assert table.wrong_number(3, "store", more_rows=False) is None
    assert "pass --rows store" in table.wrong_number(3, "dataset", more_rows=False)
    assert "there are 5 masks, expected 6: the store has 3 samples" in table.wrong_number(5, "dataset", more_rows=True)
    assert "pass --more-rows" in table.wrong_number(9, "dataset", more_rows=False)
    assert table.wrong_number(9, "dataset", more_rows=True) is None


@pytest.fixture
def written(tmp_path):
    store = store_of(tmp_path / "store", LENGTHS)
    table, laid = lay(foreign(tmp_path / "masks", LENGTHS, SIZES), store)
    write_masks(tmp_path / "masks.parquet", table, laid, "masks")
    return tmp_path / "masks.parquet", store


def test_the_file_is_plain_parquet_by_sample_index_and_reads_back(written):
    path, store = written
    frame = pd.read_parquet(path)
    assert frame.columns.tolist() == ["sample_index", "n_tokens", "token_hash", "hash_checked", "token_mask"]
    assert frame.sample_index.tolist() == list(range(7)) and frame.n_tokens.tolist() == LENGTHS
    assert [mask.tolist() for mask in frame.token_mask] == MASKS and frame.hash_checked.all()
    masks = read_masks(path, ActivationStore(store, allow_unverified=True))
    assert len(masks) == 7 and masks.hash_checked.all()
    for index, expected in enumerate(MASKS):
        assert masks[index].dtype == torch.bool and masks[index].tolist() == expected
    for absent in (-1, 7):
        with pytest.raises(IndexError, match=f"no mask of sample {absent}"):
            masks[absent]
    assert sorted(file.name for file in path.parent.iterdir()) == ["masks", "masks.parquet", "store"]


def test_masks_of_another_store_are_refused(written, tmp_path):
    path, _ = written
    other = store_of(tmp_path / "fewer", LENGTHS[:-1])
    with pytest.raises(StoreError, match=r"has masks of 7 samples .* holds 6 samples .*another store"):
        read_masks(path, ActivationStore(other, allow_unverified=True))
    other = store_of(tmp_path / "longer", [*LENGTHS[:-1], 8])
    with pytest.raises(StoreError, match=r"sample 6 has 7 positions and token hash \w+, in the store 8 and \w+ \(1 of 7"):
        read_masks(path, ActivationStore(other, allow_unverified=True))


@pytest.mark.parametrize("damage", ["hash", "length", "n_tokens", "null", "foreign", "bytes", "gone"])
def test_a_changed_file_is_refused(written, damage):
    path, store = written
    rows = pq.read_table(path)
    if damage == "hash":
        rows = rows.set_column(2, "token_hash", pa.array(["0"] * 7))
    if damage == "length":
        rows = rows.set_column(4, "token_mask", pa.array(MASKS[1:] + MASKS[:1]))
    if damage == "n_tokens":
        rows = rows.set_column(1, "n_tokens", pa.array([9] * 7, pa.int32()))
    if damage == "null":
        rows = rows.set_column(4, "token_mask", pa.array([*MASKS[:-1], None]))
    if damage == "foreign":
        rows = rows.replace_schema_metadata({})
    pq.write_table(rows, path)
    if damage == "bytes":
        path.write_bytes(path.read_bytes()[:-9])
    if damage == "gone":
        path.unlink()
    with pytest.raises(StoreError, match=r"masks.parquet"):
        read_masks(path, ActivationStore(store, allow_unverified=True))
