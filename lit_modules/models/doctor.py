"""What is safe on a given model: ways to put samples into a batch, each tried and held against every sample alone.

Each case is tried in the model's own dtype and, as a control, in float32, where rounding explains next to nothing. So a verdict
tells apart what a text book would call wrong and what is another order of summation. It holds for the lengths that were tried:
what depends on longer ones (rotary embeddings that change with the length, sliding windows) a short trial cannot see.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from exactivations.lit_modules.models.ground_truth import Comparison, GroundTruth, relative_error, tolerance_for
from exactivations.lit_modules.models.hook_points import HookPoint, dissect, resolve_hook_points
from exactivations.lit_modules.models.language_model import first_position, forward_arguments
from exactivations.lit_modules.models.model_facts import (
    ForwardError,
    States,
    is_ours_or_the_machines,
    length_dependent_rope,
    longest_sample,
    one_line,
    random_samples,
    read_states,
)
from exactivations.store.errors import InvalidInputError

SAFE_ERROR = 1e-5
N_MIXED, N_EQUAL, PADDED_BATCH = 16, 32, 8


class Verdict(StrEnum):
    """What a case came out as.

    SAFE: right in float32, and the same in the model's dtype up to 1e-5. ROUNDING_ONLY: right in float32, and in the model's dtype
    as far off as rounding explains. WRONG: anything else, a forward pass that fails included.
    """

    SAFE = "SAFE"
    ROUNDING_ONLY = "ROUNDING ONLY"
    WRONG = "WRONG"
    NOT_APPLICABLE = "not applicable"

    @property
    def is_right(self) -> bool:
        """Whether states of such batches may be used."""
        return self in (Verdict.SAFE, Verdict.ROUNDING_ONLY)


@dataclass(frozen=True)
class Case:
    """A way to put samples into a batch.

    Attributes:
        name: In words.
        batch_size: Samples in a batch.
        pads: On which side shorter samples are filled up. "none" takes samples of one length.
        mask: Whether the forward pass gets an attention_mask.
        positions: Whether it gets position_ids that count real tokens only.
        reads_last_position: Whether position [-1] is read in place of the sample's own last token.
    """

    name: str
    batch_size: int = PADDED_BATCH
    pads: Literal["none", "right", "left"] = "none"
    mask: bool = False
    positions: bool = False
    reads_last_position: bool = False

    def lacking(self, model: PreTrainedModel) -> str | None:
        """Returns the argument that this case needs and the model's forward pass does not take; None if it takes all."""
        taken = inspect.signature(model.forward).parameters  # by name: **kwargs would take it too, and drop it
        needed = (["attention_mask"] if self.mask else []) + (["position_ids"] if self.positions else [])
        return next((name for name in needed if name not in taken), None)


RIGHT_PADDING = Case("right padding, no mask", pads="right")
EXACT_LENGTH = tuple(Case(f"exact length, batch of {n}", n) for n in (1, 2, 4, 8, 16, 32))
CASES = (
    *EXACT_LENGTH,
    RIGHT_PADDING,
    Case("right padding, mask", pads="right", mask=True),
    Case("right padding, position [-1] read", pads="right", mask=True, reads_last_position=True),
    Case("left padding, mask", pads="left", mask=True),
    Case("left padding, mask and position_ids", pads="left", mask=True, positions=True),
    Case("left padding, no mask", pads="left"),
)


@dataclass(frozen=True)
class Finding:
    """What one case came out as.

    Attributes:
        case: The case.
        verdict: Worst over all hook points, samples and tokens.
        own: The worst row in the model's dtype, held against the sample alone; its `sample_index` counts the trial's samples.
        control: The worst row in float32, held against the sample alone in float32.
        n_tokens: Length of the sample with the row that decides.
        reason: Why there are no figures: what the forward pass said when it failed, or the argument that it does not take.
    """

    case: Case
    verdict: Verdict
    own: Comparison | None = None
    control: Comparison | None = None
    n_tokens: int = 0
    reason: str = ""

    @property
    def decisive(self) -> Comparison | None:
        """The row that decides: the worst one in the model's dtype, or in float32 if only that shows that the case is wrong."""
        if self.own is None or self.control is None:
            return None
        return self.control if self.own.agrees and not self.control.agrees else self.own


def verdict_of(own: Comparison, control: Comparison) -> Verdict:
    """Returns the verdict on a case from its worst row in the model's dtype and in float32."""
    if not (control.agrees and own.agrees):
        return Verdict.WRONG
    return Verdict.SAFE if own.error < SAFE_ERROR else Verdict.ROUNDING_ONLY


