"""What is raised is found, counted as by brute force, and what is not raised is not reported."""

import random

import pytest
import torch
from scipy.stats import binomtest

from exactivations.lit_modules.amplification.raised_phrases import raised_phrases
from exactivations.store.completions import Completion
from exactivations.store.errors import InvalidInputError

PLANTED = [90, 91, 92, 93]


def completions(share, *, seed=0, n_prompts=40, rollouts=3, alpha=2.0, favourite=True):
    """Random texts, each prompt with a favourite token; a share of those at alpha holds the planted phrase."""
    dice, out = random.Random(seed), []
    for sample in range(n_prompts):
        for value in (0.0, alpha):
            for rollout in range(rollouts):
                ids = [sample % 7 if favourite and dice.random() < 0.5 else dice.randrange(30) for _ in range(20)]
                if value == alpha and dice.random() < share:
                    place = dice.randrange(16)
                    ids[place : place + 4] = PLANTED
                tokens = torch.tensor([*ids, 90, 91], dtype=torch.int32)  # the last two come behind the end of the text
                empty = torch.tensor([], dtype=torch.int32)
                out.append(Completion(sample, value, rollout, 0, empty, tokens, "length", {}, 20, None, None))
    return out


def test_a_planted_phrase_is_found_whole_and_its_figures_are_those_of_brute_force():
    texts = completions(0.4)
    search = raised_phrases(texts, 2.0, 0.0, longest=6)
    assert [list(phrase.token_ids) for phrase in search.found] == [PLANTED]
    found, held = search.found[0], {}
    for c in texts:
        said = c.token_ids[:20].tolist()
        key = c.sample_index, c.alpha
        held[key] = held.get(key, 0) + any(said[i : i + 4] == PLANTED for i in range(17))
    up = sum(held[i, 2.0] > held[i, 0.0] for i in range(40))
    down = sum(held[i, 2.0] < held[i, 0.0] for i in range(40))
    assert (found.prompts_up, found.prompts_down) == (up, down)
    assert (found.raised, found.reference) == (sum(held[i, 2.0] for i in range(40)), 0)
    assert found.p_value == pytest.approx(binomtest(up, up + down, alternative="greater").pvalue)
    assert found.p_value < found.q_value < 0.05 and 2 < found.log_odds_low < found.log_odds


def test_every_phrase_in_enough_prompts_is_tested():
    texts = completions(0.0, n_prompts=12, rollouts=2)
    prompts = {}
    for c in texts:
        said = c.token_ids[:20].tolist()
        for n in (1, 2, 3):
            for i in range(21 - n):
                prompts.setdefault(tuple(said[i : i + n]), set()).add(c.sample_index)
    assert raised_phrases(texts, 2.0, 0.0, longest=3, least_prompts=4).n_tested == sum(len(p) >= 4 for p in prompts.values())


def test_where_nothing_is_raised_nothing_is_reported():
    reported = [len(raised_phrases(completions(0.0, seed=seed, n_prompts=30), 2.0, 0.0, longest=4).found) for seed in range(12)]
    assert sum(reported) == 0  # at a false discovery rate of 5% at most, and Benjamini and Yekutieli are strict


def test_what_cannot_be_compared_is_refused():
    texts = completions(0.1)
    for wrong, alpha, reference in ((texts, 1.0, 0.0), (texts, 2.0, 2.0), (texts[:-1], 2.0, 0.0)):
        with pytest.raises(InvalidInputError, match="expected equally many of each prompt"):
            raised_phrases(wrong, alpha, reference)
