"""TokenProgress: a progress bar in tokens. Batches cost differently; counting them would tell little."""

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from exactivations.datamodules.text import TextDataModule
from exactivations.store.batches import ActivationBatch


class TokenProgress(Callback):
    """Shows rank 0's tokens, tokens per second and time left on standard error, if that is a terminal.

    The time left follows the plan's predicted cost, in which a token of a long row costs more than one of a short row. Also
    measures what `extract` tells at the end: tokens computed here and the seconds that took.
    """

    def __init__(self) -> None:
        self.n_tokens = 0
        self.seconds = 0.0
        self._bar: tqdm[Any] | None = None
        self._started: float | None = None

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the bar."""
        data: TextDataModule = trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.predict
        plan = data.plan
        batches = [b for shard in data.shards_of(trainer.global_rank, trainer.world_size) for b in plan.batches_of(shard)]
        self._costs = iter(plan.batch_cost[batches])
        self._cost_left = float(plan.batch_cost[batches].sum())
        self._cost_done = 0.0
        self._bar = tqdm(
            total=int(plan.batch_tokens[batches].sum()),
            desc="extracting" if trainer.world_size == 1 else f"extracting (rank 0 of {trainer.world_size})",
            unit=" tokens", unit_scale=True, dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} tokens [{rate_fmt}{postfix}]",
            disable=trainer.global_rank != 0 or not sys.stderr.isatty(),
        )  # fmt: skip

    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Starts the clock with the first step."""
        if self._started is None:
            self._started = time.monotonic()

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Counts a step's batches."""
        assert isinstance(outputs, ActivationBatch) and self._bar is not None and self._started is not None
        cost = float(sum(next(self._costs) for _ in batch.shapes))
        self._cost_done += cost
        self._cost_left -= cost
        self.n_tokens += len(outputs.input_ids)
        left = (time.monotonic() - self._started) * self._cost_left / self._cost_done
        self._bar.set_postfix_str(f"{tqdm.format_interval(left)} left", refresh=False)
        self._bar.update(batch.computed_tokens)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Closes the bar."""
        self.seconds = 0.0 if self._started is None else time.monotonic() - self._started
        if self._bar is not None:
            self._bar.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Closes the bar, so that the error stands on a line of its own."""
        if self._bar is not None:
            self._bar.close()
