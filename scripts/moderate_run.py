"""The parts of `exactivations moderate`: what is read, the fit, what prototypes are held against, and what is written."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from exactivations.callbacks.process_watch import named_to_children
from exactivations.datamodules.activations import ActivationDataModule
from exactivations.lit_modules.extraction.run_description import Elsewhere
from exactivations.lit_modules.moderation.aggregations import Aggregations
from exactivations.lit_modules.moderation.masked_rows import MaskedRows
from exactivations.lit_modules.moderation.moderation_results import ModerationResults
from exactivations.lit_modules.moderation.moderator_file import MODERATOR_FILE, SavedModerator, fingerprint, save_moderator
from exactivations.lit_modules.moderation.prototype_moderator import PrototypeModerator
from exactivations.lit_modules.probes.exact_probes import ExactProbeSweep
from exactivations.lit_modules.probes.probe_evaluation import Scored, chosen_vector, role_of
from exactivations.lit_modules.probes.probe_sweep import ProbeSweep
from exactivations.lit_modules.probes.trained_probes import TrainedProbeSweep
from exactivations.scripts.moderation_plots import confusion_plot, grid_plot
from exactivations.scripts.moderation_report import moderation_report, write_predictions
from exactivations.scripts.probe_run import add_baselines
from exactivations.scripts.trainers import trainer_on
from exactivations.store.activation_store import ActivationStore
from exactivations.store.errors import InvalidInputError
from exactivations.store.shard import write_text_atomically

POOLINGS = ("mean", "last")  # of token rows, where none were named
MLP_STEP, MLP_EPOCHS = 256, 30


@dataclass(frozen=True)
class Labelled:
    """What is moderated by; see `moderate_fit`."""

    label: str
    group: str | None
    label_file: str | None
    vectors: list[str] | None
    shares: tuple[float, ...]
    seed: int

    def data(self, source: Aggregations, batch_size: int | None = None) -> ActivationDataModule:
        """Makes the data module; the same split whatever the batch size."""
        return ActivationDataModule(
            source, self.label, label_file=self.label_file, label_kind="classes", names=self.vectors, group=self.group,
            shares=self.shares, seed=self.seed, batch_size=batch_size,
        )  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """What it is computed on."""

    devices: int = 1
    accelerator: str = "auto"

    def trainer(self, max_epochs: int = 1) -> pl.Trainer:
        """Makes a trainer that keeps and logs nothing.

        Raises:
            InvalidInputError: If there are no such devices.
        """
        return trainer_on(
            self.accelerator, self.devices, max_epochs=max_epochs, logger=False, num_sanity_val_steps=0,
            enable_progress_bar=sys.stderr.isatty(),
        )  # fmt: skip

    def fitted(self, module: pl.LightningModule, data: ActivationDataModule, max_epochs: int = 1) -> pl.Trainer:
        """Fits and tests."""
        trainer = self.trainer(max_epochs)
        with named_to_children():
            trainer.fit(module, datamodule=data)
        trainer.test(module, datamodule=data, verbose=False)
        return trainer


def opened(
    runs: Sequence[str], pooling: Sequence[str] | None = None, masks: str | None = None, *, allow_unverified: bool = False
) -> Aggregations:
    """Opens runs: as they were pooled, or pools their tokens under the store's own masks or imported ones.

    Raises:
        InvalidInputError: If masks are given for other than one run of tokens.
    """
    stores = [ActivationStore(run, allow_unverified=allow_unverified) for run in runs]
    if masks is not None and (len(stores) != 1 or not any(stores[0].per_token.values())):
        raise InvalidInputError(
            f"--masks belong to one run that keeps the rows of its tokens, got {', '.join(store.title for store in stores)}: "
            "moderate it alone, and extract it with --pooling tokens"
        )
    sources: list[ActivationStore | MaskedRows] = []
    for store in stores:
        has_tokens, all_tokens = any(store.per_token.values()), all(store.per_token.values())
        if has_tokens and (all_tokens or pooling or masks):
            sources.append(MaskedRows(store, pooling or POOLINGS, masks))
        elif pooling:
            raise InvalidInputError(f"{store.title} keeps no rows of tokens, so that --pooling has nothing to pool: leave it out")
        else:
            sources.append(store)
    return Aggregations(sources)


def with_baselines(source: Aggregations, labelled: Labelled, elsewhere: Elsewhere) -> ActivationDataModule:
    """Returns the same vectors and parts, and what the text alone says: what `compared` trains probes on.

    Raises:
        InvalidInputError: If the tokens are not in the store, and the dataset is not there or has others.
    """
    exact, first = labelled.data(source), source.sources[0]
    add_baselines(first if isinstance(first, ActivationStore) else first.store, exact, elsewhere)
    return exact


def compared(exact: ActivationDataModule, steps: ActivationDataModule, machine: Machine) -> dict[str, Scored]:
    """Trains probes; returns the best of each kind on validation, and baselines of the text.

    Args:
        exact: What `with_baselines` gave.
        steps: The same vectors and parts in steps of `MLP_STEP`.
        machine: What it is computed on.
    """
    logistic, mlp = ExactProbeSweep("logistic"), TrainedProbeSweep("mlp")
    machine.fitted(logistic, exact)
    machine.fitted(mlp, steps, MLP_EPOCHS)
    found = {}
    for kind, sweep, data in (("logistic", logistic, exact), ("mlp", mlp, steps)):
        best = chosen_vector(sweep, data)
        found[f"{best} {kind}"] = _scored(sweep, best, data)
    return found | {name: _scored(logistic, name, exact) for name in exact.names if role_of(name, exact) == "baseline"}


def folder_of(
    out: str | None, moderator: PrototypeModerator, data: ActivationDataModule, source: Aggregations, *, overwrite: bool
) -> Path:
    """Returns where a moderator goes: where it was said, or a folder named by its label and fingerprint.

    Raises:
        InvalidInputError: If there is a moderator, and it is not to be replaced.
    """
    mark = fingerprint(moderator, data, source)
    folder = Path(out) if out is not None else Path("moderators") / f"{data.label}-{mark[:16]}"
    if (folder / MODERATOR_FILE).exists() and not overwrite and os.environ.get("LOCAL_RANK", "0") == "0":
        raise InvalidInputError(f"{folder} holds a moderator already: name another folder with --out, or pass --overwrite")
    return folder


def written(
    folder: Path, moderator: PrototypeModerator, data: ActivationDataModule, source: Aggregations, results: ModerationResults
) -> SavedModerator:
    """Writes the moderator, metrics.json, predictions.parquet, report.md and the pictures."""
    saved = save_moderator(folder, moderator, data, source, results)
    table = results.table
    write_json(folder / "metrics.json", {"moderator": saved.name, **results.to_json()})
    write_predictions(
        folder / "predictions.parquet", source.sample_index[data.numbers("test")], moderator.grid, moderator.tested,
        moderator.grid.names, data.classes, results.thresholds, data.targets("test")[0],
    )  # fmt: skip
    grid_plot(results, moderator.grid, folder / "layers.png")
    confusion_plot(results.confusion[table.best], data.classes, f"{data.label} on test\n{table.best}", folder / "confusion.png")
    write_text_atomically(folder / "report.md", moderation_report(results, saved.name, data.classes))
    return saved


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text_atomically(path, json.dumps(content, indent=1) + "\n")


def _scored(sweep: ProbeSweep, name: str, data: ActivationDataModule) -> Scored:
    return Scored(role_of(name, data), sweep.validated[name].scores[0].double(), sweep.tested[name][0].double())
