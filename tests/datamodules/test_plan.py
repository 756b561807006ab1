"""The plan against plain Python, with hostile lengths."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from exactivations.datamodules.plan import Plan, PlanOptions, plan
from exactivations.store.errors import InvalidInputError

HOSTILE = {
    "one sample": [7],
    "one sample over every budget": [100_000],
    "all equal": [64] * 1000,
    "all different": list(range(1, 600)),
    "one giant": [5] * 300 + [50_000] + [5] * 300,
    "bimodal": [3, 900] * 200,
    "all of one token": [1] * 5000,
    "all over the budget": [3000 + i for i in range(40)],
    "ascending runs": [length for length in range(1, 40) for _ in range(length)],
}
SMALL_SHARDS = PlanOptions(token_budget=256, shard_tokens=1024)

lengths_strategy = st.one_of(
    st.lists(st.integers(1, 60), min_size=1, max_size=300),  # many ties
    st.lists(st.integers(1, 5000), min_size=1, max_size=100),  # few ties, many over the budget
    st.builds(lambda length, n: [length] * n, st.integers(1, 400), st.integers(1, 300)),
    st.builds(lambda n, giant: [2] * n + [giant], st.integers(0, 200), st.integers(1, 10**7)),
    st.sampled_from(list(HOSTILE.values())),
)
budgets = st.integers(1, 4000)
options_strategy = st.builds(
    PlanOptions,
    token_budget=budgets,
    shard_tokens=st.integers(1, 20_000),
    padding=st.sampled_from(["none", "tail"]),
    max_padded_share=st.sampled_from([0.0, 0.01, 0.05, 0.3, 0.99]),
)
anything = given(lengths=lengths_strategy, options=options_strategy)


def batches_of(planned: Plan) -> list[list[int]]:
    return [planned.batch(b).tolist() for b in range(planned.n_batches)]


def shard_members(planned: Plan) -> list[list[int]]:
    return [[int(s) for b in planned.batches_of(shard) for s in planned.batch(b)] for shard in range(planned.n_shards)]


@anything
@settings(deadline=None)
def test_every_sample_is_in_exactly_one_batch_and_every_batch_in_exactly_one_shard(lengths, options):
    planned = plan(lengths, options)
    assert Counter(s for batch in batches_of(planned) for s in batch) == Counter(range(len(lengths)))
    assert [b for shard in range(planned.n_shards) for b in planned.batches_of(shard)] == list(range(planned.n_batches))
    assert all(len(batch) for batch in batches_of(planned))
    assert all(len(planned.batches_of(shard)) for shard in range(planned.n_shards))


@given(lengths=lengths_strategy, options=options_strategy, world_size=st.integers(1, 12), data=st.data())
@settings(deadline=None)
def test_every_sample_that_is_not_done_goes_to_exactly_one_rank(lengths, options, world_size, data):
    planned = plan(lengths, options)
    done = data.draw(st.frozensets(st.integers(0, planned.n_shards - 1)))
    ranks = planned.assign(world_size, done)
    members = shard_members(planned)
    given_out = Counter(sample for shards in ranks for shard in shards for sample in members[shard])
    assert len(ranks) == world_size
    assert given_out == Counter(s for shard, samples in enumerate(members) if shard not in done for s in samples)
    for shards in ranks:
        assert shards[2:] == sorted(shards[2:])
        for weights in (
            planned.batch_tokens,
            planned.batch_tokens * planned.batch_length,
        ):  # a rank meets its heaviest batches first
            heaviest = [max(weights[batch] for batch in planned.batches_of(shard)) for shard in shards]
            assert not shards or max(heaviest) == max(heaviest[:2])
    assert ranks == plan(lengths, options).assign(world_size, done)  # computed again on another rank, it is the same


def test_ranks_beyond_the_shards_get_nothing():
    planned = plan([10] * 20, PlanOptions(token_budget=50, shard_tokens=100))
    assert planned.n_shards == 2
    assert sorted(map(len, planned.assign(5))) == [0, 0, 0, 1, 1]
    assert planned.assign(3, frozenset({0, 1})) == [[], [], []]


@anything
@settings(deadline=None)
def test_no_batch_is_over_the_budget_unless_it_is_one_sample(lengths, options):
    for batch in batches_of(plan(lengths, options)):
        assert len(batch) == 1 or len(batch) * max(lengths[s] for s in batch) <= options.token_budget


@given(lengths=lengths_strategy, budget=budgets)
@settings(deadline=None)
def test_no_batch_is_padded_by_default(lengths, budget):
    planned = plan(lengths, PlanOptions(token_budget=budget))
    assert all(len({lengths[s] for s in batch}) == 1 for batch in batches_of(planned))
    assert planned.padded_share == 0


@given(lengths=lengths_strategy, budget=budgets, share=st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.3, 0.99]))
@settings(deadline=None)
def test_with_tail_no_batch_is_padded_over_the_bound_and_none_could_have_taken_the_next_sample(lengths, budget, share):
    planned = plan(lengths, PlanOptions(token_budget=budget, shard_tokens=10**9, padding="tail", max_padded_share=share))
    assert planned.n_shards == 1  # so the batches are in the order in which they were cut
    batches = [[lengths[s] for s in batch] for batch in batches_of(planned)]

    def fits(rows: list[int]) -> bool:
        computed = len(rows) * rows[0]
        return len(rows) == 1 or (computed <= budget and computed - sum(rows) <= share * computed)

    assert all(fits(batch) for batch in batches)
    assert not any(fits([*batch, after[0]]) for batch, after in itertools.pairwise(batches))
    assert [length for batch in batches for length in batch] == sorted(lengths, reverse=True)
    computed = sum(len(batch) * batch[0] for batch in batches)
    assert planned.padded_share == pytest.approx(1 - sum(lengths) / computed)


@given(lengths=lengths_strategy, budget=budgets)
@settings(deadline=None)
def test_each_run_of_equal_lengths_is_split_evenly_into_the_fewest_batches(lengths, budget):
    """The oracle: n samples of one length over a capacity c are ceil(n / c) batches whose sizes differ by at most 1."""
    planned = plan(lengths, PlanOptions(token_budget=budget))
    expected = Counter()
    for length, n in Counter(lengths).items():
        n_batches = math.ceil(n / max(1, budget // length))
        sizes = [0] * n_batches
        for i in range(n):
            sizes[i % n_batches] += 1
        expected.update((length, size) for size in sizes)
    assert Counter((lengths[batch[0]], len(batch)) for batch in batches_of(planned)) == expected


@anything
@settings(deadline=None)
def test_rows_of_a_batch_are_ordered_by_length_and_then_by_their_place_in_the_dataset(lengths, options):
    for batch in batches_of(plan(lengths, options)):
        assert batch == sorted(batch, key=lambda s: (-lengths[s], s))


@anything
@settings(deadline=None)
def test_the_longest_batch_of_a_shard_comes_first(lengths, options):
    planned = plan(lengths, options)
    for shard in range(planned.n_shards):
        widths = [max(lengths[s] for s in planned.batch(b)) for b in planned.batches_of(shard)]
        assert widths == sorted(widths, reverse=True)


@anything
@settings(deadline=None)
def test_the_number_of_shards_is_that_of_the_tokens_but_at_most_that_of_the_batches(lengths, options):
    planned = plan(lengths, options)
    assert planned.n_shards == max(1, min(planned.n_batches, round(sum(lengths) / options.shard_tokens)))


@anything
@settings(deadline=None)
def test_shards_are_fair_samples_of_the_batches(lengths, options):
    """Numbers of batches at least L long differ by at most one between shards, for every L (L = 1: of all batches).

    Summed over L this bounds the lengths too: sums of the batches' lengths differ by at most the longest length.
    """
    planned = plan(lengths, options)
    widths = [[max(lengths[s] for s in planned.batch(b)) for b in planned.batches_of(i)] for i in range(planned.n_shards)]
    for at_least in {1, *lengths}:
        counts = [sum(width >= at_least for width in shard) for shard in widths]
        assert max(counts) - min(counts) <= 1
    sums = [sum(shard) for shard in widths]
    assert max(sums) - min(sums) <= max(lengths)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", ["log-normal", "uniform", "bimodal"])
def test_each_shards_mean_length_over_its_tokens_is_near_the_datasets(shape, seed):
    """A shard has the tokens of 16 full batches, and by the fair deal it is off by one batch in any range of lengths.

    One batch more of the longest or the shortest rows moves the mean by at most a sixteenth of the longest length.
    """
    lengths = draw(shape, 20_000, seed)
    planned = plan(lengths, PlanOptions())

    def mean_over_tokens(rows: np.ndarray) -> float:
        return float((rows**2).sum() / rows.sum())

    means = [mean_over_tokens(lengths[samples]) for samples in shard_members(planned)]
    assert len(means) > 50
    np.testing.assert_allclose(means, mean_over_tokens(lengths), rtol=0, atol=lengths.max() / 16)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("n", "off"), [(2_000, 0.1), (20_000, 0.33)])
def test_each_shards_mean_length_over_its_samples_is_near_the_datasets_for_lengths_like_those_of_real_texts(n, off, seed):
    """Log-normal lengths; 130 and 34 batches a shard.

    Less near than over tokens: a batch of short rows holds hundreds of samples, and a shard has one such batch more or less.
    For the same reason there is no bound for bimodal lengths, where some shards get a batch of the short ones and some none.
    """
    lengths = draw("log-normal", n, seed)
    means = [lengths[samples].mean() for samples in shard_members(plan(lengths, PlanOptions()))]
    assert len(means) > 3
    np.testing.assert_allclose(means, lengths.mean(), rtol=off)


def draw(shape: str, n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if shape == "log-normal":
        return np.clip(rng.lognormal(5.5, 1, n).astype(int), 1, 4096)
    return rng.integers(1, 2000, n) if shape == "uniform" else np.where(rng.random(n) < 0.5, 20, 2000)


@anything
@settings(deadline=None)
def test_places_in_the_store_agree_with_counting(lengths, options):
    planned = plan(lengths, options)
    token, place = 0, 0
    for shard in range(planned.n_shards):
        row = token_in_shard = 0
        for batch in planned.batches_of(shard):
            assert planned.place(batch) == (shard, row, token_in_shard)
            for sample in planned.batch(batch):
                assert (planned.shard_of_sample[sample], planned.row_of_sample[sample]) == (shard, row)
                assert (planned.order[place], planned.token_start[place]) == (sample, token)
                row, place = row + 1, place + 1
                token_in_shard, token = token_in_shard + lengths[sample], token + lengths[sample]
        assert planned.shard_size(shard) == (row, token_in_shard)
    assert planned.token_start[-1] == token == sum(lengths)


@anything
@settings(deadline=None)
def test_widths_and_tokens_agree_with_counting_and_the_heaviest_batches_come_first(lengths, options):
    planned = plan(lengths, options)
    widths = [max(lengths[s] for s in batch) for batch in batches_of(planned)]
    tokens = [width * len(batch) for width, batch in zip(widths, batches_of(planned), strict=True)]
    assert planned.batch_length.tolist() == widths
    assert planned.batch_tokens.tolist() == tokens
    squares = [n * width for n, width in zip(tokens, widths, strict=True)]
    first_two = [batch for shard in planned.assign(1)[0][:2] for batch in planned.batches_of(shard)]
    assert max(tokens[i] for i in first_two) == max(tokens)
    assert max(squares[i] for i in first_two) == max(squares)


@anything
@settings(deadline=None)
def test_steps_are_all_batches_in_order_within_one_shard_and_the_budget(lengths, options):
    planned = plan(lengths, options)
    shards = planned.assign(1)[0]
    steps = planned.steps(shards, options.token_budget)
    assert [batch for step in steps for batch in step] == [batch for shard in shards for batch in planned.batches_of(shard)]
    sizes = [int(planned.batch_tokens[step.start : step.stop].sum()) for step in steps]
    assert all(len(step) == 1 or size <= options.token_budget for step, size in zip(steps, sizes, strict=True))
    of_shard = [{planned.place(batch)[0] for batch in step} for step in steps]
    assert all(len(shards) == 1 for shards in of_shard)
    for (one, size), (other, shard), (_, before) in zip(  # none could have taken one batch more
        zip(steps, sizes, strict=True), zip(steps[1:], of_shard[1:], strict=True), zip(steps, of_shard, strict=True), strict=False
    ):
        assert shard != before or size + int(planned.batch_tokens[other.start]) > options.token_budget, one


@given(lengths=lengths_strategy, options=options_strategy, world_size=st.integers(1, 8))
@example(lengths=HOSTILE["one giant"], options=SMALL_SHARDS, world_size=2)
@settings(deadline=None)
def test_no_rank_has_more_than_the_mean_and_one_shard(lengths, options, world_size):
    """A shard goes to the rank with the least, which is below the mean: so nobody gets more than the mean and that shard."""
    planned = plan(lengths, options)
    costs = [sum(float(planned.batch_cost[b]) for b in planned.batches_of(shard)) for shard in range(planned.n_shards)]
    np.testing.assert_allclose(planned.shard_cost, costs)
    loads = [sum(costs[shard] for shard in shards) for shards in planned.assign(world_size)]
    assert max(loads) <= (sum(costs) / world_size + max(costs)) * (1 + 1e-9)


def test_the_most_expensive_shard_is_dealt_to_ranks_first():
    small_then_giant = Plan(np.array([1, 1, 1, 1, 4]) * 10_000, np.arange(5), np.arange(6), np.arange(6))
    assert small_then_giant.assign(2) == [[4], [0, 1, 2, 3]]


def test_dealing_back_and_forth_makes_shards_equal_where_lengths_fall_steadily():
    planned = plan(range(1, 81), PlanOptions(token_budget=1, shard_tokens=810))
    assert [planned.shard_size(shard) for shard in range(planned.n_shards)] == [(20, 810)] * 4


def test_ranks_are_balanced_to_a_percent_where_there_are_many_shards():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1, 50_000).astype(int), 1, 4096)
    planned = plan(lengths, PlanOptions(shard_tokens=32768))
    loads = [planned.shard_cost[shards].sum() for shards in planned.assign(8)]
    assert max(loads) <= 1.01 * np.mean(loads)


@anything
@settings(deadline=None)
def test_a_plan_made_twice_is_the_same_whatever_holds_the_lengths(lengths, options):
    first, second = plan(lengths, options), plan(np.array(lengths, dtype=np.int32), options)
    for name in ("lengths", "order", "batch_start", "shard_start"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
        assert getattr(first, name).dtype == np.int64


def test_the_callers_lengths_are_not_shared():
    lengths = np.array([3, 1, 2])
    planned = plan(lengths, PlanOptions())
    lengths[:] = 9
    assert planned.lengths.tolist() == [3, 1, 2]


@pytest.mark.parametrize("name", HOSTILE)
def test_more_tokens_in_a_batch_than_asked_happen_only_for_single_samples(name):
    planned = plan(HOSTILE[name], SMALL_SHARDS)
    over = planned.batch_tokens > SMALL_SHARDS.token_budget
    assert (np.diff(planned.batch_start)[over] == 1).all()


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([], "zero samples"),
        ([[1, 2]], "zero samples"),
        ([3, 0, 2], "sample 1 has 0 tokens"),
        ([3, 2, -4], "sample 2 has -4 tokens"),
        ([1.5], "whole numbers, got float64"),
        (["a"], "whole numbers"),
    ],
)
def test_lengths_that_cannot_be_planned_are_refused(lengths, message):
    with pytest.raises(InvalidInputError, match=message):
        plan(lengths, PlanOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_budget": 0}, "token_budget must be at least 1, got 0"),
        ({"shard_tokens": -5}, "shard_tokens must be at least 1, got -5"),
        ({"padding": "left"}, "'none' or 'tail', got 'left'"),
        ({"max_padded_share": 1.0}, r"max_padded_share must be in \[0, 1\), got 1.0"),
        ({"max_padded_share": -0.1}, "max_padded_share"),
        ({"max_padded_share": float("nan")}, "max_padded_share"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InvalidInputError, match=message):
        PlanOptions(**options)


def test_a_world_of_no_ranks_is_refused():
    with pytest.raises(InvalidInputError, match="world_size must be at least 1, got 0"):
        plan([1], PlanOptions()).assign(0)
