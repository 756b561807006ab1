"""The head on stored states: right ones predict what the model predicts, others do not, and the model is left as it was."""

import copy
import re

import pytest
import torch
import transformers as t

from exactivations.lit_modules import ActivationExtractor
from exactivations.lit_modules.models.hook_points import dissect
from exactivations.lit_modules.models.language_model import body_of, has_head
from exactivations.lit_modules.verification.next_tokens import MOST_POSITIONS, NextTokenCheck, StoredStates
from tests.lit_modules.tiny_models import CONFIGS, SMALL, in_dtype, tiny_model

IDS = torch.tensor([7, 33, 8, 91, 14, 60, 23, 8, 5])
OTHER = torch.tensor([44, 12, 70, 9, 31, 31, 6, 81, 50])
ALL = torch.arange(len(IDS))
OPT = {name: value for name, value in SMALL.items() if name != "intermediate_size"} | {"ffn_dim": 48, "max_position_embeddings": 64}
HEADS = {name: CONFIGS[name] for name in ("gpt2", "llama", "gpt_neox", "mixtral", "mamba", "qwen3")} | {
    "gemma2": t.Gemma2Config(**CONFIGS["gemma2"].to_dict() | {"final_logit_softcapping": 5.0}),  # so tight that it tells
    "granite": t.GraniteConfig(**SMALL, max_position_embeddings=64, logits_scaling=3.0),
    "opt": t.OPTConfig(**OPT, word_embed_proj_dim=32),  # its head calls the decoder inside the body
    "openai_gpt": t.OpenAIGPTConfig(vocab_size=99, n_embd=32, n_layer=3, n_head=4, n_positions=64),  # lists, and no final norm
}
NORMS = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm", "mamba": "norm_f", "opt": "decoder.final_layer_norm", "openai_gpt": None}
BLOCKS = {"gpt2": "h", "opt": "decoder.layers", "openai_gpt": "h"}
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LOGIT_SIZE = 3.0  # their standard deviation: predictions as sharp as a trained model's
DTYPES = [(name, dtype) for name in HEADS for dtype in (F32, BF16, F16) if dtype == F32 or name != "openai_gpt"]
"""All but OpenAI-GPT in half precision: it has a float32 mask in its attention, and does not run with `in_dtype`."""


def whole_of(name, dtype=F32, config=None):
    torch.manual_seed(0)
    config = copy.deepcopy(config or HEADS[name])
    config.tie_word_embeddings = False
    model = t.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
        head, body = model.get_output_embeddings(), body_of(model.train(False))
        head.weight.mul_(LOGIT_SIZE / head(body(input_ids=IDS[None]).last_hidden_state).std())
    return in_dtype(model.train(False), dtype)


@torch.no_grad()
def true_states(whole, name, ids):
    """The last block's output and what the head receives, by hooks on modules named by hand."""
    body, seen = body_of(whole), {}
    blocks = body.get_submodule(BLOCKS.get(name, "layers"))
    handle = blocks[2].register_forward_hook(lambda _, __, out: seen.update(block=out[0] if isinstance(out, tuple | list) else out))
    last = body(input_ids=ids[None]).last_hidden_state
    handle.remove()
    norm = NORMS.get(name, "norm")
    return {"resid_post.2/tokens": seen["block"][0]} | ({"final_norm/tokens": last[0]} if norm else {})


@torch.no_grad()
def by_hand(whole, name, states):
    """Probabilities from the states that the head receives, written out: projection, scaling, soft-capping, softmax."""
    logits = states.float() @ whole.get_output_embeddings().weight.float().T
    if name == "gemma2":
        logits = 5.0 * torch.tanh(logits / 5.0)
    if name == "granite":
        logits = logits / 3.0
    return logits.softmax(dim=1)


def checked(whole, states, dtypes=(F32,), ids=IDS, positions=ALL):
    check = NextTokenCheck(whole, body_of(whole))
    return check.check(5, ids, {name: StoredStates(values, positions) for name, values in states.items()}, list(dtypes))


@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_the_models_own_states_predict_what_it_predicts(name, dtype):
    whole = whole_of(name, dtype)
    states = true_states(whole, name, IDS)
    results = checked(whole, states, [dtype])
    assert [result.name for result in results] == list(states)
    for result in results:
        assert result.agrees and (result.sample_index, result.positions, result.same_top1) == (5, 9, 9)
        assert result.difference <= 1e-6  # the same kernels on the same numbers; the norm may run alone


@pytest.mark.parametrize("name", HEADS)
def test_the_difference_is_that_of_a_head_applied_by_hand(name):
    """Of another sample's states: what is reported is what arithmetic written out gives."""
    whole = whole_of(name)
    key = "resid_post.2/tokens" if NORMS.get(name, "norm") is None else "final_norm/tokens"
    own, wrong = (true_states(whole, name, ids)[key] for ids in (IDS, OTHER))
    (result,) = checked(whole, {key: wrong})
    expected = by_hand(whole, name, own), by_hand(whole, name, wrong)
    assert result.difference == pytest.approx((expected[0] - expected[1]).abs().max().item(), rel=1e-4)
    assert result.same_top1 == int((expected[0].argmax(1) == expected[1].argmax(1)).sum())
    assert not result.agrees


