"""Pooled rows of a store's tokens, under masks that are looked up by sample index and proven by token hash."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import xxhash
from torch import Tensor

from exactivations.datamodules.examples import IntArray
from exactivations.lit_modules.extraction.pooling import pool
from exactivations.store.activation_store import ActivationStore
from exactivations.store.errors import InvalidInputError
from exactivations.store.masks import SampleMasks, read_masks
from exactivations.store.pooling_names import TOKENS, check_pooling, refuse_short, tokens_needed
from exactivations.store.run_folder import RunInfo

TOKENS_AT_ONCE = 65536  # of so many, or of one sample, rows are in memory at a time


class MaskedRows:
    """Token rows of a store, pooled as they are read: an `ActivationSource` with one row for each sample.

    A mask belongs to a sample by its index and by the hash of its tokens, never by its place in a batch. Without a file of masks
    the store's own are taken, which were written beside the rows. Nothing stands in for a mask that is missing.

    Each sample is pooled by itself, so that no other sample, and no way of reading, changes a bit of its row.

    Args:
        store: A store with token rows.
        poolings: Such as "mean" and "last".
        masks: A file that `import-masks` wrote for this store; None takes the store's own masks.

    Raises:
        InvalidInputError: If the store has no token rows, a pooling is none, a sample's mask marks fewer tokens than a pooling
            needs, or a mask was imported without the ids that prove whose it is: the first sample is named.
        StoreError: If the masks were written for another store: the first sample of other tokens or length is named.
    """

    def __init__(self, store: ActivationStore, poolings: Sequence[str], masks: str | Path | None = None) -> None:
        self._points = [name.removesuffix(f"/{TOKENS}") for name, per_token in store.per_token.items() if per_token]
        if not self._points:
            raise InvalidInputError(
                f"{store.title} holds no tokens to pool: it holds {', '.join(store.names)}. Extract with --pooling tokens"
            )
        for pooling in poolings:
            check_pooling(pooling)
        if not poolings or TOKENS in poolings:
            raise InvalidInputError(
                f"{TOKENS} pools nothing: name poolings such as mean and last, got {', '.join(poolings) or 'none'}"
            )
        self.store, self._poolings = store, list(poolings)
        self.sample_index: IntArray = store.sample_index
        self._masks = None if masks is None else _proven(masks, store)
        self.masks_hash = None if masks is None else xxhash.xxh3_128(Path(masks).read_bytes()).hexdigest()
        """Of the file of masks; None of the store's own."""
        if any(tokens_needed(pooling) > 1 for pooling in self._poolings):
            every = np.arange(len(self))
            tokens, lengths = np.arange(self.token_start[-1]), self._lengths(every)
            counted = np.array([int(mask.sum()) for mask in self._masks_of(every, tokens, lengths)])
            refuse_short(self._poolings, counted, self.sample_index)

    def __len__(self) -> int:
        return len(self.store)

    @property
    def title(self) -> str:
        """What messages call it."""
        return self.store.title

    @property
    def info(self) -> RunInfo:
        """The description of the store's run."""
        return self.store.info

    @property
    def samples(self) -> pa.Table:
        """The store's samples.parquet."""
        return self.store.samples

    @property
    def token_start(self) -> IntArray:
        """int64 [n+1]: how many tokens the samples before each one have."""
        return self.store.token_start

    @property
    def per_token(self) -> Mapping[str, bool]:
        """False for each of its activations."""
        return {f"{point}/{pooling}": False for point in self._points for pooling in self._poolings}

    def are_content(self, numbers: IntArray) -> Tensor:
        """Returns whether the store takes tokens by number for content, bool [m]."""
        return self.store.are_content(numbers)

    def rows(self, name: str, numbers: IntArray) -> Tensor:
        """Returns pooled rows float32 [m, D] of samples by their place in `sample_index`.

        Raises:
            InvalidInputError: If there is no such activation, or a sample's mask marks no token; it is named.
        """
        if name not in self.per_token:
            raise InvalidInputError(f"{self.title} has no {name} to pool; of its tokens there are {', '.join(self.per_token)}")
        point, _, pooling = name.rpartition("/")
        width = int(self.store.info.activations[f"{point}/{TOKENS}"]["width"])
        out = torch.empty(len(numbers), width)
        for chosen in self._blocks(numbers):
            places = numbers[chosen]
            lengths = self._lengths(places)
            tokens = np.concatenate([np.arange(self.token_start[place], self.token_start[place + 1]) for place in places])
            values = torch.split(self.store.rows(f"{point}/{TOKENS}", tokens), lengths.tolist())
            for at, place, of_sample, mask in zip(chosen, places, values, self._masks_of(places, tokens, lengths), strict=True):
                if not mask.any():
                    raise InvalidInputError(
                        f"sample {self.sample_index[place]}: its mask marks none of its {len(mask)} tokens, so that there is "
                        "nothing to pool: leave the sample out, or mend its mask"
                    )
                out[at] = pool(of_sample[None], mask[None], pooling)[0]
        return out

    def _lengths(self, places: IntArray) -> IntArray:
        lengths: IntArray = self.token_start[places + 1] - self.token_start[places]
        return lengths

    def _blocks(self, numbers: IntArray) -> Iterator[IntArray]:
        """Yields positions in `numbers`, whose samples have so many tokens together as are to be in memory."""
        block = np.cumsum(self._lengths(numbers)) // TOKENS_AT_ONCE
        yield from (chosen for chosen in np.split(np.arange(len(numbers)), np.flatnonzero(np.diff(block)) + 1) if len(chosen))

    def _masks_of(self, places: IntArray, tokens: IntArray, lengths: IntArray) -> list[Tensor]:
        if self._masks is None:
            return list(torch.split(self.store.are_content(tokens), lengths.tolist()))
        return [self._masks[int(self.sample_index[place])] for place in places]


def _proven(path: str | Path, store: ActivationStore) -> SampleMasks:
    """Reads masks, each of which must be its sample's by token hash."""
    masks = read_masks(path, store)
    unproven = masks.sample_index[~masks.hash_checked]
    if len(unproven):
        raise InvalidInputError(
            f"{path}: nothing proves that the mask of sample {unproven[0]} is its own ({len(unproven):,} of {len(masks):,} masks): "
            "they were imported without input_ids, and another text's mask may be as long. Save the input_ids beside the masks, "
            "and import them anew"
        )
    return masks
