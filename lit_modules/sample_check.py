"""Samples of a store, read back as any user would, and held against the same samples computed alone from their texts."""

import statistics
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import numpy as np
import torch
from torch import Tensor

from exactivations.datamodules.text import TextDataModule
from exactivations.datamodules.tokenization import EncodedSample
from exactivations.lit_modules.diagnosis import explain
from exactivations.lit_modules.extraction import ActivationExtractor
from exactivations.lit_modules.ground_truth import (
    TOLERANCE_IN_WORDS,
    Comparison,
    GroundTruth,
    compare,
    pool_by_definition,
)
from exactivations.lit_modules.next_tokens import NextTokenCheck, NextTokens, StoredStates
from exactivations.lit_modules.origin import Origin, are_near_ties, origin_of
from exactivations.lit_modules.pooling import TOKENS
from exactivations.store.activation_store import ActivationStore, Sample
from exactivations.store.errors import ExactivationsError
from exactivations.store.verification import NameFigures, NextTokenFigures, Verification

MOST_EXPLAINED = 16  # failures of one rank whose cause is looked for: that costs forward passes
MOST_FAILURES = 100  # that are written down


@dataclass(frozen=True)
class SampleResult:
    """How one sample came out: every activation, the head where it applies, and what is wrong, in words."""

    sample_index: int
    comparisons: list[Comparison] = field(default_factory=list)
    next_tokens: list[NextTokens] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class SampleCheck:
    """Draws samples and checks them.

    Args:
        store: The store; it may be incomplete, as long as the samples to be checked are in it.
        extractor: What the store was made with, loaded; its model computes the truth.
        data: The texts that the store was made of.
        dtype: What the truth is computed in; None is the model's own dtype, that of the run.
    """

    def __init__(
        self, store: ActivationStore, extractor: ActivationExtractor, data: TextDataModule, dtype: torch.dtype | None = None
    ) -> None:
        self.store, self.data = store, data
        loaded = extractor.load(extractor.device)
        self._loaded, self._extractor = loaded, extractor
        self.truth = GroundTruth(loaded.model, loaded.hook_points, loaded.arguments)
        self.dtype = dtype or loaded.model.dtype
        self._run_dtype = loaded.model.dtype
        self._next_tokens = None if loaded.whole is None else NextTokenCheck(loaded.whole, loaded.model)
        identity = store.folder.read_samples(["sample_index", "token_hash"])
        self._token_hash = identity.column("token_hash")
        self._row_of = identity.column("sample_index").to_numpy()
        self._explained = 0

    def draw(self, shards: list[int], n: int, seed: int = 0, first: list[int] | None = None) -> list[int]:
        """Returns indices of up to n samples in these shards: always the same ones for the same arguments.

        The `first` ones that are in these shards come first; then those where faults show soonest: the longest sample, the
        shortest, the most padded one, one of the largest and one of the smallest batch; then a random choice.
        """
        plan = self.data.plan
        positions = np.flatnonzero(np.isin(plan.shard_of_sample, shards))
        if not len(positions) or n < 1:
            return []
        batch_of_sample = np.empty_like(plan.order)
        batch_of_sample[plan.order] = np.repeat(np.arange(plan.n_batches), np.diff(plan.batch_start))
        batch = batch_of_sample[positions]
        lengths, sizes = plan.lengths[positions], np.diff(plan.batch_start)[batch]
        padding = plan.batch_length[batch] - lengths
        extremes = [lengths.argmax(), lengths.argmin(), sizes.argmax(), sizes.argmin()]
        if padding.any():
            extremes.insert(2, padding.argmax())
        drawn = np.random.default_rng(seed).permutation(len(positions))[:n]
        index = self.data.tokens.sample_index[positions]
        again = np.intersect1d(index, first or [])
        chosen = [*again.tolist(), *index[np.array([*extremes, *drawn])].tolist()]
        return list(dict.fromkeys(chosen))[: max(n, len(again))]

    def check(self, sample_index: int) -> SampleResult:
        """Tokenizes and computes one sample alone, and compares everything that the store holds of it."""
        try:
            encoded, stored = self.data.encode_alone(sample_index), self.store.read(sample_index)
        except (ExactivationsError, IndexError) as error:
            return SampleResult(sample_index, failures=[f"sample {sample_index} cannot be checked: {error}"])
        failures = self._identity_failures(encoded, stored)
        if failures:
            return SampleResult(sample_index, failures=failures)
        states = self.truth.states(encoded.input_ids, self.dtype)
        coarser = max(self.dtype, self._run_dtype, key=lambda dtype: torch.finfo(dtype).eps)
        in_coarser = states if self.dtype == coarser else self.truth.states(encoded.input_ids, coarser)
        in_float32 = states if self.dtype == torch.float32 else self.truth.states(encoded.input_ids, torch.float32)
        comparisons = []
        for name, values in stored.activations.items():
            hook_point, _, pooling = name.rpartition("/")
            true, coarse, fine = (
                pool_by_definition(of[hook_point], encoded.token_mask, pooling) for of in (states, in_coarser, in_float32)
            )
            rows = values if pooling == TOKENS else values[None]
            compared = compare(name, sample_index, rows, true, coarse, fine, self._dtypes(values))
            comparisons.append(compared)
        wrong = [compared for compared in comparisons if not compared.agrees]
        origin = self._origin(encoded, stored, wrong, in_float32) if wrong else None
        if origin is Origin.IN_ROUNDING and are_near_ties(self._loaded.model, wrong):
            comparisons = [replace(compared, is_near_tie=not compared.agrees) for compared in comparisons]
        elif wrong:  # the first one in the order of the forward pass: what follows it is wrong because it is
            failures.append(_failure(wrong, len(comparisons), origin) + self._look_alike(encoded, stored, wrong[0].name))
        next_tokens = self._check_next_tokens(encoded, stored)
        tied = {compared.name for compared in comparisons if compared.is_near_tie}
        failures += [_next_token_failure(result) for result in next_tokens if not result.agrees and result.name not in tied]
        return SampleResult(sample_index, comparisons, next_tokens, failures)

    def _origin(
        self, encoded: EncodedSample, stored: Sample, wrong: list[Comparison], in_float32: dict[str, Tensor]
    ) -> Origin | None:
        """Finds where rows that disagree went wrong; None once enough were traced in a run that need not be excused."""
        if self._run_dtype == torch.float32 and self._explained >= MOST_EXPLAINED:
            return None
        rows, true = {}, {}
        for name in (compared.name for compared in wrong):
            hook_point, _, pooling = name.rpartition("/")
            values = stored.activations[name]
            rows[name] = values if pooling == TOKENS else values[None]
            true[name] = pool_by_definition(in_float32[hook_point], encoded.token_mask, pooling)
        return origin_of(self._extractor, self.data, stored.sample_index, rows, true)

    def _dtypes(self, values: Tensor) -> list[torch.dtype]:
        return [self.dtype, self._run_dtype, values.dtype]

    def _identity_failures(self, encoded: EncodedSample, stored: Sample) -> list[str]:
        """Says in what the sample that is stored is not the one that the text gives."""
        i = stored.sample_index
        row = int(np.searchsorted(self._row_of, i))
        expected, found = encoded.token_hash, self._token_hash[row].as_py()
        n_stored, n_now = stored.n_tokens, len(encoded.input_ids)
        if expected != found or n_stored != n_now:
            why = f"; it was cut to {n_stored} tokens there" if encoded.truncated != (n_stored < n_now) and n_stored < n_now else ""
            return [
                f"sample {i} is not the one of this text: it has token hash {found} and {n_stored} tokens in the store, "
                f"{expected} and {n_now} tokens when its text is tokenized now{why}: another dataset, order or tokenizer"
            ]
        failures = []
        if stored.input_ids is not None and not torch.equal(stored.input_ids.long(), encoded.input_ids):
            at = int((stored.input_ids.long() != encoded.input_ids).nonzero()[0])
            failures.append(
                f"sample {i}: its stored ids are not those of its text, from token {at} on (id {int(stored.input_ids[at])} "
                f"in the shard, {int(encoded.input_ids[at])} in the text): its rows belong to another sample"
            )
        if stored.token_mask is not None and not torch.equal(stored.token_mask, encoded.token_mask):
            at = int((stored.token_mask != encoded.token_mask).nonzero()[0])
            failures.append(
                f"sample {i}: its stored token_mask is not that of its text, from token {at} on "
                f"({int(stored.token_mask.sum())} tokens count there, {int(encoded.token_mask.sum())} do): the mask belongs to "
                "another sample or another choice of tokens"
            )
        return failures

    def _look_alike(self, encoded: EncodedSample, stored: Sample, name: str) -> str:
        if self._explained >= MOST_EXPLAINED:
            return ""
        self._explained += 1
        found = explain(self._loaded.model, self._loaded.arguments, self.data, encoded, stored, name)
        return f"; {found}" if found else ""

    def _check_next_tokens(self, encoded: EncodedSample, stored: Sample) -> list[NextTokens]:
        if self._next_tokens is None:
            return []
        counted = encoded.token_mask.nonzero()[:, 0]
        positions = {TOKENS: torch.arange(len(encoded.input_ids)), "last": counted[-1:], "first": counted[:1]}
        states = {
            name: StoredStates(values.reshape(-1, values.shape[-1]), positions[name.rpartition("/")[2]])
            for name, values in stored.activations.items()
            if self._next_tokens.applies_to(name)
        }
        dtypes = self._dtypes(next(iter(stored.activations.values())))
        return self._next_tokens.check(stored.sample_index, encoded.input_ids, states, dtypes)


