"""Intervals hold the rate and tests are wrong as seldom as they say, also where rollouts of one prompt resemble each other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, bootstrap, fisher_exact, permutation_test

from exactivations.lit_modules.amplification.prompt_rates import MIN_PROMPTS, compared, interval_of

N, ROLLOUTS = 60, 5


def clustered(generator, rate, n=N, correlation=0.5):
    """Of each prompt a probability of its own, and rollouts drawn with it, bool [n, ROLLOUTS]."""
    spread = 1 / correlation - 1
    own = generator.beta(rate * spread, (1 - rate) * spread, size=n)
    return own, generator.random((n, ROLLOUTS)) < own[:, None]


def by_prompt(drawn):
    return {prompt: dict(enumerate(row.tolist())) for prompt, row in enumerate(drawn)}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.data())
def test_with_one_rollout_of_each_prompt_the_interval_is_wilsons(n, data):
    k = data.draw(st.integers(0, n))
    expected = binomtest(k, n).proportion_ci(0.95, method="wilson")
    low, high, how = interval_of([1] * k + [0] * (n - k), [1] * n)
    assert how == "wilson" and low <= k / n <= high
    assert (low, high) == (pytest.approx(expected.low, abs=1e-12), pytest.approx(expected.high, abs=1e-12))


def test_with_several_it_is_the_bootstrap_over_prompts_and_where_few_show_it_that_of_as_many_completions_as_prompts():
    shown = np.random.default_rng(0).binomial(ROLLOUTS, 0.3, N)
    low, high, how = interval_of(shown.tolist(), [ROLLOUTS] * N)
    expected = bootstrap((shown / ROLLOUTS,), np.mean, method="BCa", random_state=np.random.default_rng(1)).confidence_interval
    assert how == "bootstrap over prompts" and (low, high) == pytest.approx((expected.low, expected.high), abs=0.01)
    assert interval_of(shown.tolist(), [ROLLOUTS] * N) == (low, high, how)
    for few, rate in (([ROLLOUTS] * 6 + [0] * (N - 6), 6), ([0] * N, 0), ([ROLLOUTS] * N, N)):
        assert sum(map(bool, few)) < MIN_PROMPTS or rate == N
        wilson = binomtest(rate, N).proportion_ci(0.95, method="wilson")
        low, high, how = interval_of(few, [ROLLOUTS] * N)
        assert how == "wilson over prompts" and (low, high) == pytest.approx((wilson.low, wilson.high))
    assert interval_of([2] * N, [4] * N)[2] == "wilson over prompts"  # all alike: no spread for resamples to show


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
def test_intervals_of_clustered_rollouts_hold_the_rate_and_those_over_completions_do_not(rate):
    generator, trials, held, over_completions = np.random.default_rng(3), 150, 0, 0
    for _ in range(trials):
        counts = clustered(generator, rate)[1].sum(axis=1)
        low, high, _ = interval_of(counts.tolist(), [ROLLOUTS] * N)
        held += low <= rate <= high
        wilson = binomtest(int(counts.sum()), N * ROLLOUTS).proportion_ci(0.95, method="wilson")
        over_completions += wilson.low <= rate <= wilson.high
    assert held >= 0.9 * trials and over_completions < 0.88 * trials


def test_prompts_are_compared_by_the_exact_sign_test():
    before, after = ({p: dict(enumerate(row)) for p, row in enumerate(rows)} for rows in (
        [[0, 0], [0, 1], [1, 1], [0, 0], [0, 1], [1, 0], [0, 0]],
        [[1, 1], [1, 1], [1, 1], [0, 1], [1, 0], [0, 0], [1, 0]],
    ))  # fmt: skip
    found = compared(after, before)
    assert (found.prompts_up, found.prompts_down) == (4, 1)
    signs = np.array([1, 1, 1, 1, -1])
    exact = permutation_test((signs, np.zeros(5)), lambda a, b: (a - b).sum(), permutation_type="samples", n_resamples=np.inf)
    assert found.p_value == pytest.approx(exact.pvalue) and compared(before, after).p_value == found.p_value
    assert compared(before, before).p_value == 1.0 and compared({}, before).p_value == 1.0


def test_rollouts_that_failed_on_one_side_are_compared_on_neither():
    whole = {prompt: {0: False, 1: True} for prompt in range(9)}
    half = {prompt: {0: False} for prompt in range(8)}
    assert compared(whole, half) == compared(half, whole) == compared(half, half)


def test_where_nothing_differs_the_test_finds_it_as_seldom_as_it_says_and_fishers_over_completions_far_oftener():
    """Both conditions draw from one distribution of prompts' rates, as two alphas would that do nothing to the model's mean rate.

    Each prompt's own probability is drawn anew in both, which is the least that rollouts of a prompt in one condition can share.
    """
    generator, trials, signs, fisher, shared = np.random.default_rng(5), 400, 0, 0, 0
    for _ in range(trials):
        drawn = [clustered(generator, 0.2)[1] for _ in range(2)]
        signs += compared(*map(by_prompt, drawn)).p_value < 0.05
        counts = [int(rows.sum()) for rows in drawn]
        fisher += fisher_exact([[k, N * ROLLOUTS - k] for k in counts]).pvalue < 0.05
        own, rows = clustered(generator, 0.2)
        other = generator.random(rows.shape) < own[:, None]  # the same prompts at both alphas
        shared += compared(by_prompt(rows), by_prompt(other)).p_value < 0.05
    assert signs <= 0.06 * trials and shared <= 0.06 * trials and fisher > 0.15 * trials
