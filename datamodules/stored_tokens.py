"""The tokens of a store in the order in which they lie in its files, and to which part each belongs."""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import numpy.typing as npt

from exactivations.datamodules.examples import IntArray
from exactivations.store.activation_store import ActivationStore

BITS = 8  # of a byte
TOKENS_AT_ONCE = 1 << 20  # whose masks are looked at together
LEFT_OUT = -1


class StoredTokens:
    """Tokens by their place in the files: shard after shard, and in a shard as its rows lie there.

    Whoever reads them in this order reads the files from end to end. What is held: 16 bytes for a sample and, where only content
    counts, a bit for a token. Making it reads masks (a byte for a token) and no activations.

    Args:
        store: A store with token rows.
        hook_point: One of which it has them.
        part_of_sample: int8 [n], of each sample in the order of `store.sample_index`.
        content_only: Leave out special tokens.
    """

    def __init__(
        self, store: ActivationStore, hook_point: str, part_of_sample: npt.NDArray[np.int8], *, content_only: bool
    ) -> None:
        self._store, self._part_of_sample = store, part_of_sample
        places, packed, left = [np.empty(0, dtype=np.int64)], [], np.empty(0, dtype=bool)
        for block in store.tokens(hook_point, TOKENS_AT_ONCE):
            places.append(np.searchsorted(store.sample_index, block.sample_index.numpy()))
            if content_only:
                mask = np.concatenate([left, block.token_mask.numpy()])
                whole = len(mask) // BITS * BITS
                packed.append(np.packbits(mask[:whole]))
                left = mask[whole:]
        self._place = np.concatenate(places)
        self._start = np.concatenate([[0], np.cumsum(np.diff(store.token_start)[self._place])]).astype(np.int64)
        self._content = np.concatenate([*packed, np.packbits(left)]) if content_only else None

    def __len__(self) -> int:
        return int(self._start[-1])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._place.nbytes + self._start.nbytes + (0 if self._content is None else self._content.nbytes)

    def numbers(self, part: int, first: int, last: int) -> IntArray:
        """Returns the tokens of a part from place `first` to before `last` in the files, by number (see `ActivationStore.rows`)."""
        lying = np.arange(first, min(last, len(self)))
        sample = np.searchsorted(self._start, lying, side="right") - 1
        numbers = self._store.token_start[self._place[sample]] + lying - self._start[sample]
        chosen: IntArray = numbers[self._parts(first, last, sample) == part]
        return chosen

    def counts(self, block_tokens: int, n_parts: int) -> IntArray:
        """Returns how many tokens of each part each block of so many places has, int64 [n_parts, blocks]."""
        found = [np.empty((n_parts, 0), dtype=np.int64)]
        for first, last in self._stretches(block_tokens):
            sample = np.searchsorted(self._start, np.arange(first, last), side="right") - 1
            parts = self._parts(first, last, sample)
            starts = np.arange(0, last - first, block_tokens)
            found.append(np.stack([np.add.reduceat(parts == part, starts, dtype=np.int64) for part in range(n_parts)]))
        return np.concatenate(found, axis=1)

    def _stretches(self, block_tokens: int) -> Iterator[tuple[int, int]]:
        length = max(1, TOKENS_AT_ONCE // block_tokens) * block_tokens
        for first in range(0, len(self), length):
            yield first, min(first + length, len(self))

    def _parts(self, first: int, last: int, sample: IntArray) -> npt.NDArray[np.int8]:
        """Returns the part of each token from a place to another [T], LEFT_OUT for special ones; `sample` is whose they are."""
        parts = self._part_by_lying[sample]
        if self._content is not None:
            begin = first // BITS
            bits = np.unpackbits(self._content[begin : -(-last // BITS)])[first - begin * BITS :][: len(parts)]
            parts = np.where(bits, parts, np.int8(LEFT_OUT))
        return parts

    @cached_property
    def _part_by_lying(self) -> npt.NDArray[np.int8]:
        return self._part_of_sample[self._place]
