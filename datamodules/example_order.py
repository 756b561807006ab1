"""Which examples make a step of training or evaluation: the same steps on any number of ranks, each of which takes its share."""

import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from exactivations.datamodules.examples import IntArray

STEPS_OF_BUFFER = 32
"""How many steps are shuffled together: samples come in a random order, and their tokens are spread over so many steps."""


class ShuffledExamples(Sampler[tuple[IntArray, int]]):
    """Yields this rank's examples of each step, and how many the step has on all ranks: a pure function of seed and epoch.

    Samples are put in a random order; as many of them as fill STEPS_OF_BUFFER steps are shuffled together. So all examples of an
    epoch come once, and what is read in a while lies in few places of the memory map.

    Args:
        numbers: int64 [n], the examples.
        sample: int64 [n], whose they are; examples of a sample stand together.
        batch_size: Examples of a step, on all ranks together. The last step has what is left.
        seed: What the order depends on, beside the epoch.
        rank: Which share is given.
        world_size: Of how many.
    """

    def __init__(self, numbers: IntArray, sample: IntArray, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self._numbers, self._batch_size, self._seed = numbers, batch_size, seed
        self._rank, self._world_size = rank, world_size
        starts = np.flatnonzero(np.diff(sample, prepend=-1))
        self._runs = np.stack([starts, np.append(starts[1:], len(sample))], axis=1)  # of each sample
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order; Lightning calls it."""
        self._epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self._numbers) / self._batch_size)

    def __iter__(self) -> Iterator[tuple[IntArray, int]]:
        dice = np.random.default_rng([self._seed, self._epoch])
        runs = self._runs[dice.permutation(len(self._runs))]
        ends = np.cumsum(runs[:, 1] - runs[:, 0])
        capacity = STEPS_OF_BUFFER * self._batch_size
        left, first = np.empty(0, dtype=np.int64), 0
        while first < len(runs):
            done = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, done + capacity - len(left), side="right")))
            buffer = np.concatenate([left, *(self._numbers[start:end] for start, end in runs[first:last])])
            buffer = buffer[dice.permutation(len(buffer))]
            first = last
            whole = len(buffer) if first == len(runs) else len(buffer) // self._batch_size * self._batch_size
            for start in range(0, whole, self._batch_size):
                step = buffer[start : min(start + self._batch_size, whole)]
                yield step[self._rank :: self._world_size], len(step)
            left = buffer[whole:]


class ExamplesInOrder(Sampler[tuple[IntArray, int]]):
    """Yields the examples of this rank, a block of them an item, in their order; and how many there are in the block.

    Every rank has as many items, the last of which may be empty: Lightning waits for all ranks between them.

    Args:
        numbers: int64 [n], the examples of all ranks.
        block: Examples of an item.
        rank: Which of the shares is given.
        world_size: How many there are.
    """

    def __init__(self, numbers: IntArray, block: int, rank: int = 0, world_size: int = 1) -> None:
        self._numbers, self._block = np.array_split(numbers, world_size)[rank], block
        self._n_items = max(1, math.ceil(math.ceil(len(numbers) / world_size) / block))

    def __len__(self) -> int:
        return self._n_items

    def __iter__(self) -> Iterator[tuple[IntArray, int]]:
        for item in range(self._n_items):
            block = self._numbers[item * self._block : (item + 1) * self._block]
            yield block, len(block)
