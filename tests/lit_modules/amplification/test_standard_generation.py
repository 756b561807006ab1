"""The baseline is Hugging Face's own generate: greedy it gives what alpha 0 gives, and its scores are those of the definition."""

import dataclasses

import pytest
import torch

from exactivations.lit_modules.amplification.amplifier import AmplifyOptions, LogitDiffAmplifier
from exactivations.lit_modules.amplification.standard_generation import StandardGeneration
from exactivations.store.batches import TokenBatch
from exactivations.store.errors import InvalidInputError
from tests.lit_modules.pairs import FAMILIES, pair

PROMPTS = torch.tensor([[7, 33, 8, 91, 14], [44, 12, 70, 9, 31], [60, 60, 23, 8, 77]])
BATCH = dataclasses.replace(TokenBatch.of(PROMPTS, token_mask="all"), sample_index=torch.tensor([4, 900, 17]))
OPTIONS = AmplifyOptions(alphas=(0.0,), rollouts=1, max_new_tokens=10, temperature=0.0, scores=True)


def ids_of(out):
    return [ids.tolist() for ids in out.token_ids.split(out.n_tokens.tolist())]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_greedy_it_is_alpha_0_with_the_same_scores(family, ignore_eos):
    models, options = pair(family), dataclasses.replace(OPTIONS, ignore_eos=ignore_eos)
    models["after"].generation_config.eos_token_id = list(range(3, 99, 4))
    amplified, standard = (kind(**models, options=options)(BATCH) for kind in (LogitDiffAmplifier, StandardGeneration))
    assert ids_of(standard) == ids_of(amplified) and standard.finished == amplified.finished
    assert ("eos" in standard.finished) != ignore_eos
    for name in ("sample_index", "alpha", "rollout", "n_tokens"):
        assert getattr(standard, name).equal(getattr(amplified, name))
    for name, values in vars(amplified.scores).items():
        torch.testing.assert_close(getattr(standard.scores, name), values, rtol=1e-7, atol=1e-9)
    assert models["after"].generation_config.eos_token_id == list(range(3, 99, 4))


def test_sampled_it_is_the_same_again_whatever_was_drawn_before_and_leaves_torchs_generator_alone():
    module = StandardGeneration(
        **pair("llama"), options=dataclasses.replace(OPTIONS, temperature=1.0, top_p=0.9, rollouts=4, max_rows=8)
    )
    torch.manual_seed(0)
    state, first = torch.get_rng_state(), module(BATCH)
    assert torch.get_rng_state().equal(state)
    torch.randn(3)
    assert ids_of(module(BATCH)) == ids_of(first) and len({tuple(ids) for ids in ids_of(first)}) > 8
    assert first.rollout.tolist() == [0, 1, 2, 3] * 3 and first.sample_index.tolist() == [4] * 4 + [900] * 4 + [17] * 4
    assert first.seed[:8].unique().numel() == 1 and first.seed[8:].unique().numel() == 1  # two prompts at a time, by max_rows
    other = StandardGeneration(**pair("llama"), options=dataclasses.replace(module.options, seed=1))(BATCH)
    assert ids_of(other) != ids_of(first)


def test_the_share_of_each_first_token_is_that_of_alpha_0():
    models, n = pair("gpt2"), 600
    options = dataclasses.replace(OPTIONS, temperature=1.0, top_p=0.9, rollouts=n, max_new_tokens=1, max_rows=4 * n, scores=False)
    counts = []
    for kind in (LogitDiffAmplifier, StandardGeneration):
        out = kind(**models, options=options)(TokenBatch.of(PROMPTS[:1], token_mask="all"))
        counts.append(out.token_ids.bincount(minlength=99).double())
    expected = models["after"](input_ids=PROMPTS[:1]).logits[0, -1].softmax(0)
    likely = expected > 0.02
    for found in counts:
        spread = (n * expected * (1 - expected)).sqrt()
        assert (found[expected < expected[found > 0].min()] == 0).all()
        kept = expected[found > 0].sum()
        assert ((found - n * expected / kept).abs() < 5 * spread / kept)[likely].all()


def test_other_alphas_are_refused():
    module = StandardGeneration(**pair("gpt2"), options=dataclasses.replace(OPTIONS, alphas=(0.0, 1.0)))
    with pytest.raises(InvalidInputError, match="plain generation is alpha 0"):
        module.check_fits(None)
