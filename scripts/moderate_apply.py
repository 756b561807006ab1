"""What `exactivations moderate test` does: a saved moderator on stored activations of other samples."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from exactivations.callbacks.process_watch import named_to_children
from exactivations.datamodules.label_files import column_of
from exactivations.datamodules.labels import labels_of
from exactivations.datamodules.stored_samples import StoredSamples
from exactivations.lit_modules.aggregations import Aggregations
from exactivations.lit_modules.moderation import PrototypeModerator
from exactivations.lit_modules.moderation_results import confusion_of, metrics_on, names_of_groups
from exactivations.lit_modules.moderator_file import SavedModerator, seen_samples
from exactivations.lit_modules.probe_evaluation import Bootstrap
from exactivations.lit_modules.prototype_diagnosis import diagnose_predictions
from exactivations.lit_modules.prototype_grid import scores_of
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
        InvalidInputError: If labels have a class that the moderator does not know, a sample was seen in the fit, or metrics are
            undefined.
        IdentityError: If the runs are of another model, tokenizer or dtype.
    """
    saved, name = application.saved, application.name
    saved.refuse_another(source, name)
    keep, labels = _kept(application, source), _labels(application, source)
    groups = source.sample_index.tolist() if application.group is None else column_of(source, application.group).to_pylist()
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
    out.mkdir(parents=True, exist_ok=True)
    write_json(
        out / "metrics.json",
        {
            "moderator": saved.name, "name": name, "runs": source.runs, "label": application.label, "classes": saved.classes,
            "n_samples": len(keep), "n_left_out_as_seen": len(source) - len(keep), "group_column": application.group,
            "metrics": {what: asdict(interval) for what, interval in metrics.items()}, "confusion": confusion,
            "findings": {entry: [asdict(finding) for finding in found] for entry, found in findings.items()},
        },
    )  # fmt: skip
    write_predictions(
        out / "predictions.parquet", source.sample_index[keep.numpy()], moderator.grid, distances, moderator.grid.names,
        saved.classes, of_kept,
    )  # fmt: skip
    confusion_plot(confusion, saved.classes, f"{application.label} in {source.title}\n{name}", out / "confusion.png")
    left_out = f"; {len(source) - len(keep):,} left out, which it was made of or chosen on" if len(keep) < len(source) else ""
    print(f"{application.label} by {name} of {saved.name}: {len(keep):,} samples{left_out}")
    for what, interval in metrics.items():
        print(f"  {COLUMNS[what]:<18} {span(interval)}")
    for entry, found in findings.items():
        for finding in found:
            print(f"WARNING: {finding.name}: {entry}: {finding.message}. {finding.advice}")
    print(f"-> {out}: metrics.json, predictions.parquet, confusion.png")


def _kept(application: Application, source: Aggregations) -> torch.Tensor:
    """Returns places of the samples that are tested, int64 [m]."""
    seen = np.flatnonzero(seen_samples(application.saved, source))
    if len(seen) and not application.unseen_only:
        raise InvalidInputError(
            f"{application.saved.name} was made of or chosen on sample {source.sample_index[seen[0]]} of {source.title} "
            f"({len(seen):,} of {len(source):,} samples, by token hash): what it says of them is no test. Pass --unseen-only to "
            "leave them out"
        )
    return torch.from_numpy(np.setdiff1d(np.arange(len(source)), seen))


def _labels(application: Application, source: Aggregations) -> torch.Tensor:
    """Returns the number of each sample's class, as the moderator counts them, int64 [n]."""
    labels, classes = labels_of(source, application.label, application.label_file, kind="classes"), application.saved.classes
    unknown = [name for name in labels.classes if name not in classes]
    if unknown or labels.numbers is None:
        raise InvalidInputError(
            f"{source.title}: label {application.label!r} has the class {unknown[0]!r}, and {application.saved.name} knows "
            f"{', '.join(map(repr, classes))} only"
        )
    return torch.tensor([classes.index(name) for name in labels.classes])[torch.from_numpy(labels.numbers)]