class Trial:
    """Tries cases on one model, which is left as it was.

    Args:
        model: The model's body, on any device.
        hook_points: What is read.
        mixed: Samples of several lengths, each int64 [L], for cases that pad.
        equal: Samples of one length, for cases that do not.
        pad_id: The token that fills up shorter samples.
        alone: Returns a sample's true states [L, D] in a dtype.

    Raises:
        InvalidInputError: If the model cannot compute a sample alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        hook_points: list[HookPoint],
        mixed: list[Tensor],
        equal: list[Tensor],
        pad_id: int,
        alone: Callable[[Tensor, torch.dtype], States],
    ) -> None:
        self.model, self.hook_points, self.pad_id = model, hook_points, pad_id
        self.samples, self._n_mixed = [*mixed, *equal], len(mixed)
        self.dtypes = list(dict.fromkeys([model.dtype, torch.float32]))
        with _failing_as_invalid_input(model):
            self.truth = {dtype: [alone(ids, dtype) for ids in self.samples] for dtype in self.dtypes}

    def examine(self, case: Case) -> Finding:
        """Tries one case.

        Raises:
            InvalidInputError: If a hook point is not reached, runs twice, or is not a tensor [B, L, D].
        """
        lacking = case.lacking(self.model)
        if lacking is not None:
            return Finding(case, Verdict.NOT_APPLICABLE, reason=f"the forward pass takes no {lacking}")
        try:
            worst = {dtype: self._worst(case, dtype) for dtype in self.dtypes}
        except ForwardError as error:
            return Finding(case, Verdict.WRONG, reason=str(error))
        own, control = worst[self.model.dtype], worst[torch.float32]
        finding = Finding(case, verdict_of(own, control), own, control)
        assert finding.decisive is not None
        return replace(finding, n_tokens=len(self.samples[finding.decisive.sample_index]))

    def _worst(self, case: Case, dtype: torch.dtype) -> Comparison:
        """Returns the row that lies furthest off, as a share of what is allowed, with the lowest cosine of all rows."""
        got: dict[str, list[Tensor]] = {point.name: [] for point in self.hook_points}
        rows: list[tuple[int, int]] = []  # sample, position in it
        for chosen in self._batches(case):
            arguments, starts = self._batch(case, chosen)
            states = read_states(self.model, self.hook_points, dtype, **arguments)
            length = arguments["input_ids"].shape[1]
            for row, (sample, start) in enumerate(zip(chosen, starts, strict=True)):
                n = len(self.samples[sample])
                place = slice(length - 1, length) if case.reads_last_position else slice(start, start + n)
                rows += [(sample, position) for position in ([n - 1] if case.reads_last_position else range(n))]
                for name, state in states.items():
                    got[name].append(state[row, place])
        comparisons = [self._compare(name, torch.cat(parts), rows, dtype) for name, parts in got.items()]
        worst = max(comparisons, key=_badness)
        return replace(worst, cosine=min(found.cosine for found in comparisons))

    def _compare(self, name: str, got: Tensor, rows: list[tuple[int, int]], dtype: torch.dtype) -> Comparison:
        """Holds rows [n, D] of one hook point against those of the samples alone; `worst_row` is a position in its sample.

        Two roundings of one row differ by luck, so a row is allowed what rounding did to it or to 99 of 100 rows, whichever is
        more. A fault cannot hide behind that: the control has no rounding to speak of.
        """
        true, exact = (torch.stack([self.truth[d][s][name][p] for s, p in rows]).double() for d in (dtype, torch.float32))
        errors, rounding = relative_error(got.double(), true), relative_error(true, exact)
        rounding = rounding.maximum(rounding.quantile(0.99, interpolation="higher"))
        cosine = nn.functional.cosine_similarity(got.double(), true, dim=1, eps=1e-300).min().item()
        found = [
            Comparison(name, sample, error, cosine, rounded, tolerance_for([dtype], rounded), position)
            for (sample, position), error, rounded in zip(rows, errors.tolist(), rounding.tolist(), strict=True)
        ]
        return max(found, key=_badness)

    def _batches(self, case: Case) -> list[list[int]]:
        """Returns which samples go together."""
        chosen = range(self._n_mixed) if case.pads != "none" else range(self._n_mixed, len(self.samples))
        return [list(chosen[i : i + case.batch_size]) for i in range(0, len(chosen), case.batch_size)]

    def _batch(self, case: Case, chosen: list[int]) -> tuple[dict[str, Tensor], list[int]]:
        """Returns the forward arguments of one batch, and where each row's real tokens start."""
        length = max(len(self.samples[i]) for i in chosen)
        ids = torch.full((len(chosen), length), self.pad_id)
        mask = torch.zeros_like(ids)
        starts = []
        for row, sample in enumerate(chosen):
            n = len(self.samples[sample])
            starts.append(length - n if case.pads == "left" else 0)
            ids[row, starts[-1] : starts[-1] + n] = self.samples[sample]
            mask[row, starts[-1] : starts[-1] + n] = 1
        arguments = {"input_ids": ids}
        if case.mask:
            arguments["attention_mask"] = mask
        if case.positions:
            arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0) + first_position(self.model)
        return arguments, starts


