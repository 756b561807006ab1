"""StepCheckpoint: one checkpoint that is replaced every so many steps, whole or not at all."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from exactivations.store.errors import InvalidInputError
from exactivations.store.shard import publishing


class StepCheckpoint(Callback):
    """Saves training every so many steps, and tells in a line how far it is where no progress bar does.

    Args:
        path: The checkpoint; its folder is made.
        every: Steps.

    Raises:
        InvalidInputError: If that is below 1.
    """

    def __init__(self, path: Path, every: int) -> None:
        if every < 1:
            raise InvalidInputError(f"a checkpoint is saved every 1 or more steps, got {every}")
        self._path, self._every = path, every

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves, if it is time."""
        if trainer.global_step % self._every:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with publishing(self._path) as temporary:
            trainer.save_checkpoint(temporary, weights_only=False)
        if trainer.progress_bar_callback is None:
            measured = ", ".join(f"{name} {float(value):.3g}" for name, value in trainer.progress_bar_metrics.items())
            print(f"step {trainer.global_step:,} of {trainer.max_steps:,}: {measured}", flush=True)
