"""What was found about probes, in words and tables: as Markdown for readers, and as a short table for a terminal."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exactivations.lit_modules.probes.group_bootstrap import Interval
    from exactivations.lit_modules.probes.probe_results import ProbeResults, Role, VectorResult

LEVEL = "95%"
"""Of all intervals: what `Bootstrap` leaves `group_bootstrap.intervals` to take."""

METRICS = {
    "auroc": "AUROC", "f1": "F1", "brier": "Brier score",
    "r2": "R²", "pearson": "Pearson's correlation", "spearman": "Spearman's rank correlation",
}  # fmt: skip
LOWER_IS_BETTER = ("brier", "calibration_error", "mean_absolute_error")
MOST_ROWS: "Mapping[Role, int]" = {"probe": 12, "control": 3, "baseline": 12, "ensemble": 12}
"""In the terminal."""


def probe_report(results: "ProbeResults", *, picture: str = "layers.png", how: Sequence[str] = ()) -> str:
    """Returns a report in Markdown. All numbers in it are of the results, or of `how`.

    Args:
        results: What was found.
        picture: Where `layers_plot` drew it, as seen from the report.
        how: Further sentences, in Markdown, on what the results do not know: the model, the kind of probe, which strengths were
            tried.
    """
    sections = [
        f"# Probes for {_code(results.label)}",
        _asked(results),
        "## Answer\n\n" + _answer(results),
        _warnings(results),
        f"![{metric_name(results.headline)} on test by layer]({picture})",
        "## Parts\n\n" + _parts(results),
        "## All metrics on test\n\n" + _all_metrics(results),
        _threshold(results),
        "## Controls\n\n" + _controls(results),
        "## Every vector\n\n" + _vectors(results),
        "## How it was done\n\n" + "\n".join(f"- {line}" for line in [*_how(results), *how]),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def results_table(results: "ProbeResults", *, everything: bool = False) -> str:
    """Returns the chosen vector's results, and a line for each of the vectors that are best on validation, as text.

    Args:
        results: What was found.
        everything: Show all vectors, and not only the first ones of each role.
    """
    best, test, metric = _best(results), results.parts["test"], metric_name(results.headline)
    groups = f"{test['groups']:,} groups by {results.group_column}" if results.group_column else "no groups"
    lines = [
        f"{results.label}: {metric} {_span(best.test)} on test by {best.name} ({test['examples']:,} {results.unit}s, {groups})"
    ]
    if results.over_baseline is not None:
        lines.append(f"  over {results.best_baseline}: {_span(results.over_baseline, '+.3f')}")
    shown: list[VectorResult] = []
    for role, most in MOST_ROWS.items():
        ranked = sorted(results.of_role(role), key=lambda vector: (vector.validation is None, -(vector.validation or 0.0)))
        shown += ranked if everything else ranked[:most]
    rows = [("", "vector", "validation", f"{metric} on test", "shuffled", "strength")]
    rows += [("*" if vector.name == best.name else "", vector.name, *_cells(vector)) for vector in shown]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for mark, name, *cells in rows:
        figures = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[2:], strict=True))
        lines.append(f"{mark:<1} {name:<{widths[1]}}  {figures}")
    if len(shown) < len(results.vectors):
        lines.append(f"  and {len(results.vectors) - len(shown):,} more, worse on validation, in metrics.json")
    lines.append(f"*: chosen on validation; [ ]: {LEVEL} intervals; shuffled: span of the intervals with shuffled labels")
    return "\n".join(lines + [f"WARNING: {warning}" for warning in results.warnings])


def metric_name(metric: str) -> str:
    """Returns a metric's name as readers know it."""
    return METRICS.get(metric, metric.replace("_", " "))


