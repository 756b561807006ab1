"""Drawing samples to be computed again alone: those where faults show soonest, and a random choice."""

from typing import Any

import numpy as np
import numpy.typing as npt

from exactivations.datamodules.plan import IntArray, Plan

WITNESSES_OF_SHARD, WITNESSES_OF_RUN = 4, 16  # at least so many, where there are that many samples


def draw(plan: Plan, positions: IntArray, n: int, seed: int) -> IntArray:
    """Returns up to n of these samples, called by their position in the plan: always the same ones for the same arguments.

    Up to half are those where faults show soonest (the seed says with which to begin): the longest sample, the shortest, the last
    rows of the largest and of the smallest batch, the most padded one. The others are a random choice, spread over the shards.
    """
    dice = np.random.default_rng(seed)
    extremes = np.roll(_extremes(plan, positions), seed)[: -(-n // 2)]
    others = _spread(positions, plan.shard_of_sample[positions], dice)
    return np.array(list(dict.fromkeys([*extremes.tolist(), *others.tolist()]))[:n], dtype=np.int64)


def choose(n: int, k: int, seed: int) -> IntArray:
    """Returns k of the numbers 0 to n - 1 at random, ascending: always the same ones for the same arguments."""
    return np.sort(np.random.default_rng(seed).choice(n, k, replace=False))


def witnesses(plan: Plan, shard: int) -> IntArray:
    """Returns the rows of a shard, ascending, that are kept where only means are, so that their samples can be computed again.

    They depend on the plan alone: other numbers of ranks keep the same ones.
    """
    n = max(WITNESSES_OF_SHARD, -(-WITNESSES_OF_RUN // plan.n_shards))
    return np.sort(plan.row_of_sample[draw(plan, plan.samples_of(shard), n, seed=shard)])


def n_witnesses(plan: Plan) -> int:
    """Returns how many rows a run keeps that keeps means only."""
    return sum(len(witnesses(plan, shard)) for shard in range(plan.n_shards))


def _extremes(plan: Plan, positions: IntArray) -> IntArray:
    """Returns the samples, of these, in which faults show soonest."""
    batch = plan.batch_of_sample[positions]
    lengths, sizes = plan.lengths[positions], np.diff(plan.batch_start)
    padding = plan.batch_length[batch] - lengths
    last_rows = [int(plan.batch(number)[-1]) for number in (batch[sizes[batch].argmax()], batch[sizes[batch].argmin()])]
    extremes = [int(positions[lengths.argmax()]), int(positions[lengths.argmin()]), *last_rows]
    found = np.array(extremes + ([int(positions[padding.argmax()])] if padding.any() else []), dtype=np.int64)
    return found[np.isin(found, positions)]


def _spread(positions: IntArray, shards: npt.NDArray[Any], dice: np.random.Generator) -> IntArray:
    """Returns the positions in a random order in which every shard comes before any comes twice."""
    order = dice.permutation(len(positions))
    by_shard = order[np.argsort(shards[order], kind="stable")]
    starts = np.searchsorted(shards[by_shard], shards[by_shard], side="left")
    turn = np.arange(len(by_shard)) - starts  # how many of its shard came before
    chosen: IntArray = positions[by_shard[np.lexsort((dice.permutation(len(by_shard)), turn))]]
    return chosen
