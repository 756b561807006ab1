"""A steered model against the untouched one with plain PyTorch hooks, or with its blocks run one by one, by hand."""

import itertools

import pytest
import torch
import transformers

from exactivations.lit_modules import ActivationExtractor
from exactivations.lit_modules.steering import Ablate, Add, Generated, Replace, steering
from exactivations.store import TokenBatch
from exactivations.store.errors import InvalidInputError
from tests.lit_modules.tiny_models import CONFIGS, in_dtype, tiny_model

FAMILIES = ["gpt2", "gpt_neox", "llama"]
BY_HAND = {  # block, attention, MLP, final norm, embedding
    "gpt2": ("h.{}", "h.{}.attn", "h.{}.mlp", "ln_f"),
    "gpt_neox": ("layers.{}", "layers.{}.attention", "layers.{}.mlp", "final_layer_norm"),
    "llama": ("layers.{}", "layers.{}.self_attn", "layers.{}.mlp", "norm"),
}
P = 9


def causal(family, seed=0):
    """The model with its head, whose next tokens are far apart."""
    body = tiny_model(family, seed)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]).train(False)
    model.base_model.load_state_dict(body.state_dict())
    head = torch.nn.Linear(32, 99, bias=False)  # not tied to the embedding, so that a token does not predict itself
    model.set_output_embeddings(head.to(torch.float32).train(False))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return causal(family)


