"""RunWriter: what every callback that fills a run folder does: take the folder, agree with the other ranks, give it back."""

import socket
import sys
import uuid
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter

from exactivations.callbacks.process_watch import end_with_parent
from exactivations.datamodules.text import TextDataModule
from exactivations.lit_modules.ranks import failure_of, gather, raise_together, wait_for_all_ranks
from exactivations.store.errors import ExactivationsError, IdentityError, InvalidInputError, StoreError
from exactivations.store.lock import RunLock
from exactivations.store.run_folder import ENVIRONMENT_FIELDS, RunFolder, RunInfo


class RunWriter(BasePredictionWriter, ABC):
    """Writes a run folder while the Trainer predicts; a run that stopped goes on where it was.

    Shards that are there already are left out of the plan before the first batch is computed. Works with a `TextDataModule` (the
    plan), on any number of ranks, whose folders may be one shared folder or one on each node, to be merged by copying.

    Args:
        folder: The run folder.
        overwrite: Remove the run that is there and start anew.
        allow_changed: Fields of the environment (torch, transformers, device_type, cpu_threads) that may differ from the run
            that is there; the change is recorded.

    Raises:
        IdentityError, LockedRunError, StoreError: In `setup`, if the folder cannot take this run.
    """

    def __init__(self, folder: str | Path, *, overwrite: bool = False, allow_changed: tuple[str, ...] = ()) -> None:
        super().__init__(write_interval="batch")
        unknown = set(allow_changed) - ENVIRONMENT_FIELDS
        if unknown:
            raise InvalidInputError(
                f"only {', '.join(sorted(ENVIRONMENT_FIELDS))} may change within a run, not {', '.join(sorted(unknown))}"
            )
        self.folder = RunFolder(folder)
        self.overwrite, self.allow_changed = overwrite, frozenset(allow_changed)
        self.info: RunInfo | None = None
        self._lock: RunLock | None = None

    @abstractmethod
    def describe(self, pl_module: pl.LightningModule, data: TextDataModule) -> RunInfo:
        """Loads the module, holds the data against it, and returns the content of run.json."""

    @abstractmethod
    def refuse_strangers(self, pl_module: pl.LightningModule, data: object) -> None:
        """Refuses what this callback does not work with.

        Raises:
            InvalidInputError: Naming what it works with and what it got.
        """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes the folder, checks that it holds this run or none, and tells the data module which shards are there.

        Every rank gets to the exchange of what was found, also one that failed; then all fail together.
        """
        data = getattr(trainer, "datamodule", None)
        self.refuse_strangers(pl_module, data)
        assert isinstance(data, TextDataModule)
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

    def _take_folder(self, pl_module: pl.LightningModule, data: TextDataModule, run_id: str, rank: "RankReport") -> None:
        info = self.describe(pl_module, data)
        rank.identity = info.identity
        self.folder.refuse_strangers()  # before the lock, which leaves a file
        self._lock = RunLock(self.folder.path, run_id)
        self._lock.acquire(lambda: self._prepare(info, data))
        self.info = self.folder.read_info()
        rank.published = self.folder.published(self.info)

    def _prepare(self, info: RunInfo, data: TextDataModule) -> None:
        """Begins the run in the folder, or goes on with it; this process is alone there."""
        self.folder.prepare(info, data.sample_blocks(), overwrite=self.overwrite, allow_changed=self.allow_changed)

    def refuse_sigterm(self, trainer: pl.Trainer) -> None:
        """Ends a run that was sent SIGTERM: Lightning notes it, tells the ranks that it started, and predicts on.

        Raises:
            StoreError: If that has happened.
        """
        if trainer.received_sigterm:
            ended = StoreError("ended by SIGTERM. What was published stays; start the same command again, and it goes on from here")
            ended.known_to_all_ranks = True
            raise ended

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Waits for the other ranks: when `predict` returns, every rank has written all that it had.

        Raises:
            StoreError: If another rank ended before.
        """
        try:
            wait_for_all_ranks(trainer)
            self._conclude(trainer)
        finally:
            self._release()

    def _conclude(self, trainer: pl.Trainer) -> None:  # most have nothing to add
        """What is done when all shards of all ranks are published; every rank comes here."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Gives the folder back. What was published stays; a shard that is not full is not published."""
        if self._lock is not None and isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
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
