"""CompletionProgress: a progress bar in completions, and how fast they came."""

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from exactivations.datamodules.text import TextDataModule
from exactivations.lit_modules.amplification.amplifier import LogitDiffAmplifier


class CompletionProgress(Callback):
    """Shows rank 0's completions, tokens per second and time left on standard error, if that is a terminal.

    Attributes:
        n_tokens: Tokens that were generated here.
        n_completions: Completions, likewise.
        seconds: What that took, the loading of models not counted.
    """

    def __init__(self) -> None:
        self.n_tokens = self.n_completions = 0
        self.seconds = 0.0
        self._bar: tqdm[Any] | None = None

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the bar."""
        assert isinstance(pl_module, LogitDiffAmplifier)
        data: TextDataModule = trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.predict
        shards, options = data.shards_of(trainer.global_rank, trainer.world_size), pl_module.options
        n_prompts = sum(data.plan.shard_size(shard)[0] for shard in shards)
        self._bar = tqdm(
            total=n_prompts * len(options.alphas) * options.rollouts, unit=" completions", dynamic_ncols=True,
            desc="generating" if trainer.world_size == 1 else f"generating (rank 0 of {trainer.world_size})",
            disable=trainer.global_rank != 0 or not sys.stderr.isatty(),
        )  # fmt: skip
        self._started = time.monotonic()

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Counts a step's batches."""
        assert self._bar is not None
        n_completions = sum(len(of_batch.n_tokens) for of_batch in outputs)
        self.n_tokens += sum(len(of_batch.token_ids) for of_batch in outputs)
        self.n_completions += n_completions
        self.seconds = time.monotonic() - self._started
        self._bar.set_postfix_str(f"{self.n_tokens / self.seconds:,.0f} tokens/s", refresh=False)
        self._bar.update(n_completions)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Closes the bar, so that the error stands on a line of its own."""
        if self._bar is not None:
            self._bar.close()
