"""Moments of shards, merged in order, are those of the whole data (math.fsum, numpy), to the last bit where that is promised."""

import functools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exactivations.store.moments import ROWS_AT_ONCE, Moments
from exactivations.store.vectors import Vector, mean_over

KINDS = st.sampled_from(["normal", "constant", "integers", "one outlier"])


def merged(parts):
    """All parts together, in their order, as shards are folded."""
    return functools.reduce(Moments.merge, parts)


@st.composite
def shards(draw, max_rows=300):
    """Whole data [n, d], the bin of each row, the number of bins, and cuts into shards; bins and shards may be empty."""
    dice = np.random.default_rng(draw(st.integers(0, 2**32), label="seed"))
    n, width, n_bins = draw(st.integers(0, max_rows)), draw(st.integers(1, 20)), draw(st.integers(1, 6))
    deviation = 10.0 ** dice.uniform(-6, 6, width)
    offset = deviation * dice.choice([-1, 1], width) * draw(st.sampled_from([0.0, 1.0, 30.0, 1e4]))
    noise = {
        "normal": lambda: dice.normal(size=(n, width)),
        "constant": lambda: np.zeros((n, width)),
        "integers": lambda: dice.integers(-3, 4, (n, width)).astype(float),
        "one outlier": lambda: np.where(np.arange(n)[:, None] == n // 2, 1e3, dice.normal(size=(n, width))),
    }[draw(KINDS)]()
    bins = dice.integers(0, draw(st.integers(1, n_bins)), n)
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=8)))
    return offset + deviation * noise, bins, n_bins, list(zip([0, *cuts], [*cuts, n], strict=True))


def parts_of(data):
    rows, bins, n_bins, cuts = data
    return [Moments.of(rows[start:end], bins[start:end], n_bins) for start, end in cuts]


def bits(moments):
    squares = None if moments.squares is None else moments.squares.tobytes()
    return moments.count.tobytes(), moments.total.tobytes(), squares, moments.total.shape


def allowed_variance_error(values):
    """1e-12 of the variance v where the mean m is at most ten deviations; beyond, a variance is that much worse conditioned.

    kappa = sqrt(1 + m^2 / v) is what a relative change of the data does to the variance at most (Chan, Golub and LeVeque 1983);
    summing n rows one after the other may lose n eps kappa, and (n eps kappa)^2 through the mean: 1e-13 is n eps for n = 450.
    """
    variance, size = values.var(ddof=1), np.abs(values).max()
    return 1e-12 * variance + 1e-13 * size * math.sqrt(variance) + (1e-13 * size) ** 2


@settings(max_examples=150, deadline=None)
@given(data=shards())
def test_however_rows_are_cut_into_shards_the_moments_are_those_of_the_whole_data(data):
    rows, bins, n_bins, _ = data
    found = merged(parts_of(data))
    for number in range(n_bins):
        inside = rows[bins == number]
        n = len(inside)
        assert found.count[number] == n
        for column in range(rows.shape[1]):
            values = inside[:, column]
            total, scale = math.fsum(values), math.fsum(np.abs(values))
            assert abs(found.total[number, column] - total) <= 1e-12 * scale
            if not n:
                assert math.isnan(found.mean[number, column])
            else:
                assert abs(found.mean[number, column] - total / n) <= 1e-12 * scale / n
            if n < 2:
                assert math.isnan(found.variance[number, column])
            else:
                assert abs(found.variance[number, column] - values.var(ddof=1)) <= allowed_variance_error(values)
                assert found.variance[number, column] >= 0


@settings(max_examples=60, deadline=None)
@given(data=shards(max_rows=60), at=st.integers(0, 8))
def test_merging_is_a_left_fold_so_that_two_steps_give_the_bits_of_one(data, at):
    parts = parts_of(data)
    by_hand = parts[0]
    for part in parts[1:]:
        by_hand = by_hand.merge(part)
    assert bits(merged(parts)) == bits(by_hand)
    first = parts[: 1 + at % len(parts)]
    assert bits(merged(iter([merged(first), *parts[len(first) :]]))) == bits(by_hand)


@settings(max_examples=60, deadline=None)
@given(data=shards(max_rows=60))
def test_merging_changes_neither_part_and_the_counts_and_totals_commute(data):
    parts = parts_of(data)
    before = [bits(part) for part in parts]
    ours = parts[0].merge(parts[-1])
    other = parts[-1].merge(parts[0])
    assert [bits(part) for part in parts] == before
    assert bits(ours)[:2] == bits(other)[:2]


@settings(max_examples=60, deadline=None)
@given(data=shards(max_rows=60))
def test_a_shard_without_rows_changes_no_bit_on_either_side(data):
    rows, _, n_bins, _ = data
    found = merged(parts_of(data))
    nothing = Moments.of(np.zeros((0, rows.shape[1])), np.zeros(0, dtype=np.int64), n_bins)
    assert not nothing.count.any() and not nothing.total.any() and not nothing.squares.any()
    assert bits(found.merge(nothing)) == bits(nothing.merge(found)) == bits(found)


