"""A shard whose batches are coming in: each is held against the plan before any of it is kept."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from exactivations.store.batches import ActivationBatch, ActivationSpec
from exactivations.store.finite import refuse_not_finite
from exactivations.store.tensor_file import Shapes


@dataclass(frozen=True)
class ShardPlan:
    """What a shard is to hold.

    Attributes:
        number: Which one it is.
        n_rows: Its samples.
        n_tokens: Their tokens.
        specs: The activations, by name.
    """

    number: int
    n_rows: int
    n_tokens: int
    specs: Mapping[str, ActivationSpec]

    @property
    def has_tokens(self) -> bool:
        """Whether anything is kept for each token; then their ids and mask are, too."""
        return any(spec.per_token for spec in self.specs.values())

    @property
    def shapes(self) -> Shapes:
        """Dtype and shape of each tensor."""
        by_row: Shapes = {"sample_index": (torch.int64, (self.n_rows,)), "n_tokens": (torch.int32, (self.n_rows,))}
        by_token: Shapes = {"input_ids": (torch.int32, (self.n_tokens,)), "token_mask": (torch.bool, (self.n_tokens,))}
        activations: Shapes = {
            name: (spec.dtype, (self.n_tokens if spec.per_token else self.n_rows, spec.width)) for name, spec in self.specs.items()
        }
        return {**by_row, **(by_token if self.has_tokens else {}), **activations}


class IncomingShard(ABC):
    """A shard that is being filled, batch after batch in the order of the plan.

    A row that comes twice, too early or never is an error of ours, and nothing of the shard is published.
    """

    def __init__(self, plan: ShardPlan) -> None:
        self.plan = plan
        self._rows = self._tokens = 0

    @property
    def is_full(self) -> bool:
        """Whether every row and token has arrived."""
        assert (self._rows == self.plan.n_rows) == (self._tokens == self.plan.n_tokens), "rows and tokens of a shard disagree"
        return self._rows == self.plan.n_rows

    def put(self, batch: ActivationBatch) -> None:
        """Takes the next batch, whose tensors are on the host.

        Raises:
            NotFiniteError: If it holds inf or NaN.
        """
        assert batch.place is not None, "a batch without a place in a plan cannot be stored"
        came, next_one = (
            (batch.place.shard, batch.place.first_row, batch.place.first_token),
            (self.plan.number, self._rows, self._tokens),
        )
        assert came == next_one, f"a batch for (shard, row, token) {came} came, the next one is {next_one}"
        assert batch.activations.keys() == self.plan.specs.keys(), f"got {list(batch.activations)}, planned {list(self.plan.specs)}"
        n_rows, n_tokens = len(batch.sample_index), len(batch.input_ids)
        assert int(batch.n_tokens.sum()) == n_tokens, "lengths and tokens of a batch disagree"
        tensors = {"sample_index": batch.sample_index, "n_tokens": batch.n_tokens.int()}
        if self.plan.has_tokens:
            tensors |= {"input_ids": batch.input_ids.int(), "token_mask": batch.token_mask}
        tensors |= batch.activations
        for name, (dtype, shape) in ShardPlan(self.plan.number, n_rows, n_tokens, self.plan.specs).shapes.items():
            found = tensors[name]
            assert found.dtype == dtype and found.shape == shape, (
                f"{name}: planned {dtype} {list(shape)}, got {found.dtype} {list(found.shape)}"
            )
        assert self._rows + n_rows <= self.plan.n_rows and self._tokens + n_tokens <= self.plan.n_tokens, (
            "more rows than were planned"
        )
        refuse_not_finite(batch)
        self._keep(tensors)
        self._rows, self._tokens = self._rows + n_rows, self._tokens + n_tokens

    @abstractmethod
    def _keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Keeps a batch's tensors, which follow those of the last one."""

    @abstractmethod
    def publish(self) -> None:
        """Makes a file of the shard, which is full.

        Raises:
            StoreError: If it cannot be written.
        """

    @abstractmethod
    def discard(self) -> None:
        """Drops what came; nothing is left of it on the disk."""
