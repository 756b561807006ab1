"""Architectures that do something else than most: read rightly, or refused; never read wrongly."""

import pytest
import safetensors.torch
import torch
import transformers as t

from exactivations.lit_modules import ActivationExtractor
from exactivations.lit_modules.models.doctor import refuse_unsafe_right_padding
from exactivations.lit_modules.models.hook_points import dissect, resolve_hook_points
from exactivations.store import TokenBatch
from exactivations.store.errors import InvalidInputError
from tests import planted_faults as zoo
from tests.lit_modules.tiny_models import CONFIGS, in_dtype, tiny_model

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
ODD = {
    "bloom": t.BloomConfig(vocab_size=99, hidden_size=32, n_layer=3, n_head=4),
    "mpt": t.MptConfig(vocab_size=99, d_model=32, n_layers=3, n_heads=4, max_seq_len=64),
    "esm": t.EsmConfig(**SMALL, max_position_embeddings=66, pad_token_id=1, mask_token_id=2, emb_layer_norm_before=True),
    "mpnet": t.MPNetConfig(**SMALL, max_position_embeddings=66),
    "opt": t.OPTConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32
    ),
    "falcon": t.FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4),
    "gptj": t.GPTJConfig(vocab_size=99, n_embd=32, n_layer=3, n_head=4, rotary_dim=4, n_positions=64),
    "distilbert": t.DistilBertConfig(vocab_size=99, dim=32, n_layers=3, n_heads=4, hidden_dim=48),
}
IDS = torch.tensor([[7, 33, 8, 91, 14, 60, 23]])


def model_of(family):
    torch.manual_seed(0)
    model = t.AutoModel.from_config(ODD[family])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train(False)


@pytest.mark.parametrize("family", list(ODD))
def test_states_are_the_models_own_hidden_states(family):
    model = model_of(family)
    names = [name for name in dissect(model).names() if name.startswith(("embed", "resid_post", "final_norm"))]
    got = ActivationExtractor(model, names, ["tokens"])(TokenBatch.of(IDS, token_mask="all")).activations
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(got["embed/tokens"], states[0][0])
    for layer in range(2):
        torch.testing.assert_close(got[f"resid_post.{layer}/tokens"], states[layer + 1][0])
    last = "final_norm" if "final_norm" in names else "resid_post.2"
    torch.testing.assert_close(got[f"{last}/tokens"], states[-1][0])


@pytest.mark.parametrize("family", list(ODD))
@pytest.mark.parametrize("kind", ["attn_out", "mlp_out"])
def test_what_attention_and_mlp_put_out_does_not_hold_the_residual(family, kind):
    """Without its last bias-free projection such a module puts out nothing; one that adds the residual still does."""
    model = model_of(family)
    names = [name for name in dissect(model).names() if name.startswith(kind)]
    if family in ("bloom", "mpt", "mpnet", "opt"):
        assert names == [] or (family, kind) in [("mpt", "attn_out"), ("mpnet", "mlp_out"), ("opt", "attn_out")]
    if not names:
        with pytest.raises(InvalidInputError, match="that leaves the residual out"):
            ActivationExtractor(model, [f"{kind}.1"], ["mean"]).load()
        return
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear | t.pytorch_utils.Conv1D) and ".1." in f".{name}.":
                module.weight.zero_()
                if module.bias is not None:
                    module.bias.zero_()
    got = ActivationExtractor(model, [f"{kind}.1"], ["tokens"])(TokenBatch.of(IDS, token_mask="all")).activations[
        f"{kind}.1/tokens"
    ]
    assert got.abs().max() == 0


@pytest.mark.parametrize("family", list(ODD))
@pytest.mark.parametrize(("kind", "width"), [("attn_z", 32), ("mlp_act", None)])
def test_the_ends_of_attention_and_mlp_are_all_that_they_are_made_of(family, kind, width):
    """What the last map receives, put through it by hand, is what attention and MLP put out, in models that have these alone."""
    model = model_of(family)
    names = [f"{kind}.1", {"attn_z": "attn_out.1", "mlp_act": "mlp_out.1"}[kind]]
    if not set(names) <= set(dissect(model).names()):
        pytest.skip("the model has not both")
    end = model.get_submodule(resolve_hook_points(model, names[:1])[0].path)
    got = ActivationExtractor(model, names, ["tokens"])(TokenBatch.of(IDS, token_mask="all")).activations
    with torch.no_grad():
        torch.testing.assert_close(end(got[f"{names[0]}/tokens"]), got[f"{names[1]}/tokens"])
    assert width is None or got[f"{names[0]}/tokens"].shape[1] == width


def test_layers_of_different_kinds_are_told_apart():
    config = t.JambaConfig(
        **SMALL, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, num_experts=2, expert_layer_period=2,
        use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4,
    )  # fmt: skip
    model = t.AutoModel.from_config(config).train(False)
    assert [name for name in dissect(model).names() if name.startswith("attn")] == ["attn_z.1", "attn_out.1"]
    ActivationExtractor(model, ["attn_out.1"], ["mean"])(TokenBatch.of(IDS, token_mask="all"))
    with pytest.raises(InvalidInputError, match=r"no attention module in JambaMambaDecoderLayer \(layers 0, 2\)"):
        ActivationExtractor(model, ["attn_out.0"], ["mean"]).load()


