"""The plan: which sample is computed in which batch and stored in which shard and row, decided before the first forward pass.

A pure function of the lengths and `PlanOptions`, and of nothing else: not of the number of devices, the rank, the time, or
what was done before. So it can be made again anywhere, and it doubles as the index of the store.
"""

import bisect
import heapq
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from exactivations.store.errors import InvalidInputError

IntArray = npt.NDArray[np.int64]

# A batch's predicted cost is its tokens, more the longer its rows (attention), plus a constant for launching it. The unit is
# one token in a short row. It only balances ranks and estimates the time left; no value depends on it.
ATTENTION_LENGTH = 8192.0
TOKENS_PER_LAUNCH = 64.0


@dataclass(frozen=True)
class PlanOptions:
    """Everything besides the lengths that a plan depends on.

    Attributes:
        token_budget: The most tokens in one batch, padding included. A longer sample makes a batch alone.
        shard_tokens: About so many tokens in one shard.
        padding: "none" for batches of equal length; "tail" lets neighbouring rare lengths share a batch, padded on the right
            (right for causal models only).
        max_padded_share: With "tail", the most padding in any batch, as a share of its tokens.
    """

    token_budget: int = 8192
    shard_tokens: int = 131072
    padding: Literal["none", "tail"] = "none"
    max_padded_share: float = 0.05

    def __post_init__(self) -> None:
        for name in ("token_budget", "shard_tokens"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.padding not in ("none", "tail"):
            raise InvalidInputError(f"padding must be 'none' or 'tail', got {self.padding!r}")
        if not 0 <= self.max_padded_share < 1:
            raise InvalidInputError(f"max_padded_share must be in [0, 1), got {self.max_padded_share}")


@dataclass(frozen=True)
class Plan:
    """Samples in batches in shards. Samples are called by their position among the lengths that were planned.

    Attributes:
        lengths: int64 [n], tokens of each sample.
        order: int64 [n], the samples in plan order: shard by shard, in it batch by batch, in it row by row.
        batch_start: int64 [batches + 1], where each batch starts in `order`.
        shard_start: int64 [shards + 1], where each shard starts among the batches.
    """

    lengths: IntArray
    order: IntArray
    batch_start: IntArray
    shard_start: IntArray

    @property
    def n_batches(self) -> int:
        """Number of batches."""
        return len(self.batch_start) - 1

    @property
    def n_shards(self) -> int:
        """Number of shards."""
        return len(self.shard_start) - 1

    def batch(self, batch: int) -> IntArray:
        """Returns the samples of a batch, in row order (the longest first)."""
        return self.order[self.batch_start[batch] : self.batch_start[batch + 1]]

    def batches_of(self, shard: int) -> range:
        """Returns the numbers of a shard's batches."""
        return range(int(self.shard_start[shard]), int(self.shard_start[shard + 1]))

    def samples_of(self, shard: int) -> IntArray:
        """Returns the samples of a shard, in row order."""
        return self.order[self.sample_start[shard] : self.sample_start[shard + 1]]

    @cached_property
    def sample_start(self) -> IntArray:
        """int64 [shards + 1], where each shard starts in `order`."""
        return self.batch_start[self.shard_start]

    @cached_property
    def batch_of_sample(self) -> IntArray:
        """int64 [n], the batch that holds each sample."""
        batches: IntArray = np.empty_like(self.order)
        batches[self.order] = np.repeat(np.arange(self.n_batches), np.diff(self.batch_start))
        return batches

    @cached_property
    def shard_of_sample(self) -> IntArray:
        """int64 [n], the shard that holds each sample."""
        shards: IntArray = np.empty_like(self.order)
        shards[self.order] = np.repeat(np.arange(self.n_shards), np.diff(self.sample_start))
        return shards

    @cached_property
    def row_of_sample(self) -> IntArray:
        """int64 [n], each sample's row in its shard."""
        rows: IntArray = np.empty_like(self.order)
        rows[self.order] = np.arange(len(self.order)) - np.repeat(self.sample_start[:-1], np.diff(self.sample_start))
        return rows

    @cached_property
    def token_start(self) -> IntArray:
        """int64 [n + 1], real tokens before each place in `order`."""
        return np.concatenate([[0], np.cumsum(self.lengths[self.order])])

    def place(self, batch: int) -> tuple[int, int, int]:
        """Returns (shard, first row in it, first real token in it) of a batch."""
        shard = int(np.searchsorted(self.shard_start, batch, side="right")) - 1
        start, shard_begins = self.batch_start[batch], self.sample_start[shard]
        return shard, int(start - shard_begins), int(self.token_start[start] - self.token_start[shard_begins])

    def shard_size(self, shard: int) -> tuple[int, int]:
        """Returns (samples, real tokens) of a shard."""
        start, stop = self.sample_start[shard], self.sample_start[shard + 1]
        return int(stop - start), int(self.token_start[stop] - self.token_start[start])

    @cached_property
    def batch_length(self) -> IntArray:
        """int64 [batches], the width L of each batch."""
        return self.lengths[self.order[self.batch_start[:-1]]]

    @cached_property
    def batch_tokens(self) -> IntArray:
        """int64 [batches], computed tokens B x L of each batch, padding included."""
        return np.diff(self.batch_start) * self.batch_length

    @cached_property
    def batch_cost(self) -> npt.NDArray[np.float64]:
        """float64 [batches], predicted cost in tokens of a short row."""
        return self.batch_tokens * (1 + self.batch_length / ATTENTION_LENGTH) + TOKENS_PER_LAUNCH

    @cached_property
    def shard_cost(self) -> npt.NDArray[np.float64]:
        """float64 [shards], predicted cost."""
        return np.add.reduceat(self.batch_cost, self.shard_start[:-1])

    @property
    def padded_share(self) -> float:
        """Padding as a share of all computed tokens."""
        computed = int(self.batch_tokens.sum())
        return 1 - int(self.lengths.sum()) / computed

    def assign(self, world_size: int, done: frozenset[int] = frozenset()) -> list[list[int]]:
        """Deals the shards that are not done to ranks: every one to exactly one, the predicted costs balanced.

        The most expensive shard goes first, always to the rank with the least so far. A rank begins with the shards that hold
        its heaviest batches, so that too little memory shows at once, and works through the others in ascending order.

        Raises:
            InvalidInputError: If world_size is below 1.
        """
        if world_size < 1:
            raise InvalidInputError(f"world_size must be at least 1, got {world_size}")
        shards = np.setdiff1d(np.arange(self.n_shards), list(done))
        ranks: list[list[int]] = [[] for _ in range(world_size)]
        loads = [(0.0, rank) for rank in range(world_size)]
        for shard in shards[np.lexsort((shards, -self.shard_cost[shards]))]:
            load, rank = heapq.heappop(loads)
            ranks[rank].append(int(shard))
            heapq.heappush(loads, (load + float(self.shard_cost[shard]), rank))
        return [self._heaviest_first(shards_of_rank) for shards_of_rank in ranks]

    def steps(self, shards: list[int], most_tokens: int) -> list[range]:
        """Cuts the batches of shards into runs that stay within one shard and, unless it is one batch, within so many tokens."""
        found: list[range] = []
        for shard in shards:
            first = taken = 0
            batches = self.batches_of(shard)
            for place, tokens in enumerate(self.batch_tokens[batches.start : batches.stop].tolist()):
                if taken and taken + tokens > most_tokens:
                    found.append(batches[first:place])
                    first, taken = place, 0
                taken += tokens
            found.append(batches[first:])
        return found

    def _heaviest_first(self, shards: list[int]) -> list[int]:
        """Sorts shards, before all others those with the most tokens in a batch, and with the largest B x L x L.

        Memory grows with the first or, as in `eager` attention with its L x L scores, with the second.
        """
        if not shards:
            return []
        weights = (self.batch_tokens, self.batch_tokens * self.batch_length)
        heaviest = {max(sorted(shards), key=np.maximum.reduceat(of, self.shard_start[:-1]).__getitem__) for of in weights}
        return sorted(shards, key=lambda shard: (shard not in heaviest, shard))


def plan(lengths: Any, options: PlanOptions) -> Plan:
    """Plans batches and shards for samples of these lengths (int [n], each at least 1).

    Invariants: every sample is in exactly one batch; no batch holds more than `token_budget` tokens unless it is one sample;
    without padding a batch has one length, with it no batch is padded by more than `max_padded_share`; numbers of batches of
    any two shards differ by at most one, and so do their numbers of batches that are at least so long, for every length (this
    makes each shard a fair sample of the batches); inside a shard the longest batch comes first.

    Raises:
        InvalidInputError: If there are no lengths, or one of them is below 1 or no whole number.
    """
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or not len(lengths):
        raise InvalidInputError(f"cannot plan zero samples (lengths have shape {list(lengths.shape)}, expected [n] with n > 0)")
    if lengths.dtype.kind not in "iu":
        raise InvalidInputError(f"lengths must be whole numbers, got {lengths.dtype}")
    lengths = lengths.astype(np.int64)
    if lengths.min() < 1:
        sample = int(lengths.argmin())
        raise InvalidInputError(f"sample {sample} has {lengths[sample]} tokens; every planned sample needs at least 1")
    by_length = np.argsort(-lengths, kind="stable")  # longest first, then by position
    cut = _cut_equal_lengths if options.padding == "none" else _cut_neighbouring_lengths
    sizes = cut(lengths[by_length], options)
    batch_start = np.concatenate([[0], np.cumsum(sizes)])
    shards = max(1, min(len(sizes), round(int(lengths.sum()) / options.shard_tokens)))
    dealt = _deal(len(sizes), shards)
    order = by_length[_ranges(batch_start[:-1][dealt], sizes[dealt])]
    per_shard = np.bincount(_shard_of_batch(len(sizes), shards), minlength=shards)
    return Plan(
        lengths=lengths,
        order=order,
        batch_start=np.concatenate([[0], np.cumsum(sizes[dealt])]),
        shard_start=np.concatenate([[0], np.cumsum(per_shard)]),
    )


def _cut_equal_lengths(sorted_lengths: IntArray, options: PlanOptions) -> IntArray:
    """Returns batch sizes that cut each run of n equal lengths into ceil(n / capacity) nearly equal batches."""
    run_start = np.flatnonzero(np.concatenate([[True], sorted_lengths[1:] != sorted_lengths[:-1]]))
    n = np.diff(np.append(run_start, len(sorted_lengths)))
    capacity = np.maximum(1, options.token_budget // sorted_lengths[run_start])
    batches = -(-n // capacity)
    small, n_larger = np.divmod(n, batches)
    number_in_run = np.arange(batches.sum()) - np.repeat(np.cumsum(batches) - batches, batches)
    sizes: IntArray = np.repeat(small, batches) + (number_in_run < np.repeat(n_larger, batches))
    return sizes


def _cut_neighbouring_lengths(sorted_lengths: IntArray, options: PlanOptions) -> IntArray:
    """Returns batch sizes that take neighbours, longest first, as long as budget and padded share allow."""
    lengths = sorted_lengths.tolist()
    total = [0, *np.cumsum(sorted_lengths).tolist()]
    sizes = []
    first = 0
    while first < len(lengths):
        longest = lengths[first]
        capacity = min(max(1, options.token_budget // longest), len(lengths) - first)
        size = capacity
        if longest * capacity > total[first + capacity] - total[first]:

            def is_padded_too_much(n: int, first: int = first, longest: int = longest) -> bool:
                computed = n * longest
                padding: int = computed - (total[first + n] - total[first])
                return padding > options.max_padded_share * computed

            # The padded share grows with n, as lengths only fall; one sample alone has none.
            size = bisect.bisect_left(range(1, capacity + 1), True, key=is_padded_too_much)
        sizes.append(size)
        first += size
    return np.array(sizes, dtype=np.int64)


def _shard_of_batch(n_batches: int, shards: int) -> IntArray:
    """Deals like cards, back and forth (0 1 2 2 1 0 0 1 ...), so that no shard gets the longest of every round."""
    number = np.arange(n_batches)
    place, backwards = number % shards, (number // shards) % 2 == 1
    return np.where(backwards, shards - 1 - place, place)


def _deal(n_batches: int, shards: int) -> IntArray:
    """Returns the batches shard by shard, in each shard in their order before."""
    return np.argsort(_shard_of_batch(n_batches, shards), kind="stable")


def _ranges(starts: IntArray, sizes: IntArray) -> IntArray:
    """Returns the concatenation of arange(start, start + size)."""
    ends = np.cumsum(sizes)
    offsets: IntArray = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)
    return np.repeat(starts, sizes) + offsets