def _badness(found: Comparison) -> tuple[float, float]:
    """Orders rows by their error as a share of what is allowed, and equally good ones by what rounding does to them."""
    return found.error / found.tolerance if math.isfinite(found.error) else math.inf, found.rounding


def trial_for(
    model: PreTrainedModel, *, pad_id: int = 0, excluded: Iterable[int] = (), max_length: int = 64, seed: int = 0
) -> Trial:
    """Makes the trial of a whole model at all its hook points, on random tokens.

    Args:
        model: The model's body, whole.
        pad_id: The token that fills up shorter samples. No sample has it.
        excluded: Other ids that no sample has (special ones).
        max_length: Length of the longest sample, if the model has so many positions.
        seed: Of the random tokens.

    Raises:
        InvalidInputError: If nothing can be read from the model, or it cannot compute a sample alone.
    """
    anatomy = dissect(model)
    if anatomy.blocks is None:
        raise InvalidInputError(f"nothing can be read from {type(model).__name__}: {'; '.join(anatomy.notes)}")
    points = resolve_hook_points(model, anatomy.names())
    longest = longest_sample(model, max_length)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.linspace(1, longest, N_MIXED).long()[torch.randperm(N_MIXED, generator=generator)].tolist()
    mixed = random_samples(model, lengths, {pad_id, *excluded}, generator)
    equal = random_samples(model, [max(1, longest // 4)] * N_EQUAL, {pad_id, *excluded}, generator)
    return Trial(model, points, mixed, equal, pad_id, GroundTruth(model, points, forward_arguments(model)).states)


def refuse_unsafe_right_padding(
    model: PreTrainedModel, hook_points: list[HookPoint], *, pad_id: int = 0, max_length: int = 32
) -> Finding:
    """Tries right padding without a mask at some hook points of a model, which may be cut off after them: ten forward passes.

    Args:
        model: The model's body.
        hook_points: What will be read.
        pad_id: The token that will fill up shorter samples.
        max_length: Length of the longest sample that is tried.

    Raises:
        InvalidInputError: If it is neither SAFE nor ROUNDING ONLY, or if rotary embeddings depend on the batch's length, which
            no short trial can see.
    """
    name, types = type(model).__name__, length_dependent_rope(model)
    if types:
        raise InvalidInputError(
            f"padding='tail' is refused: {name} turns its rotary embedding by the length of the batch "
            f"({', '.join(sorted(types))}), so padding would change the states of real tokens. Use padding='none'"
        )
    longest = longest_sample(model, max_length)
    lengths = sorted({1, max(1, longest // 6), max(1, longest // 2), longest})
    samples = random_samples(model, lengths, {pad_id}, torch.Generator().manual_seed(0))

    def alone(ids: Tensor, dtype: torch.dtype) -> States:  # not GroundTruth: that needs the model's end
        return {name: state[0] for name, state in read_states(model, hook_points, dtype, input_ids=ids[None]).items()}

    finding = Trial(model, hook_points, samples, [], pad_id, alone).examine(RIGHT_PADDING)
    if not finding.verdict.is_right:
        raise InvalidInputError(
            f"padding='tail' needs a causal model in which padding on the right changes nothing, and {name} is not one: "
            f"{why_wrong(finding)}. Use padding='none'"
        )
    return finding


def why_wrong(finding: Finding) -> str:
    """Returns in words what makes a case WRONG."""
    worst = finding.decisive
    if worst is None or finding.control is None:
        return finding.reason
    if not math.isfinite(worst.error):
        what = "the states are not finite"
    else:
        what = f"the states are off by {worst.error:.2g} of their norm, and rounding explains {worst.tolerance:.2g}"
    where = f"at {worst.name}, token {worst.worst_row} of a sample of {finding.n_tokens}"
    return f"{what}, {where} (in float32: off by {finding.control.error:.2g})"


@contextmanager
def _failing_as_invalid_input(model: PreTrainedModel) -> Iterator[None]:
    """Turns the failure of a model on a single sample into an error that a user can act on."""
    try:
        yield
    except (ForwardError, ValueError, IndexError, TypeError, RuntimeError) as error:
        if is_ours_or_the_machines(error):
            raise
        raise InvalidInputError(
            f"{type(model).__name__} cannot compute a single sample from input_ids alone: {one_line(error)}"
        ) from error