def _asked(results: "ProbeResults") -> str:
    where = f"a {results.unit}'s activations"
    if not results.classes:
        return f"Asked: can the value of {_code(results.label)} be read off {where}?"
    classes = " or ".join(map(_code, results.classes)) if len(results.classes) == 2 else _listed(map(_code, results.classes))
    positive = f" The positive class is {_code(results.classes[1])}." if len(results.classes) == 2 else ""
    return f"Asked: can {_code(results.label)} ({classes}) be read off {where}?{positive}"


def _answer(results: "ProbeResults") -> str:
    best, metric = _best(results), metric_name(results.headline)
    scale = "0.5 is chance, 1 is perfect" if results.classes else "0 is no better than the labels' mean, 1 is perfect"
    first = (
        f"The probe of {_code(best.name)}, chosen on validation ({metric} {_value(best.validation)} there), reaches "
        f"**{metric} {_span(best.test)}** on test ({scale})."
    )
    if results.over_baseline is None or results.best_baseline is None:
        return first + " No baseline was given, so that what the text alone would reach is not known."
    over, name = results.over_baseline, _code(results.best_baseline)
    difference = f"{_span(over, '+.3f')} over {name}, the baseline that is best on test"
    if over.low > 0:
        return f"{first} That is **{difference}**: the activations tell more than this baseline."
    if over.high < 0:
        return f"{first} That is **{difference}**: the baseline alone tells more than the activations."
    return f"{first} That is **{difference}**, an interval that holds 0: the baseline alone may be as good."


def _warnings(results: "ProbeResults") -> str:
    if not results.warnings:
        return ""
    lines = [f"> - {_escaped(warning)}" for warning in results.warnings]
    return "\n".join(["> **Warnings**", ">", *lines])


def _parts(results: "ProbeResults") -> str:
    columns = ["part", "samples", *(["tokens"] if results.unit == "token" else []), "groups", *map(_code, results.classes)]
    rows = []
    for part, counts in results.parts.items():
        n = [counts["samples"], *([counts["examples"]] if results.unit == "token" else []), counts["groups"]]
        rows.append([part, *(f"{count:,}" for count in [*n, *(counts["classes"][name] for name in results.classes)])])
    grouped = (
        f"No group ({_code(results.group_column)}) is in two parts." if results.group_column else "Every sample is its own group."
    )
    return _table(columns, rows) + f"\n\n{grouped}"


def _all_metrics(results: "ProbeResults") -> str:
    names = list(results.metrics)
    rows = []
    for what in results.metrics[names[0]]:
        better = " (lower is better)" if what in LOWER_IS_BETTER else ""
        style = ".4g" if what == "mean_absolute_error" else ".3f"  # it is in the labels' own unit
        rows.append([metric_name(what) + better, *(_span(results.metrics[name][what], style) for name in names)])
    return _table(["metric", *map(_code, names)], rows)


def _threshold(results: "ProbeResults") -> str:
    threshold = results.threshold
    if threshold is None:
        return ""
    positive, negative = map(_code, reversed(results.classes))
    return (
        f"## Threshold\n\nCalled {positive} where its log-odds, the probe's score, are above {threshold.value:.4f}. That was "
        f"fixed on {_escaped(threshold.fixed_on)}, so that at most {threshold.max_fpr:g} of its {threshold.n_negatives:,} "
        f"negatives lies above. On test, the share above is {_span(threshold.recall)} of {positive} (recall) and "
        f"{_span(threshold.false_positive_rate)} of {negative} (false positives)."
    )


