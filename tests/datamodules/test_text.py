"""TextDataModule: batches that know whose they are."""

from collections import Counter
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import SequentialSampler

from exactivations.datamodules import PlanOptions, TextDataModule, TextOptions
from exactivations.store.errors import InvalidInputError
from exactivations.store.token_hash import hash_of_ids

SMALL = PlanOptions(token_budget=64, shard_tokens=256)


def texts_of(n=400):
    rng = np.random.default_rng(3)
    return [" ".join(rng.choice(list("abcdefghij"), rng.integers(1, 30))) for _ in range(n)]


TEXTS = texts_of()


@pytest.fixture
def labelled():
    return datasets.Dataset.from_dict(
        {"label": [i % 3 for i in range(len(TEXTS))], "text": TEXTS, "tags": [["x"] * (i % 2) for i in range(len(TEXTS))]}
    )


def make(source, tokenizer, **options) -> TextDataModule:
    data = TextDataModule(source, tokenizer, plan_options=options.pop("plan_options", SMALL), **options)
    data.setup()
    return data


def batches_of(data):
    return [batch for step in data.predict_dataloader() for batch in step.batches()]


def check_against_texts(batches, texts, tokenizer) -> Counter:
    """Holds every row of the batches against the tokenizer; returns how often each sample was seen."""
    seen = Counter()
    for batch in batches:
        for row, index in enumerate(batch.sample_index.tolist()):
            ids = tokenizer(texts[index])["input_ids"]
            n = len(ids)
            assert batch.n_tokens[row] == n
            assert batch.input_ids[row, :n].tolist() == ids
            assert not batch.input_ids[row, n:].any()
            assert batch.token_mask[row].tolist() == [0 < i < n - 1 for i in range(batch.input_ids.shape[1])]
            seen[index] += 1
        assert batch.input_ids.dtype == batch.n_tokens.dtype == batch.sample_index.dtype == torch.int64
        assert batch.token_mask.dtype == torch.bool
    return seen


@pytest.mark.parametrize("padding", ["none", "tail"])
def test_every_row_of_every_batch_is_the_sample_that_it_says(word_tokenizer, padding):
    data = make(TEXTS, word_tokenizer, plan_options=PlanOptions(64, 256, padding, 0.2))
    batches = batches_of(data)  # without a trainer
    assert check_against_texts(batches, TEXTS, word_tokenizer) == Counter(range(len(TEXTS)))
    assert any(batch.is_padded for batch in batches) == (padding == "tail")


def test_places_of_batches_and_the_samples_table_agree(word_tokenizer):
    data = make(TEXTS, word_tokenizer)
    samples = data.samples.to_pylist()
    for batch in batches_of(data):
        first_token = sum(
            row["n_tokens"] for row in samples if row["shard"] == batch.place.shard and row["row"] < batch.place.first_row
        )
        assert batch.place.first_token == first_token
        for row, index in enumerate(batch.sample_index.tolist()):
            assert (samples[index]["shard"], samples[index]["row"]) == (batch.place.shard, batch.place.first_row + row)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 200])
def test_ranks_cover_all_samples_once_whatever_their_number(word_tokenizer, world_size):
    seen, data = Counter(), make(TEXTS, word_tokenizer)
    for rank in range(world_size):
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, strategy=strategy)
        seen += check_against_texts(batches_of(data), TEXTS, word_tokenizer)
    assert seen == Counter(range(len(TEXTS)))


def test_shards_that_exist_are_left_out(word_tokenizer):
    data = make(TEXTS, word_tokenizer)
    assert data.plan.n_shards > 5
    data.skip_shards = frozenset({0, 3})
    seen = {shard for rank in range(2) for shard in data.shards_of(rank, 2)}
    assert seen == set(range(data.plan.n_shards)) - {0, 3}
    places = {batch.place.shard for batch in batches_of(data)}
    assert places == seen
    data.skip_shards = frozenset(range(data.plan.n_shards))
    assert list(data.predict_dataloader()) == []


def test_the_samples_table_is_in_dataset_order_with_its_own_columns_first(word_tokenizer, labelled):
    table = make(labelled, word_tokenizer).samples
    own = {
        "sample_index": pa.int64(), "n_tokens": pa.int32(), "token_hash": pa.string(),
        "truncated": pa.bool_(), "shard": pa.int32(), "row": pa.int32(),
    }  # fmt: skip
    assert table.column_names == [*own, "label", "text", "tags"]
    assert [table.schema.field(name).type for name in own] == list(own.values())
    assert table["sample_index"].to_pylist() == list(range(len(TEXTS)))
    assert table["text"].to_pylist() == TEXTS
    assert table["label"].to_pylist() == labelled["label"][:]
    assert table["tags"].to_pylist() == labelled["tags"][:]
    ids = [word_tokenizer(text)["input_ids"] for text in TEXTS]
    assert table["n_tokens"].to_pylist() == list(map(len, ids))
    assert table["token_hash"].to_pylist() == list(map(hash_of_ids, ids))
    assert len(set(zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True))) == len(TEXTS)


