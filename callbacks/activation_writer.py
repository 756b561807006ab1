"""ActivationWriter: keeps what an ActivationExtractor computes, shard by shard, as the plan says."""

import queue
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from exactivations.callbacks.host_copy import HostCopier, HostCopy
from exactivations.callbacks.run_writer import RunWriter
from exactivations.datamodules.draw import witnesses
from exactivations.datamodules.plan import Plan
from exactivations.datamodules.text import TextDataModule
from exactivations.lit_modules.extraction.extractor import ActivationExtractor
from exactivations.lit_modules.extraction.run_description import run_info
from exactivations.lit_modules.ranks import failure_of, gather, raise_together
from exactivations.store.batches import ActivationBatch, ActivationSpec
from exactivations.store.errors import ExactivationsError, InvalidInputError, StoreError
from exactivations.store.incoming_shard import IncomingShard, ShardPlan
from exactivations.store.means_fold import publish_fold
from exactivations.store.run_folder import RunFolder, RunInfo
from exactivations.store.shard_content import ShardContent
from exactivations.store.shard_sums import MeanOptions
from exactivations.store.streamed_shard import StreamedShard
from exactivations.store.summed_shard import ShardMemory, SummedShard
from exactivations.store.verification import withdraw_passed

QUEUED_BATCHES = 4  # enough that neither side waits for the other's jitter; few enough that host memory stays small


