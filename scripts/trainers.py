"""Trainers of all commands: they do nothing of their own accord, and say in one line which devices cannot be had."""

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from exactivations.store.errors import InvalidInputError


def trainer_on(accelerator: str, devices: int, **options: Any) -> pl.Trainer:
    """Returns a Trainer without summaries, checkpoints or a sampler of Lightning's.

    Args:
        accelerator: "auto", "cpu" or "gpu".
        devices: How many.
        options: Of the Trainer.

    Raises:
        InvalidInputError: If the devices cannot be had.
    """
    try:
        return pl.Trainer(
            accelerator=accelerator, devices=devices, use_distributed_sampler=False, enable_checkpointing=False,
            enable_model_summary=False, **options,
        )  # fmt: skip
    except (MisconfigurationException, ValueError) as error:
        raise InvalidInputError(f"--accelerator {accelerator} --devices {devices} cannot be had here: {error}") from error
