"""ActivationWriter: keeps what an ActivationExtractor computes, shard by shard, as the plan says."""

import queue
import socket
import sys
import threading
import uuid
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter

from exactivations.callbacks.host_copy import HostCopier, HostCopy
from exactivations.callbacks.process_watch import end_with_parent
from exactivations.callbacks.ranks import failure_of, gather, raise_together, wait_for_all_ranks
from exactivations.datamodules.draw import witnesses
from exactivations.datamodules.plan import Plan
from exactivations.datamodules.text import TextDataModule
from exactivations.lit_modules.extraction import ActivationExtractor
from exactivations.lit_modules.run_description import run_info
from exactivations.store.batches import ActivationBatch, ActivationSpec
from exactivations.store.errors import ExactivationsError, IdentityError, InvalidInputError, StoreError
from exactivations.store.lock import RunLock
from exactivations.store.means_fold import publish_fold
from exactivations.store.run_folder import ENVIRONMENT_FIELDS, RunFolder, RunInfo
from exactivations.store.shard import ShardBuffer, write_shard
from exactivations.store.shard_content import ShardContent
from exactivations.store.shard_sums import ArrivedSums, MeanOptions
from exactivations.store.verification import withdraw_passed

QUEUED_BATCHES = 4  # enough that neither side waits for the other's jitter; few enough that host memory stays small


