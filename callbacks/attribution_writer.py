"""AttributionWriter: writes each prompt's attributions as they come, so that no more than one batch's are held."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from exactivations.store.attributions import Attributions, write_attributions


class AttributionWriter(Callback):
    """Writes what `LocalAttributor` predicts. Use `Trainer.predict(…, return_predictions=False)`.

    Args:
        folders: By file of sets, where its results go.
        separate: Whether each set goes into a folder of its own, called as the set, instead of all into one file.
        tell: Is called with what was written, and the files.
    """

    def __init__(self, folders: Mapping[str, Path], *, separate: bool, tell: Callable[[Attributions, list[Path]], None]) -> None:
        self._folders, self._separate, self._tell = folders, separate, tell

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Writes a batch.

        Raises:
            StoreError: If it cannot be written.
        """
        for prompt, attributions in zip(batch, outputs, strict=True):
            folder = self._folders[prompt.file]
            if self._separate:
                paths = [write_attributions(folder / name, attributions.one(name)) for name in attributions.set_names]
            else:
                paths = [write_attributions(folder, attributions)]
            self._tell(attributions, paths)
