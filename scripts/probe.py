"""`exactivations probe`: probes of a label for every vector of a store, with baselines, controls and intervals."""

import os
from pathlib import Path
from typing import Literal


def probe(
    run: str,
    *,
    label: str,
    out: str,
    group: str | None = None,
    label_file: str | None = None,
    label_kind: Literal["auto", "classes", "values"] = "auto",
    unit: Literal["sample", "token"] = "sample",
    vectors: list[str] | None = None,
    kind: Literal["logistic", "mass-mean", "ridge", "mlp", "attention"] = "logistic",
    strengths: list[float] | None = None,
    balanced: bool = False,
    split_column: str | None = None,
    split_file: str | None = None,
    shares: list[float] | None = None,
    seed: int = 0,
    shuffles: int = 3,
    baselines: bool = True,
    untrained: str | None = None,
    benign: str | None = None,
    erase: bool = False,
    resamples: int = 1000,
    batch_size: int | None = None,
    epochs: int = 30,
    learning_rate: float = 0.01,
    hidden: int = 64,
    starts: int = 1,
    devices: int = 1,
    accelerator: str = "auto",
    dataset: str | None = None,
    tokenizer: str | None = None,
    overwrite: bool = False,
    allow_unverified: bool = False,
) -> None:
    """Trains probes of a label on every vector of a store at once, chooses on validation, and looks at test once.

    Args:
        run: The run folder of an `extract`.
        label: The column of labels.
        out: Folder for the probes, metrics.json, layers.png and report.md.
        group: Column of which no value is to be in two parts: what samples share and a probe could remember.
        label_file: File with the labels, if they are not in the store: .jsonl, .csv or .parquet, with sample_index or token_hash.
        label_kind: Whether labels are classes or real values; of ridge they are real values.
        unit: What has a label: each sample, or each token (then the column holds a list a sample; see `label-tokens`).
        vectors: Which activations, such as resid_post.3/mean. Default: all that fit the unit.
        kind: logistic, mass-mean and ridge (real values) are exact; mlp and attention (over tokens) are trained in steps.
        strengths: The larger, the less regularised: scikit-learn's C, or 1 / alpha. Default: 1e-5 to 100; of what is trained in
            steps, 0.001, 0.1 and 10.
        balanced: Weigh samples so that all classes weigh the same.
        split_column: Column that says which part a sample is in: train, validation (valid, val, dev) or test. Without validation it
            is drawn from train. Default: parts are drawn.
        split_file: The split.json of an earlier run over the same samples, for the same parts again.
        shares: Of train, validation and test. Default: 0.6 0.2 0.2.
        seed: Of the split and the shuffles.
        shuffles: So many times everything is done with shuffled labels as well.
        baselines: Probe what the text alone says, too: length and bag of tokens; of tokens, the token and the one before it.
        untrained: Run folder of the same samples in an untrained model (extract --random-weights), probed likewise.
        benign: Run folder of samples that are all negative: the threshold for 1% false positives is fixed on them.
        erase: Erase the label from the best vector (LEACE), and train and test anew.
        resamples: Of groups, for the intervals.
        batch_size: Train in steps of so many examples, also logistic and ridge: for rows that do not fit into memory.
        epochs: With steps: how often all examples are seen, at most.
        learning_rate: With steps: of Adam, at first.
        hidden: Units of an mlp.
        starts: With steps: from so many random starts.
        devices: Processes, or GPUs.
        accelerator: cpu, gpu or auto.
        dataset: The dataset of the run, if it lies elsewhere now; the baselines of the text read it.
        tokenizer: Its tokenizer, likewise.
        overwrite: Replace the probes that are in the folder.
        allow_unverified: Read stores that were not verified.
    """
    from exactivations.callbacks.process_watch import end_with_parent

    end_with_parent(int(os.environ.get("LOCAL_RANK", "0")))

    from exactivations.datamodules.activations import ActivationDataModule
    from exactivations.lit_modules.extraction.run_description import Elsewhere
    from exactivations.lit_modules.probes.probe_evaluation import Bootstrap, refuse_few_groups
    from exactivations.lit_modules.probes.probe_file import PROBES_FILE
    from exactivations.lit_modules.probes.probe_results import UNTRAINED
    from exactivations.scripts.probe_run import Training, add_baselines, finish, fit, refuse_benign, refuse_untrained
    from exactivations.store.activation_store import ActivationStore
    from exactivations.store.errors import InvalidInputError

    folder = Path(out)
    if (folder / PROBES_FILE).exists() and not overwrite and os.environ.get("LOCAL_RANK", "0") == "0":
        raise InvalidInputError(f"{folder} holds probes already: name another folder with --out, or pass --overwrite")
    store = ActivationStore(run, allow_unverified=allow_unverified)
    others = {} if untrained is None else {UNTRAINED: ActivationStore(untrained, allow_unverified=allow_unverified)}
    training = Training(kind, strengths, balanced, batch_size, epochs, learning_rate, hidden, starts, devices, accelerator)
    data = ActivationDataModule(
        store, label, label_file=label_file,
        label_kind="values" if kind == "ridge" else label_kind, unit=unit, over_tokens=kind == "attention", names=vectors,
        group=group, split_column=split_column, split_file=split_file,
        shares=shares or (0.6, 0.2, 0.2), seed=seed, n_shuffles=shuffles, others=others,
        batch_size=training.examples_of_step,
    )  # fmt: skip
    data.setup()
    bootstrap = Bootstrap(resamples, seed)
    refuse_few_groups(data, bootstrap)
    for control in others.values():
        refuse_untrained(control, store)
    negatives = None if benign is None else ActivationStore(benign, allow_unverified=allow_unverified)
    if negatives is not None:
        refuse_benign(negatives, store, data)
    if erase and (data.batch_size is not None or not data.classes):
        raise InvalidInputError("--erase takes classes out of whole vectors: leave it out, or train on whole vectors of classes")
    further = add_baselines(store, data, Elsewhere(tokenizer=tokenizer, dataset=dataset)) if baselines else {}
    sweep, is_first = fit(training, data, folder)
    if is_first:
        finish(folder, sweep, data, store, further, negatives, bootstrap, erase=erase)