def _failure(wrong: list[Comparison], n: int, origin: Origin | None) -> str:
    first = wrong[0]
    where = f" at token {first.worst_row}" if first.name.endswith(f"/{TOKENS}") else ""
    others = f"; so are {len(wrong) - 1} more of its {n} activations" if len(wrong) > 1 else ""
    return (
        f"sample {first.sample_index}: {first.name} is not what the sample gives alone: relative error {first.error:.2g}{where}, "
        f"allowed is {first.tolerance:.2g} (rounding does {first.rounding:.1g}), cosine {first.cosine:.4f}{others}"
        + (f"; {origin}" if origin else "")
    )


def _next_token_failure(result: NextTokens) -> str:
    return (
        f"sample {result.sample_index}: the model's head on the stored {result.name} does not give what the model gives: its "
        f"logits are off by {result.error:.2g} of their norm, allowed is {result.tolerance:.2g}; the likeliest token is the same "
        f"at {result.same_top1} of {result.positions} positions"
    )


def summarize(
    results: list[SampleResult], *, names: list[str], fingerprint: str, dtype: torch.dtype, seconds: float,
    share: float | None = None, next_tokens_note: str | None = None, checked: list[str] | None = None,
    other_failures: list[str] | None = None,
) -> Verification:  # fmt: skip
    """Returns the verdict over all samples that were checked, on all ranks."""
    results = sorted(results, key=lambda result: result.sample_index)
    failures = [failure for result in results for failure in result.failures] + (other_failures or [])
    compared = [comparison for result in results for comparison in result.comparisons]
    tied = [comparison for comparison in compared if comparison.is_near_tie]
    heads = sorted({checked.name for result in results for checked in result.next_tokens})
    return Verification(
        passed=not failures and bool(results),
        fingerprint=fingerprint,
        samples=[result.sample_index for result in results],
        figures=[figures for figures in (_figures(name, results) for name in names) if figures is not None],
        dtype=str(dtype).removeprefix("torch."),
        tolerance=TOLERANCE_IN_WORDS,
        seconds=round(seconds, 3),
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        failed_samples=[result.sample_index for result in results if result.failures],
        failures=failures[:MOST_FAILURES] if results else [*failures, "no sample was checked"],
        n_failures=len(failures),
        next_tokens=[_next_token_figures(name, results) for name in heads],
        next_tokens_note=None if heads else next_tokens_note,
        checked=(checked or []) + ([_near_ties_in_words(tied)] if tied else []),
        share=share,
    )


