"""The parts of `exactivations probe`: what is added to the vectors, the fit, and what is written of it."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from exactivations.callbacks.process_watch import named_to_children
from exactivations.datamodules.activations import ActivationDataModule
from exactivations.datamodules.examples import IntArray
from exactivations.datamodules.labels import FloatArray, TokenLabels
from exactivations.datamodules.splits import PARTS
from exactivations.datamodules.text_rows import TextTokens, bag_of_tokens, length_rows
from exactivations.datamodules.token_identity import TokenIdentity, control_labels
from exactivations.lit_modules.extraction.run_description import Elsewhere, data_of
from exactivations.lit_modules.probes.erasure import erase as erase_classes
from exactivations.lit_modules.probes.exact_probes import STRENGTHS, ExactProbeSweep
from exactivations.lit_modules.probes.layer_ensembles import ensembles
from exactivations.lit_modules.probes.linear_probes import logistic_probes, standardised
from exactivations.lit_modules.probes.probe_evaluation import Benign, Bootstrap, Scored, chosen_vector, evaluate, probe_names
from exactivations.lit_modules.probes.probe_file import save_probes
from exactivations.lit_modules.probes.probe_heads import scores_of
from exactivations.lit_modules.probes.probe_results import BASELINE, CONTROL_TASK, LENGTH
from exactivations.lit_modules.probes.probe_sweep import ProbeSweep
from exactivations.lit_modules.probes.trained_probes import STRENGTHS as STRENGTHS_IN_STEPS
from exactivations.lit_modules.probes.trained_probes import TrainedProbeSweep
from exactivations.scripts.layers_plot import layers_plot
from exactivations.scripts.probe_report import probe_report, results_table
from exactivations.scripts.trainers import trainer_on
from exactivations.store.activation_store import ActivationStore
from exactivations.store.errors import InvalidInputError
from exactivations.store.means_file import origin_of, refuse_another_origin
from exactivations.store.shard import write_text_atomically

EXAMPLES_OF_STEP = 256  # of an mlp or attention probe, where no number was given
BAG, IDENTITY = f"{BASELINE}bag of tokens", f"{BASELINE}token and the one before"
MOST_TOKENS_OF_BAG = 4096


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
        needed, free = 4 * MOST_TOKENS_OF_BAG * len(store), psutil.virtual_memory().available
        if needed > free / 2:
            raise InvalidInputError(
                f"a bag of {MOST_TOKENS_OF_BAG:,} tokens of {len(store):,} samples takes {needed / 2**30:.1f} GiB, and "
                f"{free / 2**30:.1f} GiB are free: pass --baselines false, or probe fewer samples"
            )
        bag, _ = bag_of_tokens(tokens, data.split.train, MOST_TOKENS_OF_BAG)
        data.add(LENGTH, torch.from_numpy(length_rows(tokens)))
        data.add(BAG, torch.from_numpy(bag))
        return {}
    n_classes, train = len(labels.classes), data.numbers("train")
    shares = np.bincount(labels.numbers[train], minlength=n_classes) / len(train)
    data.add_control(CONTROL_TASK, _control(tokens, shares, data))
    identity = TokenIdentity.of(tokens, labels.numbers, n_classes, train)
    scores = {part: torch.from_numpy(np.log(identity.probabilities(tokens, data.numbers(part)))) for part in ("validation", "test")}
    if n_classes == 2:
        scores = {part: log[:, 1:] - log[:, :1] for part, log in scores.items()}
    return {IDENTITY: Scored("baseline", scores["validation"].float(), scores["test"].float())}


def _control(tokens: TextTokens, shares: FloatArray, data: ActivationDataModule) -> IntArray:
    """Returns the labels of a control task, of the first draw that has every class in every part."""
    for draw in range(100):
        labels = control_labels(tokens.ids, shares, 100 * data.seed + draw)
        if all(len(np.unique(labels[data.numbers(part)])) == len(shares) for part in PARTS):
            return labels
    raise InvalidInputError(
        "no draw of the control task has every class in every part, as one of them is too rare: pass --baselines false"
    )


def fit(training: Training, data: ActivationDataModule, folder: Path) -> tuple[ProbeSweep, bool]:
    """Fits and tests; returns the sweep, and whether this rank is the one that tells."""
    sweep, began = training.sweep(), time.monotonic()
    steps = training.examples_of_step is not None
    trainer = trainer_on(
        training.accelerator, training.devices, max_epochs=training.epochs if steps else 1, num_sanity_val_steps=0,
        logger=CSVLogger(folder.parent, name=folder.name, version=""), log_every_n_steps=1,
        enable_progress_bar=sys.stderr.isatty(),
    )  # fmt: skip
    if trainer.is_global_zero:
        n_probes = len(data.names) * len(sweep.settings) * len(data.variants)
        parts = ", ".join(f"{len(data.numbers(part)):,} {part}" for part in ("train", "validation", "test"))
        print(
            f"{n_probes:,} probes: {len(data.names)} vectors x {len(sweep.settings)} settings x {len(data.variants)} variants of "
            f"the labels; {data.unit}s: {parts}"
        )
        if data.split_column is not None or data.split_file is not None:
            print(f"parts are {data.how_split}")
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
    erased, not_erased = _erased(sweep, data, best) if erase else (None, None)
    results = evaluate(
        sweep, data, further=further, bootstrap=bootstrap, erased=erased, not_erased=not_erased,
        benign=None if negatives is None else _benign(negatives, sweep, best),
    )  # fmt: skip
    if sweep.kind == "mass-mean" and results.best_baseline is not None:
        results.warnings.append(
            f"{results.best_baseline!r} was probed by mass-mean, too: by --kind logistic the words may tell more"
        )
    save_probes(folder, sweep, data, results, store.info, stacking, negatives)
    write_text_atomically(folder / "metrics.json", json.dumps(results.to_json(), indent=1) + "\n")
    layers_plot(results, folder / "layers.png")
    write_text_atomically(folder / "report.md", probe_report(results, how=_how(sweep, data, store)))
    print(results_table(results))
    print(f"written to {folder}: report.md, layers.png, metrics.json and the probes")
    print(f"score texts by them with: exactivations score {folder} --texts ...")


def _how(sweep: ProbeSweep, data: ActivationDataModule, store: ActivationStore) -> list[str]:
    """Says what a reader needs to do it again."""
    about, strengths = store.info.about, sorted({setting.strength for setting in sweep.settings})
    chosen = {name: sweep.settings[int(found.chosen[0])].strength for name, found in sweep.validated.items()}
    at_end = [name for name, strength in chosen.items() if strength == strengths[-1]]
    return [
        f"Probes: {sweep.kind}; strengths {', '.join(f'{strength:g}' for strength in strengths)}.",
        f"Activations of `{about['model']}` over `{about['dataset']}`, from `{store.title}` ({store.info.fingerprint}).",
        *(
            [f"The strength of {', '.join(f'`{name}`' for name in at_end)} is the largest tried: larger ones may do better."]
            if len(strengths) > 1 and at_end
            else []
        ),
        f"Parts: {data.how_split}; who is where: split.json.",
    ]


def refuse_benign(negatives: ActivationStore, store: ActivationStore, data: ActivationDataModule) -> None:
    """Refuses samples that no threshold can be fixed on, before anything is trained.

    Raises:
        InvalidInputError: If the threshold would not be of two classes of samples with one row each, or one of the samples is in
            the run that is probed; it is named.
        IdentityError: If they are of another model, tokenizer or option.
    """
    if data.unit == "token" or data.over_tokens or len(data.classes) != 2:
        raise InvalidInputError("--benign fixes the threshold of two classes of samples with one row each: leave it out")
    points = [name.rpartition("/")[0] for name in store.per_token]
    origin = origin_of(store.info.present_identity, points)
    refuse_another_origin(origin, origin_of(negatives.info.present_identity, points), negatives.title, store.title)
    known = set(store.samples.column("token_hash").to_pylist())
    shared = [at for at, key in enumerate(negatives.samples.column("token_hash").to_pylist()) if key in known]
    if shared:
        raise InvalidInputError(
            f"sample {negatives.sample_index[shared[0]]} of {negatives.title} is in {store.title} too ({len(shared):,} of "
            f"{len(negatives):,} are): a threshold is fixed on samples that are neither trained nor tested on"
        )


def refuse_untrained(untrained: ActivationStore, store: ActivationStore) -> None:
    """Refuses a run that is no control: of weights that were trained, or another architecture.

    Raises:
        InvalidInputError: Saying why.
    """
    if untrained.info.about["random_weights"] is None:
        raise InvalidInputError(f"{untrained.title} is of a trained model: --untrained takes a run of extract --random-weights")
    ours, theirs = (one.info.present_identity["model_config"] for one in (store, untrained))
    if ours != theirs:
        raise InvalidInputError(f"{untrained.title} is of another architecture than {store.title} (model_config {theirs}, {ours})")


def _benign(negatives: ActivationStore, sweep: ProbeSweep, best: str) -> Benign:
    """Scores samples that are all negative by the best probe."""
    rows = negatives.pooled(*best.rsplit("/", 1))
    return Benign(negatives.title, scores_of(sweep.probe(best), rows, None)[0, 0, :, 0])


def _erased(sweep: ProbeSweep, data: ActivationDataModule, best: str) -> tuple[Tensor, Tensor]:
    """Returns scores on test of probes trained on validation with the best one's strength: after LEACE of train, and without."""
    train, validation, test = (data.examples(part, [best], data.numbers(part)) for part in PARTS)
    mean, scale, standard = standardised(train.rows[best].double())
    eraser = erase_classes(standard, train.labels[0], len(data.classes))
    strength = sweep.settings[int(sweep.validated[best].chosen[0])].strength

    def tested(change: Callable[[Tensor], Tensor]) -> Tensor:
        on_validation, on_test = (change((part.rows[best].double() - mean) / scale) for part in (validation, test))
        return logistic_probes(on_validation, validation.labels[:1], len(data.classes), [strength]).scores(on_test)[0, 0]

    return tested(eraser.erased), tested(lambda rows: rows)
