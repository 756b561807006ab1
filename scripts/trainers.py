"""Trainers of all commands: they do nothing of their own accord, and say in one line which devices cannot be had."""

from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy

from exactivations.store.errors import InvalidInputError

PATIENCE = timedelta(days=7)
"""How long ranks wait for one another: a fast one may have shards less to do for hours, and ends at once when another is gone."""


def trainer_on(accelerator: str, devices: int, **options: Any) -> pl.Trainer:
    """Returns a Trainer without summaries, checkpoints or a sampler of Lightning's.

    Ranks talk by gloo, on GPUs too: little is said, none of it while batches are extracted, and where another rank is gone gloo
    raises an error at once. NCCL waits until its time is over, and then ends the process.

    Args:
        accelerator: "auto", "cpu" or "gpu".
        devices: How many.
        options: Of the Trainer.

    Raises:
        InvalidInputError: If the devices cannot be had.
    """
    if devices * options.get("num_nodes", 1) > 1:
        options["strategy"] = DDPStrategy(process_group_backend="gloo", timeout=PATIENCE)
    try:
        return pl.Trainer(
            accelerator=accelerator, devices=devices, use_distributed_sampler=False, enable_checkpointing=False,
            enable_model_summary=False, **options,
        )  # fmt: skip
    except (MisconfigurationException, ValueError) as error:
        raise InvalidInputError(f"--accelerator {accelerator} --devices {devices} cannot be had here: {error}") from error
