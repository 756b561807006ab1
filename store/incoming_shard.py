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
    """What a shard is to hold: which one it is, its samples, their tokens, and its activations by name."""

    number: int
    n_rows: int
    n_tokens: int
    specs: Mapping[str, ActivationSpec]

    @property
    def shapes(self) -> Shapes:
        """Dtype and shape of each tensor."""
        return shapes_of_rows(self.specs, self.n_rows, self.n_tokens)

    def is_per_token(self, name: str) -> bool:
        """Whether a tensor has a row for each token, and not for each sample."""
        return name in ("input_ids", "token_mask") or (name in self.specs and self.specs[name].per_token)


def shapes_of_rows(specs: Mapping[str, ActivationSpec], n_rows: int, n_tokens: int) -> Shapes:
    """Returns dtype and shape of each tensor that is kept of so many samples; ids and mask only where rows of tokens are."""
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "sample_index": (torch.int64, (n_rows,)),
        "n_tokens": (torch.int32, (n_rows,)),
    }
    if any(spec.per_token for spec in specs.values()):
        shapes |= {"input_ids": (torch.int32, (n_tokens,)), "token_mask": (torch.bool, (n_tokens,))}
    return shapes | {name: (spec.dtype, (n_tokens if spec.per_token else n_rows, spec.width)) for name, spec in specs.items()}


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
        tensors = {
            "sample_index": batch.sample_index,
            "n_tokens": batch.n_tokens.int(),
            "input_ids": batch.input_ids.int(),
            "token_mask": batch.token_mask,
            **batch.activations,
        }
        shapes = shapes_of_rows(self.plan.specs, n_rows, n_tokens)
        for name, planned in shapes.items():
            found = tensors[name].dtype, tuple(tensors[name].shape)
            assert found == planned, f"{name}: planned {planned}, got {found}"
        assert self._rows + n_rows <= self.plan.n_rows and self._tokens + n_tokens <= self.plan.n_tokens, (
            "more rows than were planned"
        )
        refuse_not_finite(batch)
        self._keep({name: tensors[name] for name in shapes})
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
