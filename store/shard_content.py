"""What is published of a full shard of which means are taken: its sums, with all its rows or those of a few samples."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from exactivations.store.moments import IntArray
from exactivations.store.shard_sums import ArrivedSums, Groups, MeanOptions, sealed, sums_of_shard, to_tensors


@dataclass(frozen=True)
class ShardContent:
    """Turns the tensors of a full shard into those that are published.

    Args:
        means: What sums are taken of.
        groups_of: Gives the groups of a shard's rows, if there are groups.
        witnesses: Gives the rows of a shard that are kept; None keeps all.
    """

    means: MeanOptions
    groups_of: Callable[[int], Groups] | None = None
    witnesses: Callable[[int], IntArray] | None = None

    def of(self, shard: int, tensors: Mapping[str, Tensor], arrived: ArrivedSums | None = None) -> dict[str, Tensor]:
        """Returns what is published of this shard, whose sums must be those that `arrived`."""
        rows = dict(tensors) if self.witnesses is None else rows_of(tensors, torch.from_numpy(self.witnesses(shard)))
        groups = None if self.groups_of is None else self.groups_of(shard)
        sums = sums_of_shard(tensors, self.means, groups)
        if arrived is not None:
            arrived.check(shard, sums)
        return rows | sealed(to_tensors(sums))


def rows_of(tensors: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Returns a shard of these rows int64 [m], ascending, only, and of their tokens."""
    n_tokens = tensors["n_tokens"].long()
    owner = torch.repeat_interleave(torch.arange(len(n_tokens)), n_tokens)
    tokens = torch.isin(owner, rows).nonzero()[:, 0]
    per_token = {"input_ids", "token_mask", *(name for name in tensors if name.endswith("/tokens"))}
    return {name: values[tokens if name in per_token else rows] for name, values in tensors.items()}
