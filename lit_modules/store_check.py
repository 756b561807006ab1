"""Verifying a finished store, any time after its run: files, identity, and samples computed again alone."""

import time
from pathlib import Path

import torch

from exactivations.datamodules.text import TextDataModule
from exactivations.lit_modules.extraction import ActivationExtractor
from exactivations.lit_modules.hook_points import dissect
from exactivations.lit_modules.next_tokens import NextTokenCheck, before_the_head
from exactivations.lit_modules.sample_check import SampleCheck, summarize
from exactivations.store.activation_store import ActivationStore
from exactivations.store.errors import CorruptShardError, IdentityError, InvalidInputError
from exactivations.store.run_folder import ENVIRONMENT_FIELDS
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
    Samples that failed before are drawn again.

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
    if n_samples < 1:
        raise InvalidInputError(f"n_samples must be at least 1, got {n_samples}")
    started = time.monotonic()
    store = ActivationStore(path, allow_unverified=True)
    before = read_verification(store.folder, store.info)
    extractor.load(device)
    data.setup()
    notes = _refuse_another_run(store, extractor, data)
    damaged = _damaged_shards(store)
    check = SampleCheck(store, extractor, data, dtype)
    whole_shards = [shard for shard in sorted(store.published) if shard not in damaged]
    drawn = check.draw(whole_shards, n_samples, seed, first=before.failed_samples if before else None)
    results = [check.check(index) for index in drawn]
    verification = summarize(
        results, names=store.names, fingerprint=store.info.fingerprint, dtype=check.dtype, other_failures=list(damaged.values()),
        seconds=time.monotonic() - started, next_tokens_note=why_no_head(extractor), checked=[
            f"all {store.info.n_shards} shards are there",
            f"checksums of {len(whole_shards)} shards agree",
            f"token hashes, lengths and columns of all {len(store)} samples are those of the dataset",
            "model, tokenizer and options are those of the run",
            *notes,
        ],
    )  # fmt: skip
    write_verification(store.folder, verification)
    return verification


def why_no_head(extractor: ActivationExtractor) -> str | None:
    """Says why the model's head cannot be put on what is stored, or None if it can."""
    loaded = extractor.load(extractor.device)
    if loaded.whole is not None:
        check = NextTokenCheck(loaded.whole, loaded.model)
        heads = any(check.applies_to(name) for name in extractor.specs())
        return None if heads else "no state that is stored is what the model's head receives: the model changes it once more"
    points = before_the_head(dissect(loaded.model))
    if points.isdisjoint(point.name for point in loaded.hook_points):
        return f"no state before the head is stored ({' or '.join(sorted(points)) or 'final_norm'})"
    if {"tokens", "last", "first"}.isdisjoint(extractor.poolings):
        return "no single token's state is stored (pooling tokens, last or first)"
    return "the model is no causal language model, or its head is not in the checkpoint"


def _damaged_shards(store: ActivationStore) -> dict[int, str]:
    damaged = {}
    for shard in sorted(store.published):
        try:
            verify_shard(store.folder.shard_path(shard))
        except CorruptShardError as error:
            damaged[shard] = str(error)
    return damaged


def _refuse_another_run(store: ActivationStore, extractor: ActivationExtractor, data: TextDataModule) -> list[str]:
    """Refuses parts that are not those of the run; returns what differs of the environment, which is only told."""
    was, now = store.info.present_identity, {**extractor.identity(), **data.identity()}
    differing = [name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name)]
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
