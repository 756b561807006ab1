"""An alignment report as text for a terminal: at most 110 columns, ranges instead of thousands of lines."""

import textwrap
from itertools import groupby

import numpy as np

from exactivations.store.alignment import AlignmentReport
from exactivations.store.batch_rules import NO_BATCH, NO_ROW, OUTCOMES, OldRule
from exactivations.store.mask_identity import Identity, how_far
from exactivations.store.mask_layout import named

WIDTH = 110
MOST_LINES = 6  # of one listing
BY_BATCH = "by batch number, as code does that divides the samples seen so far (activations padded to the longest of their batch)"


def render(report: AlignmentReport) -> str:
    """Returns the report as text."""
    lines = [f"{report.store.path}: {len(report.store):,} samples", f"{report.masks}: {_what_there_is(report)}"]
    if report.wrong_number:
        lines += _wrapped(f"NUMBER: {report.wrong_number}")
    lines += ["", "by sample index", *_identity(report)]
    lines += _wrapped(f"{'WRONG' if report.problems or report.side_problem else 'ok':<8}{_lengths(report)}", 2, 10)
    lines += _listing([f"sample {sample}: {problem}" for sample, problem in sorted(report.problems.items())], 10)
    if report.same_marks is not None:
        same, compared = report.same_marks
        told = f"{same:,} of {compared:,} masks mark the same tokens as the store's own token_mask"
        lines += _wrapped(f"{'marks':<8}{told}", 2, 10)
    if report.marks_fault:
        lines += _wrapped(f"{'WRONG':<8}{report.marks_fault}", 2, 10)
    for warning in report.warnings:
        lines += _wrapped(f"{'WARNING':<8}{warning}", 2, 10)
    if report.rules:
        lines += ["", *_wrapped(BY_BATCH)]
        lines += [line for rule in report.rules for line in _rule(rule)]
    lines += ["", *_wrapped(_conclusion(report))]
    return "\n".join(lines)


def _what_there_is(report: AlignmentReport) -> str:
    if report.sizes is None:
        return f"{report.n_masks:,} samples, a store"
    runs = [(size, len(list(group))) for size, group in groupby(report.sizes)]
    shown = ", ".join(f"{times} x {size}" if times > 1 else str(size) for size, times in runs[:8])
    return f"{report.n_masks:,} masks in {len(report.sizes):,} batches of {shown}{', ...' if len(runs) > 8 else ''}"


def _lengths(report: AlignmentReport) -> str:
    if report.side_problem:
        return report.side_problem
    padding = f" (padded on the {report.side})" if report.side else ""
    if not report.problems:
        return f"every mask fits the tokens of its sample{padding}"
    return f"{named(sorted(report.problems))}: the mask in their place cannot be theirs{padding}"


def _identity(report: AlignmentReport) -> list[str]:
    if report.identity is None:
        return _wrapped(
            f"{'UNKNOWN':<8}whose masks these are: no input_ids are kept beside them. Another run's masks, or the same in another "
            "order, would look like this too wherever their lengths fit",
            2, 10,
        )  # fmt: skip
    state = "ok" if report.identity.is_same else "WRONG"
    return [
        *_wrapped(f"{state:<8}{report.identity.verdict} (by token hash)", 2, 10),
        *_listing(_moves(report, report.identity), 10),
    ]


def _moves(report: AlignmentReport, identity: Identity) -> list[str]:
    """One line for each run of samples that are found equally far from their place, if any is not in it."""
    if identity.is_same or not identity.found.any():
        return []
    index = report.store.sample_index
    lines = []
    keys = zip(identity.found.tolist(), identity.offset.tolist(), strict=True)
    for (found, offset), group in groupby(enumerate(keys), key=lambda item: item[1]):
        positions = [position for position, _ in group]
        samples = _range([int(index[positions[0]]), int(index[positions[-1]])])
        where = "in place" if offset == 0 else how_far(offset)
        lines.append(f"{samples}: {where if found else 'no mask of these tokens'}")
    return lines


def _rule(rule: OldRule) -> list[str]:
    n, n_wrong = len(rule.outcome), len(rule.outcome) - len(rule.samples("own"))
    if not n_wrong:
        return _wrapped(f"{'ok':<8}{rule.picks.rule}: every sample gets its own mask, with batches of these sizes", 2, 10)
    lines = _wrapped(f"{'WRONG':<8}{rule.picks.rule}: {n_wrong:,} of {n:,} samples do not get their own mask", 2, 10)
    lines += [
        line
        for outcome, meaning in OUTCOMES.items()
        if outcome != "own" and (samples := rule.samples(outcome))
        for line in _wrapped(f"{_range_or_named(samples)}: {meaning}", 10, 12)
    ]
    if rule.first_error:
        sample, position, size = rule.first_error
        lines += _wrapped(f"sample {sample}: index {position} is out of bounds for activations of {size} positions", 10, 12)
    return [*lines, *_listing(_picked(rule), 10)]


def _picked(rule: OldRule) -> list[str]:
    """One line for each run of samples that get the masks of a run of others."""
    picks, lines = rule.picks, []
    shift = np.where(picks.sample < 0, picks.sample, picks.sample - np.arange(len(picks.sample)))
    keys = list(zip(picks.batch.tolist(), shift.tolist(), (picks.sample < 0).tolist(), strict=True))
    for (batch, _, _), group in groupby(range(len(keys)), key=lambda sample: keys[sample]):
        samples = list(group)
        first, last = int(picks.sample[samples[0]]), int(picks.sample[samples[-1]])
        if first == samples[0]:
            continue
        if first in (NO_BATCH, NO_ROW):
            lines.append(
                f"{_range(samples)}: batch {batch}, {'which is not there' if first == NO_BATCH else 'which has no such rows'}"
            )
        else:
            lines.append(f"{_range(samples)}: batch {batch}, with the masks of {_range([first, last])}")
    return lines


def _range(samples: list[int]) -> str:
    return f"sample {samples[0]}" if samples[0] == samples[-1] else f"samples {samples[0]} to {samples[-1]}"


def _range_or_named(samples: list[int]) -> str:
    return _range(samples) if samples == list(range(samples[0], samples[-1] + 1)) else named(samples)


def _conclusion(report: AlignmentReport) -> str:
    if report.faults:
        return "These masks cannot be laid over this store's samples as they are."
    if report.identity is None:
        return "Counted by sample, all masks have the right shape; that they are this dataset's is not known."
    return "Found by sample index, every mask is its sample's own, proven by token hash."


def _listing(lines: list[str], indent: int) -> list[str]:
    shown = [line for text in lines[:MOST_LINES] for line in _wrapped(text, indent, indent + 2)]
    return [*shown, *([" " * indent + f"... and {len(lines) - MOST_LINES:,} more"] if len(lines) > MOST_LINES else [])]


def _wrapped(text: str, indent: int = 0, further: int = 2) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * further, break_long_words=False, break_on_hyphens=False
    )
