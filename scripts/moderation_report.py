"""What was found about moderators, as tables: Markdown for report.md, lines for a terminal; and predictions as Parquet."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from exactivations.lit_modules.moderation.moderation_results import FALSE_POSITIVES, RECALL
from exactivations.lit_modules.moderation.prototype_grid import scores_of
from exactivations.store.errors import StoreError
from exactivations.store.shard import publishing

if TYPE_CHECKING:
    from exactivations.lit_modules.moderation.moderation_results import ModerationResults
    from exactivations.lit_modules.moderation.prototype_grid import PrototypeGrid
    from exactivations.lit_modules.probes.group_bootstrap import Interval

COLUMNS = {"auroc": "AUROC", "f1": "F1", RECALL: "recall at 1% FPR", FALSE_POSITIVES: "FPR there"}
KINDS = {"probe": "prototype or probe", "ensemble": "MLPM", "baseline": "text alone"}


def moderation_report(results: "ModerationResults", name: str, classes_of_findings: Sequence[str]) -> str:
    """Returns report.md: what was chosen, the comparison, every entry, and findings with advice."""
    table = results.table
    best = next(vector for vector in table.vectors if vector.name == table.best)
    parts = "; ".join(
        f"{part}: {counts['samples']:,} samples in {counts['groups']:,} groups ("
        + ", ".join(f"{count:,} {of}" for of, count in counts["classes"].items())
        + ")"
        for part, counts in table.parts.items()
    )
    over = ""
    if table.over_baseline is not None:
        over = f" That is {span(table.over_baseline, '+.3f')} over `{table.best_baseline}`, the baseline that is best on test."
    every = [[f"`{v.name}`", _number(v.validation), span(v.test)] for v in table.vectors]
    sections = [
        f"# Moderation of `{table.label}`",
        f"Model `{name}`. {parts}. Intervals are of 95 %, over groups ({table.group_column or 'every sample is its own'}).",
        f"Chosen on validation: `{best.name}`, AUROC {_number(best.validation)} there and **{span(best.test)} on test**.{over}",
        *(f"**Warning:** {warning}" for warning in table.warnings),
        "![AUROC on test by layer](layers.png)\n\n![confusion matrix of the chosen one](confusion.png)",
        "## On test\n\n" + comparison(results),
        "## Everything\n\n" + _markdown([["", "AUROC on validation", "AUROC on test"], *every]),
        "## Findings\n\n" + (findings(results, classes_of_findings) or "None."),
        "## How to read it\n\n"
        f"Only the chosen one was decided before test was looked at. The {len(table.vectors)} intervals on test are not corrected "
        "for being so many: the best of them is too good by chance. What the chosen one has over a baseline is held against the "
        "baseline that is best on test. Intervals say nothing of other training data. `moderate curve` looks at the same test part "
        "again.",
    ]
    return "\n\n".join(sections) + "\n"


def comparison(results: "ModerationResults") -> str:
    """Returns the table of what was chosen, of the mixtures, and of probes and baselines, in Markdown."""
    table = results.table
    roles = {vector.name: KINDS[vector.role] for vector in table.vectors}
    shown = [what for what in COLUMNS if any(what in metrics for metrics in table.metrics.values())]
    rows = [["", "kind", *(COLUMNS[what] for what in shown)]]
    for name, metrics in table.metrics.items():
        star = " (chosen)" if name == table.best else ""
        rows.append([f"`{name}`{star}", roles[name], *(span(metrics[what]) if what in metrics else "-" for what in shown)])
    return _markdown(rows)


def findings(results: "ModerationResults", classes: Sequence[str]) -> str:
    """Returns what makes prototypes useless, by name, with the entries that share it and what to do."""
    found: dict[str, list[str]] = {}
    for entry, of_entry in results.findings.items():
        for finding in of_entry:
            found.setdefault(f"{finding.name}\n{finding.advice}", []).append(f"{entry}: {finding.message}")
    lines = []
    for key, messages in found.items():
        name, advice = key.split("\n")
        lines.append(f"- **{name}** ({len(messages)} of {len(results.findings)}): {messages[0]}. Advice: {advice}.")
    numbered = ", ".join(f"{number} is {name!r}" for number, name in enumerate(classes))
    return "\n".join([*lines, f"  (Classes: {numbered}.)"] if lines else [])


def write_predictions(
    path: Path,
    sample_index: "np.ndarray[tuple[int], np.dtype[np.int64]]",
    grid: "PrototypeGrid",
    distances: Mapping[str, Tensor],
    names: Sequence[str],
    classes: Sequence[str],
    thresholds: Mapping[str, float | None],
    labels: Tensor | None = None,
) -> None:
    """Writes a row for each sample and moderator: the most probable class, and each class's probability and distance.

    Of two classes also the log-odds of the second, and whether they are above the threshold. Mixtures have no distances of their
    own: theirs are null, and those of their layers are in the rows of these.

    Args:
        path: A .parquet file.
        sample_index: int64 [n].
        grid: What predicts.
        distances: Of each entry that is needed, [n, K].
        names: Entries and mixtures.
        classes: Their names.
        thresholds: Of the log-odds of the second of two classes, by name.
        labels: int64 [n], the samples' classes, if they are known.

    Raises:
        StoreError: If it cannot be written.
    """
    tables = []
    for name in names:
        log_p = grid.log_probabilities(name, distances)
        n, predicted = len(log_p), log_p.argmax(dim=1).tolist()
        columns: dict[str, pa.Array] = {"sample_index": pa.array(sample_index), "moderator": pa.array([name] * n)}
        if labels is not None:
            columns["label"] = pa.array([classes[number] for number in labels.tolist()])
        columns["predicted"] = pa.array([classes[number] for number in predicted])
        for number, of in enumerate(classes):
            columns[f"probability {of}"] = pa.array(log_p[:, number].exp().numpy())
        for number, of in enumerate(classes):
            values = distances[name][:, number].numpy() if name in distances else [None] * n
            columns[f"distance {of}"] = pa.array(values, type=pa.float64())
        threshold = thresholds.get(name)
        if threshold is not None:
            log_odds = scores_of(log_p)[:, 0]
            columns["log_odds"] = pa.array(log_odds.numpy())
            columns["above_threshold"] = pa.array((log_odds > threshold).numpy())
        tables.append(pa.table(columns))
    try:
        with publishing(path) as temporary:
            pq.write_table(pa.concat_tables(tables), temporary, write_page_checksum=True)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"cannot write {path}: {error}") from error


def in_words(log_probabilities: Tensor, distances: Tensor | None, classes: Sequence[str], threshold: float | None) -> list[str]:
    """Returns for each sample its most probable class, that one's probability, and the distances, if there are any.

    With a threshold also the log-odds of the second of two classes, and a star if they are above it.
    """
    lines = []
    for at, row in enumerate(log_probabilities):
        number = int(row.argmax())
        line = f"{classes[number]}  {float(row[number].exp()):.4f}"
        if threshold is not None:
            log_odds = float(scores_of(row[None]))
            line += f"  log-odds of {classes[1]} {log_odds:.4g}{' *' if log_odds > threshold else ''}"
        if distances is not None:
            line += "  distances " + ", ".join(f"{of} {float(d):.4g}" for of, d in zip(classes, distances[at], strict=True))
        lines.append(line)
    return lines


def span(interval: "Interval", style: str = ".3f") -> str:
    """Returns an interval as readers know it."""
    return f"{interval.estimate:{style}} [{interval.low:{style}}, {interval.high:{style}}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
