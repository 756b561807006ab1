"""What `exactivations probe-test` does: saved probes on a store of other samples, and what is told and written of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from exactivations.datamodules.examples import IntArray
from exactivations.datamodules.label_files import groups_in
from exactivations.datamodules.labels import NOT_LABELLED, FloatArray, class_numbers, labels_of
from exactivations.datamodules.text_rows import TextTokens, length_rows
from exactivations.lit_modules.extraction.run_description import Elsewhere, data_of
from exactivations.lit_modules.probes.group_bootstrap import Interval
from exactivations.lit_modules.probes.probe_application import FALSE_POSITIVES, RECALL, ProbeApplication, applied
from exactivations.lit_modules.probes.probe_evaluation import Bootstrap
from exactivations.lit_modules.probes.probe_file import SavedProbes
from exactivations.lit_modules.probes.probe_results import LENGTH
from exactivations.lit_modules.probes.stored_scores import stored_scores
from exactivations.scripts.probe_report import LEVEL, metric_name
from exactivations.store.activation_store import ActivationStore
from exactivations.store.errors import InvalidInputError
from exactivations.store.shard import write_text_atomically


@dataclass(frozen=True)
class Application:
    """Probes and what their scores are held against; see `probe_test`."""

    saved: SavedProbes
    names: list[str]
    label: str
    label_file: str | None
    group: str | None
    unseen_only: bool
    baseline: bool
    elsewhere: Elsewhere


def apply_to_run(application: Application, store: ActivationStore, bootstrap: Bootstrap) -> ProbeApplication:
    """Scores the samples that the probes do not know, and holds the scores against labels.

    Raises:
        InvalidInputError: If the store lacks a vector, a label is of a class that the probes do not know, a sample or its group was
            seen in training, a sample has no group, or there are fewer than five groups.
        IdentityError: If the run is of another model, tokenizer or dtype.
    """
    saved = application.saved
    for name in application.names:
        saved.refuse_another(store, store.info, name)
    samples = saved.seen.unseen(store, unseen_only=application.unseen_only)
    n_left_out = len(store) - len(samples)
    every = _labels(application, store)
    numbers = samples
    if saved.scored_per_token:
        of_kept = np.zeros(len(store), dtype=np.bool_)
        of_kept[samples] = True
        owner = np.repeat(np.arange(len(store)), np.diff(store.token_start))
        numbers = np.flatnonzero(of_kept[owner] & (every != NOT_LABELLED))
        samples = owner[numbers]
        if not len(numbers):
            raise InvalidInputError(f"{store.title}: no token of the samples that are left has a label {application.label!r}")
    scores = stored_scores(saved, application.names, store, numbers)
    warnings, length = saved.seen.warnings(store, "the probe"), None
    if application.baseline and LENGTH in saved.tensors:
        data = None if any(store.per_token.values()) else data_of(store.info, application.elsewhere)
        rows = torch.from_numpy(length_rows(TextTokens.of(store, data)))[torch.from_numpy(numbers)]
        length = saved.length_scores(rows)
    else:
        warnings.append("no length baseline stands beside: it was not asked for, or not trained with these probes")
    groups = groups_in(store, application.group)
    return applied(
        saved, scores, length, torch.from_numpy(every[numbers]), [groups[place] for place in samples.tolist()],
        label=application.label, n_samples=len(set(samples.tolist())), n_left_out=n_left_out, group_column=application.group,
        bootstrap=bootstrap, warnings=warnings,
    )  # fmt: skip


def _labels(application: Application, store: ActivationStore) -> IntArray | FloatArray:
    """Returns int64 [n] class numbers as the probes count them (of tokens [T], -1 without a label), or values float64 [n]."""
    saved, where = application.saved, (application.label, application.label_file)
    if saved.classes:
        return class_numbers(store, *where, saved.classes, str(saved.path), per_token=saved.scored_per_token)
    values = labels_of(store, *where, kind="values").values
    assert values is not None  # they are
    return values


def tell(found: ProbeApplication, application: Application, store: ActivationStore) -> None:
    """Prints the table and the warnings."""
    print(_about(found, application, store))
    rows = _rows(found)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        figures = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        print(f"  {name:<{widths[0]}}  {figures}")
    print(f"[ ]: {LEVEL} intervals; thresholds are those that training fixed")
    for warning in found.warnings:
        print(f"WARNING: {warning}")


def write(out: Path, found: ProbeApplication, application: Application, store: ActivationStore) -> None:
    """Writes metrics.json and report.md."""
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "probes": str(application.saved.path),
        "run": {"title": store.title, "fingerprint": store.info.fingerprint},
        **found.to_json(),
    }
    write_text_atomically(out / "metrics.json", json.dumps(content, indent=1) + "\n")
    header, *rows = _rows(found)
    table = [header, ["---"] * len(header), *[[f"`{name}`", *cells] for name, *cells in rows]]
    sections = [
        f"# Probes of `{found.label}` on other samples",
        _about(found, application, store),
        *(f"**Warning:** {warning}" for warning in found.warnings),
        "\n".join(f"| {' | '.join(cells)} |" for cells in table),
        "\n".join(["## All metrics", *(_of_probe(found, name) for name in found.metrics)]),
        f"Intervals are of {LEVEL}, by {found.n_resamples:,} resamples of whole groups. Nothing was trained or chosen here.",
    ]
    write_text_atomically(out / "report.md", "\n\n".join(sections) + "\n")


def _about(found: ProbeApplication, application: Application, store: ActivationStore) -> str:
    groups = f"{found.n_groups:,} groups by {found.group_column}" if found.group_column else "no groups"
    of_class = "".join(f", {n:,} {name}" for name, n in found.n_of_class.items())
    left = f"; {found.n_left_out_as_seen:,} samples left out: training saw these, or others of their groups"
    return (
        f"{found.label} by {application.saved.path} in {store.title}: {found.n_examples:,} {found.unit}s{of_class} ({groups})"
        f"{left if found.n_left_out_as_seen else ''}"
    )


def _rows(found: ProbeApplication) -> list[list[str]]:
    """Returns the table's cells, the header first."""
    headline, shown = metric_name(found.headline), [found.headline]
    header = ["", f"{headline} on validation", f"{headline} here"]
    if any(value is not None for value in found.threshold.values()):
        header += ["recall above threshold", "false positives above it"]
        shown += [RECALL, FALSE_POSITIVES]
    if found.over_length:
        header.append("over length")
    rows = [header]
    for name, metrics in found.metrics.items():
        validation = found.validation.get(name)
        rows.append([name, "-" if validation is None else f"{validation:.3f}"])
        rows[-1] += [_span(metrics, what) for what in shown]
        if found.over_length:
            rows[-1].append(_span(found.over_length, name, "+.3f"))
    return rows


def _of_probe(found: ProbeApplication, name: str) -> str:
    return f"- `{name}`: " + ", ".join(f"{metric_name(what)} {_span(found.metrics[name], what)}" for what in found.metrics[name])


def _span(intervals: Mapping[str, Interval], key: str, style: str = ".3f") -> str:
    interval = intervals.get(key)
    return "-" if interval is None else f"{interval.estimate:{style}} [{interval.low:{style}}, {interval.high:{style}}]"