def _controls(results: "ProbeResults") -> str:
    best, metric = _best(results), metric_name(results.headline)
    lines = []
    if best.shuffled:
        should = "0.5" if results.classes else "0 or a little less"
        of = ", ".join(map(_span, best.shuffled))
        lines.append(f"Shuffled labels, trained, chosen and tested on: {metric} {of} of {_code(best.name)}; it should be {should}.")
    else:
        lines.append("Labels were not shuffled.")
    same = [vector for vector in results.of_role("control") if vector.name.endswith(f": {best.name}")]
    lines += [
        f"{_code(vector.name)}: {metric} {_span(vector.test)}, where the model itself has {_span(best.test)}." for vector in same
    ]
    if results.over_untrained is not None:
        which = _code(results.best_untrained) if results.best_untrained else "the untrained model"
        lines.append(f"Over {which}, the untrained model's best on validation, it has {_span(results.over_untrained, '+.3f')}.")
    if results.selectivity is not None:
        lines.append(
            f"Selectivity {results.selectivity:+.3f}: accuracy on the labels, less that on a control task of random labels "
            "(Hewitt and Liang 2019). Near 0, the probe itself could learn anything."
        )
    if results.erased is not None:
        lines.append(
            f"Erasure: after LEACE, fitted on train, removed from {_code(best.name)} what is linearly available of the label, a "
            f"probe that was trained anew, on validation, has {metric} {_span(results.erased)}"
            + (f"; trained on validation without erasure it has {_span(results.not_erased)}." if results.not_erased else ".")
        )
    return "\n".join(f"- {line}" for line in lines)


def _vectors(results: "ProbeResults") -> str:
    columns = ["vector", f"{metric_name(results.headline)} on validation", "on test", "shuffled labels, span on test", "strength"]
    rows = []
    for vector in results.vectors:
        chosen = " (chosen)" if vector.name == results.best else ""
        rows.append([_code(vector.name) + chosen, *_cells(vector)])
    return _table(columns, rows)


def _how(results: "ProbeResults") -> list[str]:
    resampled = f"groups ({_code(results.group_column)})" if results.group_column else "samples"
    lines = [
        "Test was looked at once. Strengths, and the vector to report, were chosen on validation, by "
        f"{metric_name(results.headline)}; the larger the strength, the less regularised the probe.",
        f"Intervals are of {LEVEL}, by {results.n_resamples:,} resamples of whole {resampled} of test. They say nothing of how "
        "probes would come out on other training data; the tests of many vectors are not corrected for being many.",
    ]
    n_undefined = max(interval.n_undefined for interval in _intervals(results))
    if n_undefined:
        lines.append(f"Up to {n_undefined:,} further resamples lacked a class and were drawn again.")
    if results.of_role("baseline"):
        lines.append("Baselines were trained, chosen and tested on the same parts as the probes.")
    if any(vector.role == "ensemble" and vector.validation is None for vector in results.vectors):
        lines.append("An ensemble without a value on validation was fitted there.")
    return lines


def _intervals(results: "ProbeResults") -> "Iterable[Interval]":
    for vector in results.vectors:
        yield from (vector.test, *vector.shuffled)
    for values in results.metrics.values():
        yield from values.values()


def _cells(vector: "VectorResult") -> tuple[str, str, str, str]:
    shuffled = "-"
    if vector.shuffled:
        lowest, highest = min(interval.low for interval in vector.shuffled), max(interval.high for interval in vector.shuffled)
        shuffled = f"[{lowest:.3f}, {highest:.3f}]"
    strength = "-" if vector.strength is None else f"{vector.strength:g}"
    return _value(vector.validation), _span(vector.test), shuffled, strength


def _best(results: "ProbeResults") -> "VectorResult":
    return next(vector for vector in results.vectors if vector.name == results.best)


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _span(interval: "Interval", style: str = ".3f") -> str:
    return f"{interval.estimate:{style}} [{interval.low:{style}}, {interval.high:{style}}]"


def _listed(items: Iterable[str]) -> str:
    *first, last = items
    return f"{', '.join(first)} or {last}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _escaped(text: str) -> str:
    """Returns text that Markdown shows as it is, on one line."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*~|#$]|\](?=\()|(?<!\w)_|_(?!\w))", r"\\\1", text)


def _code(text: str) -> str:
    """Returns a name as Markdown's code, which may stand in a table too."""
    if re.search(r"[`|\n\r\t]|\s\s|^\s|\s$|^$", text):  # what code in backticks cannot hold everywhere
        return f"<code>{_escaped(text)}</code>"
    return f"`{text}`"
