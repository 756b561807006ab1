"""The extractor against the untouched Hugging Face model, run on each sample alone."""

import numpy as np
import pytest
import torch
import transformers

from exactivations.datamodules import PlanOptions, TextDataModule, TextOptions, plan
from exactivations.lit_modules import ActivationExtractor, ModelOptions
from exactivations.lit_modules.extraction.extractor import refuse_short_cuts
from exactivations.lit_modules.extraction.live_activations import live_batches
from exactivations.lit_modules.models.hook_points import dissect, resolve_hook_points, width_of
from exactivations.store import ActivationBatch, TokenBatch
from exactivations.store.batches import Place
from exactivations.store.errors import InvalidInputError
from tests.lit_modules.tiny_models import CAUSAL, CONFIGS, in_dtype, tiny_model

# Float32 sums of some hundred terms in another order: 1e-5 relative to the size of the vector is what rounding may do.
TOLERANCE = 1e-5
POOLINGS = ["tokens", "last", "first", "mean", "max", "exp_decay:0.3", "position:0", "position:-1"]
LENGTHS = [7, 3, 3, 12, 1, 7, 7, 2, 30, 12, 5, 3]


def relative_error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(scope="module", params=list(CONFIGS))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def samples():
    """Ids from 5 up (no special ids in any family) and masks in which some tokens do not count."""
    rng = np.random.default_rng(0)
    ids = [torch.tensor(rng.integers(5, 99, n)) for n in LENGTHS]
    masks = [torch.tensor(rng.random(n) < 0.7) for n in LENGTHS]
    for mask in masks:
        mask[len(mask) // 2] = True
    return ids, masks


def planned_batches(ids, masks, options):
    the_plan = plan([len(x) for x in ids], options)
    for number in range(the_plan.n_batches):
        positions = the_plan.batch(number)
        length = int(the_plan.batch_length[number])
        yield TokenBatch(
            sample_index=torch.tensor(positions),
            input_ids=torch.stack([torch.nn.functional.pad(ids[p], (0, length - len(ids[p])), value=0) for p in positions]),
            n_tokens=torch.tensor([len(ids[p]) for p in positions]),
            token_mask=torch.stack([torch.nn.functional.pad(masks[p], (0, length - len(ids[p]))) for p in positions]),
            place=Place(*the_plan.place(number)),
        )


def oracle_states(model, ids, names):
    """All hook points of one sample, alone, from the model's own outputs and plain hooks on modules named by hand."""
    by_hand = {
        "gpt2": ("h.{}", "h.{}.attn", "h.{}.mlp", "ln_f"),
        "gpt_neox": ("layers.{}", "layers.{}.attention", "layers.{}.mlp", "final_layer_norm"),
        "llama": ("layers.{}", "layers.{}.self_attn", "layers.{}.mlp", "norm"),
        "qwen3": ("layers.{}", "layers.{}.self_attn", "layers.{}.mlp", "norm"),
        "gemma2": ("layers.{}", "layers.{}.self_attn", "layers.{}.mlp", "norm"),
        "mixtral": ("layers.{}", "layers.{}.self_attn", "layers.{}.mlp", "norm"),
        "mamba": ("layers.{}", None, None, "norm_f"),
        "bert": ("encoder.layer.{}", "encoder.layer.{}.attention.output.dense", "encoder.layer.{}.output.dense", None),
        "roberta": ("encoder.layer.{}", "encoder.layer.{}.attention.output.dense", "encoder.layer.{}.output.dense", None),
    }[model.config.model_type]
    ends = {
        "gpt2": ("h.{}.attn.c_proj", "h.{}.mlp.c_proj"),
        "gpt_neox": ("layers.{}.attention.dense", "layers.{}.mlp.dense_4h_to_h"),
        "mixtral": ("layers.{}.self_attn.o_proj", None),  # experts have no one last map
        "mamba": (None, None),
        "bert": ("encoder.layer.{}.attention.output.dense", "encoder.layer.{}.output.dense"),
        "roberta": ("encoder.layer.{}.attention.output.dense", "encoder.layer.{}.output.dense"),
    }.get(model.config.model_type, ("layers.{}.self_attn.o_proj", "layers.{}.mlp.down_proj"))
    seen, received = {}, {}

    def keep(path):
        def hook(module, args, output):
            if args and isinstance(args[0], torch.Tensor):
                received[path] = args[0].clone()
            first = output[0] if isinstance(output, tuple) else output
            seen[path] = first.clone() if isinstance(first, torch.Tensor) else None

        return hook

    modules = dict(model.named_modules())
    handles = [modules[path].register_forward_hook(keep(path)) for path in modules if path]
    with torch.no_grad():
        outputs = model(input_ids=ids[None], output_hidden_states=True)
    for handle in handles:
        handle.remove()
    block, attention, mlp, norm = by_hand
    mamba = model.config.model_type == "mamba"  # its hidden_states lack the embedding
    states = {"embed": seen["embeddings"][0] if mamba else outputs.hidden_states[0][0]}
    for layer in range(3):
        if layer < 2:  # for the last block Hugging Face gives the state after the final norm, if there is one
            assert torch.equal(outputs.hidden_states[layer if mamba else layer + 1][0], seen[block.format(layer)][0])
        states[f"resid_post.{layer}"] = seen[block.format(layer)][0]
        if attention:
            states[f"attn_out.{layer}"] = seen[attention.format(layer)][0]
            states[f"mlp_out.{layer}"] = seen[mlp.format(layer)][0]
        for kind, path in zip(("attn_z", "mlp_act"), ends, strict=True):
            if path:
                states[f"{kind}.{layer}"] = received[path.format(layer)][0]
    if norm:
        states["final_norm"] = outputs.hidden_states[-1][0]
    assert set(names) == set(states)
    return states


def pool_by_hand(states, mask, pooling):
    """Poolings in float64, straight from their definitions."""
    counted = states[mask].double()
    n = len(counted)
    if pooling == "tokens":
        return states
    if pooling.startswith("exp_decay"):
        weights = [2.0 ** (-(n - 1 - i) / (0.3 * n)) for i in range(n)]
        return sum(w * row for w, row in zip(weights, counted, strict=True)) / sum(weights)
    if pooling.startswith("position"):
        return counted[int(pooling.partition(":")[2])]
    return {"last": counted[-1], "first": counted[0], "mean": counted.mean(0), "max": counted.max(0).values}[pooling]


@pytest.mark.parametrize("padding", ["none", "tail"])
def test_every_hook_point_and_pooling_equals_the_model_on_each_sample_alone(family, samples, padding):
    if padding == "tail" and family not in CAUSAL:
        pytest.skip("padding on the right is for causal models")
    ids, masks = samples
    model = tiny_model(family)
    names = dissect(model).names()
    extractor = ActivationExtractor(model, names, POOLINGS)
    options = PlanOptions(token_budget=24, padding=padding, max_padded_share=0.5)
    assert {name: spec.width for name, spec in extractor.specs().items()} == {
        f"{point.name}/{pooling}": width_of(model, point) for point in resolve_hook_points(model, names) for pooling in POOLINGS
    }
    widths = {"mlp_act": 128 if family == "gpt2" else 48}
    assert all(
        width_of(model, point) == widths.get(point.name.partition(".")[0], 32) for point in resolve_hook_points(model, names)
    )
    batches = [extractor(batch) for batch in planned_batches(ids, masks, options)]

    assert sorted(i for batch in batches for i in batch.sample_index.tolist()) == list(range(len(ids)))
    if padding == "tail":
        assert any(len(batch.n_tokens.unique()) > 1 for batch in batches)
    for batch in batches:
        starts = [0, *batch.n_tokens.cumsum(0).tolist()]
        for row, sample in enumerate(batch.sample_index.tolist()):
            tokens = slice(starts[row], starts[row + 1])
            torch.testing.assert_close(batch.input_ids[tokens], ids[sample])
            torch.testing.assert_close(batch.token_mask[tokens], masks[sample])
            for name, states in oracle_states(model, ids[sample], names).items():
                for pooling in POOLINGS:
                    rows = batch.activations[f"{name}/{pooling}"]
                    got = rows[tokens] if pooling == "tokens" else rows[row]
                    expected = pool_by_hand(states, masks[sample], pooling)
                    assert got.shape == expected.shape
                    assert relative_error(got, expected) < TOLERANCE, (family, name, pooling, sample)


def test_positions_within_equal_the_model_on_each_sample_alone(family, samples):
    """Of samples of different lengths and masks, so that a position is another place in each."""
    ids, masks = (
        [values for values, mask in zip(of, samples[1], strict=True) if mask.sum() >= 3] for of in (samples[0], samples[1])
    )
    model, poolings = tiny_model(family), ["position:2", "position:-3", "position:-2"]
    names = dissect(model).names()
    extractor = ActivationExtractor(model, names, poolings)
    places = []
    for batch in planned_batches(ids, masks, PlanOptions(token_budget=24)):
        got = extractor(batch).activations
        for row, sample in enumerate(batch.sample_index.tolist()):
            places.append(masks[sample].nonzero()[-2].item() - len(ids[sample]))
            for name, states in oracle_states(model, ids[sample], names).items():
                for pooling in poolings:
                    expected = pool_by_hand(states, masks[sample], pooling)
                    assert relative_error(got[f"{name}/{pooling}"][row], expected) < TOLERANCE, (family, name, pooling, sample)
    assert len(places) == len(ids) > 3 and len(set(places)) > 1


def test_a_batch_with_too_few_tokens_is_refused_before_the_model_runs(samples):
    model = tiny_model("llama")
    extractor = ActivationExtractor(model, ["resid_post.0"], ["mean", "position:1", "position:-5"])
    extractor.load()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, :2] = False
    batch = TokenBatch(torch.tensor([40, 41]), torch.full((2, 6), 7), torch.tensor([6, 6]), mask)
    with pytest.raises(InvalidInputError, match=r"sample 41 has 4 tokens that count, the pooling position:-5 needs 5 \(1 of 2"):
        extractor(batch)


