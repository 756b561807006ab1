"""A covariance taken in one pass is numpy's and scikit-learn's of all rows, whatever the blocks and however large the mean."""

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from sklearn.covariance import LedoitWolf, ledoit_wolf, shrunk_covariance
from sklearn.covariance import ledoit_wolf_shrinkage as sklearn_shrinkage

from exactivations.store import ActivationStore
from exactivations.store.covariance import CovarianceAccumulator, PowerSums, covariance_of
from exactivations.store.errors import InvalidInputError, NotFiniteError

from .stores import make_store

# Both sides sum at most some hundred products in float64, each rounded by 1e-16 of the norm.
CLOSE = 1e-12
# Ledoit and Wolf's coefficient is a quotient of differences. scikit-learn takes its denominator as ||C||^2 - trace^2 / d, which for
# an almost round covariance of n rows is only about 1 / n of the two: some digits are lost there, and those of 1e-12 above.
LEDOIT_WOLF_CLOSE = 1e-9
INDEX = [0, 2, 3, 7, 8, 11, 12, 20, 21, 22, 40]
LENGTHS = [1, 9, 2, 2, 30, 1, 5, 5, 4, 2, 17]


def rows_of(seed, n, width, offset=0.0, spread=1.0):
    """Correlated rows, of heavy tails, with means of `offset` times their deviation; the dimensions' scales differ by `spread`."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_t(6, (n, width)) @ rng.normal(size=(width, width)) / np.sqrt(width)
    return (mixed + offset * mixed.std(axis=0) * rng.choice([-1, 1], width)) * np.geomspace(1, spread, width)


def taken(rows, *cuts):
    """Takes rows in blocks that end at these cuts."""
    accumulator = CovarianceAccumulator(rows.shape[1])
    for block in np.split(rows, sorted(cuts)):
        accumulator.update(torch.from_numpy(block))
    return accumulator


def centred(rows):
    """The mean, and the deviations from it; what was rounded off a large mean is found in the deviations and taken off, too."""
    rounded = rows.mean(0)
    rest = (rows - rounded).mean(0)
    return rounded + rest, rows - rounded - rest


def off(found, expected):
    """The distance relative to the norm of what is expected."""
    expected = np.asarray(expected)
    return np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)


def refuses(message, error=InvalidInputError):
    return pytest.raises(error, match=message)


offsets = st.sampled_from([0.0, 1.0, 1e2, 1e4])


@settings(max_examples=150)
@given(data=st.data(), seed=st.integers(0, 2**31), n=st.integers(2, 200), width=st.integers(1, 12), offset=offsets)
def test_any_blocks_in_any_order_and_any_merges_give_the_covariance_of_all_rows(data, seed, n, width, offset):
    rows = rows_of(seed, n, width, offset, spread=data.draw(st.sampled_from([1.0, 1e3])))
    arranged = data.draw(st.sampled_from(["as drawn", "shuffled", "sorted"]))  # sorted: blocks whose means are far apart
    order = {"as drawn": np.arange(n), "shuffled": np.random.default_rng(seed).permutation(n), "sorted": rows[:, -1].argsort()}
    cuts = st.lists(st.integers(0, n), max_size=8)
    parts = [taken(part, *data.draw(cuts)) for part in np.split(rows[order[arranged]], sorted(data.draw(cuts)))]
    while len(parts) > 1:  # merged as a tree at random
        left = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        parts[data.draw(st.integers(0, len(parts) - 1))].merge(left)
    found = parts[0].result()
    assert found.count == n
    mean, deviations = centred(rows)
    assert (np.abs(found.mean.numpy() - mean) / (np.abs(mean) + deviations.std(0))).max() < CLOSE
    for ddof in (0, 1):
        assert off(found.matrix(ddof), np.cov(rows, rowvar=False, ddof=ddof).reshape(width, width)) < CLOSE
    whole = taken(rows).result()
    assert found.ledoit_wolf_shrinkage == pytest.approx(whole.ledoit_wolf_shrinkage, rel=LEDOIT_WOLF_CLOSE, abs=LEDOIT_WOLF_CLOSE)
    assert found.fourth == pytest.approx((np.square(deviations).sum(1) ** 2).sum(), rel=CLOSE)
    assert torch.equal(found.scatter, found.scatter.T)


@pytest.mark.parametrize("size", [1, 7, 400])
def test_a_large_mean_and_an_extreme_first_row_cost_no_digits(size):
    rows = rows_of(0, 400, 6, offset=1e4)
    rows[0] += 1e3  # such as the state of a first token
    found = taken(rows, *range(size, 400, size)).result()
    wide = rows.astype(np.longdouble)
    deviations = wide - wide.mean(0)
    assert off(found.scatter, (deviations.T @ deviations).astype(float)) < 1e-14
    naive = rows.T @ rows - 400 * np.outer(rows.mean(0), rows.mean(0))
    assert off(naive, np.asarray(found.scatter)) > CLOSE  # so that the bounds here do say something


def test_a_mean_that_float64_can_only_round_costs_no_digits_and_results_do_not_change_by_being_asked_for():
    small = rows_of(7, 301, 4)
    rows = np.round(small * 1024) / 1024 + 1e12  # exact, while the mean is off by up to 1e-4
    asked_between = taken(rows[:170], 100)
    asked_between.result()
    mean, deviations = centred(rows - 1e12)
    for accumulator in (taken(rows, 100, 170), asked_between.update(torch.from_numpy(rows[170:]))):
        found = accumulator.result()
        assert off(found.scatter, deviations.T @ deviations) < CLOSE
        assert found.fourth == pytest.approx((np.square(deviations).sum(1) ** 2).sum(), rel=CLOSE)
        np.testing.assert_array_equal(found.mean.numpy(), mean + 1e12)  # the nearest that float64 has


def test_sums_about_any_centre_can_be_moved_to_any_other():
    """In an accumulator centres are means, about which some of the terms are too small to be seen."""
    rows, delta = torch.from_numpy(rows_of(8, 40, 5, offset=2.0)), torch.from_numpy(rows_of(9, 1, 5)[0])
    sums = PowerSums.of(rows)
    for step in (delta, 3 * delta.flip(0)):
        sums.shift(step)
    y = rows - rows.mean(0) + delta + 3 * delta.flip(0)
    lengths = y.square().sum(1)
    expected = (y.sum(0), y.T @ y, (lengths[:, None] * y).sum(0), lengths.square().sum())
    for found, wanted in zip((sums.first, sums.second, sums.third, sums.fourth), expected, strict=True):
        assert off(found, wanted) < CLOSE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_dtype_is_widened_before_anything_is_computed(dtype):
    rows = torch.from_numpy(rows_of(1, 50, 4, offset=30.0)).to(dtype).requires_grad_()
    found = CovarianceAccumulator(4).update(rows).update(rows[:0]).result()
    assert off(found.matrix(), np.cov(rows.detach().double().numpy(), rowvar=False)) < CLOSE
    assert found.scatter.dtype == found.mean.dtype == torch.float64 and not found.scatter.requires_grad


def test_merging_leaves_the_other_one_as_it_is_and_a_result_is_not_touched_by_later_rows():
    rows = rows_of(2, 60, 3, offset=10.0)
    first, second = taken(rows[:20]), taken(rows[20:])
    before = second.result()
    assert off(first.merge(second).merge(CovarianceAccumulator(3)).result().matrix(), np.cov(rows, rowvar=False)) < CLOSE
    early = first.result()
    kept = early.mean.clone(), early.scatter.clone()
    first.update(torch.ones(5, 3)).merge(first)
    assert first.count == 130
    assert torch.equal(early.mean, kept[0]) and torch.equal(early.scatter, kept[1])
    after = second.result()
    assert torch.equal(before.scatter, after.scatter) and torch.equal(before.mean, after.mean) and before.fourth == after.fourth


@settings(max_examples=60)
@example(seed=0, n=40, width=8, offset=1e4, cut=3, spread=1.0)
@given(
    seed=st.integers(0, 2**31), n=st.integers(3, 120), width=st.integers(1, 10), offset=offsets, cut=st.integers(0, 120),
    spread=st.sampled_from([1.0, 30.0]),
)  # fmt: skip
def test_ledoit_and_wolfs_shrinkage_is_scikit_learns(seed, n, width, offset, cut, spread):
    rows = rows_of(seed, n, width, offset, spread)
    found = taken(rows, min(cut, n)).result()
    expected, coefficient = ledoit_wolf(rows)
    assert found.ledoit_wolf_shrinkage == pytest.approx(coefficient, rel=LEDOIT_WOLF_CLOSE, abs=LEDOIT_WOLF_CLOSE)
    assert coefficient == pytest.approx(sklearn_shrinkage(rows), abs=LEDOIT_WOLF_CLOSE)
    assert off(found.shrunk("ledoit-wolf"), expected) < LEDOIT_WOLF_CLOSE
    assert off(found.shrunk("ledoit-wolf"), LedoitWolf(assume_centered=False).fit(rows).covariance_) < LEDOIT_WOLF_CLOSE


@pytest.mark.parametrize("rows", [np.ones((4, 3)), np.eye(3)[[0, 0, 1, 1, 2, 2]] * 5, *(rows_of(seed, 2, 3) for seed in range(10))])
def test_no_rounding_takes_ledoit_and_wolfs_coefficient_out_of_its_range(rows):
    assert 0 <= taken(rows, 1).result().ledoit_wolf_shrinkage <= 1  # of two rows it is 0, give or take a rounding


@given(seed=st.integers(0, 2**31), width=st.integers(1, 8), share=st.floats(0, 1))
@settings(max_examples=40)
def test_shrunk_is_scikit_learns_of_the_covariance_divided_by_count(seed, width, share):
    rows = rows_of(seed, 30, width)
    found = taken(rows, 11).result()
    expected = shrunk_covariance(np.cov(rows, rowvar=False, ddof=0).reshape(width, width), shrinkage=share)
    assert off(found.shrunk(share), expected) < CLOSE
    assert torch.equal(found.shrunk(0), found.matrix(ddof=0))


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), width=st.integers(1, 8), offset=offsets, share=st.sampled_from([0, 0.3, 1.0, "ledoit-wolf"]))
def test_whitening_makes_the_covariance_that_was_asked_for_the_identity(seed, width, offset, share):
    rows = rows_of(seed, 100, width, offset)
    found = taken(rows, 30).result()
    condition = np.linalg.cond(found.shrunk(share).numpy())
    assume(condition < 1e6)
    factor = found.cholesky(share)
    assert torch.equal(factor, factor.tril()) and off(factor @ factor.T, found.shrunk(share)) < CLOSE
    white = found.whiten(torch.from_numpy(rows), share)
    # The factor's error of 1e-16 grows by the condition, and so does that of rows beside a large mean.
    tolerance = 1e-13 * condition * (1 + offset)
    assert np.abs(white.mean(0).numpy()).max() < tolerance
    inverse = np.linalg.inv(factor.numpy())
    expected = inverse @ np.cov(rows, rowvar=False, ddof=0).reshape(width, width) @ inverse.T
    np.testing.assert_allclose(np.cov(white, rowvar=False, ddof=0).reshape(width, width), expected, atol=tolerance)
    if share == 0:
        np.testing.assert_allclose(expected, np.eye(width), atol=tolerance)


def test_too_few_samples_are_refused_without_a_shrinkage_and_taken_with_one():
    few = taken(rows_of(3, 5, 5, offset=7.0)).result()
    with refuses(r"5 samples in 5 dimensions.*at most 4 dimensions; pass a \(larger\) shrinkage"):
        few.cholesky(0)
    for share in (0.1, "ledoit-wolf"):
        few.cholesky(share)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), width=st.integers(2, 10), offset=offsets, factor=st.floats(1e-6, 1e6), same=st.booleans())
def test_dimensions_that_add_nothing_are_refused_though_rounding_hides_them(seed, width, offset, factor, same):
    rows = rows_of(seed, 300, width, offset)
    rows[:, -1] = factor if same else rows[:, :-1].sum(1) * factor
    with refuses(f"300 samples in {width} dimensions.*dimension {width - 1} is constant or follows"):
        taken(rows, 100).result().cholesky(0)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), "oas"])
def test_a_shrinkage_that_is_none_is_refused(share):
    with refuses("shrinkage must be from 0 to 1, or 'ledoit-wolf'"):
        taken(rows_of(4, 9, 2)).result().shrunk(share)


@pytest.mark.parametrize("ddof", [-1, 9])
def test_a_divisor_that_is_none_is_refused(ddof):
    with refuses(f"ddof must be from 0 to 8.*got {ddof}"):
        taken(rows_of(4, 9, 2)).result().matrix(ddof)


@pytest.mark.parametrize(
    "rows",
    [torch.ones(2, 4), torch.ones(3), torch.ones(2, 3, 1), torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, device="meta")],
)
def test_rows_of_another_shape_or_kind_are_refused(rows):
    accumulator = CovarianceAccumulator(3).update(torch.eye(3))
    with refuses(r"rows must be floats \[n, 3\] on the host"):
        accumulator.update(rows)
    with refuses(r"rows must be floats \[n, 3\] on the host"):
        accumulator.result().whiten(rows, 0.5)
    assert accumulator.count == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_not_finite_is_refused_by_its_place_and_leaves_no_trace(bad, dtype):
    accumulator = taken(rows_of(5, 6, 3))
    before = accumulator.result()
    rows = torch.ones(4, 3, dtype=dtype)
    rows[2, 1] = bad
    with refuses(f"row 8, dimension 1 is {bad}", NotFiniteError):
        accumulator.update(rows)
    assert accumulator.count == 6 and torch.equal(accumulator.result().scatter, before.scatter)


def test_widths_and_counts_that_cannot_be_are_refused():
    with refuses("got width 0"):
        CovarianceAccumulator(0)
    with refuses("width 2 cannot be merged with rows of width 3"):
        CovarianceAccumulator(3).merge(CovarianceAccumulator(2))
    for count in (0, 1):
        with refuses(f"at least 2 rows, found {count}"):
            CovarianceAccumulator(3).update(torch.ones(count, 3)).result()


@pytest.fixture
def store(tmp_path):
    make_store(tmp_path / "run", INDEX, LENGTHS)
    return ActivationStore(tmp_path / "run")


@pytest.mark.parametrize("block_rows", [1, 3, 8192])
def test_a_stores_covariance_is_that_of_its_samples(store, block_rows):
    for hook_point, pooling in (("resid_post.1", "mean"), ("final_norm", "last")):
        rows = np.stack([sample.activations[f"{hook_point}/{pooling}"].double().numpy() for sample in store])
        found = covariance_of(store, hook_point, pooling, block_rows=block_rows)
        assert found.count == len(INDEX)
        np.testing.assert_allclose(found.mean.numpy(), rows.mean(0), rtol=CLOSE)
        assert off(found.matrix(), np.cov(rows, rowvar=False)) < CLOSE


@pytest.mark.parametrize("block_rows", [1, 7, 8192])
def test_of_tokens_only_those_that_are_marked_count(store, block_rows):
    marked = np.concatenate([s.activations["resid_post.1/tokens"][s.token_mask].double().numpy() for s in store])
    assert 0 < len(marked) < sum(LENGTHS)
    found = covariance_of(store, "resid_post.1", "tokens", block_rows=block_rows)
    assert found.count == len(marked)
    np.testing.assert_allclose(found.mean.numpy(), marked.mean(0), rtol=CLOSE)
    assert off(found.matrix(), np.cov(marked, rowvar=False)) < CLOSE


def test_shards_are_read_in_ascending_order_and_only_those_that_are_there(tmp_path):
    make_store(tmp_path / "run", INDEX, LENGTHS, leave_out=[1])
    store = ActivationStore(tmp_path / "run", allow_incomplete=True, allow_unverified=True)
    opened = []
    open_shard = store.folder.open_shard
    store.folder.open_shard = lambda shard, info: opened.append(shard) or open_shard(shard, info)
    assert covariance_of(store, "final_norm", "last").count == len(store) < len(INDEX)
    assert covariance_of(store, "resid_post.1", "mean").count == len(store)
    assert opened == [0, 2]  # and each of them once


def test_what_a_store_lacks_is_refused_in_the_stores_own_words(store):
    for hook_point, pooling in (("final_norm", "mean"), ("final_norm", "tokens"), ("resid_post.2", "last")):
        with pytest.raises(InvalidInputError) as expected:
            store.pooled(hook_point, pooling)
        with pytest.raises(InvalidInputError) as found:
            covariance_of(store, hook_point, pooling)
        assert str(found.value) == str(expected.value)
    with refuses("block_rows must be at least 1, got 0"):
        covariance_of(store, "final_norm", "last", block_rows=0)


def test_a_store_of_one_sample_is_refused_by_name(tmp_path):
    make_store(tmp_path / "run", [3], [4], n_shards=1)
    with refuses(r"run, final_norm/last in the order of the shards: a covariance needs at least 2 rows, found 1"):
        covariance_of(ActivationStore(tmp_path / "run"), "final_norm", "last")
