"""Rows, labels and groups of an example belong to one sample or token, and what does not fit together is refused by name."""

import json
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import psutil
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from exactivations.datamodules.activations import ActivationDataModule
from exactivations.datamodules.splits import PARTS, Split
from exactivations.lit_modules.probes.exact_probes import ExactProbeSweep
from exactivations.store.activation_store import ActivationStore
from exactivations.store.errors import InvalidInputError
from tests.lit_modules.probe_stores import demo_like, write_rows
from tests.store.stores import make_store, mask_of, row

MEAN, LAST, TOKENS = "resid_post.1/mean", "final_norm/last", "resid_post.1/tokens"
LETTERS = ["a", "b", None]


def class_of(sample):
    return "xy"[sample % 2]


def letter_of(sample, token):
    """The label of a token; None is none."""
    return LETTERS[(sample * 5 + token) % 3]


def refused(call, *parts):
    with pytest.raises(InvalidInputError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@st.composite
def stores(draw):
    """Indices with gaps, lengths, and how the samples are dealt to shards; enough of both classes for three parts."""
    index = sorted(draw(st.sets(st.integers(0, 120), min_size=24, max_size=40)) | set(range(12)))
    return {
        "sample_index": index,
        "lengths": draw(st.lists(st.integers(1, 6), min_size=len(index), max_size=len(index))),
        "n_shards": draw(st.integers(1, 5)),
        "seed": draw(st.integers(0, 100)),
    }


def made(tmp_path_factory, index, lengths, **options):
    path = tmp_path_factory.mktemp("runs") / "store"
    make_store(
        path, index, lengths, label=[class_of(sample) for sample in index], module=[f"m{sample % 9}" for sample in index],
        letters=[[letter_of(sample, token) for token in range(n)] for sample, n in zip(index, lengths, strict=True)], **options,
    )  # fmt: skip
    return ActivationStore(path)


def as_rank(data, rank, world_size):
    connector = SimpleNamespace(use_distributed_sampler=False)
    data.trainer = SimpleNamespace(
        global_rank=rank, world_size=world_size, sanity_checking=False, _accelerator_connector=connector
    )  # fmt: skip
    return data


def loader_of(module, part):
    return {"train": module.train_dataloader, "validation": module.val_dataloader, "test": module.test_dataloader}[part]()


def drawn(data, numbers):
    """Some of the numbers, in any order and with repeats."""
    return np.array(data.draw(st.lists(st.sampled_from(numbers.tolist()), max_size=2 * len(numbers))), dtype=np.int64)


@settings(max_examples=20, deadline=None)
@given(made_of=stores(), ranks=st.integers(1, 4), data=st.data())
def test_rows_and_labels_of_samples_are_of_the_same_samples(tmp_path_factory, made_of, ranks, data):
    index, lengths = made_of.pop("sample_index"), made_of.pop("lengths")
    store = made(tmp_path_factory, index, lengths, **made_of)
    module = ActivationDataModule(store, "label", group="module", n_shuffles=1)
    extra = torch.tensor([[float(sample)] for sample in index])
    module.add("baseline: itself", extra)
    assert module.names == [MEAN, LAST, "baseline: itself"] and module.classes == ["x", "y"]

    def check(examples, numbers, part):
        assert examples.number.tolist() == numbers.tolist() and examples.n_tokens is None
        samples = [index[number] for number in numbers]
        for name, rows in examples.rows.items():
            assert rows.tolist() == [[sample] if name.startswith("base") else row(sample, name) for sample in samples]
        assert [module.classes[number] for number in examples.labels[0]] == [class_of(sample) for sample in samples]
        assert torch.equal(examples.labels, module.targets(part)[:, np.searchsorted(module.numbers(part), numbers)])

    for part in PARTS:
        numbers = module.numbers(part)
        assert module.groups_of(part) == [f"m{index[number] % 9}" for number in numbers]
        asked = drawn(data, numbers)
        examples = module.examples(part, module.names, asked, 99)
        check(examples, asked, part)
        assert examples.n_in_step == 99
        seen = {}
        for rank in range(ranks):
            loader = loader_of(as_rank(module, rank, ranks), part)
            assert len(loader) == -(-len(module.names) // ranks)  # as many items for all: Lightning waits for all after each
            for examples in loader:
                check(examples, numbers, part)
                if not examples.rows:
                    continue  # it has a vector less than others, and as many items
                (name,) = examples.rows
                assert name not in seen
                seen[name] = rank
                assert examples.n_in_step == len(numbers)
        assert seen.keys() == set(module.names)
    assert sorted(np.concatenate([module.numbers(part) for part in PARTS]).tolist()) == list(range(len(index)))


@settings(max_examples=20, deadline=None)
@given(made_of=stores(), ranks=st.integers(1, 3), batch_size=st.integers(1, 30), data=st.data())
def test_content_tokens_and_labels_of_a_sample_stay_together_in_steps(tmp_path_factory, made_of, ranks, batch_size, data):
    index, lengths = made_of.pop("sample_index"), made_of.pop("lengths")
    module = ActivationDataModule(
        made(tmp_path_factory, index, lengths, **made_of), "label", over_tokens=True, batch_size=batch_size, n_shuffles=1
    )
    assert module.names == [TOKENS]
    of = dict(zip(index, lengths, strict=True))

    def check(examples, part):
        samples = [index[number] for number in examples.number]
        content = [[token for token in range(of[s]) if mask_of(s, of[s])[token]] for s in samples]
        assert examples.n_tokens.tolist() == [len(tokens) for tokens in content]
        expected = [row(s, TOKENS, token) for s, tokens in zip(samples, content, strict=True) for token in tokens]
        assert examples.rows[TOKENS].tolist() == expected and examples.rows[TOKENS].shape == (len(expected), 3)
        assert [module.classes[number] for number in examples.labels[0]] == [class_of(s) for s in samples]
        assert torch.equal(examples.labels, module.targets(part)[:, np.searchsorted(module.numbers(part), examples.number.numpy())])

    for part in PARTS:
        check(module.examples(part, module.names, drawn(data, module.numbers(part))), part)
        seen = []
        for rank in range(ranks):
            for examples in loader_of(as_rank(module, rank, ranks), part):
                check(examples, part)
                seen += examples.number.tolist()
        assert sorted(seen) == module.numbers(part).tolist()


@settings(max_examples=20, deadline=None)
@given(made_of=stores(), data=st.data())
def test_rows_and_labels_of_tokens_are_of_the_same_tokens(tmp_path_factory, made_of, data):
    index, lengths = made_of.pop("sample_index"), made_of.pop("lengths")
    store = made(tmp_path_factory, index, lengths, **made_of)
    module = ActivationDataModule(store, "letters", unit="token", group="module", n_shuffles=2)
    tokens = [(sample, token) for sample, n in zip(index, lengths, strict=True) for token in range(n)]
    control = np.array([(sample + token) % 2 for sample, token in tokens])
    module.add_control("control task", control)
    try:
        module.setup()
    except InvalidInputError as error:  # three parts that all have both cannot always be had
        assert "no token of class" in str(error) or "is absent from" in str(error)
        assume(False)
    assert module.names == [TOKENS] and module.classes == ["a", "b"]
    place_in = {}
    for part in PARTS:
        numbers = module.numbers(part)
        asked = drawn(data, numbers)
        examples = module.examples(part, [TOKENS], asked)
        mine = [tokens[number] for number in asked]
        assert examples.rows[TOKENS].tolist() == [row(sample, TOKENS, token) for sample, token in mine]
        assert [module.classes[number] for number in examples.labels[0]] == [letter_of(*token) for token in mine]
        assert examples.labels[3].tolist() == control[asked].tolist()
        assert [index[place] for place in module.sample_of(asked)] == [sample for sample, _ in mine]
        assert module.groups_of(part) == [f"m{tokens[number][0] % 9}" for number in numbers]
        for number in numbers:
            assert place_in.setdefault(f"m{tokens[number][0] % 9}", part) == part
    labelled = [number for number, token in enumerate(tokens) if letter_of(*token) is not None]
    assert sorted(np.concatenate([module.numbers(part) for part in PARTS]).tolist()) == labelled


# --- parts and variants


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    rows, columns = demo_like()
    columns["sample"] = list(range(5, 5 + 3 * len(columns["label"]), 3))
    return write_rows(tmp_path_factory.mktemp("runs") / "demo", rows, sample_index=columns.pop("sample"), **columns)


@pytest.mark.parametrize("label", ["label", "kind", "value"])
def test_groups_are_in_one_part_and_the_recorded_split_is_the_one_that_was_used(store, label):
    data, again, other = (ActivationDataModule(store, label, group="module", seed=seed) for seed in (3, 3, 4))
    groups = {part: set(data.groups_of(part)) for part in PARTS}
    assert sum(map(len, groups.values())) == len(set.union(*groups.values())) == 40
    recorded = json.loads(json.dumps(data.split.to_json(store.sample_index)))
    assert recorded["group_column"] == "module" and recorded["train"][0] in store.sample_index
    for part in PARTS:
        expected = getattr(Split.from_json(recorded, store.sample_index), part)
        np.testing.assert_array_equal(data.numbers(part), expected)
        np.testing.assert_array_equal(again.numbers(part), expected)
        assert torch.equal(again.targets(part), data.targets(part))
    assert other.numbers("test").tolist() != data.numbers("test").tolist()
    column = store.samples.column("module").to_pylist()
    for part in PARTS:
        assert data.groups_of(part) == [column[place] for place in data.numbers(part)]


@pytest.mark.parametrize("label", ["label", "kind", "value"])
def test_shuffled_labels_are_those_of_the_part_in_another_order_which_the_seed_decides(store, label):
    data, again, other = (ActivationDataModule(store, label, group="module", n_shuffles=3, seed=seed) for seed in (0, 0, 1))
    again.add_control("control task", np.zeros(len(store), int)) if again.classes else None
    more = ActivationDataModule(store, label, group="module", n_shuffles=4)
    assert data.variants == ["labels", "shuffled 0", "shuffled 1", "shuffled 2"]
    values = data.labels.numbers if data.classes else data.labels.values
    for part in PARTS:
        found = data.targets(part)
        assert found[0].tolist() == values[data.numbers(part)].tolist()
        assert found.dtype == (torch.int64 if data.classes else torch.float64) and len(found) == 4
        assert all(torch.equal(variant.sort().values, found[0].sort().values) for variant in found)  # the same of each class
        assert len({tuple(variant.tolist()) for variant in found}) == 4
        assert torch.equal(again.targets(part)[:4], found) and torch.equal(more.targets(part)[:4], found)
        assert (other.targets(part)[1:].shape != found[1:].shape) or not torch.equal(other.targets(part)[1:], found[1:])


# --- what does not fit


def columns_of(n=30):
    return {"label": ["no", "yes"] * (n // 2), "module": [f"m{place // 3}" for place in range(n)]}


def small(tmp_path, name="run", n=30, rows=None, **columns):
    rows = rows or {"a/mean": np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)}
    return write_rows(tmp_path / name, rows, sample_index=range(100, 100 + n), **(columns_of(n) | columns))


def test_labels_and_groups_that_cannot_be_split_are_refused_by_name(tmp_path):
    rare = ["no", "yes"] * 13 + ["no"] * 2 + ["rare"] * 2
    store = small(
        tmp_path,
        rare=rare,
        one=["x"] * 30,
        pair=["a", "b"] * 15,
        gap=[None if i == 7 else "m" for i in range(30)],
        real=[i / 7 for i in range(30)],
    )
    setup = lambda *args, **options: ActivationDataModule(store, *args, **options).setup  # noqa: E731
    refused(setup("rare", group="module"), "class 'rare' is absent from", "1 group of column 'module'")
    refused(setup("rare"), "class 'rare' is absent from", "2 samples", "leave the class out")
    refused(setup("label", group="pair"), "there are 2 groups of column 'pair'", "at least three")
    refused(setup("label", group="gap"), "sample 107 has nothing in column 'gap' (1 of 30 samples)")
    refused(setup("label", group="typo"), "no column 'typo'", "module")
    refused(setup("label", group="real"), "column 'real'", "float")
    refused(setup("one"), "every label is 'x'")
    refused(setup("label", shares=(0.5, 0.5, 0.5)), "sum to 1")
    foreign = tmp_path / "other.jsonl"
    foreign.write_text(
        "".join(json.dumps({"sample_index": i, "token_hash": f"other{i}", "y": i % 2}) + "\n" for i in range(100, 130))
    )
    refused(
        setup("y", label_file=foreign),
        "other.jsonl",
        "sample 100 has token_hash other100 there, 00000000000000000000000000000064 in the store",
        "30 of 30",
    )


def test_classes_of_tokens_that_no_token_of_a_part_has_are_refused(tmp_path):
    letters = [["a"] * 100 + ["b"], *([None, "b"] for _ in range(29))]
    make_store(tmp_path / "run", list(range(30)), [101] + [2] * 29, letters=letters)
    store = ActivationStore(tmp_path / "run")
    refused(ActivationDataModule(store, "letters", unit="token").setup, "no token of class 'a' of letters is in", "another seed")
    refused(ActivationDataModule(store, "nothing", unit="token").setup, "no column 'nothing'")
    for options in ({"over_tokens": True, "batch_size": 3}, {"label_kind": "values"}):
        refused(
            lambda options=options: ActivationDataModule(store, "letters", unit="token", **options), "labels of tokens are classes"
        )


def test_sources_that_do_not_belong_together_are_refused_by_sample(tmp_path):
    store = small(tmp_path)
    rows = {"a/mean": np.zeros((30, 5), np.float32)}
    same = write_rows(tmp_path / "same", rows, sample_index=range(100, 130), seed=4)
    shifted = write_rows(tmp_path / "shifted", rows, sample_index=range(101, 131))
    fewer = write_rows(tmp_path / "fewer", {"a/mean": rows["a/mean"][:29]}, sample_index=range(100, 129))
    hashes = [f"{i:032x}" if i != 112 else "else" for i in range(100, 130)]
    retokenized = write_rows(tmp_path / "retokenized", rows, sample_index=range(100, 130), token_hash=hashes)
    elsewhere = write_rows(tmp_path / "elsewhere", {"b/mean": rows["a/mean"]}, sample_index=range(100, 130))
    data = ActivationDataModule(store, "label", others={"untrained": same})
    assert data.names == ["a/mean", "untrained: a/mean"]
    assert data.examples("train", data.names, data.numbers("train")).rows["untrained: a/mean"].shape[1] == 5

    def with_other(other):
        return lambda: ActivationDataModule(store, "label", others={"untrained": other}).setup()

    refused(with_other(shifted), "shifted (untrained) and", "sample 100 is in one only (2 are)")
    refused(with_other(fewer), "sample 129 is in one only (1 are)")
    refused(with_other(retokenized), "retokenized (untrained): sample 112 has other tokens", "(1 of 30 samples)")
    refused(with_other(elsewhere), "elsewhere (untrained) has no a/mean (1 of 1 vectors)")


def test_vectors_and_options_that_cannot_be_used_are_refused(tmp_path, monkeypatch):
    store = small(tmp_path)
    refused(
        lambda: ActivationDataModule(store, "label", unit="token").names,
        "run has no activation at all with a row for each token",
        "--pooling",
    )
    refused(lambda: ActivationDataModule(store, "label", names=["b/mean"]).names, "no activation b/mean", "it has: a/mean")
    refused(lambda: ActivationDataModule(store, "label", names=[]).names, "no activation at all")
    refused(lambda: ActivationDataModule(store, "label", over_tokens=True), "give a batch_size")
    refused(lambda: ActivationDataModule(store, "label", batch_size=0), "batch_size must be at least 1, got 0")
    data = ActivationDataModule(store, "label")
    refused(lambda: data.add("a/mean", torch.zeros(30, 1)), "name of its own")
    refused(lambda: data.add("b", torch.zeros(29, 1)), "a row for each sample, [30, D]; it is [29, 1]")
    refused(lambda: data.add_control("labels", np.zeros(30, int)), "name of its own")
    refused(lambda: data.add_control("control", np.full(30, 2)), "30 class numbers from 0 to 1")
    refused(lambda: data.add_control("control", np.zeros(29, int)), "30 class numbers from 0 to 1")
    with pytest.raises(AssertionError, match="not all of test"):
        data.examples("test", ["a/mean"], data.numbers("train")[:2])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * 18 * 3 - 1))
    refused(lambda: list(data.train_dataloader()), "a/mean has 18 rows of 3 values for train", "--batch-size")


def test_rows_that_are_not_finite_are_refused_with_their_sample(tmp_path):
    pooled, tokens = np.zeros((30, 3), np.float32), np.zeros((90, 2), np.float32)
    pooled[17, 1], pooled[21], tokens[3 * 17 + 2] = np.nan, np.inf, -np.inf
    letters = [["a", "b", "a"]] * 30
    store = small(tmp_path, rows={"a/mean": pooled, "a/tokens": tokens}, lengths=[3] * 30, letters=letters)
    for data in (
        ActivationDataModule(store, "label"),
        ActivationDataModule(store, "letters", unit="token"),
        ActivationDataModule(store, "label", over_tokens=True, batch_size=7),
    ):
        met = []
        for part in PARTS:
            try:
                list(loader_of(data, part))
            except InvalidInputError as error:
                met.append(str(error))
        assert any("sample 117: a/" in message and "is not finite" in message for message in met)
        assert all("sample 117: " in message or "sample 121: a/mean" in message for message in met)
    data = ActivationDataModule(small(tmp_path, "other"), "label")
    baseline = torch.zeros(30, 1)
    place = int(data.numbers("validation")[2])
    baseline[place] = torch.nan
    data.add("baseline: length", baseline)
    list(data.train_dataloader())
    refused(lambda: list(data.val_dataloader()), f"sample {100 + place}: baseline: length is not finite (1 of 6 rows)")


def test_trainers_that_would_read_otherwise_are_refused(tmp_path):
    data = ActivationDataModule(small(tmp_path), "label")
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    refused(lambda: trainer.fit(ExactProbeSweep(), datamodule=data), "use_distributed_sampler=False and num_sanity_val_steps=0")
    as_rank(data, 0, 2).trainer._accelerator_connector.use_distributed_sampler = True
    refused(data.train_dataloader, "use_distributed_sampler=False and num_sanity_val_steps=0")