def test_a_model_whose_states_are_not_batch_first_is_refused():
    model = t.XLNetModel(t.XLNetConfig(vocab_size=99, d_model=32, n_layer=3, n_head=4, d_inner=48))
    with pytest.raises(InvalidInputError, match=r"has shape \[4, 1, 32\] for a batch \[1, 4\]"):
        ActivationExtractor(model, ["resid_post.1"], ["mean"]).load()


def test_a_norm_that_runs_before_the_blocks_is_not_taken_for_the_final_one():
    model = tiny_model("bert")
    model.encoder.early_norm = torch.nn.LayerNorm(32)
    forward = model.encoder.forward
    model.encoder.forward = lambda states, *args, **kwargs: forward(model.encoder.early_norm(states), *args, **kwargs)
    with pytest.raises(InvalidInputError, match="runs before them"):
        ActivationExtractor(model, ["final_norm"], ["mean"]).load()


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_padding_is_refused_where_rotary_embeddings_depend_on_the_length(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    family, extra = (
        (t.Phi3Config, {"pad_token_id": 0, "original_max_position_embeddings": 64})
        if rope_type == "longrope"
        else (t.LlamaConfig, {})
    )
    model = t.AutoModel.from_config(family(**SMALL, max_position_embeddings=128, rope_parameters=rope, **extra))
    with pytest.raises(InvalidInputError, match=f"by the length of the batch \\({rope_type}\\)"):
        refuse_unsafe_right_padding(model, resolve_hook_points(model, ["resid_post.1"]))


def test_a_checkpoint_without_weights_that_are_needed_is_refused_with_their_names(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.1.mlp.up_proj" not in name}
    safetensors.torch.save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidInputError, match=r"lacks layers\.1\.mlp\.up_proj\.weight, which LlamaModel needs"):
        ActivationExtractor(str(tmp_path), ["resid_post.2"], ["mean"]).load()
    ActivationExtractor(str(tmp_path), ["resid_post.0"], ["mean"]).load()  # not needed as far as here


def test_a_random_pooler_that_never_runs_does_not_change_what_the_model_is(tmp_path):
    torch.manual_seed(0)
    config = t.RobertaConfig(**SMALL, max_position_embeddings=66)
    t.RobertaForMaskedLM(config).save_pretrained(tmp_path)
    identities = [ActivationExtractor(str(tmp_path), ["resid_post.1"], ["mean"]).identity() for _ in range(2)]
    assert identities[0] == identities[1]


def test_what_decides_values_decides_the_identity():
    model = tiny_model("mixtral")
    before = ActivationExtractor(model, ["resid_post.1"], ["mean"]).identity()
    handle = model.layers[0].register_forward_hook(lambda *args: None)
    assert ActivationExtractor(model, ["resid_post.1"], ["mean"]).identity()["forward_hooks"] == before["forward_hooks"] + 1
    handle.remove()
    model.set_experts_implementation("eager")
    assert (
        ActivationExtractor(model, ["resid_post.1"], ["mean"]).identity()["experts_implementation"]
        != before["experts_implementation"]
    )
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        changed = ActivationExtractor(model, ["resid_post.1"], ["mean"]).identity()["float32_matmul_precision"]
        assert changed != before["float32_matmul_precision"]
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize(
    "config",
    [
        t.RobertaPreLayerNormConfig(**SMALL, max_position_embeddings=66, pad_token_id=1),  # its last norm is not found
        t.OPTConfig(vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=16),
        t.Qwen3MoeConfig(
            **SMALL, moe_intermediate_size=24, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
            max_position_embeddings=64,
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verification_raises_no_false_alarm(config, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    torch.manual_seed(0)
    model = in_dtype(t.AutoModel.from_config(config).train(False), dtype)
    names = [name for name in dissect(model).names() if name != "embed"]
    check = zoo.run(tmp_path / "run", ActivationExtractor(model, names, ["tokens", "mean"]), zoo.data_of(zoo.texts()))
    assert check.verification.passed


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_model_is_the_same_whether_its_head_is_loaded_with_it_or_not(family, tmp_path):
    torch.manual_seed(0)
    t.AutoModelForCausalLM.from_config(CONFIGS[family]).save_pretrained(tmp_path)
    mean, last = (ActivationExtractor(str(tmp_path), ["resid_post.2"], [pooling]) for pooling in ("mean", "last"))
    different = ("poolings",)
    one, other = ({k: v for k, v in e.identity().items() if k not in different} for e in (mean, last))
    assert one == other
    assert (last.load().whole is not None) == (family != "bert") and mean.load().whole is None


def test_the_head_is_not_put_on_the_last_block_of_a_model_that_was_cut(tmp_path):
    t.AutoModelForCausalLM.from_config(CONFIGS["llama"]).save_pretrained(tmp_path)
    loaded = ActivationExtractor(str(tmp_path), ["resid_post.1"], ["last"]).load()
    assert loaded.whole is None and "no state before the head is stored" in loaded.no_head