def test_a_model_loaded_by_path_and_cut_gives_what_the_whole_model_gives(family, samples, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    whole = transformers.AutoModel.from_pretrained(tmp_path)
    extractor = ActivationExtractor(str(tmp_path), ["resid_post.1", "resid_post.0"], ["tokens"])
    got = extractor(TokenBatch.of(samples[0][0][None], token_mask="all"))
    assert list(got.activations) == ["resid_post.1/tokens", "resid_post.0/tokens"]
    expected = oracle_states(whole, samples[0][0], dissect(whole).names())
    for layer in (0, 1):
        assert relative_error(got.activations[f"resid_post.{layer}/tokens"], expected[f"resid_post.{layer}"]) < TOLERANCE
    blocks = extractor.load().model.get_submodule(dissect(whole).blocks)
    assert len(blocks) == 2, "the third block is not loaded onto the device at all"


def test_last_block_is_before_the_final_norm_and_final_norm_after_it():
    model = tiny_model("llama")
    ids = torch.randint(5, 99, (2, 6))
    got = ActivationExtractor(model, ["resid_post.2", "final_norm"], ["tokens"])(TokenBatch.of(ids, token_mask="all")).activations
    with torch.no_grad():
        final = model(ids).last_hidden_state.flatten(0, 1)
        renormed = model.norm(got["resid_post.2/tokens"])
    assert relative_error(got["final_norm/tokens"], final) < TOLERANCE
    assert relative_error(renormed, final) < TOLERANCE
    assert relative_error(got["resid_post.2/tokens"], final) > 0.1


def test_nothing_after_the_deepest_hook_point_is_computed_and_no_mask_is_made(samples):
    model = tiny_model("llama")
    ran, masks = [], []

    def note(layer):
        def hook(module, args, kwargs):
            ran.append(layer)
            masks.append(kwargs["attention_mask"])

        return hook

    for i, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(note(i), with_kwargs=True)
    extractor = ActivationExtractor(model, ["mlp_out.1"], ["mean"])
    extractor.load()
    ran.clear(), masks.clear()
    extractor(TokenBatch.of(samples[0][0][None], token_mask="all"))
    assert ran == [0, 1]
    assert masks == [None, None]


def test_the_callers_model_is_left_as_it_was(samples):
    model = tiny_model("gpt2").train(True)
    model.h[1].train(False)
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ActivationExtractor(model, ["resid_post.0"], ["last"])(TokenBatch.of(samples[0][0][None], token_mask="all"))
    assert [module.training for module in model.modules()] == modes
    assert len(model.h) == 3
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_dropout_is_off_even_if_the_callers_model_trains(samples):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.5)
    extractor = ActivationExtractor(transformers.AutoModel.from_config(config).train(True), ["resid_post.1"], ["mean"])
    batch = TokenBatch.of(samples[0][0][None], token_mask="all")
    assert torch.equal(extractor(batch).activations["resid_post.1/mean"], extractor(batch).activations["resid_post.1/mean"])


