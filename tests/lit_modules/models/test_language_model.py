"""Loading: with a head it is the same body, and a model whose float32 buffers were rounded is refused."""

import copy

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

from exactivations.lit_modules import ActivationExtractor, ModelOptions
from exactivations.lit_modules.models.language_model import load_causal_model, load_model, refuse_rounded_buffers, weights_hash
from exactivations.scripts.component_loading import load_components
from exactivations.store.errors import InvalidInputError
from tests.lit_modules.tiny_models import CAUSAL, CONFIGS, in_dtype, tiny_model

IDS = torch.tensor([[7, 33, 8, 91, 14]])
HALVES = [torch.bfloat16, torch.float16]
ROTARY = ["llama", "qwen3", "gemma2", "mixtral"]  # the tiny GPT-NeoX turns by one angle only, 1.0, which no dtype rounds


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saves a tiny causal language model once for each family."""
    paths = {}

    def saved(family):
        if family not in paths:
            torch.manual_seed(0)
            paths[family] = tmp_path_factory.mktemp(family)
            t.AutoModelForCausalLM.from_config(CONFIGS[family]).save_pretrained(paths[family])
        return paths[family]

    return saved


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("family", CONFIGS)
def test_no_model_in_any_dtype_is_refused_that_was_not_cast(family, dtype):
    refuse_rounded_buffers(in_dtype(tiny_model(family), dtype))
    refuse_rounded_buffers(t.AutoModel.from_config(copy.deepcopy(CONFIGS[family]), dtype=dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", ROTARY)
def test_a_model_that_was_cast_is_refused_with_the_buffer_and_a_remedy(family, dtype):
    for model in (tiny_model(family).to(dtype), tiny_model(family).to(dtype).float()):
        with pytest.raises(InvalidInputError, match=r"buffer rotary_emb\.\w*inv_freq of \w+ .*was cast.*from_pretrained\("):
            refuse_rounded_buffers(model)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_rotary_buffer_of_another_dtype_is_refused_even_if_its_value_is_exact(dtype):
    with pytest.raises(InvalidInputError, match="inv_freq"):
        refuse_rounded_buffers(tiny_model("gpt_neox").to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta", "mamba"])
def test_models_without_such_buffers_may_be_cast(family, dtype):
    refuse_rounded_buffers(tiny_model(family).to(dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", CAUSAL)
def test_with_its_head_the_body_and_its_hash_are_the_same(saved, family, dtype):
    options = ModelOptions(dtype=dtype)
    alone, both = (load_model(str(saved(family)), options, "cpu", wants_head=wants) for wants in (None, lambda body: True))
    assert alone.whole is None and both.whole.base_model is both.body
    assert type(alone.body) is type(both.body) and both.body.dtype == getattr(torch, dtype)
    assert weights_hash(alone.body) == weights_hash(both.body) and alone.random == both.random == frozenset()
    assert not both.whole.training and not both.body.training
    refuse_rounded_buffers(both.body)
    with torch.no_grad():
        assert torch.equal(alone.body(IDS).last_hidden_state, both.body(IDS).last_hidden_state)
        expected = t.AutoModelForCausalLM.from_pretrained(saved(family), dtype=getattr(torch, dtype))(IDS).logits
        assert torch.equal(both.whole(IDS).logits, expected)


def test_a_checkpoint_that_lost_its_head_has_a_body_and_no_whole(saved, tmp_path):
    model = t.AutoModelForCausalLM.from_pretrained(saved("llama"))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(str(tmp_path), ModelOptions(), "cpu", wants_head=lambda body: True)
    assert loaded.whole is None and loaded.random == frozenset()
    assert weights_hash(loaded.body) == weights_hash(model.model)
    with pytest.raises(InvalidInputError, match="is no whole causal language model with its head: name one"):
        load_causal_model(str(tmp_path), ModelOptions())


def test_a_checkpoint_that_lost_a_weight_of_its_body_tells_it_with_its_head_as_without(saved, tmp_path):
    t.AutoModelForCausalLM.from_pretrained(saved("llama")).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = [load_model(str(tmp_path), ModelOptions(), "cpu", wants_head=wants) for wants in (None, lambda body: True)]
    assert [weights.random for weights in loaded] == [{"layers.1.mlp.up_proj.weight"}] * 2
    assert loaded[1].whole is not None
    for load in (load_causal_model, lambda name, options: load_components(name, options, None, ["*.q_proj"], None)):
        with pytest.raises(InvalidInputError, match=r"no whole .* head \(it lacks layers\.1\.mlp\.up_proj\.weight\): name one"):
            load(str(tmp_path), ModelOptions())


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_a_checkpoint_saved_without_a_head_gives_none(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), ModelOptions(), "cpu", wants_head=lambda body: True)
    assert loaded.whole is None and weights_hash(loaded.body) == weights_hash(tiny_model(family))


def test_tied_weights_need_no_head_in_the_checkpoint(saved):
    assert "lm_head.weight" not in load_file(saved("gpt2") / "model.safetensors")
    assert load_model(str(saved("gpt2")), ModelOptions(), "cpu", wants_head=lambda body: True).whole is not None


def test_frequencies_that_the_model_changes_itself_are_no_rounding():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = t.LlamaConfig(**{**CONFIGS["llama"].to_dict(), "rope_parameters": rope, "max_position_embeddings": 16})
    model = t.LlamaModel(config).train(False)
    model(torch.arange(40)[None])
    assert not torch.equal(model.rotary_emb.inv_freq, model.rotary_emb.original_inv_freq)
    ActivationExtractor(model, ["resid_post.0"], ["mean"]).load()
    with pytest.raises(InvalidInputError, match="inv_freq"):
        ActivationExtractor(model.to(torch.bfloat16), ["resid_post.0"], ["mean"]).load()
