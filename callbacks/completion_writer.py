"""CompletionWriter: keeps what a LogitDiffAmplifier generates, shard by shard, as the plan says."""

from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from torch import Tensor

from exactivations.callbacks.run_writer import RunWriter
from exactivations.datamodules.text import TextDataModule
from exactivations.lit_modules.amplification.amplifier import Completions
from exactivations.store.batches import TokenBatch, TokenStep
from exactivations.store.completions import SCORE
from exactivations.store.errors import InvalidInputError, StoreError
from exactivations.store.run_folder import RunInfo
from exactivations.store.shard import write_shard


@runtime_checkable
class Completer(Protocol):
    """A LightningModule whose `predict_step` returns the `Completions` of each batch of a `TokenStep`."""

    def check_fits(self, data: TextDataModule) -> None:
        """Refuses prompts that cannot be completed."""

    def run_info(self, data: TextDataModule) -> RunInfo:
        """Returns the content of run.json, with `alphas`, `rollouts` and `eos_token_ids` in its identity."""


class CompletionWriter(RunWriter):
    """Writes completions into a run folder while the Trainer predicts; see `RunWriter`. `CompletionStore` reads them.

    A shard is published when the completions of all of its prompts are there, whole or not at all; at most the shards in flight
    are generated again after a kill.
    """

    _arrived: tuple[int, list[tuple[Completions, TokenBatch]]] | None = None

    def refuse_strangers(self, pl_module: pl.LightningModule, data: object) -> None:
        """Refuses what does not complete prompts."""
        if not isinstance(pl_module, Completer) or not isinstance(data, TextDataModule):
            raise InvalidInputError(
                "CompletionWriter works with a LogitDiffAmplifier and a TextDataModule, "
                f"got {type(pl_module).__name__} and {type(data).__name__}"
            )

    def describe(self, pl_module: pl.LightningModule, data: TextDataModule) -> RunInfo:
        """Returns the content of run.json."""
        assert isinstance(pl_module, Completer)
        pl_module.check_fits(data)
        return pl_module.run_info(data)

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: list[Completions],
        batch_indices: Any,
        batch: TokenStep,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Takes the completions of a step's batches, and publishes the shard if they were the last that it lacked."""
        assert self.info is not None and batch.place is not None
        self.refuse_sigterm(trainer)
        data: TextDataModule = trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.predict
        shard = batch.place.shard
        if self._arrived is None:
            self._arrived = shard, []
        if self._arrived[0] != shard:  # a rank's batches come shard by shard
            raise _unfilled(self._arrived[0])
        self._arrived[1].extend(zip(prediction, batch.on_host.batches(), strict=True))
        n_there = sum(len(prompts.sample_index) for _, prompts in self._arrived[1])
        if n_there == data.plan.shard_size(shard)[0]:
            metadata = {"shard": shard, "fingerprint": self.info.fingerprint}
            write_shard(self.folder.shard_path(shard), shard_tensors(self._arrived[1]), metadata)
            self._arrived = None

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sees that nothing is left over.

        Raises:
            StoreError: If a shard was begun and never filled.
        """
        if self._arrived is not None:
            raise _unfilled(self._arrived[0])

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Drops a shard that is not full and gives the folder back."""
        self._arrived = None
        super().on_exception(trainer, pl_module, exception)


def shard_tensors(batches: list[tuple[Completions, TokenBatch]]) -> dict[str, Tensor]:
    """Returns what is stored of the batches of one shard: prompts in plan order, and the completions of each together."""
    batches = sorted(batches, key=lambda batch: batch[1].place.first_row if batch[1].place is not None else 0)
    found, prompts = [found for found, _ in batches], [prompts for _, prompts in batches]
    scores = [part.scores for part in found if part.scores is not None]
    return {
        "sample_index": torch.cat([part.sample_index for part in prompts]),
        "n_prompt_tokens": torch.cat([part.n_tokens for part in prompts]).int(),
        "prompt_ids": torch.cat([part.input_ids.flatten() for part in prompts]).int(),
        "alpha": torch.cat([part.alpha for part in found]),
        "rollout": torch.cat([part.rollout for part in found]).int(),
        "seed": torch.cat([part.seed for part in found]),
        "n_tokens": torch.cat([part.n_tokens for part in found]).int(),
        "ended": torch.tensor([how == "eos" for part in found for how in part.finished]),
        "token_ids": torch.cat([part.token_ids for part in found]).int(),
        **{f"{SCORE}{name}": torch.cat([getattr(s, name) for s in scores]).float() for name in (vars(scores[0]) if scores else ())},
    }


def _unfilled(shard: int) -> StoreError:
    return StoreError(f"shard {shard} was not filled: batches of it are missing; it is not published")
