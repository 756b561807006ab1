"""The truth against the untouched Hugging Face model; what it does to the model (nothing); and what counts as agreement."""

import math

import numpy as np
import pytest
import torch
import transformers as t
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from exactivations.lit_modules.models.ground_truth import GroundTruth, compare, pool_by_definition, relative_error, tolerance_for
from exactivations.lit_modules.models.hook_points import cut_after, dissect, resolve_hook_points
from exactivations.lit_modules.models.language_model import body_of, forward_arguments
from tests.lit_modules.extraction.test_extractor import oracle_states
from tests.lit_modules.extraction.test_pooling import by_definition
from tests.lit_modules.tiny_models import CONFIGS, in_dtype, tiny_model

IDS = torch.tensor([7, 33, 8, 91, 14, 60, 23, 8, 5])
HALVES = [torch.bfloat16, torch.float16]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SMALL = {"vocab_size": 99, "num_attention_heads": 4, "max_position_embeddings": 64}


def truth_of(model, names=None):
    return GroundTruth(model, resolve_hook_points(model, names or dissect(model).names()), forward_arguments(model))


def snapshot(model):
    """Everything about a model that must stay: which tensors it holds, where their memory is, every bit, modes, hooks, dtype."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    return (
        {name: (id(x), x.data_ptr(), x.dtype, x.requires_grad, x.detach().clone().view(-1).view(torch.uint8).tolist())
         for name, x in tensors.items()},
        [module.training for module in model.modules()],
        [[list(hooks) for name, hooks in vars(module).items() if name.endswith("hooks")] for module in model.modules()],
        [sorted(vars(module)) for module in model.modules()],
        model.config.to_dict(),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, *HALVES])
@pytest.mark.parametrize("family", CONFIGS)
def test_states_are_exactly_those_of_the_untouched_model_at_every_hook_point(family, dtype):
    model = in_dtype(tiny_model(family), dtype)
    names = dissect(model).names()
    expected = oracle_states(model, IDS, names)
    found = truth_of(model).states(IDS)
    assert found.keys() == expected.keys()
    for name in names:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("weights", [F32, *HALVES])
@pytest.mark.parametrize("computed", [F32, *HALVES])
@pytest.mark.parametrize("family", CONFIGS)
def test_another_dtype_gives_what_a_model_made_in_it_gives_and_leaves_every_bit(family, weights, computed):
    model = in_dtype(tiny_model(family), weights)
    other = in_dtype(in_dtype(tiny_model(family), weights), computed)  # its weights rounded, and widened or narrowed again
    before = snapshot(model)
    found = truth_of(model).states(IDS, computed)
    assert snapshot(model) == before
    for name, expected in oracle_states(other, IDS, dissect(other).names()).items():
        assert torch.equal(found[name], expected), name
    for name, expected in oracle_states(model, IDS, dissect(model).names()).items():  # and it computes as before
        assert torch.equal(truth_of(model).states(IDS)[name], expected), name


@pytest.mark.parametrize("computed", [F32, BF16])
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("where", ["inside a block", "after the first block", "outside"])
def test_a_forward_pass_that_fails_leaves_every_bit_mode_and_hook(family, computed, where):
    model = in_dtype(tiny_model(family), BF16).train(True)
    blocks = model.get_submodule(dissect(model).blocks)
    blocks[1].train(False)
    before = snapshot(model)
    module = {"inside a block": next(iter(blocks[1].children())), "after the first block": blocks[0], "outside": model}[where]
    broken = module.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        truth_of(model).states(IDS, computed)
    broken.remove()
    assert snapshot(model) == before
    expected = truth_of(in_dtype(tiny_model(family), BF16)).states(IDS)
    assert all(torch.equal(state, expected[name]) for name, state in truth_of(model).states(IDS).items())


@pytest.mark.parametrize("computed", [None, F32, F16])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_that_was_cut_gives_what_the_whole_one_gives(family, computed):
    names = ["resid_post.1", "embed", "resid_post.0"]
    whole = truth_of(in_dtype(tiny_model(family), BF16), names).states(IDS, computed)
    model = in_dtype(tiny_model(family), BF16)
    assert cut_after(model, resolve_hook_points(model, names)) == 2
    before = snapshot(model)
    cut = truth_of(model, names).states(IDS, computed)
    assert snapshot(model) == before
    assert list(cut) != [] and all(torch.equal(cut[name], whole[name]) for name in names)


def causal(config):
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(config).train(False)


OPT = {**SMALL, "hidden_size": 32, "num_hidden_layers": 3, "ffn_dim": 48}
ENDS = {  # models in which the last block's output, or the norm's, is not what the model hands out: (model, hook point, module)
    "projected after the norm": (t.OPTConfig(**OPT, word_embed_proj_dim=16), "final_norm", "decoder.final_layer_norm"),
    "projected after the norm, block": (t.OPTConfig(**OPT, word_embed_proj_dim=16), "resid_post.2", "decoder.layers.2"),
    "projected without norm": (
        t.OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False), "resid_post.2", "decoder.layers.2",
    ),
    "a norm only before the blocks": (
        t.BartConfig(vocab_size=99, d_model=32, decoder_layers=3, decoder_attention_heads=4, decoder_ffn_dim=48, encoder_layers=3),
        "resid_post.2", "decoder.layers.2",
    ),
    "blocks that put out lists": (
        t.OpenAIGPTConfig(vocab_size=99, n_embd=32, n_layer=3, n_head=4, n_positions=64), "resid_post.2", "h.2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
def test_the_end_of_odd_models_is_what_the_module_itself_puts_out(end):
    config, name, path = ENDS[end]
    model = body_of(causal(config))
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        model(input_ids=IDS[None], use_cache=False) if "OpenAI" not in type(model).__name__ else model(input_ids=IDS[None])
    handle.remove()
    expected = seen[0][0] if isinstance(seen[0], list | tuple) else seen[0]
    assert torch.equal(truth_of(model, [name]).states(IDS)[name], expected[0])


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_other_modules_can_be_computed_alone_by_their_path(family):
    model = tiny_model(family)
    path = {"llama": "layers.1.mlp.up_proj", "bert": "encoder.layer.1.intermediate"}[family]
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda _, __, out: seen.append(out[0].clone()))
    with torch.no_grad():
        model(input_ids=IDS[None])
    handle.remove()
    assert torch.equal(truth_of(model, [f"module:{path}"]).states(IDS)[f"module:{path}"], seen[0])


def test_inputs_are_what_a_module_computes_with_and_the_model_is_left_as_it_was():
    model = tiny_model("llama")
    names = ["attn_z.1", "mlp_act.1", "input:layers.1.self_attn"]
    alone = truth_of(model, names).states(IDS)
    assert not any("forward" in vars(module) for module in model.modules())
    with torch.no_grad():
        for name, path in {"attn_z.1": "self_attn", "mlp_act.1": "mlp"}.items():
            out = truth_of(model, [f"module:layers.1.{path}"]).states(IDS)[f"module:layers.1.{path}"]
            end = {"self_attn": model.layers[1].self_attn.o_proj, "mlp": model.layers[1].mlp.down_proj}[path]
            torch.testing.assert_close(end(alone[name]), out)
    handle = model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    changed = truth_of(model, ["mlp_act.1"]).states(IDS)["mlp_act.1"]
    handle.remove()
    assert torch.equal(changed, 2 * alone["mlp_act.1"])


@given(
    states=hnp.arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 5)), elements=st.floats(-1e3, 1e3, width=32)),
    data=st.data(),
)
def test_poolings_follow_their_definitions(states, data):
    mask = data.draw(hnp.arrays(bool, len(states)))
    mask[data.draw(st.integers(0, len(states) - 1))] = True
    given_states, given_mask = torch.tensor(states), torch.tensor(mask)
    assert torch.equal(pool_by_definition(given_states, given_mask, "tokens"), torch.tensor(states, dtype=torch.float64))
    for pooling in ("last", "first", "mean", "max", "exp_decay:0.067", "exp_decay:3"):
        found = pool_by_definition(given_states, given_mask, pooling)
        assert found.dtype == torch.float64 and found.shape == (1, states.shape[1])
        np.testing.assert_allclose(found[0].numpy(), by_definition(states[mask], pooling), rtol=1e-9, atol=1e-9)


@given(mask=st.lists(st.booleans(), min_size=1, max_size=9), k=st.integers(-10, 10))
def test_a_position_is_that_of_the_tokens_that_count_or_there_is_no_row(mask, k):
    states = torch.arange(len(mask), dtype=torch.float32)[:, None]
    counted = [float(i) for i, marked in enumerate(mask) if marked]
    found = pool_by_definition(states, torch.tensor(mask), f"position:{k}")
    assert found[:, 0].tolist() == ([counted[k]] if -len(counted) <= k < len(counted) else [])
    assert found.shape[1:] == (1,) and found.dtype == torch.float64


def test_the_definition_of_exp_decay_is_told_by_an_example():
    states = torch.tensor([[1.0], [2.0], [4.0], [9.0]])
    mask = torch.tensor([True, True, False, True])  # three count: half-life 1/3 of them is one token
    found = pool_by_definition(states, mask, f"exp_decay:{1 / 3}")
    assert found.item() == pytest.approx((0.25 * 1 + 0.5 * 2 + 1 * 9) / 1.75)


hostile = st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, 1e-45, -1e-30, 3e38, math.inf, -math.inf, math.nan])


@st.composite
def rows(draw, n=4):
    """Stored, true, coarse and fine rows: some as they should be, some perturbed, some hostile."""
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    true = draw(hnp.arrays(np.float32, shape, elements=hostile)).astype(np.float64)
    found = [true]
    for _ in range(n - 1):
        factor = draw(hnp.arrays(np.float64, shape, elements=st.sampled_from([1.0, 1.0, 1 + 5e-5, 1 + 1e-3, 1.01, 1.1, -1.0, 0.0])))
        with np.errstate(all="ignore"):
            found.append(
                draw(hnp.arrays(np.float32, shape, elements=hostile)).astype(float)
                if draw(st.integers(0, 9)) == 0
                else true * factor
            )
    return found  # fmt: skip


def error_by_hand(found, true):
    """Row by row, in plain Python."""
    errors = []
    for f, x in zip(found.tolist(), true.tolist(), strict=True):
        if not all(map(math.isfinite, f + x)):
            errors.append(math.inf)
            continue
        difference, norm = math.hypot(*(a - b for a, b in zip(f, x, strict=True))), math.hypot(*x)
        errors.append(0.0 if difference == 0 else difference / norm if norm else math.inf)
    return errors


@given(arrays=rows())
def test_relative_errors_are_those_of_arithmetic_by_hand(arrays):
    true, found, *_ = arrays
    np.testing.assert_allclose(
        relative_error(torch.tensor(found), torch.tensor(true)).numpy(), error_by_hand(found, true), rtol=1e-9
    )


@given(
    arrays=rows(), dtypes=st.lists(st.sampled_from([F32, BF16, F16]), min_size=1, max_size=3)
)  # fmt: skip
def test_rows_agree_if_and_only_if_each_error_is_within_its_own_tolerance(arrays, dtypes):
    true, stored, coarse, fine = arrays
    errors, rounding = error_by_hand(stored, true), error_by_hand(coarse, fine)
    median = sorted(rounding)[(len(rounding) - 1) // 2]
    eps = {F32: 0.0, F16: 2.0**-10, BF16: 2.0**-7}
    coarsest = max(eps[dtype] for dtype in dtypes)

    def allowed(r):
        r = max(r, median)
        return min(0.5, 4 * max(r if math.isfinite(r) else 0.0, coarsest / 2)) if coarsest else 1e-4

    # Not within a billionth of the boundary: arithmetic by hand rounds in another order.
    nearness = [(e + 1e-300) / a for e, a in zip(errors, map(allowed, rounding), strict=True)]
    compared = compare("x/tokens", 3, *(torch.tensor(x) for x in (stored, true, coarse, fine)), dtypes)
    if all(abs(near - 1) > 1e-9 for near in nearness):
        assert compared.agrees == all(near < 1 for near in nearness)
    assert math.isfinite(compared.tolerance) and compared.tolerance > 0
    assert compared.agrees == (compared.error <= compared.tolerance)
    assert compared.error == pytest.approx(errors[compared.worst_row], rel=1e-9)
    assert max(nearness) == pytest.approx(nearness[compared.worst_row], rel=1e-9)


@given(seed=st.integers(0, 99), n=st.integers(1, 20), size=st.floats(1e-7, 10.0), scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e30]))
def test_the_error_is_the_size_of_what_was_planted_whatever_the_size_of_the_row(seed, n, size, scale):
    dice = np.random.default_rng(seed)
    true = dice.normal(size=(n, 8)) * scale
    planted = dice.integers(n)
    direction = dice.normal(size=8)
    stored = true.copy()
    stored[planted] += direction / np.linalg.norm(direction) * size * np.linalg.norm(true[planted])
    compared = compare("x/tokens", 0, *(torch.tensor(x) for x in (stored, true, true, true)), [F32])
    assert compared.error == pytest.approx(size, rel=1e-6)
    assert compared.worst_row == planted
    if abs(size / 1e-4 - 1) > 1e-6:  # on the boundary itself arithmetic by hand rounds in another order
        assert compared.agrees == (size <= 1e-4)


@pytest.mark.parametrize("dtype", [F32, *HALVES])
def test_a_fault_in_one_quiet_row_is_found_among_loud_ones(dtype):
    """Massive activations are a thousand times as large as other tokens' states, and rounding is loud there."""
    torch.manual_seed(0)
    true = torch.randn(50, 32, dtype=torch.float64) * 1000
    true[31] /= 1e5
    coarse = true.to(dtype).double()
    coarse[::5] += true[::5].norm(dim=1, keepdim=True) * 0.01 * torch.randn(10, 32, dtype=torch.float64)  # rounded much more
    stored = coarse.clone()
    clean = compare("x/tokens", 0, stored, true, coarse, true, [dtype])
    stored[31] += 0.05 * true[31].norm() * torch.nn.functional.normalize(torch.randn(32, dtype=torch.float64), dim=0)
    found = compare("x/tokens", 0, stored, true, coarse, true, [dtype])
    assert (clean.agrees or dtype == F32) and not found.agrees
    if dtype != F32:
        assert found.worst_row == 31 and found.error == pytest.approx(0.05, rel=0.2)  # a little more without its largest dimension