def test_hooks_are_gone_after_an_error_in_the_forward_pass(samples):
    model = tiny_model("llama")
    extractor = ActivationExtractor(model, ["resid_post.2"], ["mean"])
    extractor.load()
    broken = model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        extractor(TokenBatch.of(samples[0][0][None], token_mask="all"))
    broken.remove()
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_with_a_head_is_read_without_running_the_head(samples):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"])
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    ActivationExtractor(model, ["final_norm"], ["last"])(TokenBatch.of(samples[0][0][None], token_mask="all"))


def test_any_module_can_be_read_by_its_path(samples):
    model = tiny_model("llama")
    got = ActivationExtractor(model, ["module:layers.1.mlp.up_proj"], ["tokens"])(
        TokenBatch.of(samples[0][0][None], token_mask="all")
    )
    assert got.activations["module:layers.1.mlp.up_proj/tokens"].shape == (LENGTHS[0], 48)


@pytest.mark.parametrize(
    ("path", "width"),
    [("layers.1.mlp.down_proj", 48), ("layers.1.self_attn", 32), ("layers.2", 32), ("norm", 32), ("layers.1", 32)],
)
def test_what_any_module_receives_can_be_read_by_its_path(samples, path, width):
    """By position or by name: the attention of Llama is called with hidden_states=…"""
    model, ids = tiny_model("llama"), samples[0][0]
    got = ActivationExtractor(model, [f"input:{path}"], ["tokens"])(TokenBatch.of(ids[None], token_mask="all")).activations[
        f"input:{path}/tokens"
    ]
    by_hand = {
        "layers.1.self_attn": lambda states: model.layers[1].input_layernorm(states["resid_post.0"]),
        "layers.2": lambda states: states["resid_post.1"],
        "layers.1": lambda states: states["resid_post.0"],
        "norm": lambda states: states["resid_post.2"],
        "layers.1.mlp.down_proj": lambda states: states["mlp_act.1"],
    }[path]
    with torch.no_grad():
        expected = by_hand(oracle_states(model, ids, dissect(model).names()))
    assert got.shape == (len(ids), width)
    assert relative_error(got, expected) < TOLERANCE


