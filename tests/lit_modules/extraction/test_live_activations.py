"""Activations computed here and now are those of a store of the same samples, to the bit, and of the same samples and tokens."""

import datasets
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Model, PreTrainedTokenizerFast

from exactivations.callbacks import ActivationWriter
from exactivations.datamodules.activations import ActivationDataModule
from exactivations.datamodules.plan import PlanOptions
from exactivations.datamodules.text import TextDataModule
from exactivations.datamodules.tokenization import TextOptions
from exactivations.lit_modules.extraction.extractor import ActivationExtractor
from exactivations.lit_modules.extraction.live_activations import LiveActivations, live_batches
from exactivations.store.activation_store import ActivationStore
from exactivations.store.batches import TokenBatch
from exactivations.store.errors import InvalidInputError, NotFiniteError
from tests.lit_modules.probe_stores import run, save_model, texts_of
from tests.lit_modules.tiny_models import tiny_model

POINTS, POOLINGS = ["embed", "resid_post.1"], ["mean", "last", "tokens"]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def parts_of(model):
    """An extractor, and a random choice of the samples, in many shards."""
    texts, labels, letters = texts_of()
    columns = {"text": texts, "label": labels, "letters": letters, "module": [f"m{i % 30}" for i in range(90)]}
    data = TextDataModule(
        datasets.Dataset.from_dict(columns), model, num_samples=80, sample_seed=3, plan_options=PlanOptions(60, 90)
    )
    return ActivationExtractor(model, POINTS, POOLINGS, cpu_threads=1), data


@pytest.fixture(scope="module")
def both(model, tmp_path_factory):
    """The same samples, from a store and live."""
    path = tmp_path_factory.mktemp("runs") / "run"
    extractor, data = parts_of(model)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, callbacks=[ActivationWriter(path)], logger=False, use_distributed_sampler=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.predict(extractor, datamodule=data, return_predictions=False)
    store = ActivationStore(path, allow_unverified=True)
    assert store.info.n_shards > 3 and store.sample_index.tolist() != list(range(80))
    return store, LiveActivations(*parts_of(model))


def test_rows_tokens_and_samples_are_those_of_the_store(both):
    store, live = both
    assert len(live) == len(store) == 80 and live.sample_index.tolist() == store.sample_index.tolist()
    assert live.per_token == store.per_token and live.samples.equals(store.samples)
    assert live.token_start.tolist() == store.token_start.tolist()
    rng = np.random.default_rng(0)
    n_tokens = int(store.token_start[-1])
    for name, per_token in store.per_token.items():
        numbers = rng.integers(0, n_tokens if per_token else 80, size=300)
        assert torch.equal(live.rows(name, numbers), store.rows(name, numbers))
    numbers = rng.integers(0, n_tokens, size=300)
    assert live.token_ids(numbers).tolist() == store.token_ids(numbers).tolist()
    assert live.are_content(numbers).tolist() == store.are_content(numbers).tolist()
    assert 0.5 < live.are_content(np.arange(n_tokens)).double().mean() < 1
    none = np.array([], dtype=np.int64)
    assert live.rows("embed/tokens", none).shape == store.rows("embed/tokens", none).shape == (0, 16)


@pytest.mark.parametrize(
    "options",
    [{"label": "label"}, {"label": "letters", "unit": "token"}, {"label": "label", "over_tokens": True, "batch_size": 16}],
)
def test_a_data_module_gives_the_same_examples_of_both(both, options):
    modules = [ActivationDataModule(source, group="module", n_shuffles=1, **options) for source in both]
    for part in ("train", "validation", "test"):
        numbers = modules[0].numbers(part)
        assert modules[1].numbers(part).tolist() == numbers.tolist()
        one, other = (module.examples(part, modules[0].names, numbers) for module in modules)
        assert one.rows.keys() == other.rows.keys() and torch.equal(one.labels, other.labels)
        assert all(torch.equal(rows, other.rows[name]) for name, rows in one.rows.items())
        assert one.n_tokens is other.n_tokens is None or torch.equal(one.n_tokens, other.n_tokens)
        assert modules[0].groups_of(part) == modules[1].groups_of(part)


def test_a_sweep_needs_no_store(both):
    stored, live = (run(ActivationDataModule(source, "label", group="module")) for source in both)
    assert stored.tested.keys() == live.tested.keys() == {"embed/mean", "embed/last", "resid_post.1/mean", "resid_post.1/last"}
    assert all(torch.equal(scores, live.tested[name]) for name, scores in stored.tested.items())