def test_only_the_columns_asked_for_are_kept_in_the_order_asked_for(word_tokenizer, labelled):
    assert make(labelled, word_tokenizer, keep_columns=["tags", "label", "tags"]).samples.column_names[6:] == ["tags", "label"]
    assert make(labelled, word_tokenizer, keep_columns=[]).samples.column_names[6:] == []


def test_a_column_with_a_name_of_the_stores_own_is_refused_unless_it_is_left_out(word_tokenizer, labelled):
    named = labelled.rename_column("label", "shard")
    with pytest.raises(InvalidInputError, match="column 'shard' has a name that the store uses itself"):
        make(named, word_tokenizer)
    assert make(named, word_tokenizer, keep_columns=["tags"]).samples.column_names[6:] == ["tags"]


def test_columns_that_are_missing_are_refused_with_those_that_there_are(word_tokenizer, labelled):
    with pytest.raises(InvalidInputError, match="no column 'lable' to keep or group by; it has label, text, tags"):
        make(labelled, word_tokenizer, keep_columns=["lable"])
    with pytest.raises(InvalidInputError, match="no column 'body'; it has label, text, tags"):
        make(labelled, word_tokenizer, text=TextOptions(text_column="body"))


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_part_of_the_samples_keeps_its_indices_and_columns(word_tokenizer, labelled, seed):
    data = make(labelled, word_tokenizer, num_samples=50, sample_seed=seed)
    table = data.samples
    indices = table["sample_index"].to_pylist()
    assert len(set(indices)) == 50
    assert indices == sorted(indices)
    assert (indices == list(range(50))) == (seed is None)
    assert table["text"].to_pylist() == [TEXTS[i] for i in indices]
    assert check_against_texts(batches_of(data), TEXTS, word_tokenizer) == Counter(indices)
    again = make(labelled, word_tokenizer, num_samples=50, sample_seed=seed)
    assert again.samples.equals(table)
    assert again.identity() == data.identity()


def test_seeds_choose_different_samples(word_tokenizer):
    chosen = [make(TEXTS, word_tokenizer, num_samples=50, sample_seed=seed).selected.tolist() for seed in range(3)]
    assert len({tuple(indices) for indices in chosen}) == 3


@pytest.mark.parametrize("n", [0, -1, 401])
def test_more_or_fewer_samples_than_there_are_are_refused(word_tokenizer, n):
    with pytest.raises(InvalidInputError, match=f"{n} samples were asked for, the dataset has 400"):
        make(TEXTS, word_tokenizer, num_samples=n)


def test_a_seed_without_a_number_of_samples_is_refused(word_tokenizer):
    with pytest.raises(InvalidInputError, match="say how many"):
        TextDataModule(TEXTS, word_tokenizer, sample_seed=1)


def test_a_dataset_without_samples_is_refused(word_tokenizer):
    with pytest.raises(InvalidInputError, match="no samples"):
        make([], word_tokenizer)
    with pytest.raises(InvalidInputError, match="no samples"):
        make(["a", "b"], word_tokenizer, split="train[2:]")


def test_skipped_samples_leave_the_others_their_indices_and_columns(word_tokenizer, labelled):
    texts = [None if i % 10 == 3 else text for i, text in enumerate(TEXTS)]
    holed = labelled.remove_columns("text").add_column("text", texts)
    data = make(holed, word_tokenizer, text=TextOptions(on_empty="skip"), num_samples=100, sample_seed=5)
    kept = [i for i in data.selected.tolist() if i % 10 != 3]
    assert data.tokens.skipped == [i for i in data.selected.tolist() if i % 10 == 3]
    assert data.samples["sample_index"].to_pylist() == kept
    assert data.samples["label"].to_pylist() == [i % 3 for i in kept]
    assert check_against_texts(batches_of(data), texts, word_tokenizer) == Counter(kept)


def test_truncation_is_recorded_by_sample(word_tokenizer):
    data = make(TEXTS, word_tokenizer, text=TextOptions(max_length=12))
    lengths = [len(word_tokenizer(text)["input_ids"]) for text in TEXTS]
    assert data.samples["truncated"].to_pylist() == [n > 12 for n in lengths]
    assert data.samples["n_tokens"].to_pylist() == [min(n, 12) for n in lengths]