def test_inputs_are_read_of_a_cut_model_and_said_to_be_inputs(samples, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    names = ["attn_z.1", "mlp_act.0", "input:layers.1.mlp"]
    extractor = ActivationExtractor(str(tmp_path), names, ["tokens"])
    got = extractor(TokenBatch.of(samples[0][0][None], token_mask="all")).activations
    assert len(extractor.load().model.layers) == 2
    assert extractor.identity()["hook_paths"] == [
        "input of layers.1.self_attn.o_proj", "input of layers.0.mlp.down_proj", "input of layers.1.mlp"
    ]  # fmt: skip
    whole = tiny_model("llama")
    expected = oracle_states(whole, samples[0][0], dissect(whole).names())
    for name in names[:2]:
        assert relative_error(got[f"{name}/tokens"], expected[name]) < TOLERANCE


def test_what_comes_after_an_input_is_not_computed(samples):
    model = tiny_model("llama")
    extractor = ActivationExtractor(model, ["attn_z.1"], ["mean"])
    extractor.load()
    model.layers[1].mlp.register_forward_pre_hook(lambda *_: pytest.fail("the MLP ran"))
    model.layers[1].self_attn.o_proj.register_forward_hook(lambda *_: pytest.fail("the projection ran"))
    extractor(TokenBatch.of(samples[0][0][None], token_mask="all"))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "mamba"])
