"""Draws are those of the distribution that temperature and top-p define, and depend on seed, step and token alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from exactivations.lit_modules.amplification.row_sampling import RowSampling, combined, gumbel_noise, mix64, row_seed
from exactivations.store.errors import InvalidInputError

MASK = (1 << 64) - 1
LOGITS = st.lists(st.sampled_from([-math.inf, -3.0, -1.0, 0.0, 0.5, 0.5, 2.0]), min_size=1, max_size=12).filter(
    lambda row: max(row) > -math.inf
)


def splitmix(state):
    """The published generator's output for a state, in Python's integers."""
    z = state & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def signed(value):
    return value - (1 << 64) if value >= 1 << 63 else value


def sampling(temperature, top_p, seeds):
    return RowSampling.alike(temperature, top_p, torch.tensor(seeds, dtype=torch.int64))


def sample(logits, temperature, top_p, seeds, step=0):
    rows = sampling(temperature, top_p, seeds)
    return rows.draw(rows.distribution(logits.expand(len(seeds), -1)), step)


def test_the_hash_is_splitmix64_by_its_published_numbers():
    golden = 0x9E3779B97F4A7C15
    states = [(1234567 + k * golden) & MASK for k in range(1, 6)]
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert mix64(torch.tensor([signed(s) for s in states])).tolist() == [signed(value) for value in published]


@given(seed=st.integers(0, 2**63 - 1), step=st.integers(0, 10**6), token=st.integers(0, 99))
@example(seed=2**63 - 1, step=0, token=0)
def test_noise_is_that_of_seed_step_and_token_alone(seed, step, token):
    golden = 0x9E3779B97F4A7C15
    stream = splitmix(splitmix(seed + golden) ^ step)
    uniform = ((splitmix(stream + (token + 1) * golden) >> 12) + 0.5) / 2**52
    short, long = gumbel_noise(torch.tensor([seed]), step, token + 1), gumbel_noise(torch.tensor([5, seed, 6]), step, 1000)
    assert long[1, token].item() == short[0, token].item()
    assert long[1, token].item() == pytest.approx(-math.log(-math.log(uniform)), rel=1e-12, abs=1e-12)


def test_noise_is_gumbel_and_independent_across_seeds_steps_and_tokens():
    seeds = torch.arange(500)  # as people choose them: small and in a row
    noise = torch.stack([gumbel_noise(seeds, step, 40) for step in range(20)]).numpy()
    assert stats.kstest(noise.ravel(), "gumbel_r").pvalue > 0.01
    uniform = np.exp(-np.exp(-noise))
    for axis in range(3):
        first, second = (np.delete(uniform, end, axis).ravel() for end in (-1, 0))
        counts = np.histogram2d(first, second, bins=16, range=[[0, 1]] * 2)[0]
        assert stats.chisquare(counts.ravel()).pvalue > 0.01
    assert len(np.unique(noise)) == noise.size


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("by", ["seed", "step"])
def test_frequencies_are_those_of_the_softmax(temperature, by):
    logits = torch.tensor([2.0, -1.0, 0.3, 0.3, -math.inf, 1.1], dtype=torch.float64)
    n = 40_000
    if by == "seed":
        drawn = sample(logits, temperature, 1.0, list(range(n)))
    else:
        drawn = torch.stack([sample(logits, temperature, 1.0, list(range(20)), step) for step in range(n // 20)])
    counts = np.bincount(drawn.flatten().numpy(), minlength=6)
    expected = (logits / temperature).softmax(0).numpy() * n
    assert counts[4] == 0
    assert stats.chisquare(np.delete(counts, 4), np.delete(expected, 4)).pvalue > 0.01


def nucleus(logits, temperature, top_p):
    """The standard definition, a token at a time: most probable first, of equal ones the smaller id, until p is reached."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    weights = [math.exp((logits[i] - max(logits)) / temperature) for i in order]
    kept, mass = set(), 0.0
    for i, weight in zip(order, weights, strict=True):
        if mass >= top_p - 1e-12:
            break
        kept.add(i)
        mass += weight / sum(weights)
    return kept


@given(row=LOGITS, top_p=st.sampled_from([0.01, 0.3, 0.5, 0.77, 0.9, 1.0]), temperature=st.sampled_from([0.5, 1.0, 2.0]))
def test_top_p_keeps_the_smallest_set_that_reaches_it(row, top_p, temperature):
    logits = torch.tensor([row], dtype=torch.float64)
    found = sampling(temperature, top_p - 1e-9 if top_p < 1 else 1.0, [0]).distribution(logits)[0]
    kept = {i for i in range(len(row)) if found[i] > -math.inf}
    assert kept == {i for i in nucleus(row, temperature, top_p) if row[i] > -math.inf}
    assert all(found[i].item() == row[i] / temperature for i in kept)


