"""GroundTruthCheck: a run is only called verified when samples of it were computed again, alone, and agreed."""

import time
import traceback
from dataclasses import dataclass, field

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from exactivations.callbacks.activation_writer import ActivationWriter
from exactivations.callbacks.ranks import gather, wait_for_all_ranks
from exactivations.datamodules.text import TextDataModule
from exactivations.lit_modules.extraction import ActivationExtractor
from exactivations.lit_modules.sample_check import SampleCheck, SampleResult, summarize
from exactivations.lit_modules.store_check import why_no_head
from exactivations.store.activation_store import ActivationStore
from exactivations.store.errors import ExactivationsError, InvalidInputError, StoreError, VerificationError
from exactivations.store.verification import Verification, read_verification, refuse_failed, write_verification


class GroundTruthCheck(Callback):
    """At the end of a run, computes some samples of each rank again, alone, and holds the published shards against them.

    What is compared is read back from the shards as a user would read it, so that batching, pooling, copying, writing, the plan
    and the index are all under test. The verdict goes to verification.json; if anything disagrees, the run ends with an error
    and readers refuse the store. A run that was already verified, and computed nothing new, is not verified again.

    Needs an `ActivationWriter`, before which it has to stand among the callbacks: the folder is then still locked.

    Args:
        n_samples: How many samples to draw, over all ranks.
        seed: Seed of the draw.

    Raises:
        VerificationError: At the end of the run, on every rank, if a sample does not agree.
    """

    def __init__(self, n_samples: int = 16, seed: int = 0) -> None:
        if n_samples < 1:
            raise InvalidInputError(f"n_samples must be at least 1, got {n_samples}; leave the callback out to verify nothing")
        self.n_samples, self.seed = n_samples, seed
        self.verification: Verification | None = None
        self.was_verified_before = False
        self._began = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses to stand anywhere but before an ActivationWriter; starts the clock."""
        self._began = time.monotonic()
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Trainer has it, its type does not say so
        writers = [callback for callback in callbacks if isinstance(callback, ActivationWriter)]
        if not writers or callbacks.index(self) > callbacks.index(writers[0]):
            raise InvalidInputError(
                "GroundTruthCheck checks what an ActivationWriter writes: list it before one among the callbacks"
            )
        self._writer = writers[0]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Verifies. This late, since a rank without batches gets to no earlier hook; every rank gets to every exchange."""
        data: TextDataModule = trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.predict
        assert isinstance(pl_module, ActivationExtractor) and self._writer.info is not None
        folder, info = self._writer.folder, self._writer.info
        wait_for_all_ranks(trainer)  # now every shard that will be there is there
        started = time.monotonic()
        mine = RankResults(nothing_new=len(data.skip_shards) == info.n_shards)
        try:
            mine.before = read_verification(folder, info)
        except ExactivationsError as error:
            mine.failure = error
        ranks: list[RankResults] = gather(mine)
        if all(rank.nothing_new and rank.before is not None and rank.before.passed for rank in ranks):
            self.verification, self.was_verified_before = mine.before, True
            return
        try:
            if mine.failure is None:
                mine.results = self._check(trainer, pl_module, data, mine.before)
        except ExactivationsError as error:
            mine.failure = error
        except Exception as error:  # the other ranks wait for this one, whatever went wrong
            traceback.print_exc()
            mine.failure = StoreError(
                f"rank {trainer.global_rank} could not verify: {type(error).__name__}: {error}. What was written stays, unverified"
            )
        mine.seconds = time.monotonic() - started
        mine.before = None  # it was exchanged already
        ranks = gather(mine)
        failure = next((rank.failure for rank in ranks if rank.failure is not None), None)
        if failure is not None:
            failure.known_to_all_ranks = True
            raise failure
        seconds = max(rank.seconds for rank in ranks)
        self.verification = summarize(
            [result for rank in ranks for result in rank.results], names=list(info.activations), fingerprint=info.fingerprint,
            dtype=pl_module.load(pl_module.device).model.dtype, seconds=seconds,
            share=seconds / (time.monotonic() - self._began), next_tokens_note=why_no_head(pl_module),
        )  # fmt: skip
        if trainer.local_rank == 0:  # every node has its own folder, or the same one
            write_verification(folder, self.verification)
        try:
            refuse_failed(folder, self.verification)
        except VerificationError as error:
            error.known_to_all_ranks = True
            raise

    def _check(
        self, trainer: pl.Trainer, extractor: ActivationExtractor, data: TextDataModule, before: Verification | None
    ) -> list[SampleResult]:
        """Checks this rank's share of samples, from the shards that are its own."""
        store = ActivationStore(self._writer.folder.path, allow_incomplete=True, allow_unverified=True)
        mine = [shard for shard in data.plan.assign(trainer.world_size)[trainer.global_rank] if shard in store.published]
        check = SampleCheck(store, extractor, data)
        n = -(-self.n_samples // trainer.world_size)
        drawn = check.draw(mine, n, self.seed, first=before.failed_samples if before else None)
        return [check.check(index) for index in drawn]


@dataclass
class RankResults:
    """What a rank found."""

    nothing_new: bool
    before: Verification | None = None
    results: list[SampleResult] = field(default_factory=list)
    seconds: float = 0.0
    failure: ExactivationsError | None = None