def test_it_is_said_where_a_block_does_more_than_add_what_attention_and_mlp_put_out(name, samples):
    model = tiny_model(name)
    states = oracle_states(model, samples[0][0], dissect(model).names())
    total = states["resid_post.0"] + states["attn_out.1"] + states["mlp_out.1"]
    adds = relative_error(total, states["resid_post.1"]) < TOLERANCE
    remarks = dissect(model).remarks
    assert adds == (not remarks) == (name not in ("gemma2", "bert", "roberta"))
    assert all("is not resid_post" in remark for remark in remarks)


def test_the_norms_of_gemma2_give_what_is_added(samples):
    model = tiny_model("gemma2")
    points = ["resid_post.0", "resid_post.1", *(f"module:layers.1.post_{part}_layernorm" for part in ("attention", "feedforward"))]
    got = ActivationExtractor(model, points, ["tokens"])(TokenBatch.of(samples[0][0][None], token_mask="all")).activations
    before, after, *added = (got[f"{point}/tokens"] for point in points)
    assert relative_error(before + sum(added), after) < TOLERANCE


def test_activations_are_in_the_models_dtype_or_the_one_asked_for(samples):
    batch = TokenBatch.of(samples[0][0][None], token_mask="all")
    model = in_dtype(tiny_model("llama"), torch.bfloat16)
    for asked, expected in [(None, torch.bfloat16), ("float32", torch.float32)]:
        got = ActivationExtractor(model, ["resid_post.0"], ["tokens", "mean"], store_dtype=asked)(batch).activations
        assert {values.dtype for values in got.values()} == {expected}