def test_what_the_model_cannot_take_is_refused_with_its_sample(model, tmp_path):
    long = TextDataModule(["w1 w2", " ".join(["w3"] * 40)], model)
    with pytest.raises(InvalidInputError, match=r"sample 1 .*42"):
        next(live_batches(ActivationExtractor(model, POINTS, POOLINGS), long))
    spoilt = GPT2Model.from_pretrained(model)
    with torch.no_grad():
        spoilt.wte.weight[5 + 7] = torch.inf
    live = LiveActivations(ActivationExtractor(spoilt, POINTS, POOLINGS), TextDataModule(["w1 w2", "w3", "w2 w7 w1"], model))
    with pytest.raises(NotFiniteError, match=r"^sample 2: embed/"):
        live.rows("embed/mean", np.array([0]))


def bos_tokenizer(n_words=40):
    """Llama-like: BOS before each text, nothing after it."""
    words = {f"w{i}": i for i in range(n_words)} | {"<s>": n_words, "<unk>": n_words + 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", n_words)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("options", "counted"),
    [
        (TextOptions(), slice(1, None)),
        (TextOptions(token_mask="all"), slice(0, None)),
        (TextOptions(add_special_tokens=False), slice(0, None)),
        (TextOptions(add_special_tokens=False, template="w1 {text}", skip_first=1), slice(1, None)),
        (TextOptions(template="w1 {text} w2", max_length=5), slice(1, 5)),
    ],
)
def test_one_text_pools_the_tokens_that_the_store_and_the_untouched_model_pool_where_the_tokenizer_adds_bos(
    options, counted, tmp_path
):
    texts = ["w3 w4 w5", "w6", "w7 w8 w9 w10"]
    poolings = ["mean", "first", "max", "last", "exp_decay:0.5"]
    extractor = ActivationExtractor(tiny_model("llama"), ["resid_post.1"], poolings, cpu_threads=1)
    data = TextDataModule(texts, bos_tokenizer(), text=options)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, callbacks=[ActivationWriter(tmp_path / "run")], logger=False, use_distributed_sampler=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.predict(extractor, datamodule=data, return_predictions=False)
    store = ActivationStore(tmp_path / "run", allow_unverified=True)
    untouched = tiny_model("llama")
    for number, text in enumerate(texts):
        batch = TextDataModule(["w0"], bos_tokenizer(), text=options).batch_of(text)  # of data that does not have the text
        live = extractor(batch).activations
        for pooling in poolings:
            expected = store.pooled("resid_post.1", pooling)[number]
            assert torch.allclose(live[f"resid_post.1/{pooling}"][0], torch.as_tensor(expected), rtol=1e-5, atol=1e-6), pooling
        whole = (options.template or "{text}").replace("{text}", text)
        ids = bos_tokenizer()(whole, return_tensors="pt", add_special_tokens=options.add_special_tokens)["input_ids"][
            :, : options.max_length
        ]
        assert batch.input_ids.tolist() == ids.tolist()
        assert batch.token_mask.any()
        states = untouched(ids, output_hidden_states=True).hidden_states[2][0, counted].double()
        assert torch.allclose(live["resid_post.1/mean"][0].double(), states.mean(0), rtol=1e-5, atol=1e-6)


def test_one_text_that_has_no_tokens_that_count_or_is_cut_to_nothing_is_refused():
    data = TextDataModule(["w1"], bos_tokenizer())
    with pytest.raises(InvalidInputError, match="the text is empty: none of its 1 tokens counts"):
        data.batch_of(" ")
    with pytest.raises(InvalidInputError, match="max_length 1 leaves no room for text"):
        TextDataModule(["w1"], bos_tokenizer(), text=TextOptions(max_length=1)).batch_of("w1")


def test_a_batch_of_ids_alone_has_to_be_told_which_of_them_count():
    ids = torch.tensor([[40, 1, 2]])
    with pytest.raises(TypeError, match="token_mask"):
        TokenBatch.of(ids)
    for mask, found in [
        (torch.ones(1, 2, dtype=torch.bool), r"torch.bool \[1, 2\]"),
        (torch.ones(1, 3), r"torch.float32 \[1, 3\]"),
    ]:
        with pytest.raises(InvalidInputError, match=rf"token_mask must be bool \[1, 3\], .*, got {found}"):
            TokenBatch.of(ids, token_mask=mask)
    with pytest.raises(InvalidInputError, match="got 'content'"):
        TokenBatch.of(ids, token_mask="content")
    assert TokenBatch.of(ids, token_mask="all").token_mask.tolist() == [[True] * 3]
    assert TokenBatch.of(ids, token_mask=ids != 40).token_mask.tolist() == [[False, True, True]]