@settings(max_examples=60, deadline=None)
@given(data=shards(max_rows=60), seed=st.integers(0, 2**32), more=st.integers(0, 4))
def test_moments_put_into_other_bins_keep_their_bits_and_leave_the_rest_empty(data, seed, more):
    found = merged(parts_of(data))
    n = len(found.count)
    where = np.random.default_rng(seed).permutation(n + more)[:n]
    moved = found.in_bins(where, n + more)
    assert bits(Moments(moved.count[where], moved.total[where], moved.squares[where])) == bits(found)
    rest = np.setdiff1d(np.arange(n + more), where)
    assert not moved.count[rest].any() and not moved.total[rest].any() and not moved.squares[rest].any()
    assert np.isnan(moved.mean[rest]).all() and np.isnan(moved.variance[rest]).all()


@settings(max_examples=40, deadline=None)
@given(data=shards(max_rows=60), seed=st.integers(0, 2**32))
def test_merging_in_more_bins_gives_the_bits_of_merging_and_then_moving(data, seed):
    parts = parts_of(data)
    n = data[2]
    where = np.random.default_rng(seed).permutation(n + 2)[:n]
    assert bits(merged(part.in_bins(where, n + 2) for part in parts)) == bits(merged(parts).in_bins(where, n + 2))


@settings(max_examples=60, deadline=None)
@given(data=shards(max_rows=60))
def test_a_bin_has_the_bits_of_its_rows_alone(data):
    rows, bins, n_bins, _ = data
    found = Moments.of(rows, bins, n_bins)
    for number in range(n_bins):
        alone = Moments.of(rows[bins == number])
        assert bits(alone) == bits(Moments(found.count[number:][:1], found.total[number:][:1], found.squares[number:][:1]))


def in_order(rows):
    """Python adds one row after the other."""
    totals = [0.0] * rows.shape[1]
    for row in rows.tolist():
        totals = [total + value for total, value in zip(totals, row, strict=True)]
    return totals


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 300, ROWS_AT_ONCE - 1, ROWS_AT_ONCE, ROWS_AT_ONCE + 1, 2 * ROWS_AT_ONCE + 100])
@pytest.mark.parametrize("width", [1, 2, 3, 20])
def test_rows_are_added_one_after_the_other_to_the_last_bit(n, width):
    rows = np.random.default_rng(n).normal(size=(n, width)) * 1e3 + 7
    found = Moments.of(rows)
    assert found.total[0].tolist() == in_order(rows)
    assert found.squares[0].tolist() == in_order((rows - np.array(in_order(rows)) / n) ** 2)


@pytest.mark.parametrize("layout", ["columns together", "every other row", "every other column", "backwards", "not writable"])
def test_how_the_rows_lie_in_memory_changes_no_bit(layout):
    rows = np.random.default_rng(0).normal(size=(500, 6)) * 1e3 + 7
    other = {
        "columns together": np.asfortranarray(rows),
        "every other row": np.repeat(rows, 2, axis=0)[::2],
        "every other column": np.repeat(rows, 2, axis=1)[:, ::2],
        "backwards": rows[::-1, ::-1].copy()[::-1, ::-1],
        "not writable": rows.copy(),
    }[layout]
    other.flags.writeable = layout != "not writable"
    assert np.array_equal(rows, other)
    assert bits(Moments.of(other)) == bits(Moments.of(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_layers", [1, 2])
def test_rows_of_narrow_tensors_lose_nothing(dtype, n_layers):
    """Their sum is exact in float64 here, and in no narrower dtype: large and small values by turns."""
    large = {torch.float32: 2.0**30 + 128, torch.bfloat16: 2.0**30 + 2.0**23, torch.float16: 2.0**15 + 32}[dtype]
    values = torch.tensor([[large, 1.5], [1.0, -large], [0.25, large], [-large, 2.0**-10]] * 40, dtype=dtype)
    assert values[0, 0].item() == large
    rows = Vector(("a", "b")[:n_layers], "mean").rows({"a/mean": values, "b/mean": values})
    assert rows.dtype == np.float64 and rows.tolist() == values.tolist()
    exact = [sum((Fraction(value) for value in column), Fraction(0)) for column in zip(*values.tolist(), strict=True)]
    found = Moments.of(rows)
    assert [Fraction(total) for total in found.total[0].tolist()] == exact
    assert [Fraction(mean) for mean in found.mean[0].tolist()] == [Fraction(float(total / 160)) for total in exact]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32), n_layers=st.integers(1, 5), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
)
def test_layers_are_averaged_in_float64_in_their_order(seed, n_layers, dtype):
    layers = [torch.from_numpy(np.random.default_rng((seed, i)).normal(size=(4, 3)) * 1e3).to(dtype) for i in range(n_layers)]
    expected = layers[0].double().numpy()
    for layer in layers[1:]:
        expected = expected + layer.double().numpy()
    assert np.array_equal(mean_over(layers), expected / n_layers)


def test_means_only_stay_means_only_when_merged_or_moved():
    full = Moments.of(np.arange(6.0).reshape(3, 2))
    means = Moments(full.count, full.total, None)
    for merged in (full.merge(means), means.merge(full), means.merge(means)):
        assert merged.squares is None and merged.count.tolist() == [6] and merged.mean.tolist() == [[2.0, 3.0]]
        assert merged.in_bins(np.array([1]), 2).squares is None
        with pytest.raises(AssertionError, match="only means"):
            _ = merged.variance


def test_moments_of_other_widths_or_other_numbers_of_bins_are_not_merged():
    here = Moments.of(np.ones((3, 2)))
    for other in (Moments.of(np.ones((3, 1))), Moments.of(np.ones((3, 2)), np.zeros(3, dtype=np.int64), 2)):
        with pytest.raises(AssertionError, match="merged into"):
            here.merge(other)
