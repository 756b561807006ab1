"""The parts of `exactivations probe`: what is added to the vectors, the fit, and what is written of it."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from exactivations.callbacks.process_watch import named_to_children
from exactivations.datamodules.activations import ActivationDataModule
from exactivations.datamodules.labels import TokenLabels
from exactivations.datamodules.splits import PARTS
from exactivations.datamodules.text_rows import TextTokens, bag_of_tokens, length_rows
from exactivations.datamodules.token_identity import TokenIdentity, control_labels
from exactivations.lit_modules.erasure import erase as erase_classes
from exactivations.lit_modules.exact_probes import STRENGTHS, ExactProbeSweep
from exactivations.lit_modules.layer_ensembles import ensembles
from exactivations.lit_modules.linear_probes import logistic_probes, standardised
from exactivations.lit_modules.probe_evaluation import Benign, Bootstrap, Scored, chosen_vector, evaluate, probe_names
from exactivations.lit_modules.probe_file import save_probes
from exactivations.lit_modules.probe_heads import scores_of
from exactivations.lit_modules.probe_results import BASELINE, CONTROL_TASK
from exactivations.lit_modules.probe_scores import probabilities
from exactivations.lit_modules.probes import ProbeSweep
from exactivations.lit_modules.run_description import Elsewhere, data_of
from exactivations.lit_modules.trained_probes import STRENGTHS as STRENGTHS_IN_STEPS
from exactivations.lit_modules.trained_probes import TrainedProbeSweep
from exactivations.scripts.layers_plot import layers_plot
from exactivations.scripts.probe_report import probe_report, results_table
from exactivations.store.activation_store import ActivationStore
from exactivations.store.errors import InvalidInputError
from exactivations.store.means_file import origin_of, refuse_another_origin
from exactivations.store.shard import write_text_atomically

EXAMPLES_OF_STEP = 256  # of an mlp or attention probe, where no number was given
LENGTH, BAG, IDENTITY = f"{BASELINE}length", f"{BASELINE}bag of tokens", f"{BASELINE}token and the one before"
LARGEST_BAG = 2**27  # values: 512 MiB


@dataclass(frozen=True)
class Training:
    """How probes are trained; see `probe`."""

    kind: Literal["logistic", "mass-mean", "ridge", "mlp", "attention"]
    strengths: list[float] | None
    balanced: bool
    batch_size: int | None
    epochs: int
    learning_rate: float
    hidden: int
    starts: int
    devices: int
    accelerator: str

    @property
    def examples_of_step(self) -> int | None:
        """Examples of a step; None if vectors come whole."""
        return self.batch_size or (EXAMPLES_OF_STEP if self.kind in ("mlp", "attention") else None)

    def sweep(self) -> ProbeSweep:
        """Makes the module that is fitted."""
        if self.examples_of_step is None:
            assert self.kind in ("logistic", "mass-mean", "ridge")
            return ExactProbeSweep(self.kind, tuple(self.strengths or STRENGTHS), balanced=self.balanced)
        if self.kind == "mass-mean":
            raise InvalidInputError("mass-mean probes are means, and not trained in steps: leave --batch-size out")
        return TrainedProbeSweep(
            "linear" if self.kind == "ridge" else self.kind, self.strengths or STRENGTHS_IN_STEPS, range(self.starts),
            learning_rate=self.learning_rate, n_hidden=self.hidden, balanced=self.balanced,
        )  # fmt: skip


def add_baselines(store: ActivationStore, data: ActivationDataModule, elsewhere: Elsewhere) -> dict[str, Scored]:
    """Adds what the text alone says: vectors to the data, or for tokens scores, which are returned, and a control task.

    An attention probe, whose vectors have a row for each token, is held against nothing but its controls.

    Raises:
        InvalidInputError: If the tokens are not in the store, and the dataset is not there or has others.
    """
    if data.over_tokens:
        return {}
    tokens = TextTokens.of(store, None if any(store.per_token.values()) else data_of(store.info, elsewhere))
    labels = data.labels
    if not isinstance(labels, TokenLabels):
        bag, _ = bag_of_tokens(tokens, data.split.train, min(4096, LARGEST_BAG // len(store)))
        data.add(LENGTH, torch.from_numpy(length_rows(tokens)))
        data.add(BAG, torch.from_numpy(bag))
        return {}
    n_classes, train = len(labels.classes), data.numbers("train")
    shares = np.bincount(labels.numbers[train], minlength=n_classes) / len(train)
    data.add_control(CONTROL_TASK, control_labels(tokens.ids, shares, data.seed))
    identity = TokenIdentity.of(tokens, labels.numbers, n_classes, train)
    scores = {part: torch.from_numpy(np.log(identity.probabilities(tokens, data.numbers(part)))) for part in ("validation", "test")}
    if n_classes == 2:
        scores = {part: log[:, 1:] - log[:, :1] for part, log in scores.items()}
    return {IDENTITY: Scored("baseline", scores["validation"].float(), scores["test"].float())}


def fit(training: Training, data: ActivationDataModule, folder: Path) -> tuple[ProbeSweep, bool]:
    """Fits and tests; returns the sweep, and whether this rank is the one that tells."""
    sweep, began = training.sweep(), time.monotonic()
    steps = training.examples_of_step is not None
    try:
        trainer = pl.Trainer(
            accelerator=training.accelerator, devices=training.devices, max_epochs=training.epochs if steps else 1,
            logger=CSVLogger(folder.parent, name=folder.name, version=""), log_every_n_steps=1, num_sanity_val_steps=0,
            use_distributed_sampler=False, enable_checkpointing=False, enable_model_summary=False,
            enable_progress_bar=sys.stderr.isatty(),
        )  # fmt: skip
    except (MisconfigurationException, ValueError) as error:
        raise InvalidInputError(
            f"--accelerator {training.accelerator} --devices {training.devices} cannot be had here: {error}"
        ) from error
    if trainer.is_global_zero:
        n_probes = len(data.names) * len(sweep.settings) * len(data.variants)
        parts = ", ".join(f"{len(data.numbers(part)):,} {part}" for part in ("train", "validation", "test"))
        print(
            f"{n_probes:,} probes: {len(data.names)} vectors x {len(sweep.settings)} settings x {len(data.variants)} variants of "
            f"the labels; {data.unit}s: {parts}"
        )
    with named_to_children():
        trainer.fit(sweep, datamodule=data)
    trainer.test(sweep, datamodule=data, verbose=False)
    if trainer.is_global_zero:
        print(f"trained, chosen and tested in {time.monotonic() - began:.1f} s")
    return sweep, trainer.is_global_zero


def finish(
    folder: Path, sweep: ProbeSweep, data: ActivationDataModule, store: ActivationStore, further: dict[str, Scored],
    negatives: ActivationStore | None, bootstrap: Bootstrap, *, erase: bool,
) -> None:  # fmt: skip
    """Evaluates, writes all files, and prints what came out."""
    names, stacking = probe_names(data), None
    if len(names) > 1:
        of_ensembles, stacking = ensembles(sweep, data, names)
        further = further | of_ensembles
    best = chosen_vector(sweep, data)
    print(f"intervals by {bootstrap.n_resamples:,} resamples of {len(set(data.groups_of('test'))):,} groups ...")
    results = evaluate(
        sweep, data, further=further, bootstrap=bootstrap,
        benign=None if negatives is None else _benign(negatives, store, sweep, data, best),
        erased=_erased(sweep, data, best) if erase else None,
    )  # fmt: skip
    save_probes(folder, sweep, data, results, store.info, stacking)
    write_text_atomically(folder / "metrics.json", json.dumps(results.to_json(), indent=1) + "\n")
    layers_plot(results, folder / "layers.png")
    write_text_atomically(folder / "report.md", probe_report(results, how=_how(sweep, data, store)))
    print(results_table(results))
    print(f"written to {folder}: report.md, layers.png, metrics.json and the probes")
    print(f"score texts by them with: exactivations score {folder} --texts ...")


def _how(sweep: ProbeSweep, data: ActivationDataModule, store: ActivationStore) -> list[str]:
    """Says what a reader needs to do it again."""
    about, strengths = store.info.about, sorted({setting.strength for setting in sweep.settings})
    return [
        f"Probes: {sweep.kind}; strengths {', '.join(f'{strength:g}' for strength in strengths)}.",
        f"Activations of `{about['model']}` over `{about['dataset']}`, from `{store.title}` ({store.info.fingerprint}).",
        f"Parts: shares {', '.join(f'{share:g}' for share in data.shares)}, seed {data.seed}; who is where: split.json.",
    ]


def _benign(negatives: ActivationStore, store: ActivationStore, sweep: ProbeSweep, data: ActivationDataModule, best: str) -> Benign:
    """Scores samples that are all negative by the best probe."""
    if data.unit == "token" or data.over_tokens or len(data.classes) != 2:
        raise InvalidInputError("--benign fixes the threshold of two classes of samples with one row each: leave it out")
    point, _, pooling = best.rpartition("/")
    origin = origin_of(store.info.present_identity, [point])
    refuse_another_origin(origin, origin_of(negatives.info.present_identity, [point]), negatives.title, store.title)
    rows = negatives.pooled(point, pooling)
    return Benign(negatives.title, probabilities(scores_of(sweep.probe(best), rows, None)[0, 0], 2))


def _erased(sweep: ProbeSweep, data: ActivationDataModule, best: str) -> Tensor:
    """Returns scores on test of a probe of erased rows: LEACE of train's, a probe of validation's, with the best one's strength."""
    if data.over_tokens or not data.classes:
        raise InvalidInputError("--erase takes classes out of vectors with one row each: leave it out")
    train, validation, test = (data.examples(part, [best], data.numbers(part)) for part in PARTS)
    mean, scale, standard = standardised(train.rows[best].double())
    eraser = erase_classes(standard, train.labels[0], len(data.classes))
    on_validation, on_test = (eraser.erased((part.rows[best].double() - mean) / scale) for part in (validation, test))
    strength = sweep.settings[int(sweep.validated[best].chosen[0])].strength
    return logistic_probes(on_validation, validation.labels[:1], len(data.classes), [strength]).scores(on_test)[0, 0]
