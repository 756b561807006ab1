"""Verifying a finished store, any time after its run: files, identity, and samples computed again alone."""

import time
from dataclasses import replace
from pathlib import Path

import torch

from exactivations.datamodules.text import TextDataModule
from exactivations.lit_modules.extraction.extractor import ActivationExtractor
from exactivations.lit_modules.verification.sample_check import CheckedRun, SampleCheck, summarize
from exactivations.store.activation_store import ActivationStore
from exactivations.store.errors import CorruptShardError, IdentityError, InvalidInputError, StoreError
from exactivations.store.means_fold import publish_fold, sums_that_differ, withdraw_result
from exactivations.store.run_folder import ENVIRONMENT_FIELDS, contents_of
from exactivations.store.shard import verify_shard
from exactivations.store.verification import Verification, read_verification, write_verification


def verify_store(
    path: str | Path,
    extractor: ActivationExtractor,
    data: TextDataModule,
    *,
    n_samples: int = 16,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Verification:
    """Verifies a store and writes the verdict into its verification.json.

    Looked at: that every shard is there; every byte's checksum; that model, tokenizer, options and every sample's token hash,
    length and kept columns are those of the run; and, for the samples drawn, every activation against the sample computed alone.
    Samples that failed before are drawn again. A pass is not recorded over one with more samples, nor if the truth is in a coarser
    dtype than the run's, which cannot prove it; a failure always is.

    Args:
        path: The run folder.
        extractor: Made as for the run; not loaded yet, or on the right device.
        data: Made as for the run.
        n_samples: How many samples to draw (plus those that failed before).
        seed: Seed of the draw.
        dtype: What the truth is computed in; None is the run's own dtype.
        device: Where to compute.

    Returns:
        The verdict; a store that does not agree is no exception.

    Raises:
        IncompleteStoreError: If shards are missing.
        IdentityError: If model or data are not those of the run; the store is then not judged.
        InvalidInputError: If no sample is to be drawn.
    """
    if seed < 0:
        raise InvalidInputError(f"seed must be at least 0, got {seed}")
    if n_samples < 1:
        raise InvalidInputError(f"n_samples must be at least 1, got {n_samples}")
    started = time.monotonic()
    store = ActivationStore(path, allow_unverified=True, allow_witnesses=True)
    try:
        before = read_verification(store.folder, store.info)
    except StoreError:  # it is about to be replaced
        before = None
    extractor.load(device)
    data.setup()
    notes = _refuse_another_run(store, extractor, data)
    damaged = damaged_shards(store, sorted(store.published))
    if store.info.means is not None:
        damaged |= sums_that_differ(store.folder, sorted(store.published - damaged.keys()))
    check = SampleCheck(store, extractor, data, dtype, same_machine=not notes)
    whole_shards = [shard for shard in sorted(store.published) if shard not in damaged]
    drawn = check.draw(whole_shards, n_samples, seed, first=before.failed_samples if before else None)
    results = [check.check(index) for index in drawn]
    checked = [
        f"all {store.info.n_shards} shards are there",
        f"checksums of {len(whole_shards)} shards agree",
        *_checked_sums(store, damaged),
        f"token hashes, lengths and columns of all {store.info.n_samples} samples are those of the dataset",
        "model, tokenizer and options are those of the run",
        *notes,
    ]
    contents = contents_of(store.folder.checksums(store.info), store.folder.samples_footer())
    verification = summarize(
        results,
        CheckedRun(
            store.names, store.info.fingerprint, contents, check.dtype, time.monotonic() - started,
            next_tokens_note=check.why_no_head(), checked=checked, damaged=damaged,
        ),
    )  # fmt: skip
    if verification.passed:
        why_not = _why_not_recorded(
            verification, before, torch.finfo(check.dtype).eps > torch.finfo(extractor.load(device).model.dtype).eps
        )
        if why_not:
            if before is not None and before.passed and store.info.means is not None:
                publish_fold(store.folder)
            return replace(verification, checked=[*verification.checked, f"not recorded: {why_not}"])
    if not verification.passed:  # before the verdict: a kill in between must not leave a result that looks verified
        withdraw_result(store.folder, store.info)
    write_verification(store.folder, verification)
    if verification.passed and store.info.means is not None:  # the result says whether its parts are verified
        publish_fold(store.folder)
    return verification


def _checked_sums(store: ActivationStore, damaged: dict[int, str]) -> list[str]:
    if store.info.means is None or damaged:
        return []
    return ["sums of all shards are those of their rows" if store.info.keeps_rows else "sums of all shards count their samples"]


def _why_not_recorded(passed: Verification, before: Verification | None, is_coarser: bool) -> str | None:
    """Says why a store's earlier verdict stays although it passed now, or None."""
    if is_coarser:  # faults that are smaller than its rounding pass: such a truth can condemn, and not acquit
        return "a truth in a coarser dtype than the run's does not prove it"
    if before is not None and before.passed and before.contents == passed.contents and len(before.samples) > len(passed.samples):
        return f"it passed with more samples ({len(before.samples)}) before"
    return None


def damaged_shards(store: ActivationStore, shards: list[int]) -> dict[int, str]:
    """Reads shards whole, and returns those that are not what their checksums say, with the message."""
    damaged = {}
    for shard in shards:
        try:
            verify_shard(store.folder.shard_path(shard))
        except CorruptShardError as error:
            damaged[shard] = str(error)
    return damaged


def _refuse_another_run(store: ActivationStore, extractor: ActivationExtractor, data: TextDataModule) -> list[str]:
    """Refuses parts that are not those of the run; returns what differs of the environment, which is only told."""
    was, now = store.info.present_identity, {**extractor.identity(), **data.identity()}
    # What means were taken of is neither the model's nor the data's; `sums_that_differ` looks at them.
    differing = [name for name in sorted((was.keys() | now.keys()) - {"means"}) if was.get(name) != now.get(name)]
    refused = [name for name in differing if name not in ENVIRONMENT_FIELDS]
    lines = [f"  {name}: {was.get(name)!r} there, {now.get(name)!r} now" for name in refused]
    if "dataset" in refused or not refused:
        samples = store.folder.first_difference(len(data.tokens), data.sample_blocks())
        lines += [f"  samples: {samples}"] if samples else []
    if lines:
        raise IdentityError(
            f"{store.folder.path} was not made of this model and data, so that nothing can be said of it. Name those it was made "
            "of (--model, --dataset, --tokenizer, --split, --config-name):\n" + "\n".join(lines)
        )
    return [f"{name}: {was.get(name)!r} in the run, {now.get(name)!r} now" for name in differing]
