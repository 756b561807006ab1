"""A shard of rows that are written to its file as they come: none of them waits in memory, and little is left to do at the end."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from exactivations.store.incoming_shard import IncomingShard, ShardPlan
from exactivations.store.shard import publish, remove, temporary_name, writing
from exactivations.store.tensor_file import TensorFile


class StreamedShard(IncomingShard):
    """Writes each batch's rows to their places in a file beside the final one, which gets its name when it is whole.

    Args:
        path: The final name.
        plan: What the shard is to hold.
        metadata: What the file says of it.

    Raises:
        StoreError: If the file cannot be made.
    """

    def __init__(self, path: Path, plan: ShardPlan, metadata: Mapping[str, Any]) -> None:
        super().__init__(plan)
        self._path, self._temporary = path, temporary_name(path)
        with writing(path):
            self._file = TensorFile(self._temporary, plan.shapes, metadata)

    def _keep(self, tensors: Mapping[str, Tensor]) -> None:
        with writing(self._path):
            for name, rows in tensors.items():
                self._file.append(name, rows)

    def publish(self) -> None:
        """Writes the header, flushes the file to disk, and renames it; see `IncomingShard`."""
        with writing(self._path):
            self._file.finish()
            publish(self._temporary, self._path)

    def discard(self) -> None:
        """Closes and removes the file beside the final one."""
        with contextlib.suppress(OSError):
            self._file.close()
        remove(self._temporary)