def _near_ties_in_words(tied: list[Comparison]) -> str:
    return (
        f"near ties: {sum(c.n_beyond for c in tied)} rows of {len({c.sample_index for c in tied})} samples are further off than "
        "their own rounding; their batches, computed again, give the same rows, and in float32 what the samples give alone"
    )


def _figures(name: str, results: list[SampleResult]) -> NameFigures | None:
    found = [comparison for result in results for comparison in result.comparisons if comparison.name == name]
    if not found:
        return None
    worst = max(found, key=lambda comparison: comparison.error / comparison.tolerance)
    errors, cosines = [c.error for c in found], [c.cosine for c in found]
    return NameFigures(
        name,
        worst_error=_finite(worst.error),
        median_error=_finite(statistics.median(errors)),
        worst_cosine=_finite(min(cosines)),
        median_cosine=_finite(statistics.median(cosines)),
        rounding=_finite(worst.rounding),
        tolerance=worst.tolerance,
    )


def _finite(figure: float) -> float | None:
    return figure if np.isfinite(figure) else None


def _probability(difference: float) -> float:
    return difference if np.isfinite(difference) else 1.0  # the largest there is, since JSON has no infinity


def _next_token_figures(name: str, results: list[SampleResult]) -> NextTokenFigures:
    found = [checked for result in results for checked in result.next_tokens if checked.name == name]
    worst = max(found, key=lambda checked: checked.error / checked.tolerance)
    positions = sum(checked.positions for checked in found)
    agreement = sum(checked.same_top1 for checked in found) / positions
    difference = _probability(max(checked.difference for checked in found))
    return NextTokenFigures(name, positions, agreement, difference, _finite(worst.error), _finite(worst.rounding), worst.tolerance)