def test_half_precision_buffers_that_must_stay_float32_do(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    extractor = ActivationExtractor(str(tmp_path), ["resid_post.0"], ["mean"], options=ModelOptions(dtype="bfloat16"))
    model = extractor.load().model
    assert model.dtype == torch.bfloat16
    assert model.rotary_emb.inv_freq.dtype == torch.float32
    assert not list(extractor.parameters()), "the language model is not in Lightning's module tree"


def test_activations_may_be_trained_on(samples):
    got = ActivationExtractor(tiny_model("llama"), ["resid_post.0"], ["mean"])(TokenBatch.of(samples[0][0][None], token_mask="all"))
    weight = torch.zeros(32, requires_grad=True)
    (got.activations["resid_post.0/mean"] @ weight).sum().backward()
    assert weight.grad is not None


def test_identity_changes_with_weights_and_not_with_the_path(tmp_path):
    identities = []
    for folder, seed in [("a", 0), ("b", 0), ("c", 1)]:
        tiny_model("llama", seed).save_pretrained(tmp_path / folder)
        identities.append(ActivationExtractor(str(tmp_path / folder), ["resid_post.0"], ["mean"]).identity())
    assert identities[0] == identities[1]
    assert {name for name in identities[0] if identities[0][name] != identities[2][name]} == {"model"}


@pytest.mark.parametrize(
    ("family", "hook_point", "message"),
    [
        ("llama", "resid_post.3", "no layer 3; LlamaModel has layers 0 to 2"),
        ("llama", "resid_pre.1", "not one of embed"),
        ("llama", "resid_post", "not one of embed"),
        ("llama", "embed.1", "not one of embed"),
        ("llama", "module:layers.9", "no module 'layers.9'"),
        ("llama", "module:", "no module"),
        ("llama", "input:layers.9", "no module 'layers.9'"),
        ("llama", "input:", "no module"),
        ("llama", "attn_z", "not one of embed"),
        ("mixtral", "mlp_act.1", "no single last linear map of an MLP in MixtralDecoderLayer, .*; use input:<path>"),
        ("mamba", "attn_z.1", "no single output projection of an attention in MambaBlock"),
        ("llama", "input:embed_tokens", r"has shape \[1, 4\] for a batch"),
        ("bert", "final_norm", "no single norm stands beside the blocks"),
        ("mamba", "attn_out.1", "no attention module in MambaBlock"),
        ("mamba", "mlp_out.1", "no MLP module in MambaBlock"),
    ],
)
def test_hook_points_that_are_not_there_are_refused_with_what_is(family, hook_point, message):
    with pytest.raises(InvalidInputError, match=message):
        ActivationExtractor(tiny_model(family), [hook_point], ["mean"]).load()


def test_a_module_that_runs_twice_in_a_pass_is_refused():
    model = tiny_model("llama")
    model.layers[1].mlp = model.layers[0].mlp
    with pytest.raises(InvalidInputError, match="runs 2 times in one forward pass"):
        ActivationExtractor(model, ["mlp_out.0"], ["mean"]).load()


def test_a_model_with_two_stacks_is_refused_with_their_names():
    model = transformers.T5Model(transformers.T5Config(vocab_size=99, d_model=32, num_layers=3, d_kv=8, d_ff=32, num_heads=4))
    with pytest.raises(InvalidInputError, match=r"there are 2: encoder\.block, decoder\.block"):
        ActivationExtractor(model, ["resid_post.0"], ["mean"]).load()


@pytest.mark.parametrize(
    "pooling", ["mena", "exp_decay", "exp_decay:0", "exp_decay:-1", "exp_decay:x", "exp_decay:1.2.3", "position:x", ""]
)
def test_poolings_that_do_not_exist_are_refused(pooling):
    with pytest.raises(InvalidInputError, match="is not one of tokens, last, first, mean, max, exp_decay"):
        ActivationExtractor(tiny_model("llama"), ["resid_post.0"], [pooling])


@pytest.mark.parametrize(
    ("hook_points", "poolings"), [([], ["mean"]), (["embed", "embed"], ["mean"]), (["embed"], []), (["embed"], ["mean"] * 2)]
)
def test_nothing_or_the_same_twice_is_refused(hook_points, poolings):
    with pytest.raises(InvalidInputError):
        ActivationExtractor(tiny_model("llama"), hook_points, poolings).load()


def padded_data():
    return TextDataModule(["w1 w2", "w3"], word_tokenizer(50), plan_options=PlanOptions(padding="tail"))


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_models_pass_the_proof_that_padding_on_the_right_is_safe(family, dtype):
    ActivationExtractor(in_dtype(tiny_model(family), dtype), ["resid_post.2"], ["mean"]).check_fits(padded_data())


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoders_fail_the_proof(family, dtype):
    with pytest.raises(InvalidInputError, match="needs a causal model"):
        ActivationExtractor(in_dtype(tiny_model(family), dtype), ["resid_post.2"], ["mean"]).check_fits(padded_data())


def test_an_activation_batch_carries_its_identity_untouched(samples):
    ids, masks = samples
    (batch, *_) = planned_batches(ids[:1], masks[:1], PlanOptions())
    got = ActivationExtractor(tiny_model("llama"), ["embed"], ["mean"])(batch)
    assert isinstance(got, ActivationBatch)
    assert (got.sample_index, got.n_tokens, got.place) == (batch.sample_index, batch.n_tokens, batch.place)


def word_tokenizer(n_words=200):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(n_words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_samples_longer_than_the_positions_are_refused_unless_cut(cache):
    data = TextDataModule(["w7 " * 10, "w7 " * 70], word_tokenizer())
    for family, positions in [("gpt2", 64), ("roberta", 64)]:  # RoBERTa has 66 rows and starts at 2
        extractor = ActivationExtractor(tiny_model(family), ["embed"], ["mean"])
        with pytest.raises(
            InvalidInputError, match=f"sample 1 has 70 tokens, .* has {positions} positions .*--max-length {positions}"
        ):
            extractor.check_fits(data)
        extractor.check_fits(TextDataModule(["w7 " * 70], word_tokenizer(), text=TextOptions(max_length=positions)))
    ActivationExtractor(tiny_model("mamba"), ["embed"], ["mean"]).check_fits(data)  # no limit


def test_samples_with_fewer_tokens_than_a_position_are_refused_before_anything_is_computed(cache):
    texts = ["w7 " * 5, "w0 w7", "w7 w8 w9", "w1 w2"]
    data = TextDataModule(texts, word_tokenizer())
    extractor = ActivationExtractor(tiny_model("llama"), ["embed"], ["mean", "position:2", "last"])
    for refused in (lambda: extractor.check_fits(data), lambda: next(live_batches(extractor, data))):
        with pytest.raises(InvalidInputError, match=r"sample 1 has 2 tokens that count, the pooling position:2 needs 3 \(2 of 4"):
            refused()
    assert data.tokens.n_counted.tolist() == [5, 2, 3, 2]
    ActivationExtractor(tiny_model("llama"), ["embed"], ["position:1", "position:-2"]).check_fits(data)
    ActivationExtractor(tiny_model("llama"), ["embed"], ["position:2"]).check_fits(TextDataModule(texts[::2], word_tokenizer()))


def test_special_tokens_are_among_the_positions_if_the_mask_counts_them(cache):
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "w1"})
    texts = ["w7 w8 w1 w1", "w9 w1"]
    extractor = ActivationExtractor(tiny_model("llama"), ["embed"], ["position:-2"])
    with pytest.raises(InvalidInputError, match=r"sample 1 has 1 tokens that count, .* \(--token-mask all\)"):
        extractor.check_fits(TextDataModule(texts, tokenizer))
    data = TextDataModule(texts, tokenizer, text=TextOptions(token_mask="all"))
    assert data.tokens.n_counted.tolist() == [4, 2]
    rows = {int(i): row for batch in live_batches(extractor, data)
            for i, row in zip(batch.sample_index, batch.activations["embed/position:-2"], strict=True)}  # fmt: skip
    table = extractor.load().model.embed_tokens.weight
    assert torch.equal(rows[0], table[1]) and torch.equal(rows[1], table[9]), "the last but one of all tokens"