class ActivationWriter(RunWriter):
    """Writes a run folder while the Trainer predicts; a run that stopped goes on where it was.

    Shards that are there already are left out of the plan before the first batch is computed. Copies to the host and writing
    run beside the computation, in one thread; when that falls behind, the computation waits. An error in the thread stops
    the run. A shard appears under its name whole or not at all.

    Works with a `TextDataModule` (the plan) and an `ActivationExtractor`, on any number of ranks, whose folders may be one
    shared folder or one on each node, to be merged by copying.

    Args:
        folder: The run folder.
        overwrite: Remove the run that is there and start anew.
        allow_changed: Fields of the environment (torch, transformers, device_type, cpu_threads) that may differ from the run
            that is there; the change is recorded.
        means: Means to take on the way; their sums are published with each shard, and folded at the end of the run. See
            `RunningMean` for means without rows.

    Raises:
        IdentityError, LockedRunError, StoreError: In `setup`, if the folder cannot take this run.
        InvalidInputError: In `setup`, if the extractor does not give what the means need.
    """

    keeps_rows = True

    def __init__(
        self,
        folder: str | Path,
        *,
        overwrite: bool = False,
        allow_changed: tuple[str, ...] = (),
        means: MeanOptions | None = None,
    ) -> None:
        super().__init__(folder, overwrite=overwrite, allow_changed=allow_changed)
        self.means = means
        self._thread: WriterThread | None = None

    def refuse_strangers(self, pl_module: pl.LightningModule, data: object) -> None:
        """Refuses what is not an extractor with its data."""
        if not isinstance(pl_module, ActivationExtractor) or not isinstance(data, TextDataModule):
            raise InvalidInputError(
                "ActivationWriter works with an ActivationExtractor and a TextDataModule, "
                f"got {type(pl_module).__name__} and {type(data).__name__}"
            )

    def describe(self, pl_module: pl.LightningModule, data: TextDataModule) -> RunInfo:
        """Returns the content of run.json, with what means are taken of."""
        assert isinstance(pl_module, ActivationExtractor)
        pl_module.load(pl_module.device)
        pl_module.check_fits(data)
        info = run_info(pl_module, data, pl_module.specs())
        if self.means is not None:
            self.means.check_stored(info.activations)
            groups = None if self.means.group_column is None else data.groups(self.means.group_column)
            info.identity["means"] = {
                **self.means.to_json(),
                "groups": [] if groups is None else groups.names,
                "groups_digest": None if groups is None else groups.digest,
                "keeps_rows": self.keeps_rows,
            }
        return info

    def _prepare(self, info: RunInfo, data: TextDataModule) -> None:
        super()._prepare(info, data)
        withdraw_passed(self.folder, self.folder.read_info())

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the thread that writes."""
        assert isinstance(pl_module, ActivationExtractor) and self.info is not None
        data: TextDataModule = trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.predict
        self._copier = HostCopier(pl_module.load(pl_module.device).device, QUEUED_BATCHES)
        on_cpu = pl_module.device.type == "cpu"
        self._thread = WriterThread(self.folder, self.info, data.plan, pl_module.specs(), self._content(data), on_cpu)

    def _content(self, data: TextDataModule) -> ShardContent | None:
        """Returns what is to be published of each shard; None where rows are, as they come."""
        if self.means is None:
            return None
        column, plan = self.means.group_column, data.plan
        return ShardContent(
            self.means,
            None if column is None else lambda shard: data.groups(column).at(plan.samples_of(shard)),
            None if self.keeps_rows else lambda shard: witnesses(plan, shard),
        )

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: ActivationBatch,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Hands a batch over; waits when the queue is full, raises when the thread has failed."""
        assert self._thread is not None
        self.refuse_sigterm(trainer)
        self._thread.put(self._copier.start(prediction, self._thread.check))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Waits until everything that was handed over is on the disk."""
        if self._thread is not None:
            self._thread.finish()
            self._thread = None

    def _conclude(self, trainer: pl.Trainer) -> None:
        if self.means is not None:
            self._fold(trainer)

    def _fold(self, trainer: pl.Trainer) -> None:
        """Writes the means on one rank of each node, unless shards are still in other nodes' folders; all wait for them."""
        assert self.info is not None
        info = self.info

        def fold() -> None:
            if trainer.local_rank == 0 and len(self.folder.published(info)) == info.n_shards:
                publish_fold(self.folder)

        raise_together(gather(failure_of(fold, f"rank {trainer.global_rank} could not write the means")))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stops the thread and gives the folder back."""
        if self._thread is not None:
            self._thread.abandon()
            self._thread = None
        super().on_exception(trainer, pl_module, exception)


class WriterThread:
    """Puts batches into their shards and publishes each shard when it is full. One thread, a bounded queue.

    With `beside_the_model`, where the model computes on the same cores, the thread takes no OpenMP helpers.
    """

    def __init__(
        self,
        folder: RunFolder,
        info: RunInfo,
        plan: Plan,
        specs: dict[str, ActivationSpec],
        content: ShardContent | None = None,
        beside_the_model: bool = True,
    ) -> None:
        self._folder, self._info, self._plan, self._specs = folder, info, plan, specs
        self._content = content
        self._queue: queue.Queue[HostCopy | None] = queue.Queue(maxsize=QUEUED_BATCHES)
        self._memory: ShardMemory | None = None
        self._filling: IncomingShard | None = None
        self._published: set[int] = set()
        self._error: BaseException | None = None
        self._abandoned = False
        self._beside_the_model, self._has_settings = beside_the_model, threading.Event()
        self._thread = threading.Thread(target=self._run, name="activation-writer", daemon=True)
        threads = torch.get_num_threads()
        self._thread.start()
        self._has_settings.wait()
        torch.set_num_threads(threads)  # torch notes the last setting of any thread for threads to come

    def put(self, copy: HostCopy | None) -> None:
        """Hands over a batch; blocks while the queue is full."""
        while True:
            self.check()
            try:
                return self._queue.put(copy, timeout=0.5)
            except queue.Full:
                continue

    def check(self) -> None:
        """Raises what went wrong in the thread, if anything did."""
        if isinstance(self._error, ExactivationsError):
            raise self._error
        if self._error is not None:
            raise StoreError(f"the writer failed: {type(self._error).__name__}: {self._error}") from self._error

    def finish(self) -> None:
        """Waits until all is written.

        Raises:
            StoreError: If writing failed, or a shard was begun and never filled.
        """
        self.put(None)
        self._thread.join()
        self.check()
        if self._filling is not None:
            raise _unfilled(self._filling)

    def abandon(self) -> None:
        """Ends the thread soon, without raising and without publishing what is not full."""
        self._abandoned = True
        self._thread.join(timeout=60)

    def _run(self) -> None:
        # With more OpenMP threads than cores, waiting ones sleep: beside helpers of this thread, those of a model on two cores had
        # to be woken for each operation, and its forward pass took 15% longer.
        if self._beside_the_model:
            torch.get_num_threads()  # only after torch has looked at the setting in a thread does it keep the thread's own
            torch.set_num_threads(1)
        self._has_settings.set()
        try:
            while not self._abandoned:
                try:
                    copy = self._queue.get(timeout=0.2)
                except queue.Empty:
                    continue
                if copy is None:
                    return
                self._take(copy)
        except BaseException as error:  # handed to the main thread, which raises it
            self._error = error
        finally:
            if self._filling is not None:
                self._filling.discard()

    def _take(self, copy: HostCopy) -> None:
        assert copy.batch.place is not None
        shard = copy.batch.place.shard
        if shard in self._published:
            raise StoreError(f"a batch of shard {shard} came after that was full; it stays as it was published")
        if self._filling is None:
            self._filling = self._begin(shard)
        if self._filling.plan.number != shard:  # a rank's batches come shard by shard
            raise _unfilled(self._filling)
        copy.wait()
        self._filling.put(copy.batch)
        copy.release()
        if self._filling.is_full:
            self._filling.publish()
            self._published.add(shard)
            self._filling = None

    def _begin(self, shard: int) -> IncomingShard:
        path, metadata = self._folder.shard_path(shard), {"shard": shard, "fingerprint": self._info.fingerprint}
        plan = ShardPlan(shard, *self._plan.shard_size(shard), self._specs)
        if self._content is None:
            return StreamedShard(path, plan, metadata)
        if self._memory is None:  # made in this thread: the main one is in inference mode, and such tensors stay there
            sizes = [self._plan.shard_size(shard) for shard in range(self._plan.n_shards)]
            self._memory = ShardMemory(self._specs, max(rows for rows, _ in sizes), max(tokens for _, tokens in sizes))
        return SummedShard(path, plan, metadata, self._content, self._memory)


def _unfilled(shard: IncomingShard) -> StoreError:
    return StoreError(f"shard {shard.plan.number} was not filled: batches of it are missing; it is not published")
