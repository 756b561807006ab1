"""In which order the tokens of a store come: blocks of all files in a random order, so many tokens of them shuffled together."""

import math
from functools import lru_cache

import numpy as np

from exactivations.datamodules.examples import IntArray
from exactivations.datamodules.stored_tokens import StoredTokens
from exactivations.store.errors import InvalidInputError

BLOCKS, WINDOW = 0, 1  # what dice are thrown for


class TokenOrder:
    """The steps of an epoch over the tokens of a part: a pure function of the tokens, seed and epoch, on any number of ranks.

    The files are cut into blocks of `block_tokens` tokens. All blocks are put in a random order; their tokens, in this order, are
    cut into windows of about `buffer_tokens`, and each window is shuffled as a whole. So a window's blocks come from all over the
    store, each is read from end to end, and any step can be found without those before it. Every token comes once in an epoch.

    All steps have `batch_size` tokens, but for the last two, which share what is left evenly (the one, if there is one only).

    Args:
        tokens: The tokens.
        part: Which of their parts.
        counts: int64 [blocks], how many tokens of the part each block has.
        batch_size: Tokens of a step, on all ranks together.
        block_tokens: Tokens that are read together.
        buffer_tokens: Tokens that are shuffled together, on all ranks together; a step at least.
        seed: What the order depends on, beside the epoch; None leaves tokens in the order of the files.
    """

    def __init__(
        self,
        tokens: StoredTokens,
        part: int,
        counts: IntArray,
        *,
        batch_size: int,
        block_tokens: int,
        buffer_tokens: int,
        seed: int | None,
    ) -> None:
        self._tokens, self._part, self._counts = tokens, part, counts
        self.batch_size, self.block_tokens, self.seed = batch_size, block_tokens, seed
        self.n_tokens = int(counts.sum())
        self.n_steps = math.ceil(self.n_tokens / batch_size)
        self.n_windows = math.ceil(self.n_steps / max(1, buffer_tokens // batch_size))
        self._blocks_of_epoch = lru_cache(maxsize=1)(self._shuffled_blocks)

    def step_start(self, step: int) -> int:
        """Returns how many tokens of the epoch come before a step."""
        if step >= self.n_steps:
            return self.n_tokens
        if step and step == self.n_steps - 1:
            before = (step - 1) * self.batch_size
            return before + (self.n_tokens - before + 1) // 2
        return step * self.batch_size

    def window_of(self, step: int) -> int:
        """Returns the window that a step is in."""
        return ((step + 1) * self.n_windows - 1) // self.n_steps

    def steps(self, window: int) -> range:
        """Returns the steps of a window: all windows have as many, to within one."""
        return range(*(self.n_steps * at // self.n_windows for at in (window, window + 1)))

    def window(self, epoch: int, window: int) -> IntArray:
        """Returns the numbers of a window's tokens, int64, in the order of its steps."""
        steps = self.steps(window)
        first, last = self.step_start(steps.start), self.step_start(steps.stop)
        blocks, ends = self._blocks_of_epoch(epoch)
        begin, end = np.searchsorted(ends, first, side="right"), np.searchsorted(ends, last, side="left")
        chosen = blocks[begin : end + 1]
        of_blocks = [
            self._tokens.numbers(self._part, block * self.block_tokens, (block + 1) * self.block_tokens)
            for block in chosen.tolist()
        ]
        before = int(ends[begin - 1]) if begin else 0
        numbers: IntArray = np.concatenate(of_blocks)[first - before : last - before]
        assert len(numbers) == last - first, "masks changed while they were read"
        if self.seed is not None:
            np.random.default_rng([self.seed, epoch, WINDOW, window]).shuffle(numbers)
        return numbers

    def _shuffled_blocks(self, epoch: int) -> tuple[IntArray, IntArray]:
        """Returns the blocks that have tokens, in the order of an epoch, and how many tokens there are up to the end of each."""
        blocks = np.flatnonzero(self._counts)
        if self.seed is not None:
            np.random.default_rng([self.seed, epoch, BLOCKS]).shuffle(blocks)
        return blocks, np.cumsum(self._counts[blocks])

    def refuse_ranks(self, world_size: int) -> None:
        """Refuses so many ranks that one could be without a token in some step.

        Raises:
            InvalidInputError: Saying how large a batch must be.
        """
        if world_size > 1 and (self.batch_size < 2 * world_size or self.n_tokens < world_size):
            raise InvalidInputError(
                f"{world_size} ranks share steps of {self.batch_size} tokens, of {self.n_tokens:,} in all: each rank must have a "
                f"token in every step, so give a batch_size of at least {2 * world_size}, or fewer ranks"
            )
