"""What `exactivations moderate test` does: a saved moderator on stored activations of other samples."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from exactivations.callbacks.process_watch import named_to_children
from exactivations.datamodules.label_files import groups_in
from exactivations.datamodules.labels import class_numbers
from exactivations.datamodules.stored_samples import StoredSamples
from exactivations.lit_modules.moderation.aggregations import Aggregations
from exactivations.lit_modules.moderation.moderation_results import confusion_of, metrics_on
from exactivations.lit_modules.moderation.moderator_file import SavedModerator
from exactivations.lit_modules.moderation.prototype_diagnosis import diagnose_predictions
from exactivations.lit_modules.moderation.prototype_grid import scores_of
from exactivations.lit_modules.moderation.prototype_moderator import PrototypeModerator
from exactivations.lit_modules.probes.group_bootstrap import Interval
from exactivations.lit_modules.probes.probe_evaluation import Bootstrap, names_of_groups
from exactivations.lit_modules.probes.probe_warnings import FEW_GROUPS
from exactivations.scripts.moderate_run import Machine, write_json
from exactivations.scripts.moderation_plots import confusion_plot
from exactivations.scripts.moderation_report import COLUMNS, span, write_predictions


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
    seen = saved.seen_samples(source)
    keep = torch.from_numpy(seen.unseen(source, unseen_only=application.unseen_only))
    labels = torch.from_numpy(class_numbers(source, application.label, application.label_file, saved.classes, saved.name))
    n_left_out = len(source) - len(keep)
    groups = groups_in(source, application.group)
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
    warnings = [*seen.warnings(source, "the moderator"), *_warnings(application, len(set(names)), metrics)]
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


def _warnings(application: Application, n_groups: int, metrics: Mapping[str, Interval]) -> list[str]:
    """Returns what makes the test doubtful."""
    found = []
    if application.group is None:
        found.append("no --group was given: if samples resemble each other, intervals are too narrow")
    if n_groups < FEW_GROUPS:
        found.append(f"there are {n_groups} groups only: the intervals are too narrow (of 12 groups, 95% ones hold 90%)")
    if "auroc" not in metrics:
        found.append(f"all samples are of one class, which defines neither AUROC nor F1, but {', '.join(metrics)} only")
    elif metrics["auroc"].high < 0.5:
        found.append("it is worse than chance on these samples: they differ from those of the fit in more than the draw")
    return found