def test_workers_give_the_same_batches_in_the_same_order(word_tokenizer):
    alone = batches_of(make(TEXTS, word_tokenizer))
    by_workers = batches_of(make(TEXTS, word_tokenizer, num_workers=2))
    assert len(alone) == len(by_workers)
    for one, other in zip(alone, by_workers, strict=True):
        assert one.place == other.place
        for name in ("sample_index", "input_ids", "n_tokens", "token_mask"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def test_the_loader_gives_lightning_nothing_to_rebuild(word_tokenizer):
    data = make(TEXTS, word_tokenizer)
    loader = data.predict_dataloader()
    assert loader.batch_sampler is None
    assert isinstance(loader.sampler, SequentialSampler)
    assert data.allow_zero_length_dataloader_with_multiple_devices  # a rank without shards is ordinary


def test_a_dataset_with_a_format_or_in_another_order_is_read_as_it_is_given(word_tokenizer, labelled):
    order = np.random.default_rng(0).permutation(len(TEXTS))
    shuffled = labelled.select(order).with_format("numpy", columns=["label"])
    data = make(shuffled, word_tokenizer)
    texts = [TEXTS[i] for i in order]
    assert data.samples["text"].to_pylist() == texts
    assert data.samples["label"].to_pylist() == (order % 3).tolist()
    assert check_against_texts(batches_of(data), texts, word_tokenizer) == Counter(range(len(TEXTS)))


def test_the_identity_changes_with_whatever_decides_the_values_and_with_nothing_else(word_tokenizer, labelled):
    first = make(labelled, word_tokenizer).identity()
    renamed = labelled.rename_columns({"text": "body", "label": "group"})
    assert make(renamed, word_tokenizer, text=TextOptions(text_column="body"), num_workers=1).identity() == first
    assert make(TEXTS, word_tokenizer, keep_columns=[]).identity() == first
    changed = {
        "dataset": make([*TEXTS[:-1], "a"], word_tokenizer),
        "n_samples": make(TEXTS, word_tokenizer, num_samples=10),
        "max_length": make(TEXTS, word_tokenizer, text=TextOptions(max_length=90)),
        "token_mask": make(TEXTS, word_tokenizer, text=TextOptions(token_mask="all")),
        "token_budget": make(TEXTS, word_tokenizer, plan_options=PlanOptions(128, 256)),
        "padding": make(TEXTS, word_tokenizer, plan_options=PlanOptions(64, 256, "tail")),
    }
    for name, data in changed.items():
        assert data.identity()[name] != first[name]


def test_the_samples_table_has_the_same_bytes_however_the_dataset_lies_in_memory(word_tokenizer, labelled, tmp_path):
    pieces = datasets.concatenate_datasets([labelled.select(range(0, 150)), labelled.select(range(150, 400))])
    labelled.save_to_disk(tmp_path / "saved", num_shards=3)
    for i, source in enumerate([labelled, pieces, tmp_path / "saved"]):
        pq.write_table(make(source, word_tokenizer).samples, tmp_path / f"{i}.parquet")
    first, *others = [(tmp_path / f"{i}.parquet").read_bytes() for i in range(3)]
    assert all(other == first for other in others)


def test_a_tokenizer_is_loaded_by_its_path_and_one_that_is_not_there_is_refused(word_tokenizer, tmp_path):
    word_tokenizer.save_pretrained(tmp_path / "tokenizer")
    for path in (tmp_path / "tokenizer", str(tmp_path / "tokenizer")):
        data = make(["a b"], path)
        assert data.tokens.token_hash.to_pylist() == [hash_of_ids(word_tokenizer("a b")["input_ids"])]
        assert data.identity() == make(["a b"], word_tokenizer).identity()
    with pytest.raises(InvalidInputError, match=r"tokenizer .* could not be loaded"):
        make(["a"], str(tmp_path / "nothing"))


def test_the_embedded_tokenizer_is_called_demo():
    data = make(["def f(x):\n    return x + 1\n"], "demo")
    assert data.tokenizer.decode(batches_of(data)[0].input_ids[0]) == "def f(x):\n    return x + 1\n"


def test_messages_with_the_assistants_tokens_marked_arrive_in_batches(word_tokenizer):
    from tests.datamodules.conftest import MARKING_TEMPLATE

    word_tokenizer.chat_template = MARKING_TEMPLATE
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "a b"}] for text in TEXTS[:50]]
    source = datasets.Dataset.from_dict({"messages": chats}).with_format("numpy")
    data = make(source, word_tokenizer, text=TextOptions(messages_column="messages", token_mask="assistant"))
    for batch in batches_of(data):
        assert batch.token_mask.sum(1).tolist() == [2] * len(batch.sample_index)
        assert batch.input_ids[batch.token_mask].tolist() == [5, 6] * len(batch.sample_index)
