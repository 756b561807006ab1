"""Steps are a function of seed and epoch: every example once, and the same steps on any number of ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exactivations.datamodules import example_order
from exactivations.datamodules.example_order import ExamplesInOrder, ShuffledExamples

cases = given(
    n_examples=st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any),
    batch_size=st.integers(1, 25), buffer=st.integers(1, 5), seed=st.integers(0, 5), epoch=st.integers(0, 3),
    world_size=st.integers(1, 5),
)  # fmt: skip


def examples(n_examples):
    """Numbers with gaps, as of labelled tokens, and the sample that each is of."""
    sample = np.repeat(np.arange(len(n_examples)), n_examples)
    return np.arange(len(sample)) * 3 + 7, sample


def steps(n_examples, batch_size, seed, epoch, rank=0, world_size=1):
    order = ShuffledExamples(*examples(n_examples), batch_size, seed, rank, world_size)
    order.set_epoch(epoch)
    found = list(order)
    assert len(found) == len(order)
    return found


@settings(max_examples=150, deadline=None)
@cases
def test_every_example_comes_once_and_ranks_share_the_steps_of_one(n_examples, batch_size, buffer, seed, epoch, world_size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example_order, "STEPS_OF_BUFFER", buffer)
        whole = steps(n_examples, batch_size, seed, epoch)
        ranks = [steps(n_examples, batch_size, seed, epoch, rank, world_size) for rank in range(world_size)]
        again = steps(n_examples, batch_size, seed, epoch)
    numbers, _ = examples(n_examples)
    np.testing.assert_array_equal(np.sort(np.concatenate([step for step, _ in whole])), numbers)
    assert [n for _, n in whole[:-1]] == [batch_size] * (len(whole) - 1)
    assert all(np.array_equal(one, other) for (one, _), (other, _) in zip(whole, again, strict=True))
    for number, (step, n) in enumerate(whole):
        assert n == len(step)
        shares = [of_rank[number] for of_rank in ranks]
        assert {n for _, n in shares} == {len(step)}
        assert max(len(share) for share, _ in shares) - min(len(share) for share, _ in shares) <= 1
        np.testing.assert_array_equal(np.sort(np.concatenate([share for share, _ in shares])), np.sort(step))


@settings(max_examples=50, deadline=None)
@cases
def test_in_order_every_rank_has_a_run_of_its_own(n_examples, batch_size, buffer, seed, epoch, world_size):
    numbers, _ = examples(n_examples)
    ranks = [ExamplesInOrder(numbers, batch_size, rank, world_size) for rank in range(world_size)]
    found = [list(order) for order in ranks]
    assert [len(order) for order in ranks] == [len(blocks) for blocks in found]
    assert all(n == len(block) <= batch_size for blocks in found for block, n in blocks)
    np.testing.assert_array_equal(np.concatenate([block for blocks in found for block, _ in blocks]), numbers)


def test_another_seed_or_epoch_gives_another_order_and_what_is_read_in_a_while_lies_together():
    lengths = [10] * 400
    one, other_epoch, other_seed = (
        np.concatenate([step for step, _ in steps(lengths, 8, seed, epoch)]) for seed, epoch in ((0, 0), (0, 1), (1, 0))
    )
    assert (one != other_epoch).mean() > 0.9 and (one != other_seed).mean() > 0.9
    whole = example_order.STEPS_OF_BUFFER * 8 // 10  # samples that the first buffer holds, of which all whole steps are given
    assert len(np.unique((one[: whole * 10 // 8 * 8] - 7) // 3 // 10)) == whole
    step = (one[:8] - 7) // 3
    assert len(np.unique(step // 10)) > 4  # and yet a step is of many samples
