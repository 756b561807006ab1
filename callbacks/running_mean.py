"""RunningMean: means of a corpus, without storing its activations."""

from pathlib import Path

from exactivations.callbacks.activation_writer import ActivationWriter
from exactivations.store.shard_sums import MeanOptions


class RunningMean(ActivationWriter):
    """Takes means while the Trainer predicts, and keeps no rows but those of a few samples, for verification.

    Everything else is as in `ActivationWriter`: the run folder, its lock, resuming, any number of ranks. Each shard is published
    with its sums in float64 instead of its rows; at the end they are folded in shard order into means.safetensors, which
    `MeanActivations.load` reads. To keep the rows too: `ActivationWriter(folder, means=options)`.

    Args:
        folder: The run folder.
        options: What means are taken of.
        overwrite: See `ActivationWriter`.
        allow_changed: See `ActivationWriter`.
    """

    keeps_rows = False

    def __init__(
        self, folder: str | Path, options: MeanOptions, *, overwrite: bool = False, allow_changed: tuple[str, ...] = ()
    ) -> None:
        super().__init__(folder, overwrite=overwrite, allow_changed=allow_changed, means=options)