@pytest.mark.parametrize(
    ("stored", "true", "agrees"),
    [
        ([0.0, 0.0], [0.0, 0.0], True),
        ([1e-30, 0.0], [0.0, 0.0], False),
        ([0.0, 0.0], [1e-30, 0.0], False),
        ([1e-30, 0.0], [1e-30, 0.0], True),
        ([math.nan, 0.0], [1.0, 0.0], False),
        ([math.nan, 0.0], [math.nan, 0.0], False),
        ([math.inf, 0.0], [math.inf, 0.0], False),
        ([1.0, 0.0], [math.inf, 0.0], False),
        ([-1.0, 0.0], [1.0, 0.0], False),
    ],
)
@pytest.mark.parametrize("dtype", [F32, *HALVES])
def test_zero_tiny_and_not_finite_rows(stored, true, agrees, dtype):
    stored, true = torch.tensor([stored], dtype=torch.float64), torch.tensor([true], dtype=torch.float64)
    for coarse in (true, torch.full_like(true, math.inf), torch.full_like(true, math.nan)):  # an overflow excuses nothing
        fine = true.nan_to_num(1.0, 1.0)
        assert compare("x/mean", 0, stored, true, coarse, fine, [dtype]).agrees == agrees


@given(rounding=st.floats(0, 1), dtypes=st.lists(st.sampled_from([F32, BF16, F16]), min_size=1))
def test_tolerances_grow_with_rounding_and_with_the_coarsest_dtype(rounding, dtypes):
    found = tolerance_for(dtypes, rounding)
    if set(dtypes) == {F32}:
        assert found == 1e-4
    else:
        assert found == min(0.5, 4 * max(rounding, 2.0**-8 if BF16 in dtypes else 2.0**-11))
    assert found == tolerance_for(dtypes[::-1], rounding) <= tolerance_for([*dtypes, BF16], rounding)