@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_states_of_another_place_sample_or_side_of_the_norm_disagree(name, dtype):
    whole = whole_of(name, dtype)
    states, others = true_states(whole, name, IDS), true_states(whole, name, OTHER)
    wrong = {
        "shifted": {key: values.roll(1, dims=0) for key, values in states.items()},
        "another sample": others,
        "another sample's last row": {key: torch.cat([values[:-1], others[key][-1:]]) for key, values in states.items()},
        "zeros": {key: torch.zeros_like(values) for key, values in states.items()},
        "not finite": {key: values.index_fill(0, torch.tensor(3), torch.nan) for key, values in states.items()},
    }
    if "final_norm/tokens" in states:
        wrong["before the norm"] = {"final_norm/tokens": states["resid_post.2/tokens"]}
    for what, planted in wrong.items():
        for result in checked(whole, planted, [dtype]):
            # Random Mamba predicts something else in bfloat16 than in float32, so that nothing can be told of it there.
            can_tell = result.rounding < 0.25 or (name, dtype) != ("mamba", BF16)
            assert not (result.agrees and can_tell), (what, result)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("name", HEADS)
def test_states_stored_in_another_dtype_raise_no_alarm(name, dtype):
    whole = whole_of(name)
    states = {key: values.to(dtype) for key, values in true_states(whole, name, IDS).items()}
    assert all(result.agrees for result in checked(whole, states, [F32, dtype]))


def test_one_position_of_a_pooling_is_checked_at_its_own_place():
    whole = whole_of("llama")
    last = true_states(whole, "llama", IDS)["final_norm/tokens"][6:7]
    assert checked(whole, {"final_norm/last": last}, positions=torch.tensor([6]))[0].agrees
    assert not checked(whole, {"final_norm/last": last}, positions=torch.tensor([7]))[0].agrees


def test_long_samples_are_thinned_evenly_with_both_ends():
    n = 1000
    thinned = StoredStates(torch.arange(n, dtype=F32)[:, None], torch.arange(n)).thinned()
    assert len(thinned.positions) == MOST_POSITIONS and torch.equal(thinned.values[:, 0].long(), thinned.positions)
    assert (thinned.positions[0], thinned.positions[-1]) == (0, n - 1)
    assert set(thinned.positions.diff().tolist()) <= {7, 8}


PROJECTED = {"with a norm": {}, "without": {"do_layer_norm_before": False}}


@pytest.mark.parametrize("options", PROJECTED.values(), ids=PROJECTED)
def test_a_model_that_projects_after_its_norm_is_not_judged_and_says_why(options):
    whole = whole_of("opt", config=t.OPTConfig(**OPT, word_embed_proj_dim=16, **options))
    points = [name for name in dissect(body_of(whole)).names() if name in ("resid_post.2", "final_norm")]
    extractor = ActivationExtractor(whole, points, ["tokens", "last"])
    check = NextTokenCheck(whole, extractor.load().model)
    assert not any(check.applies_to(f"{point}/{pooling}") for point in points for pooling in ("tokens", "last"))


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("name", ["llama", "mamba", "opt"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_answers_as_before(name, fails, patched):
    whole = whole_of(name, BF16).train(True)
    inside = body_of(whole).decoder if name == "opt" else body_of(whole)
    if patched:  # as accelerate does
        inside.forward = inside.forward
    states, head = true_states(whole.train(False), name, IDS), whole.get_output_embeddings()
    whole.train(True), head.train(False)
    before = [sorted(vars(module)) for module in whole.modules()], [module.training for module in whole.modules()]
    forward = vars(inside).get("forward")
    check, calls = NextTokenCheck(whole, body_of(whole)), []
    if fails:
        handle = head.register_forward_hook(lambda *_: calls.append(0) or (1 / 0 if len(calls) == 3 else None))  # in the last pass
        with pytest.raises(ZeroDivisionError):
            check.check(0, IDS, {key: StoredStates(values, ALL) for key, values in states.items()}, [BF16])
        handle.remove()
    else:
        assert all(result.agrees for result in checked(whole, states, [BF16]))
    assert before == ([sorted(vars(module)) for module in whole.modules()], [module.training for module in whole.modules()])
    assert vars(inside).get("forward") is forward
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in whole.modules())
    fresh = whole_of(name, BF16)
    assert all(torch.equal(x, y) for x, y in zip(whole.state_dict().values(), fresh.state_dict().values(), strict=True))
    with torch.no_grad():
        assert torch.equal(whole.train(False)(IDS[None]).logits, fresh(IDS[None]).logits)


@pytest.mark.parametrize(
    ("model", "points", "poolings", "why"),
    [
        (lambda: tiny_model("bert"), ["resid_post.2"], ["tokens"], "no causal language model"),
        (lambda: tiny_model("llama"), ["final_norm"], ["last"], "no causal language model, or its head is not in the checkpoint"),
        (lambda: whole_of("gpt2"), ["resid_post.1"], ["last"], r"no state before the head is stored \(final_norm or"),
        (lambda: whole_of("llama"), ["final_norm"], ["mean", "max"], "no single token's state is stored"),
    ],
)  # fmt: skip
def test_where_there_is_no_head_to_try_the_reason_is_told(model, points, poolings, why):
    extractor = ActivationExtractor(model(), points, poolings)
    assert extractor.load().whole is None
    assert re.search(why, extractor.load().no_head)


def test_where_there_is_one_it_is_used_and_no_reason_is_told():
    whole = whole_of("llama")
    assert has_head(whole) and not has_head(body_of(whole))
    extractor = ActivationExtractor(whole, ["final_norm", "embed"], ["last", "mean"])
    assert extractor.load().whole is whole and extractor.load().no_head is None
    check = NextTokenCheck(whole, whole.model)
    assert [name for name in extractor.specs() if check.applies_to(name)] == ["final_norm/last"]
