"""A shard of which means are taken: its rows wait in memory until it is full, since a sum is taken of all of them at once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from exactivations.store.batches import ActivationSpec
from exactivations.store.host_memory import empty_on_host
from exactivations.store.incoming_shard import IncomingShard, ShardPlan, shapes_of_rows
from exactivations.store.shard import write_shard
from exactivations.store.shard_content import ShardContent
from exactivations.store.shard_sums import ArrivedSums


class ShardMemory:
    """Memory for one shard after another, as large as the largest.

    What is allocated and freed for each of them, in another size every time, makes the process grow.

    Args:
        specs: What is kept.
        most_rows: Samples of the shard that has the most.
        most_tokens: Tokens of the shard that has the most.
    """

    def __init__(self, specs: Mapping[str, ActivationSpec], most_rows: int, most_tokens: int) -> None:
        shapes = shapes_of_rows(specs, most_rows, most_tokens)
        self._tensors = {name: empty_on_host(*shape, dtype=dtype) for name, (dtype, shape) in shapes.items()}

    def of(self, plan: ShardPlan) -> dict[str, Tensor]:
        """Returns tensors for a shard; their content is arbitrary."""
        tensors = {name: self._tensors[name][: shape[0]] for name, (_, shape) in plan.shapes.items()}
        assert all(tensors[name].shape == shape for name, (_, shape) in plan.shapes.items()), "a shard larger than was said"
        return tensors


class SummedShard(IncomingShard):
    """Collects a shard's rows, and publishes its sums with what of the rows is kept.

    Args:
        path: The final name.
        plan: What the shard is to hold.
        metadata: What the file says of it.
        content: What is published.
        memory: Where the rows wait; one shard at a time can use it.
    """

    def __init__(
        self, path: Path, plan: ShardPlan, metadata: Mapping[str, Any], content: ShardContent, memory: ShardMemory
    ) -> None:
        super().__init__(plan)
        self._path, self._metadata, self._content = path, dict(metadata), content
        self._tensors = memory.of(plan)
        self._arrived = ArrivedSums(content.means)

    def _keep(self, tensors: Mapping[str, Tensor]) -> None:
        self._arrived.update(tensors)
        for name, rows in tensors.items():
            first = self._tokens if self.plan.is_per_token(name) else self._rows
            self._tensors[name][first : first + len(rows)] = rows

    def publish(self) -> None:
        """Takes the sums, holds them against what arrived, and writes the file."""
        write_shard(self._path, self._content.of(self.plan.number, self._tensors, self._arrived), self._metadata)

    def discard(self) -> None:
        """Does nothing: what came is in memory only."""