def test_the_token_that_crosses_top_p_is_kept_and_equal_ones_go_by_id():
    logits = torch.log(torch.tensor([[0.25, 0.5, 0.125, 0.125]], dtype=torch.float64))
    assert (sampling(1.0, 0.6, [0]).distribution(logits) > -math.inf).tolist() == [[True, True, False, False]]
    assert (sampling(1.0, 0.8, [0]).distribution(logits) > -math.inf).tolist() == [[True, True, True, False]]
    assert sample(torch.tensor([1.0, 4.0, 4.0], dtype=torch.float64), 0.0, 1.0, [3]).tolist() == [1]


@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0.0, 0.7, 1.0, 2.0]), st.sampled_from([0.2, 0.9, 1.0]), st.integers(0, 2**63 - 1)),
        min_size=1,
        max_size=7,
    ),
    seed=st.integers(0, 1000),
)
@settings(max_examples=50)
def test_a_row_is_the_same_alone_in_a_batch_and_in_another_order(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), 30, generator=generator, dtype=torch.float64) * 3
    temperature, top_p, seeds = (torch.tensor(values) for values in zip(*rows, strict=True))
    together = RowSampling(temperature.double(), top_p.double(), seeds)
    drawn = together.draw(together.distribution(logits), 7)
    order = torch.randperm(len(rows), generator=generator)
    turned = together.select(order)
    assert turned.draw(turned.distribution(logits[order]), 7).tolist() == drawn[order].tolist()
    padded = torch.cat([logits, torch.full((len(rows), 11), -math.inf, dtype=torch.float64)], dim=1)
    assert together.draw(together.distribution(padded), 7).tolist() == drawn.tolist()
    for i in range(len(rows)):
        alone = together.select(torch.tensor([i]))
        assert alone.draw(alone.distribution(logits[i : i + 1]), 7).item() == drawn[i]


def test_row_seeds_differ_for_any_different_sample_alpha_and_rollout_and_do_not_depend_on_the_batch():
    index = torch.cartesian_prod(torch.arange(200), torch.arange(5), torch.arange(8))
    alphas = torch.tensor([0.0, -1.0, 0.5, 2.0, 2.0 + 2**-51], dtype=torch.float64)
    parts = [index[:, 0], alphas[index[:, 1]], index[:, 2]]
    seeds = torch.cat([row_seed(run, *parts) for run in (0, 1, 2)])
    assert len(seeds.unique()) == 3 * len(index) and seeds.min() >= 0
    assert row_seed(1, *(part[77:78] for part in parts)).item() == seeds[len(index) + 77]
    assert row_seed(1, parts[0], torch.where(parts[1] == 0, -0.0, parts[1]), parts[2]).equal(seeds[len(index) : 2 * len(index)])
    state, part = torch.tensor([7, 9]), torch.tensor([3, 3])
    assert combined(state, part).tolist() == [combined(state[i : i + 1], 3).item() for i in range(2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0, 1.0, [0]), "temperature must be 0"),
        ((math.nan, 1.0, [0]), "temperature must be 0"),
        ((math.inf, 1.0, [0]), "temperature must be 0"),
        ((1e-9, 1.0, [0]), "temperature must be 0"),
        ((1.0, 0.0, [0]), "top_p must be"),
        ((1.0, 1.1, [0]), "top_p must be"),
        ((1.0, math.nan, [0]), "top_p must be"),
        ((1.0, 1.0, [0, -1]), "seed must not be negative, got -1 in row 1 of 2"),
    ],
)
def test_what_is_out_of_range_is_refused(arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        sampling(*arguments)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (1.0, 0.5)])
def test_logits_that_overflowed_are_refused(bad, temperature, top_p):
    rows = sampling(temperature, top_p, [0, 1])
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, bad, 1.0]], dtype=torch.float64)
    with pytest.raises(InvalidInputError, match="row 1 of 2 has no token to draw at step 4"):
        rows.draw(rows.distribution(logits), 4)
    with pytest.raises(InvalidInputError, match="row 0 of 2"):
        rows.draw(rows.distribution(torch.full((2, 3), -math.inf, dtype=torch.float64)), 0)
