"""GroundTruthCheck: a run is only called verified when samples of it were computed again, alone, and agreed."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from exactivations.callbacks.activation_writer import ActivationWriter
from exactivations.datamodules.draw import n_witnesses
from exactivations.datamodules.text import TextDataModule
from exactivations.lit_modules.extraction.extractor import ActivationExtractor
from exactivations.lit_modules.models.ground_truth import GroundTruth
from exactivations.lit_modules.ranks import failure_of, gather, raise_together, wait_for_all_ranks
from exactivations.lit_modules.verification.sample_check import CheckedRun, SampleCheck, SampleResult, summarize
from exactivations.lit_modules.verification.store_check import damaged_shards
from exactivations.store.activation_store import ActivationStore
from exactivations.store.errors import ExactivationsError, InvalidInputError, VerificationError
from exactivations.store.means_fold import sums_that_differ, withdraw_result
from exactivations.store.run_folder import contents_of
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
        self._guarded(trainer, mine, lambda: self._look(mine))
        ranks: list[RankResults] = gather(mine)
        checksums = {shard: checksum for rank in ranks for shard, checksum in rank.checksums.items()}
        contents = contents_of(checksums, next((rank.footer for rank in ranks if rank.footer), ""))
        n = min(self.n_samples, info.n_samples if info.keeps_rows else n_witnesses(data.plan))
        if all(rank.failure is None and rank.is_settled(contents, n) for rank in ranks):
            self.verification, self.was_verified_before = mine.before, True
            return
        self._guarded(trainer, mine, lambda: self._check(trainer, pl_module, data, mine))
        mine.seconds = time.monotonic() - started
        ranks = gather(mine)
        raise_together(rank.failure for rank in ranks)
        seconds = max(rank.seconds for rank in ranks)
        self.verification = verification = summarize(
            [result for rank in ranks for result in rank.results],
            CheckedRun(
                list(info.activations), info.fingerprint, contents,
                pl_module.load(pl_module.device).model.dtype, seconds, share=seconds / (time.monotonic() - self._began),
                next_tokens_note=next((rank.no_head for rank in ranks if rank.results), None),
                damaged={shard: message for rank in ranks for shard, message in rank.damaged.items()},
            ),
        )  # fmt: skip
        if trainer.local_rank == 0:  # every node has its own folder, or the same one
            self._guarded(trainer, mine, lambda: self._write(verification))
        raise_together(gather(mine.failure))
        try:
            refuse_failed(folder, verification)
        except VerificationError as error:
            error.known_to_all_ranks = True
            raise

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Computes the longest sample alone as the check will, so that too little memory shows now and not at the end."""
        data: TextDataModule = trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.predict
        assert isinstance(pl_module, ActivationExtractor)
        loaded = pl_module.load(pl_module.device)
        if loaded.device.type == "cpu":  # where memory is the same for all, and time is short
            return
        longest = int(data.tokens.n_tokens.argmax())
        ids, _ = data.tokens.gather(np.array([longest]))
        try:
            GroundTruth(loaded.model, loaded.hook_points[:1], loaded.arguments).states(ids, torch.float32)
        except torch.cuda.OutOfMemoryError as error:
            raise InvalidInputError(
                f"out of device memory computing the longest sample ({len(ids)} tokens) alone in float32, as verifying will: "
                f"cut it with --max-length, or verify nothing now (--verify-samples 0). {error}"
            ) from error

    def _guarded(self, trainer: pl.Trainer, mine: "RankResults", work: Callable[[], None]) -> None:
        """Does a rank's work; what goes wrong is told to the others, who wait for this rank."""
        if mine.failure is None:
            doing = f"rank {trainer.global_rank} could not verify"
            mine.failure = failure_of(work, doing, ". What was written stays, unverified")

    def _write(self, verification: Verification) -> None:
        assert self._writer.info is not None
        if not verification.passed:  # before the verdict: a kill in between must not leave a result that looks verified
            withdraw_result(self._writer.folder, self._writer.info)
        write_verification(self._writer.folder, verification)

    def _look(self, mine: "RankResults") -> None:
        """Notes the verdict that is there, and which shards are."""
        assert self._writer.info is not None
        mine.before = read_verification(self._writer.folder, self._writer.info)
        mine.checksums = self._writer.folder.checksums(self._writer.info)
        mine.footer = self._writer.folder.samples_footer()

    def _check(self, trainer: pl.Trainer, extractor: ActivationExtractor, data: TextDataModule, mine: "RankResults") -> None:
        """Checks this rank's share of samples, from the shards that are its own; after a failure also all their bytes."""
        store = ActivationStore(self._writer.folder.path, allow_incomplete=True, allow_unverified=True, allow_witnesses=True)
        shards = [shard for shard in data.plan.assign(trainer.world_size)[trainer.global_rank] if shard in store.published]
        failed = mine.before if mine.before is not None and not mine.before.passed else None
        mine.damaged = damaged_shards(store, shards) if failed is not None else {}
        if store.info.means is not None:  # one shard's sums; their counts are looked at again for all when they are folded
            mine.damaged |= sums_that_differ(store.folder, [shard for shard in shards if shard not in mine.damaged][:1])
        check = SampleCheck(store, extractor, data)
        n = -(-self.n_samples // trainer.world_size)
        first = failed.failed_samples if failed is not None else None
        drawn = check.draw([shard for shard in shards if shard not in mine.damaged], n, self.seed, first)
        mine.results = [check.check(index) for index in drawn]
        mine.no_head = check.why_no_head()


@dataclass
class RankResults:
    """What a rank found."""

    nothing_new: bool
    before: Verification | None = None
    checksums: dict[int, str] = field(default_factory=dict)
    footer: str = ""
    results: list[SampleResult] = field(default_factory=list)
    damaged: dict[int, str] = field(default_factory=dict)
    no_head: str | None = None
    seconds: float = 0.0
    failure: ExactivationsError | None = None

    def is_settled(self, contents: str, n_samples: int) -> bool:
        """Whether nothing was computed, and these very bytes passed before, with as many samples."""
        before = self.before
        same = before is not None and before.passed and before.contents == contents
        return self.nothing_new and same and before is not None and len(before.samples) >= n_samples
