"""Cosines of all pairs are scikit-learn's, whatever the scale of the rows; what has none is refused by its number."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity

from exactivations.store.errors import InvalidInputError
from exactivations.store.similarity import mean_off_diagonal, pairwise_cosine

CLOSE = 1e-13  # sums of some dozen products, each rounded by 1e-16 of the norms


def rows_of(seed, n, width, offset=0.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(offset, 1, (n, width)))


@given(st.integers(0, 99), st.integers(2, 12), st.integers(1, 40), st.sampled_from([0.0, 1.0, 1e6]))
@settings(max_examples=60, deadline=None)
def test_cosines_are_those_of_scikit_learn(seed, n, width, offset):
    rows = rows_of(seed, n, width, offset)
    cosines = pairwise_cosine(rows)
    assert cosines.dtype == torch.float64 and cosines.shape == (n, n)
    assert np.abs(cosines.numpy() - cosine_similarity(rows.numpy())).max() < CLOSE
    assert torch.equal(cosines, cosines.T) and torch.equal(cosines.diagonal(), torch.ones(n, dtype=torch.float64))
    assert cosines.abs().max() <= 1


def test_by_hand():
    rows = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, -3.0]])
    half = 0.5**0.5
    expected = torch.tensor([[1, half, 0], [half, 1, -half], [0, -half, 1]], dtype=torch.float64)
    assert torch.allclose(pairwise_cosine(rows), expected, atol=1e-15, rtol=0)
    assert mean_off_diagonal(pairwise_cosine(rows)) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
def test_neither_large_nor_small_rows_lose_their_direction(scale):
    rows = rows_of(0, 5, 8)
    assert torch.allclose(pairwise_cosine(rows * scale), pairwise_cosine(rows), atol=CLOSE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_dtype_is_widened_first(dtype):
    rows = rows_of(1, 6, 33).to(dtype)
    assert torch.equal(pairwise_cosine(rows), pairwise_cosine(rows.double()))


def test_rows_are_left_alone():
    rows = rows_of(2, 4, 5)
    before = rows.clone()
    pairwise_cosine(rows)
    assert torch.equal(rows, before)


def test_rows_without_a_cosine_are_refused_by_number():
    rows = rows_of(3, 4, 5)
    rows[2] = 0
    with pytest.raises(InvalidInputError, match="row 2 of 4 is zero"):
        pairwise_cosine(rows)
    for value in (float("nan"), float("inf")):
        rows[1, 3] = value
        with pytest.raises(InvalidInputError, match="row 1 of 4 is not finite"):
            pairwise_cosine(rows)


@pytest.mark.parametrize("shape", [(1, 4), (0, 4), (4,), (2, 2, 2)])
def test_less_than_a_pair_is_refused(shape):
    with pytest.raises(InvalidInputError, match="n at least 2"):
        pairwise_cosine(torch.ones(shape))


def test_the_mean_leaves_the_diagonal_out():
    cosines = torch.tensor([[9.0, 0.5, -0.25], [0.5, 9.0, 0.5], [-0.25, 0.5, 9.0]])
    assert mean_off_diagonal(cosines) == 0.25
    for shape in [(1, 1), (2, 3), (4,), ()]:
        with pytest.raises(InvalidInputError, match="n at least 2"):
            mean_off_diagonal(torch.ones(shape))


def test_centring_takes_a_shared_direction_out():
    rows = rows_of(4, 50, 64, offset=5.0)
    assert mean_off_diagonal(pairwise_cosine(rows)) > 0.9
    # Centred rows sum to zero, so that of n rows of one length the mean would be -1 / (n - 1).
    assert mean_off_diagonal(pairwise_cosine(rows - rows.mean(0))) == pytest.approx(-1 / 49, abs=2e-3)
