"""Samples of a store, read back as any user would, and held against the same samples computed alone from their texts."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import numpy as np
import torch
from torch import Tensor

from exactivations.datamodules.draw import draw
from exactivations.datamodules.text import TextDataModule
from exactivations.datamodules.tokenization import EncodedSample
from exactivations.lit_modules.extraction.extractor import ActivationExtractor
from exactivations.lit_modules.models.ground_truth import (
    FLOAT32_TOLERANCE,
    TOLERANCE_IN_WORDS,
    Comparison,
    GroundTruth,
    compare,
    pool_by_definition,
)
from exactivations.lit_modules.models.language_model import evaluating
from exactivations.lit_modules.verification.batch_proof import BatchProof, higher_than, prove, row_of
from exactivations.lit_modules.verification.diagnosis import explain
from exactivations.lit_modules.verification.next_tokens import NextTokenCheck, NextTokens, StoredStates
from exactivations.lit_modules.verification.routing import chosen_experts, first_tipped_block, is_behind
from exactivations.store.activation_store import ActivationStore, Sample
from exactivations.store.errors import ExactivationsError
from exactivations.store.pooling_names import TOKENS, position_of
from exactivations.store.verification import NameFigures, NextTokenFigures, Verification

MOST_EXPLAINED = 16  # failures of one rank whose cause is looked for: that costs forward passes
MOST_FAILURES = 100  # that are written down
MOST_STATE_BYTES = 2**30  # of a sample's states at all hook points that are on the host together


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
        same_machine: Whether the store was made with the kernels that are here: then they must give the same rows again.
    """

    def __init__(
        self,
        store: ActivationStore,
        extractor: ActivationExtractor,
        data: TextDataModule,
        dtype: torch.dtype | None = None,
        *,
        same_machine: bool = True,
    ) -> None:
        self.store, self.data = store, data
        loaded = extractor.load(extractor.device)
        self._loaded, self._extractor = loaded, extractor
        self.truth = GroundTruth(loaded.model, loaded.hook_points, loaded.arguments)
        self.dtype = dtype or loaded.model.dtype
        self._run_dtype, self._same_machine = loaded.model.dtype, same_machine
        self._next_tokens = None if loaded.whole is None else NextTokenCheck(loaded.whole, loaded.model)
        identity = store.folder.read_samples(["sample_index", "token_hash"])
        self._token_hash = identity.column("token_hash")
        self._row_of = identity.column("sample_index").to_numpy()
        self._explained = 0

    def why_no_head(self) -> str | None:
        """Says why the model's head cannot be put on what is stored, or None if it can."""
        if self._next_tokens is not None and any(map(self._next_tokens.applies_to, self.store.names)):
            return None
        return self._loaded.no_head or "no stored state is what the model's head receives: the model changes it once more"

    def draw(self, shards: list[int], n: int, seed: int = 0, first: list[int] | None = None) -> list[int]:
        """Returns indices of up to n samples in these shards: always the same ones for the same arguments; see `draw`.

        The `first` ones that are in these shards come first. Of a run that kept means only, its witnesses are drawn from.
        """
        plan, index = self.data.plan, self.data.tokens.sample_index
        inside = np.isin(plan.shard_of_sample, shards)
        if not self.store.info.keeps_rows:
            inside &= np.isin(index, self.store.sample_index)
        positions = np.flatnonzero(inside)
        if not len(positions) or n < 1:
            return []
        again = np.intersect1d(index[positions], first or []).tolist()
        chosen = [*again, *index[draw(plan, positions, n + len(again), seed)].tolist()]
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
        comparisons, alone = self._compare(encoded, stored)
        wrong = [compared for compared in comparisons if not compared.agrees]
        proof = self._prove(encoded, stored, wrong, alone)
        if wrong and proof is not None and proof.holds:
            tied = self._near_ties(encoded, sample_index, wrong)
            comparisons = [replace(compared, is_near_tie=compared.name in tied) for compared in comparisons]
            wrong = [compared for compared in wrong if compared.name not in tied]
        if wrong:  # the first one in the order of the forward pass: what follows it is wrong because it is
            failures.append(_failure(wrong, len(comparisons), proof) + self._look_alike(encoded, stored, wrong[0].name))
        elif proof is not None and not proof.holds:
            first = next(iter(proof.changed | proof.wrong))
            failures.append(_slipped(sample_index, proof) + self._look_alike(encoded, stored, first))
        next_tokens = self._check_next_tokens(encoded, stored)
        tied = {compared.name for compared in comparisons if compared.is_near_tie}
        failures += [_next_token_failure(result) for result in next_tokens if not result.agrees and result.name not in tied]
        return SampleResult(sample_index, comparisons, next_tokens, failures)

    def _compare(self, encoded: EncodedSample, stored: Sample) -> tuple[list[Comparison], dict[str, Tensor]]:
        """Compares all activations; returns also the rows of the sample alone without rounding, as `prove` takes them."""
        coarser = max(self.dtype, self._run_dtype, key=lambda dtype: torch.finfo(dtype).eps)
        comparisons, alone = [], {}
        for names in self._in_parts(list(stored.activations), len(encoded.input_ids)):
            of = {dtype: self._rows_alone(encoded, names, dtype) for dtype in {self.dtype, coarser, torch.float32}}
            for name in names:
                values = stored.activations[name]
                true, coarse, fine = (of[dtype][name] for dtype in (self.dtype, coarser, torch.float32))
                comparisons.append(compare(name, stored.sample_index, _as_rows(values), true, coarse, fine, self._dtypes(values)))
                if self._run_dtype != torch.float32 or values.dtype != torch.float32:
                    alone[name] = fine
        return comparisons, alone

    def _rows_alone(self, encoded: EncodedSample, names: list[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns the rows, float64 [n, D], of the sample computed alone in a dtype."""
        states = self.truth.states(encoded.input_ids, dtype, list(dict.fromkeys(name.rpartition("/")[0] for name in names)))
        rows = {}
        for name in names:
            hook_point, _, pooling = name.rpartition("/")
            rows[name] = pool_by_definition(states[hook_point], encoded.token_mask, pooling)
        return rows

    def _in_parts(self, names: list[str], n_tokens: int) -> Iterator[list[str]]:
        """Yields the names in parts whose states fit into memory together: each part takes forward passes of its own."""
        width = max(self._loaded.widths.values())
        points = list(dict.fromkeys(name.rpartition("/")[0] for name in names))
        size = max(1, MOST_STATE_BYTES // (n_tokens * width * 8))
        for first in range(0, len(points), size):
            part = set(points[first : first + size])
            yield [name for name in names if name.rpartition("/")[0] in part]

    def _prove(
        self, encoded: EncodedSample, stored: Sample, wrong: list[Comparison], alone: dict[str, Tensor]
    ) -> BatchProof | None:
        """Computes the planned batch again: always where rounding could hide a fault, else to find where one lies.

        In float32 the sample alone is the proof itself, unless it fails.
        """
        if alone:
            names = list(alone)
        elif wrong and self._explained < MOST_EXPLAINED:
            names = [compared.name for compared in wrong]
            for part in self._in_parts(names, len(encoded.input_ids)):
                alone |= self._rows_alone(encoded, part, higher_than(self._run_dtype))
        else:
            return None
        rows = {name: _as_rows(stored.activations[name]) for name in names}
        return prove(self._extractor, self.data, stored.sample_index, rows, alone, same_machine=self._same_machine)

    @torch.no_grad()
    def _near_ties(self, encoded: EncodedSample, sample_index: int, wrong: list[Comparison]) -> set[str]:
        """Returns which activations lie behind a router that chose other experts for the sample in its batch than alone."""
        model, arguments = self._loaded.model, self._loaded.arguments
        ids, batch = encoded.input_ids, self.data.batch_with(sample_index)
        row, width = row_of(batch, sample_index), batch.input_ids.shape[1]
        with evaluating(model):
            alone = chosen_experts(model, lambda: model(input_ids=ids[None].to(model.device), **arguments))
        together = chosen_experts(model, lambda: self._extractor(batch))
        tipped = first_tipped_block(alone, {path: chosen[row * width :][: len(ids)] for path, chosen in together.items()})
        return set() if tipped is None else {c.name for c in wrong if is_behind(c.name.rpartition("/")[0], tipped)}

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
        states = {
            name: StoredStates(_as_rows(values), _positions(name.rpartition("/")[2], counted, len(encoded.input_ids)))
            for name, values in stored.activations.items()
            if self._next_tokens.applies_to(name)
        }
        dtypes = self._dtypes(next(iter(stored.activations.values())))
        return self._next_tokens.check(stored.sample_index, encoded.input_ids, states, dtypes)


def _positions(pooling: str, counted: Tensor, n_tokens: int) -> Tensor:
    """Returns of which tokens the rows are, int64 [k], where a pooling keeps the states of single tokens."""
    position = position_of(pooling)
    return torch.arange(n_tokens) if position is None else counted[position][None]


def _as_rows(values: Tensor) -> Tensor:
    """Returns a sample's activation as rows [n, D]: a pooled one is a single row."""
    return values if values.ndim == 2 else values[None]


def _failure(wrong: list[Comparison], n: int, proof: BatchProof | None) -> str:
    first = wrong[0]
    where = f" at token {first.worst_row}" if first.name.endswith(f"/{TOKENS}") else ""
    others = f"; so are {len(wrong) - 1} more of its {n} activations" if len(wrong) > 1 else ""
    cause = proof.in_words() if proof is not None else ""
    if proof is not None and proof.holds:
        cause = "its batch is right in a higher precision: a kernel of this dtype or attention implementation is at fault"
    return (
        f"sample {first.sample_index}: {first.name} is not what the sample gives alone: relative error {first.error:.2g}{where}, "
        f"allowed is {first.tolerance:.2g} (rounding does {first.rounding:.1g}), cosine {first.cosine:.4f}{others}"
        + (f"; {cause}" if cause else "")
    )


def _slipped(sample_index: int, proof: BatchProof) -> str:
    """Says what is wrong with rows that are within rounding of the truth."""
    found = proof.changed or proof.wrong
    name = next(iter(found))
    allowed = "no error is" if proof.changed else f"{FLOAT32_TOLERANCE:g} is"
    others = f"; so are {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"sample {sample_index}: {name} is not what the sample gives alone, though rounding would hide it: relative error "
        f"{found[name]:.2g}, {allowed} allowed{others}; {proof.in_words()}"
    )


def _next_token_failure(result: NextTokens) -> str:
    return (
        f"sample {result.sample_index}: the model's head on the stored {result.name} does not give what the model gives: its "
        f"logits are off by {result.error:.2g} of their norm, allowed is {result.tolerance:.2g}; the likeliest token is the same "
        f"at {result.same_top1} of {result.positions} positions"
    )


@dataclass(frozen=True)
class CheckedRun:
    """What a verdict says of the run besides its samples: see `exactivations.store.verification.Verification`."""

    names: list[str]
    fingerprint: str
    contents: str
    dtype: torch.dtype
    seconds: float
    share: float | None = None
    next_tokens_note: str | None = None
    checked: list[str] = field(default_factory=list)
    damaged: dict[int, str] = field(default_factory=dict)


def summarize(results: list[SampleResult], run: CheckedRun) -> Verification:
    """Returns the verdict over all samples that were checked, on all ranks."""
    results = sorted(results, key=lambda result: result.sample_index)
    failures = [failure for result in results for failure in result.failures] + list(run.damaged.values())
    compared = [comparison for result in results for comparison in result.comparisons]
    tied = [comparison for comparison in compared if comparison.is_near_tie]
    heads = sorted({head.name for result in results for head in result.next_tokens})
    return Verification(
        passed=not failures and bool(results),
        fingerprint=run.fingerprint,
        contents=run.contents,
        samples=[result.sample_index for result in results],
        figures=[figures for figures in (_figures(name, results) for name in run.names) if figures is not None],
        dtype=str(run.dtype).removeprefix("torch."),
        tolerance=TOLERANCE_IN_WORDS,
        seconds=round(run.seconds, 3),
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        damaged_shards=sorted(run.damaged),
        failed_samples=[result.sample_index for result in results if result.failures],
        failures=failures[:MOST_FAILURES] if results else [*failures, "no sample was checked"],
        n_failures=len(failures),
        next_tokens=[_next_token_figures(name, results) for name in heads],
        next_tokens_note=None if heads else run.next_tokens_note,
        checked=run.checked + ([_near_ties_in_words(tied)] if tied else []),
        share=run.share,
    )


def _near_ties_in_words(tied: list[Comparison]) -> str:
    return (
        f"near ties: in {len({c.sample_index for c in tied})} samples routers choose other experts than for the sample alone, and "
        f"{sum(c.n_beyond for c in tied)} rows are further off than their own rounding; their batches are right in float32"
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
