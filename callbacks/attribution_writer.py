"""AttributionWriter: writes each prompt's attributions as they come, so that no more than one batch's are held."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from exactivations.store.attributions import KIND, Attributions, write_attributions
from exactivations.store.shard import open_shard


class AttributionWriter(Callback):
    """Writes what `LocalAttributor` predicts. Use `Trainer.predict(…, return_predictions=False)`.

    What an earlier run wrote for a file of sets, and this one does not, is removed: all sets in one, or sets that are gone.

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
            _remove_others(folder, paths)
            self._tell(attributions, paths)


def _remove_others(folder: Path, written: Sequence[Path]) -> None:
    """Removes results in the folder, and those of one set in a folder called as the set; whatever else is there, stays."""
    for path in {folder / f"{KIND}.safetensors", *folder.glob(f"*/{KIND}.safetensors")} - set(written):
        if path.is_file() and (path.parent == folder or [of["name"] for of in open_shard(path)[1]["sets"]] == [path.parent.name]):
            path.unlink()
            path.with_suffix(".json").unlink(missing_ok=True)
            if not any(path.parent.iterdir()):
                path.parent.rmdir()