@pytest.fixture
def ids():
    return torch.randint(5, 99, (2, P), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def vector():
    return torch.randn(32, generator=torch.Generator().manual_seed(1))


def hook_on(body, path, change):
    """A plain hook that puts `change(state)` in the place of a module's output."""

    def hook(module, args, output):
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return body.get_submodule(path).register_forward_hook(hook)


def hooks_of(model):
    fields = [name for name in vars(torch.nn.Module()) if "hooks" in name]
    return {(path, name): dict(getattr(m, name)) for path, m in model.named_modules() for name in fields}


@torch.no_grad()
def logits(model, ids, **arguments):
    return model(input_ids=ids, **arguments).logits


@torch.no_grad()
def states(model, ids, names, **arguments):
    """Outputs of modules of the body, by plain hooks."""
    seen = {}
    handles = [hook_on(model.base_model, path, lambda x, path=path: seen.setdefault(path, x.clone())) for path in names]
    try:
        model(input_ids=ids, **arguments)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@pytest.mark.parametrize("kind", range(4), ids=["resid_post", "attn_out", "mlp_out", "final_norm"])
def test_logits_are_those_of_a_hook_written_by_hand(model, family, ids, vector, kind):
    name = ["resid_post.1", "attn_out.1", "mlp_out.1", "final_norm"][kind]
    path = BY_HAND[family][kind].format(1)
    for edit, change in [
        (Add(name, vector, coefficient=2.5), lambda x: x + 2.5 * vector),
        (Replace(name, vector), lambda x: vector.expand_as(x)),
        (Add(f"module:{path}", vector), lambda x: x + vector),
    ]:
        handle = hook_on(model.base_model, path, change)
        expected = logits(model, ids)
        handle.remove()
        with steering(model, [edit]):
            assert torch.equal(logits(model, ids), expected)
        assert not torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_the_next_block_receives_the_steered_state(model, family, ids, vector, layer):
    """Blocks run one by one: what each got besides the states, in an untouched pass, does not depend on the states."""
    body, given = model.base_model, {}
    paths = [BY_HAND[family][0].format(i) for i in range(3)]

    def keep(path):
        def hook(module, args, kwargs):
            given[path] = (args[1:], kwargs)

        return hook

    handles = [body.get_submodule(path).register_forward_pre_hook(keep(path), with_kwargs=True) for path in paths]
    state = states(model, ids, paths, use_cache=False)[paths[layer]] + 3.0 * vector
    for handle in handles:
        handle.remove()
    for path in paths[layer + 1 :]:
        args, kwargs = given[path]
        state = body.get_submodule(path)(state, *args, **kwargs)
        state = state[0] if isinstance(state, tuple) else state
    expected = model.get_output_embeddings()(body.get_submodule(BY_HAND[family][3])(state))
    with steering(model, [Add(f"resid_post.{layer}", vector, 3.0)]):
        assert torch.equal(logits(model, ids), expected)


def test_embed_is_what_enters_the_first_block(model, family, ids, vector):
    shifted = model.get_input_embeddings()(ids) + 2.0 * vector
    with torch.no_grad():
        expected = model(inputs_embeds=shifted).logits  # positions of GPT-2 are added to that
    with steering(model, [Add("embed", vector, 2.0)]):
        found = logits(model, ids)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    with steering(model, [Add("embed", vector, 2.0)]), torch.no_grad():
        by_position = model(ids).logits  # given without its name
    assert torch.equal(by_position, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_steered_point_reads_as_state_plus_vector_and_all_before_it_as_ever(model, family, ids, vector, dtype):
    in_dtype(model, dtype)
    block, attention, mlp, _ = BY_HAND[family]
    before = [pattern.format(i) for pattern in (block, attention, mlp) for i in range(2)]
    plain = states(model, ids, before)
    marked = torch.zeros(2, P, dtype=torch.bool)
    marked[0, 3], marked[1, 5:] = True, True
    with steering(model, [Add("resid_post.1", vector, 3.7, positions=marked)]):
        found = states(model, ids, before)
    at = plain.pop(block.format(1))
    got = found.pop(block.format(1))
    for path, state in plain.items():
        assert torch.equal(found[path], state), path
    wide = torch.promote_types(dtype, torch.float32)
    assert got.dtype == dtype
    assert torch.equal(got[~marked], at[~marked])
    assert torch.equal(got[marked], (at.to(wide) + 3.7 * vector.to(wide)).to(dtype)[marked])


def test_extraction_reads_what_was_steered(family, ids, vector):
    model = causal(family)
    names = ["embed", "resid_post.0", "resid_post.1", "resid_post.2"]
    batch = TokenBatch.of(ids, token_mask="all")
    extractor = ActivationExtractor(model, names, ["tokens"])
    plain = extractor(batch).activations
    with steering(model, [Add("resid_post.1", vector, -1.5)]):
        steered = extractor(batch).activations
    for name in names[:2]:
        assert torch.equal(steered[f"{name}/tokens"], plain[f"{name}/tokens"])
    assert torch.equal(steered["resid_post.1/tokens"], plain["resid_post.1/tokens"] + -1.5 * vector)
    assert not torch.equal(steered["resid_post.2/tokens"], plain["resid_post.2/tokens"])
    assert all(torch.equal(state, plain[name]) for name, state in extractor(batch).activations.items())


def test_hidden_states_of_the_model_itself_are_the_steered_ones_whenever_it_began_to_keep_them(model, ids, vector):
    with torch.no_grad():
        plain = model(ids, output_hidden_states=True).hidden_states  # from now on its own hooks are there
    with steering(model, [Add("resid_post.0", vector), Add("embed", vector)]), torch.no_grad():
        steered = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(steered[0], plain[0] + vector)
    with steering(model, [Add("resid_post.0", vector)]), torch.no_grad():
        assert torch.equal(model(ids, output_hidden_states=True).hidden_states[1], plain[1] + vector)


def edits_of(vector, positions):
    other = vector.flip(0)
    return [
        Add("embed", other, 0.5, positions=positions),
        Add("resid_post.0", vector, 4.0, positions=positions),
        Ablate("attn_out.1", torch.stack([vector, other]), positions=positions),
        Replace("mlp_out.2", vector, positions=positions),
    ]


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3", "gemma2", "mixtral"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("positions", ["all", "generated", slice(2, None), slice(0, 4), slice(7, 12), "mask"], ids=str)
def test_generating_with_a_cache_is_generating_without_token_for_token(family, ids, vector, positions, padded):
    model = causal(family)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    if positions == "mask":
        positions = (torch.arange(P) % 3 == 1) & mask.bool()
    positions = Generated(P) if isinstance(positions, str) and positions == "generated" else positions
    arguments = {"attention_mask": mask, "max_new_tokens": 14, "do_sample": False}

    def generate(**more):
        out = model.generate(ids, **arguments, **more, return_dict_in_generate=True, output_logits=True)
        return out.sequences, torch.stack(out.logits)

    text, plain = generate()
    with steering(model, edits_of(vector, positions)):
        steered, cached = generate()
        again, uncached = generate(use_cache=False)
        assert torch.equal(steered, again)
        assert (cached - uncached).norm() <= 1e-5 * uncached.norm()
        assert torch.equal(generate()[1], cached)  # another one in the same block
    assert torch.equal(cached[0], plain[0]) == isinstance(positions, Generated)  # the first one is drawn from the prompt
    assert not torch.equal(cached[1:], plain[1:])
    after, logits_after = generate()
    assert torch.equal(after, text) and torch.equal(logits_after, plain)


def test_generated_tokens_are_steered_as_by_a_loop_written_by_hand(model, family, ids, vector):
    """Greedy, each step a whole pass in which a plain hook adds to the columns behind the prompt."""

    def change(state):
        out = state.clone()
        out[:, P:] += 6.0 * vector
        return out

    handle, text = hook_on(model.base_model, BY_HAND[family][0].format(1), change), ids
    for _ in range(12):
        text = torch.cat([text, logits(model, text, use_cache=False)[:, -1:].argmax(-1)], dim=1)
    handle.remove()
    with steering(model, [Add("resid_post.1", vector, 6.0, positions=Generated(P))]):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert torch.equal(found, text)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sample_is_steered_under_padding_as_it_is_alone(model, ids, vector, side):
    rows = [ids[0, :5], ids[1]]
    pad = torch.nn.functional.pad
    ends = (lambda n: (P - n, 0)) if side == "left" else (lambda n: (0, P - n))
    batch = torch.stack([pad(row, ends(len(row))) for row in rows])
    mask = torch.stack([pad(torch.ones(len(row), dtype=torch.long), ends(len(row))) for row in rows])
    places = (mask.cumsum(1) - 1).clamp_min(0)
    for positions in ("all", slice(1, 4), slice(3, None)):
        with steering(model, [Add("resid_post.0", vector, 3.0, positions=positions)]):
            together = logits(model, batch, attention_mask=mask, position_ids=places)
            for row, got, real in zip(rows, together, mask.bool(), strict=True):
                alone = logits(model, row[None])[0]
                assert (got[real] - alone).norm() <= 1e-5 * alone.norm()


def test_padding_is_never_steered(model, family, ids, vector):
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    path = BY_HAND[family][0].format(0)
    plain = states(model, ids, [path], attention_mask=mask)[path]
    with steering(model, [Add("resid_post.0", vector)]):
        steered = states(model, ids, [path], attention_mask=mask)[path]
    assert torch.equal(steered[~mask.bool()], plain[~mask.bool()])
    assert torch.equal(steered[mask.bool()], (plain + vector)[mask.bool()])


def test_several_sequences_of_a_prompt_take_its_rows_repeated(model, ids, vector):
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    mask = torch.arange(P)[None] == torch.tensor([[2], [7]])
    too_few = [Add("resid_post.1", vector, 5.0, positions=mask)]
    with steering(model, too_few), pytest.raises(InvalidInputError, match=r"2 rows.* has 6"):
        model.generate(ids, **arguments)
    with steering(model, [Add("resid_post.1", vector, 5.0, positions=mask.repeat_interleave(3, 0))]):
        cached = model.generate(ids, **arguments)
        assert torch.equal(cached, model.generate(ids, **arguments, use_cache=False))


def test_an_ablated_direction_is_gone_at_every_read(model, family, ids, vector):
    """Ablated wherever something is added to the residual: what is left is rounding, also while generating."""
    directions = torch.stack([vector, vector.flip(0), vector + 0.1 * vector.flip(0).roll(1)])
    paths = [BY_HAND[family][0].format(i) for i in range(3)]
    seen = []
    with steering(model, [Ablate(f"resid_post.{i}", directions) for i in range(3)]):
        handles = [hook_on(model.base_model, path, lambda x: seen.append(x) or x) for path in paths]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        for handle in handles:
            handle.remove()
    assert len(seen) == 15 and out.shape == (2, P + 5)
    for state in seen:
        along = state.double() @ (directions.double() / directions.double().norm(dim=1, keepdim=True)).T
        assert along.abs().max() <= 1e-5 * state.norm(dim=-1).max()


def test_an_ablated_state_is_the_nearest_one_without_the_subspace(model, family, ids, vector):
    directions = torch.stack([vector * 1e-20, vector.flip(0) * 1e20])  # lengths do not matter
    path = BY_HAND[family][0].format(1)
    plain = states(model, ids, [path])[path].double()
    with steering(model, [Ablate("resid_post.1", directions)]):
        found = states(model, ids, [path])[path]
    basis = torch.stack([vector, vector.flip(0)]).double()
    expected = plain - plain @ torch.linalg.pinv(basis) @ basis
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_edits_of_one_point_are_made_in_order_and_rounded_once(model, family, ids, vector):
    in_dtype(model, torch.bfloat16)
    path = BY_HAND[family][0].format(1)
    plain = states(model, ids, [path])[path].float()
    edits = [Add("resid_post.1", vector, 0.01), Add("resid_post.1", vector, 0.02), Replace("resid_post.1", vector, slice(0, 1))]
    with steering(model, edits):
        found = states(model, ids, [path])[path]
    expected = plain + 0.01 * vector + 0.02 * vector
    expected[:, 0] = vector
    assert torch.equal(found, expected.bfloat16())


def test_of_nested_blocks_the_outer_one_comes_first(model, family, ids, vector):
    path = BY_HAND[family][0].format(1)
    plain, hooks = states(model, ids, [path])[path], hooks_of(model)
    orders = itertools.permutations([Replace("resid_post.1", vector), Add("resid_post.1", vector.flip(0))])
    for (outer, inner), expected in zip(orders, [vector + vector.flip(0), vector], strict=True):
        with steering(model, [outer]):
            alone, inside = states(model, ids, [path])[path], hooks_of(model)
            with steering(model, [inner]):
                assert torch.equal(states(model, ids, [path])[path], expected.expand_as(plain))
            assert hooks_of(model) == inside
            assert torch.equal(states(model, ids, [path])[path], alone)
    assert hooks_of(model) == hooks
    assert torch.equal(states(model, ids, [path])[path], plain)


def test_nothing_is_left_on_the_model_whatever_happens(model, ids, vector):
    hooks, attributes = hooks_of(model), {name: set(vars(m)) for name, m in model.named_modules()}
    plain = logits(model, ids)
    edits = [Add("embed", vector), Add("resid_post.1", vector), Replace("attn_out.0", vector)]
    with pytest.raises(RuntimeError, match="on the way"), steering(model, edits):
        logits(model, ids)
        raise RuntimeError("on the way")
    with pytest.raises(IndexError), steering(model, edits):
        logits(model, torch.full_like(ids, 1000))  # no such token: the pass itself fails
    assert hooks_of(model) == hooks
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert torch.equal(logits(model, ids), plain)


def test_after_a_pass_that_failed_the_next_one_is_steered_by_its_own_tokens(model, ids, vector):
    with steering(model, [Add("resid_post.1", vector)]):
        with pytest.raises(IndexError):
            logits(model, torch.full((1, 3), 1000))
        found = logits(model, ids)
    with steering(model, [Add("resid_post.1", vector)]):
        assert torch.equal(found, logits(model, ids))


def test_vectors_are_taken_as_they_are_on_entering(model, ids, vector):
    kept = vector.clone()
    with steering(model, [Add("resid_post.1", kept)]):
        expected = logits(model, ids)
        kept.zero_()
        assert torch.equal(logits(model, ids), expected)


def test_a_model_without_head_and_the_one_around_it_are_steered_alike(model, ids, vector):
    with torch.no_grad():
        with steering(model, [Add("resid_post.1", vector)]):
            by_whole, inside = logits(model, ids), model.base_model(ids).last_hidden_state
        with steering(model.base_model, [Add("resid_post.1", vector)]):
            assert torch.equal(logits(model, ids), by_whole)
            assert torch.equal(model.base_model(ids).last_hidden_state, inside)


def test_autocast_does_not_round_what_is_projected(model, family, ids, vector):
    path = BY_HAND[family][0].format(1)
    seen = []
    with torch.autocast("cpu", dtype=torch.bfloat16), steering(model, [Ablate("resid_post.1", vector)]):
        handle = hook_on(model.base_model, path, lambda x: seen.append(x) or x)
        logits(model, ids)
        handle.remove()
    state = seen[0]
    rounding = 1e-5 if state.dtype == torch.float32 else 1e-2
    assert (state.float() @ vector).abs().max() <= rounding * (state.float().norm(dim=-1) * vector.norm()).max()


def test_a_head_that_calls_past_its_body_is_steered(ids, vector):
    config = transformers.OPTConfig(vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48)
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(config).train(False)  # it runs model.decoder itself
    handle = hook_on(model, "model.decoder.layers.1", lambda x: x + vector)
    expected = logits(model, ids)
    handle.remove()
    with steering(model, [Add("resid_post.1", vector)]):
        assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("family", ["mamba"])
def test_a_model_whose_cache_does_not_count_is_steered_everywhere_or_not_at_all(model, ids, vector):
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    with steering(model, [Add("resid_post.1", vector, 3.0)]):
        assert torch.equal(model.generate(ids, **arguments), model.generate(ids, **arguments, use_cache=False))
    with steering(model, [Add("resid_post.1", vector, positions=slice(2, None))]):
        with pytest.raises(InvalidInputError, match="does not tell"):
            model.generate(ids, **arguments)
        model.generate(ids, **arguments, use_cache=False)


@pytest.mark.parametrize("family", ["bert"])
def test_an_encoder_is_steered(ids, vector, family):
    model = tiny_model(family)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    path = "encoder.layer.1"
    plain = states(model, ids, [path], attention_mask=mask)[path]
    with steering(model, [Add("resid_post.1", vector, positions=slice(4, 8))]):
        found = states(model, ids, [path], attention_mask=mask)[path]
    marked = torch.zeros(2, P, dtype=torch.bool)
    marked[0, 4:8], marked[1, 4:6] = True, True
    assert torch.equal(found, torch.where(marked[..., None], plain + vector, plain))


V = torch.ones(32)
NAN, LARGE = V.index_fill(0, torch.tensor(3), torch.nan), V * 1e38


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Add("resid_post.0", V[None]), r"vector must be \[D\], got shape \[1, 32\]"),
        (lambda: Add("resid_post.0", V.long()), "must be a floating tensor"),
        (lambda: Add("resid_post.0", [1.0]), "must be a floating tensor.*got list"),
        (lambda: Add("resid_post.0", NAN), r"finite, and is nan at \[3\]"),
        (lambda: Add("resid_post.0", 0 * V), "row 0 is zero"),
        (lambda: Add("resid_post.0", V, float("inf")), "coefficient must be a finite number"),
        (lambda: Add("resid_post.0", V, V), "coefficient must be a finite number"),
        (lambda: Ablate("resid_post.0", torch.stack([V, 0 * V])), "row 1 is zero"),
        (lambda: Ablate("resid_post.0", torch.stack([V, 2 * V])), "linearly independent"),
        (lambda: Ablate("resid_post.0", torch.randn(33, 32)), "linearly independent"),
        (lambda: Ablate("resid_post.0", V[None, None]), r"\[D\] or \[k, D\]"),
        (lambda: Replace("resid_post.0", NAN), "finite"),
        (lambda: Add("resid_post.0", V, positions=slice(-1, None)), "count forwards"),
        (lambda: Add("resid_post.0", V, positions=slice(3, 3)), "hold one at least"),
        (lambda: Add("resid_post.0", V, positions=slice(0, 4, 2)), "count forwards"),
        (lambda: Add("resid_post.0", V, positions="last"), "positions must be 'all'"),
        (lambda: Add("resid_post.0", V, positions=torch.ones(2, 9)), "bool tensor"),
        (lambda: Generated(0), "prompt_length"),
    ],
)
def test_an_edit_that_cannot_be_made_is_refused_at_once(make, message):
    with pytest.raises(InvalidInputError, match=message):
        make()


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([], "needs a list of edits"),
        ([V], "needs a list of edits.*Tensor"),
        ([Add("resid_post.3", V)], "no layer 3"),
        ([Add("resid_pre.0", V)], "is not one of"),
        ([Add("module:nowhere", V)], "no module 'nowhere'"),
        ([Add("resid_post.0", V), Add("mlp_out.0", V[:8])], "8 wide, the states of GPT2Model are 32"),
        ([Add("resid_post.0", LARGE, 1e6)], "too large for torch.float32"),
    ],
)
def test_steering_that_does_not_fit_the_model_is_refused_on_entering(edits, message):
    model = causal("gpt2")
    hooks = hooks_of(model)
    with pytest.raises(InvalidInputError, match=message), steering(model, edits):
        raise AssertionError("entered")
    assert hooks_of(model) == hooks


