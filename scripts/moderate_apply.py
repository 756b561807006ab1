"""What `exactivations moderate test` does: a saved moderator on stored activations of other samples."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from exactivations.callbacks.process_watch import named_to_children
from exactivations.datamodules.activations import ActivationDataModule
from exactivations.datamodules.label_files import label_column
from exactivations.datamodules.labels import labels_of
from exactivations.datamodules.stored_samples import StoredSamples
from exactivations.lit_modules.moderation.aggregations import Aggregations
from exactivations.lit_modules.moderation.moderation_results import confusion_of, metrics_on
from exactivations.lit_modules.moderation.moderator_file import SavedModerator, of_seen_groups, seen_samples
from exactivations.lit_modules.moderation.prototype_diagnosis import diagnose_predictions
from exactivations.lit_modules.moderation.prototype_grid import scores_of
from exactivations.lit_modules.moderation.prototype_moderator import PrototypeModerator
from exactivations.lit_modules.probes.group_bootstrap import Interval
from exactivations.lit_modules.probes.probe_evaluation import Bootstrap, names_of_groups
from exactivations.lit_modules.probes.probe_warnings import FEW_GROUPS
from exactivations.scripts.moderate_run import Machine, write_json
from exactivations.scripts.moderation_plots import confusion_plot
from exactivations.scripts.moderation_report import COLUMNS, span, write_predictions
from exactivations.store.errors import InvalidInputError


@dataclass(frozen=True)
class Application:
    """A moderator and what its predictions are held against; see `moderate_test`."""

    saved: SavedModerator
    name: str
    label: str
    label_file: str | None
    group: str | None
    unseen_only: bool


def apply_to_runs(application: Application, source: Aggregations, out: Path, machine: Machine, resamples: int, seed: int) -> None:
    """Predicts all samples, writes what came out and prints what it is worth.

    Raises:
        InvalidInputError: If labels have a class that the moderator does not know, a sample or its group was seen in the fit, a
            sample has no group, or metrics are undefined.
        IdentityError: If the runs are of another model, tokenizer or dtype.
    """
    saved, name = application.saved, application.name
    saved.refuse_another(source, name)
    keep, labels = _kept(application, source), _labels(application, source)
    n_left_out = len(source) - len(keep)
    groups = _groups(application, source, application.group)
    moderator, data = PrototypeModerator(saved.content["metrics"]), StoredSamples(source, saved.grid.vectors_of(name))
    moderator.grid = saved.grid.part_of(name)
    trainer = machine.trainer()
    with named_to_children():
        trainer.predict(moderator, datamodule=data, return_predictions=False)
    if not trainer.is_global_zero:
        return
    distances = {entry: values[keep] for entry, values in moderator.predicted.items()}
    scores, of_kept = scores_of(moderator.grid.log_probabilities(name, distances)), labels[keep]
    names, n_classes = [groups[at] for at in keep.tolist()], len(saved.classes)
    metrics = metrics_on(scores, of_kept, names_of_groups(names), saved.threshold_of(name), Bootstrap(resamples, seed), n_classes)
    confusion = confusion_of(scores, of_kept, n_classes)
    findings = {
        entry: found
        for entry, values in distances.items()
        if (
            found := diagnose_predictions(
                moderator.grid.prototypes[moderator.grid.entries[entry][0]][moderator.grid.entries[entry][1]], values
            )
        )
    }
    warnings = _warnings(application, source, len(set(names)), metrics)
    out.mkdir(parents=True, exist_ok=True)
    write_json(
        out / "metrics.json",
        {
            "moderator": saved.name, "name": name, "runs": source.runs, "label": application.label, "classes": saved.classes,
            "n_samples": len(keep), "n_left_out_as_seen": n_left_out, "group_column": application.group,
            "metrics": {what: asdict(interval) for what, interval in metrics.items()}, "confusion": confusion,
            "warnings": warnings, "findings": {entry: [asdict(finding) for finding in found] for entry, found in findings.items()},
        },
    )  # fmt: skip
    write_predictions(
        out / "predictions.parquet", source.sample_index[keep.numpy()], moderator.grid, distances, moderator.grid.names,
        saved.classes, {entry: saved.threshold_of(entry) for entry in moderator.grid.names}, of_kept,
    )  # fmt: skip
    confusion_plot(confusion, saved.classes, f"{application.label} in {source.title}\n{name}", out / "confusion.png")
    left_out = f"; {n_left_out:,} left out: of these, or of their groups, it was made or chosen" if n_left_out else ""
    print(f"{application.label} by {name} of {saved.name}: {len(keep):,} samples{left_out}")
    for what, interval in metrics.items():
        print(f"  {COLUMNS[what]:<18} {span(interval)}")
    for warning in warnings:
        print(f"WARNING: {warning}")
    for entry, found in findings.items():
        for finding in found:
            print(f"WARNING: {finding.name}: {entry}: {finding.message}. {finding.advice}")
    print(f"-> {out}: metrics.json, predictions.parquet, confusion.png")


def _kept(application: Application, source: Aggregations) -> torch.Tensor:
    """Returns places of the samples that are tested, int64 [m]."""
    saved = application.saved
    by_tokens, by_group = seen_samples(saved, source), _of_seen_groups(application, source)
    seen = np.flatnonzero(by_tokens | by_group)
    if len(seen) and not application.unseen_only:
        raise InvalidInputError(
            f"{saved.name} was made of or chosen on sample {source.sample_index[seen[0]]} of {source.title}, or another of its "
            f"group ({by_tokens.sum():,} of {len(source):,} samples are known by token hash, {by_group.sum():,} by "
            f"{saved.group_column or 'no'} group): what it says of them is no test. Pass --unseen-only to leave them out"
        )
    if len(seen) == len(source):
        raise InvalidInputError(
            f"{saved.name} was made of or chosen on every sample of {source.title}, or others of their groups: nothing is left to "
            "test it on"
        )
    return torch.from_numpy(np.setdiff1d(np.arange(len(source)), seen))


def _of_seen_groups(application: Application, source: Aggregations) -> npt.NDArray[np.bool_]:
    """Returns bool [n], which samples are of a group of the fit; none where the run does not have its column."""
    saved = application.saved
    if saved.group_column is None or saved.group_column not in source.samples.column_names:
        return np.zeros(len(source), dtype=np.bool_)
    return of_seen_groups(saved, _groups(application, source, saved.group_column))


def _groups(application: Application, source: Aggregations, column: str | None) -> list[Any]:
    """Returns the group of each sample in a column, which may not be empty; without one each sample is its own."""
    return ActivationDataModule(source, application.label, group=column).groups


def _warnings(application: Application, source: Aggregations, n_groups: int, metrics: Mapping[str, Interval]) -> list[str]:
    """Returns what makes the test doubtful."""
    found, column = [], application.saved.group_column
    if column is None:
        found.append("the moderator was fitted without --group: samples that resemble those of its fit cannot be told")
    elif column not in source.samples.column_names:
        found.append(
            f"{source.title} has no column {column!r}, which no group straddled in the fit: samples of its groups cannot be told, "
            "only those with the same tokens"
        )
    if application.group is None:
        found.append("no --group was given: if samples resemble each other, intervals are too narrow")
    if n_groups < FEW_GROUPS:
        found.append(f"there are {n_groups} groups only: the intervals are too narrow (of 12 groups, 95% ones hold 90%)")
    if "auroc" not in metrics:
        found.append(f"all samples are of one class, which defines neither AUROC nor F1, but {', '.join(metrics)} only")
    elif metrics["auroc"].high < 0.5:
        found.append("it is worse than chance on these samples: they differ from those of the fit in more than the draw")
    return found


def _labels(application: Application, source: Aggregations) -> torch.Tensor:
    """Returns the number of each sample's class, as the moderator counts them, int64 [n]; all may be of one class."""
    classes, entries = application.saved.classes, list(label_column(source, application.label, application.label_file))
    if all(entry == entries[0] for entry in entries):
        named, numbers = [str(entries[0])], np.zeros(len(entries), dtype=np.int64)
    else:
        labels = labels_of(source, application.label, application.label_file, kind="classes")
        assert labels.numbers is not None  # they are classes
        named, numbers = labels.classes, labels.numbers
    unknown = [name for name in named if name not in classes]
    if unknown:
        raise InvalidInputError(
            f"{source.title}: label {application.label!r} has the class {unknown[0]!r}, and {application.saved.name} knows "
            f"{', '.join(map(repr, classes))} only"
        )
    return torch.tensor([classes.index(name) for name in named])[torch.from_numpy(numbers)]