class ActivationWriter(BasePredictionWriter):
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
        super().__init__(write_interval="batch")
        unknown = set(allow_changed) - ENVIRONMENT_FIELDS
        if unknown:
            raise InvalidInputError(
                f"only {', '.join(sorted(ENVIRONMENT_FIELDS))} may change within a run, not {', '.join(sorted(unknown))}"
            )
        self.folder = RunFolder(folder)
        self.overwrite, self.allow_changed, self.means = overwrite, frozenset(allow_changed), means
        self.info: RunInfo | None = None
        self._lock: RunLock | None = None
        self._thread: WriterThread | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes the folder, checks that it holds this run or none, and tells the data module which shards are there.

        Every rank gets to the exchange of what was found, also one that failed; then all fail together.
        """
        data = getattr(trainer, "datamodule", None)
        if not isinstance(pl_module, ActivationExtractor) or not isinstance(data, TextDataModule):
            raise InvalidInputError(
                "ActivationWriter works with an ActivationExtractor and a TextDataModule, "
                f"got {type(pl_module).__name__} and {type(data).__name__}"
            )
        end_with_parent(trainer.local_rank)
        run_id = trainer.strategy.broadcast(uuid.uuid4().hex)
        rank = RankReport()
        rank.failure = failure_of(
            lambda: self._take_folder(pl_module, data, run_id, rank), f"rank {trainer.global_rank} failed before it began"
        )
        ranks: list[RankReport] = gather(rank)
        try:
            raise_together([*(rank.failure for rank in ranks), _first_disagreement(ranks)])
        except ExactivationsError:
            self._release()
            raise
        data.skip_shards = frozenset().union(*(rank.published for rank in ranks))
        # Lightning looks for a batch sampler to infer sample indices from, and warns that there is none. Ours are in the batch.
        warnings.filterwarnings("ignore", message="Couldn't infer the batch indices")

    def _take_folder(self, extractor: ActivationExtractor, data: TextDataModule, run_id: str, rank: "RankReport") -> None:
        extractor.load(extractor.device)
        extractor.check_fits(data)
        info = run_info(extractor, data, extractor.specs())
        if self.means is not None:
            self.means.check_stored(info.activations)
            groups = None if self.means.group_column is None else data.groups(self.means.group_column)
            info.identity["means"] = {
                **self.means.to_json(),
                "groups": [] if groups is None else groups.names,
                "groups_digest": None if groups is None else groups.digest,
                "keeps_rows": self.keeps_rows,
            }
        rank.identity = info.identity
        self.folder.refuse_strangers()  # before the lock, which leaves a file
        self._lock = RunLock(self.folder.path, run_id)
        self._lock.acquire(lambda: self._prepare(info, data))
        self.info = self.folder.read_info()
        rank.published = self.folder.published(self.info)

    def _prepare(self, info: RunInfo, data: TextDataModule) -> None:
        self.folder.prepare(info, data.sample_blocks(), overwrite=self.overwrite, allow_changed=self.allow_changed)
        withdraw_passed(self.folder, self.folder.read_info())

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the thread that writes."""
        assert isinstance(pl_module, ActivationExtractor) and self.info is not None
        data: TextDataModule = trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.predict
        self._copier = HostCopier(pl_module.load(pl_module.device).device, QUEUED_BATCHES)
        self._thread = WriterThread(self.folder, self.info, data.plan, pl_module.specs(), self._content(data))

    def _content(self, data: TextDataModule) -> ShardContent:
        """Returns what is to be published of each shard."""
        column, plan = self.means.group_column if self.means else None, data.plan
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
        if trainer.received_sigterm:  # Lightning notes it, tells the ranks that it started, and predicts on
            ended = StoreError("ended by SIGTERM. What was published stays; start the same command again, and it goes on from here")
            ended.known_to_all_ranks = True
            raise ended
        self._thread.put(self._copier.start(prediction, self._thread.check))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Waits until everything that was handed over is on the disk."""
        if self._thread is not None:
            self._thread.finish()
            self._thread = None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Waits for the other ranks: when `predict` returns, every rank has written all that it had.

        Raises:
            StoreError: If another rank ended before.
        """
        try:
            wait_for_all_ranks(trainer)
            if self.means is not None:
                self._fold(trainer)
        finally:
            self._release()

    def _fold(self, trainer: pl.Trainer) -> None:
        """Writes the means on one rank of each node, unless shards are still in other nodes' folders; all wait for them."""
        assert self.info is not None
        info = self.info

        def fold() -> None:
            if trainer.local_rank == 0 and len(self.folder.published(info)) == info.n_shards:
                publish_fold(self.folder)

        raise_together(gather(failure_of(fold, f"rank {trainer.global_rank} could not write the means")))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stops the thread. What was published stays; a shard that is not full is not published."""
        if self._thread is not None:
            self._thread.abandon()
            self._thread = None
            if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
                print("interrupted: what was published stays; start the same command again, and it goes on", file=sys.stderr)
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None


@dataclass
class RankReport:
    """What the ranks tell each other before they begin."""

    identity: dict[str, Any] = field(default_factory=dict)
    published: set[int] = field(default_factory=set)
    failure: ExactivationsError | None = None
    host: str = field(default_factory=socket.gethostname)


class WriterThread:
    """Puts batches into their shards and publishes each shard when it is full. One thread, a bounded queue."""

    def __init__(
        self,
        folder: RunFolder,
        info: RunInfo,
        plan: Plan,
        specs: dict[str, ActivationSpec],
        content: ShardContent | None = None,
    ) -> None:
        self._folder, self._info, self._plan, self._specs = folder, info, plan, specs
        self._content = content or ShardContent()
        self._queue: queue.Queue[HostCopy | None] = queue.Queue(maxsize=QUEUED_BATCHES)
        self._buffer: ShardBuffer | None = None
        self._filling: int | None = None
        self._arrived: ArrivedSums | None = None
        self._published: set[int] = set()
        self._error: BaseException | None = None
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="activation-writer", daemon=True)
        self._thread.start()

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

    def _take(self, copy: HostCopy) -> None:
        assert copy.batch.place is not None
        shard = copy.batch.place.shard
        if self._buffer is None:  # made in this thread: the main one is in inference mode, and such tensors stay there
            sizes = [self._plan.shard_size(shard) for shard in range(self._plan.n_shards)]
            self._buffer = ShardBuffer(max(rows for rows, _ in sizes), max(tokens for _, tokens in sizes), self._specs)
        if shard in self._published:
            raise StoreError(f"a batch of shard {shard} came after that was full; it stays as it was published")
        if self._filling is None:
            self._buffer.begin(*self._plan.shard_size(shard))
            self._filling = shard
            self._arrived = None if self._content.means is None else ArrivedSums(self._content.means)
        if self._filling != shard:  # a rank's batches come shard by shard
            raise _unfilled(self._filling)
        copy.wait()
        if self._arrived is not None:
            self._arrived.update(copy.batch.activations)
        self._buffer.put(copy.batch)
        copy.release()
        if self._buffer.is_full:
            metadata = {"shard": shard, "fingerprint": self._info.fingerprint}
            content = self._content.of(shard, self._buffer.tensors, self._arrived)
            write_shard(self._folder.shard_path(shard), content, metadata)
            self._published.add(shard)
            self._filling = None


def _unfilled(shard: int) -> StoreError:
    return StoreError(f"shard {shard} was not filled: batches of it are missing; it is not published")


def _first_disagreement(ranks: list[RankReport]) -> IdentityError | None:
    """Says how the first rank that computes something else than rank 0 (another kind of GPU, another file) differs from it."""
    for number, rank in enumerate(ranks):
        differing = [name for name in ranks[0].identity if rank.identity.get(name) != ranks[0].identity[name]]
        if differing:
            return IdentityError(
                f"rank {number} on {rank.host} does not compute the same as rank 0 on {ranks[0].host}:\n"
                + "\n".join(f"  {name}: {ranks[0].identity[name]!r} there, {rank.identity.get(name)!r} here" for name in differing)
            )
    return None