def test_what_overflows_in_half_precision_is_refused():
    model = in_dtype(causal("gpt2"), torch.float16)
    with pytest.raises(InvalidInputError, match=r"too large for torch\.float16"), steering(model, [Add("resid_post.0", V, 1e5)]):
        pass


def test_encoder_decoders_and_other_things_are_refused():
    config = transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=11)
    for model, message in ((transformers.T5Model(config), "encoder-decoder"), (torch.nn.Linear(2, 2), "no Hugging Face model")):
        with pytest.raises(InvalidInputError, match=message), steering(model, [Add("module:shared", V)]):
            pass


@torch.no_grad()
def test_a_pass_of_which_the_tokens_are_not_known_is_refused(ids):
    model = causal("gpt2")
    everywhere = [Add("resid_post.0", V)]
    cases = [
        (everywhere, {"attention_mask": torch.ones(2, 1, P, P)}, "attention_mask must be"),
        (everywhere, {"attention_mask": torch.ones(2, P + 1, dtype=torch.long)}, "attention_mask must be"),
        ([Add("resid_post.0", V, positions=torch.ones(3, P, dtype=torch.bool))], {}, "mark 3 rows"),
        ([Add("resid_post.0", V, positions=torch.ones(2, P + 1, dtype=torch.bool))], {}, "ends after 9"),
        ([Add("resid_post.0", V, positions=Generated(P + 1))], {}, "ends after 9"),
    ]
    for edits, arguments, message in cases:
        with steering(model, edits), pytest.raises(InvalidInputError, match=message):
            model(ids, **arguments)
    padded = torch.ones_like(ids)
    padded[1, :2] = 0
    marks = torch.zeros(2, P, dtype=torch.bool)
    marks[1, 1] = True
    wrong = [Add("resid_post.0", V, positions=marks)]
    with steering(model, wrong), pytest.raises(InvalidInputError, match=r"column 1 of row 1.*padding"):
        model(ids, attention_mask=padded)
    with steering(model, everywhere), pytest.raises(InvalidInputError, match="attention_mask must be"):
        model.generate(ids, attention_mask=padded, max_new_tokens=2, cache_implementation="static")
    with steering(model, everywhere), pytest.raises(InvalidInputError, match="needs input_ids"):
        model.transformer()


@torch.no_grad()
def test_a_point_that_is_not_run_once_in_a_pass_is_refused(ids):
    model = causal("gpt2")
    block = model.transformer.h[0]
    with steering(model, [Add("resid_post.0", V)]):
        model(ids)
        with pytest.raises(InvalidInputError, match="by itself"):
            block(torch.randn(1, 3, 32))
    with steering(model, [Add("resid_post.1", V)]):
        model.transformer.h[1] = block  # not run any more
        with pytest.raises(InvalidInputError, match=r"did not reach resid_post\.1"):
            model(ids)
    with steering(model, [Add("resid_post.0", V)]), pytest.raises(InvalidInputError, match="reached twice"):
        model(ids)
    with steering(model, [Add("module:h.0.mlp", torch.ones(8))]), pytest.raises(InvalidInputError, match="expected floating"):
        model(ids)
    wide = pytest.raises(InvalidInputError, match="8 wide, the states of GPT2Model are 128")
    with wide, steering(model, [Add("module:h.0.mlp.c_fc", torch.ones(8))]):
        pass