def test_roberta_takes_as_many_tokens_as_it_is_said_to():
    model = tiny_model("roberta")
    ActivationExtractor(model, ["resid_post.0"], ["mean"])(TokenBatch.of(torch.full((1, 64), 7), token_mask="all"))
    with pytest.raises((IndexError, RuntimeError)):
        ActivationExtractor(model, ["resid_post.0"], ["mean"])(TokenBatch.of(torch.full((1, 65), 7), token_mask="all"))


def test_ids_outside_the_models_vocabulary_are_refused(cache):
    with pytest.raises(InvalidInputError, match="gives id 150, LlamaModel has 99 embeddings"):
        ActivationExtractor(tiny_model("llama"), ["embed"], ["mean"]).check_fits(TextDataModule(["w150 w3"], word_tokenizer()))


def test_padding_is_refused_for_encoders_before_anything_runs(cache):
    data = TextDataModule(["w7 w8"], word_tokenizer(), plan_options=PlanOptions(padding="tail"))
    with pytest.raises(InvalidInputError, match="needs a causal model"):
        ActivationExtractor(tiny_model("bert"), ["resid_post.1"], ["mean"]).check_fits(data)


@pytest.mark.parametrize("is_loaded", [False, True])
def test_a_model_that_is_held_elsewhere_is_refused_and_not_read_from_afar(is_loaded):
    """Ids would go to its device by a copy that nobody waits for."""
    extractor = ActivationExtractor(tiny_model("llama"), ["resid_post.0"], ["last"])
    if is_loaded:
        extractor.load()
    with pytest.raises(InvalidInputError, match=r"is on cpu, to be read on cuda:0: move it, or let the Trainer work on cpu"):
        extractor.load("cuda:0")


def test_float32_that_a_gpu_would_multiply_as_tf32_is_refused(monkeypatch):
    cuda = torch.device("cuda", 0)
    refuse_short_cuts(cuda, torch.float32)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    refuse_short_cuts(cuda, torch.bfloat16)
    refuse_short_cuts(torch.device("cpu"), torch.float32)
    with pytest.raises(InvalidInputError, match=r"precision is 'high', so that cuda:0 .*_precision\('highest'\)"):
        refuse_short_cuts(cuda, torch.float32)
