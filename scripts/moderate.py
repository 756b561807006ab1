"""`exactivations moderate`: prototypes of a label in every layer, aggregation and metric of a run, kept and applied."""

import os
from pathlib import Path

DEFAULT_SIZES = (10, 100, 1000)


def moderate_fit(
    runs: list[str],
    *,
    label: str,
    out: str | None = None,
    group: str | None = None,
    label_file: str | None = None,
    vectors: list[str] | None = None,
    metrics: list[str] | None = None,
    pooling: list[str] | None = None,
    masks: str | None = None,
    folds: int = 5,
    strengths: list[float] | None = None,
    shares: list[float] | None = None,
    seed: int = 0,
    compare: bool = True,
    resamples: int = 1000,
    batch_size: int | None = None,
    devices: int = 1,
    accelerator: str = "auto",
    dataset: str | None = None,
    tokenizer: str | None = None,
    overwrite: bool = False,
    allow_unverified: bool = False,
) -> None:
    """Makes prototypes of a label of all vectors by all metrics, and mixtures of layers; chooses on validation, tests once.

    Args:
        runs: Run folders of `extract`, of the same texts: such as one with the poolings mean and last, and one with a --template.
        label: The column of labels, which are classes.
        out: Folder for the moderator, metrics.json, predictions.parquet, report.md and pictures. Default: moderators/ and the
            label with the fingerprint of all that decides the result.
        group: Column of which no value is to be in two parts or folds.
        label_file: File with the labels, if they are not in the store: .jsonl, .csv or .parquet, with sample_index or token_hash.
        vectors: Which activations, such as resid_post.3/mean, or resid_post.3/last+prompt of a run with a template. Default: all.
        metrics: euclidean; mahalanobis:ridge, :ledoit-wolf, :empirical-n, :empirical-n-1, :empirical-n-k. Default: the first three.
        pooling: How rows of tokens are pooled, where a run keeps these. Default: mean and last.
        masks: Pool under the masks of this file, which `import-masks` wrote for the run, and not under the run's own.
        folds: Of the training samples, for mixtures of layers.
        strengths: That mixtures of layers choose from: scikit-learn's C, the smaller, the fewer layers. Default: 0.001 to 1.
        shares: Of train, validation and test. Default: 0.6 0.2 0.2.
        seed: Of the split and the folds.
        compare: Train logistic and MLP probes on the same parts, too, and probe what the text alone says (length, bag of tokens).
        resamples: Of groups, for the intervals.
        batch_size: Read in steps of so many samples, where a vector's rows do not fit into memory; with --compare false, since
            logistic probes need whole vectors.
        devices: Processes, or GPUs. Each takes some of the vectors, or in steps some of the samples.
        accelerator: cpu, gpu or auto.
        dataset: The dataset of the first run, if it lies elsewhere now; the baselines of the text read it.
        tokenizer: Its tokenizer, likewise.
        overwrite: Replace the moderator that is in the folder.
        allow_unverified: Read stores that were not verified.
    """
    from exactivations.callbacks.process_watch import end_with_parent

    end_with_parent(int(os.environ.get("LOCAL_RANK", "0")))

    from exactivations.lit_modules.extraction.run_description import Elsewhere
    from exactivations.lit_modules.moderation.moderation_results import moderation_results
    from exactivations.lit_modules.moderation.prototype_moderator import DEFAULT_METRICS, STRENGTHS, PrototypeModerator
    from exactivations.lit_modules.probes.probe_evaluation import Bootstrap, refuse_few_groups
    from exactivations.scripts.moderate_run import MLP_STEP, Labelled, Machine, compared, folder_of, opened, with_baselines, written
    from exactivations.scripts.moderation_report import comparison, findings
    from exactivations.store.errors import InvalidInputError

    if compare and batch_size is not None:
        raise InvalidInputError(
            "--batch-size reads in steps, and the logistic probes that prototypes are compared with need whole vectors: leave "
            "--batch-size out, or pass --compare false"
        )
    source = opened(runs, pooling, masks, allow_unverified=allow_unverified)
    labelled = Labelled(label, group, label_file, vectors, tuple(shares or (0.6, 0.2, 0.2)), seed)
    machine, data = Machine(devices, accelerator), labelled.data(source, batch_size)
    data.setup()
    bootstrap = Bootstrap(resamples, seed)
    refuse_few_groups(data, bootstrap)
    moderator = PrototypeModerator(metrics or DEFAULT_METRICS, n_folds=folds, strengths=strengths or STRENGTHS)
    folder = folder_of(out, moderator, data, source, overwrite=overwrite)
    exact = with_baselines(source, labelled, Elsewhere(tokenizer=tokenizer, dataset=dataset)) if compare else None
    trainer = machine.fitted(moderator, data)
    further = {} if exact is None else compared(exact, labelled.data(source, MLP_STEP), machine)
    if not trainer.is_global_zero:
        return
    results = moderation_results(moderator, data, further=further, bootstrap=bootstrap)
    saved = written(folder, moderator, data, source, results)
    print(f"{len(moderator.grid.entries):,} prototypes (vectors x metrics) and {len(moderator.grid.mixtures)} mixtures of layers")
    print(comparison(results))
    for warning in results.table.warnings:
        print(f"WARNING: {warning}")
    print(findings(results, data.classes) or "no findings")
    print(f"{saved.name} -> {folder}: report.md, layers.png, confusion.png, metrics.json, predictions.parquet and the moderator")


def moderate_test(
    moderator: str,
    run: str,
    *,
    out: str,
    label: str | None = None,
    name: str | None = None,
    group: str | None = None,
    label_file: str | None = None,
    pooling: list[str] | None = None,
    masks: str | None = None,
    unseen_only: bool = False,
    resamples: int = 1000,
    seed: int = 0,
    devices: int = 1,
    accelerator: str = "auto",
    overwrite: bool = False,
    allow_unverified: bool = False,
) -> None:
    """Applies a moderator to stored activations of other samples, and says what it is worth there.

    Samples may all be of one of two classes: harmless ones alone give the rate of false positives.

    Args:
        moderator: The folder that `moderate fit` wrote.
        run: The run folder, of the same model, tokenizer and aggregation.
        out: Folder for metrics.json, predictions.parquet and confusion.png.
        label: The column of labels. Default: as in the fit.
        name: Which entry or mixture, such as "resid_post.3/mean euclidean". Default: the one that validation chose.
        group: Column of groups, which the intervals resample.
        label_file: File with the labels, if they are not in the store.
        pooling: How rows of tokens are pooled.
        masks: Pool under the masks of this file.
        unseen_only: Leave samples out that have the same tokens as one that the moderator was made of or chosen on, or are of the
            same group in the fit's column of groups. They are an error.
        resamples: Of groups, for the intervals.
        seed: Of the resamples.
        devices: Processes, or GPUs.
        accelerator: cpu, gpu or auto.
        overwrite: Replace what is in the folder.
        allow_unverified: Read stores that were not verified.
    """
    from exactivations.callbacks.process_watch import end_with_parent

    end_with_parent(int(os.environ.get("LOCAL_RANK", "0")))

    from exactivations.lit_modules.moderation.moderator_file import load_moderator
    from exactivations.scripts.moderate_apply import Application, apply_to_runs
    from exactivations.scripts.moderate_run import Machine, opened
    from exactivations.store.errors import InvalidInputError

    if (Path(out) / "metrics.json").exists() and not overwrite and os.environ.get("LOCAL_RANK", "0") == "0":
        raise InvalidInputError(f"{out} holds results already: name another folder with --out, or pass --overwrite")
    saved = load_moderator(moderator)
    source = opened([run], pooling, masks, allow_unverified=allow_unverified)
    application = Application(saved, name or saved.best, label or saved.content["label"], label_file, group, unseen_only)
    apply_to_runs(application, source, Path(out), Machine(devices, accelerator), resamples, seed)


def moderate_score(
    moderator: str,
    *,
    texts: list[str] | None = None,
    dataset: str | None = None,
    config_name: str | None = None,
    split: str | None = None,
    text_column: str | None = None,
    messages_column: str | None = None,
    num_samples: int | None = None,
    sample_seed: int | None = None,
    name: str | None = None,
    out: str | None = None,
    show: int = 20,
    model: str | None = None,
    tokenizer: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Moderates texts live, running the model only as deep as is needed, in batches of exactly equal length.

    Args:
        moderator: The folder that `moderate fit` wrote.
        texts: Texts to moderate.
        dataset: Or a dataset, as in `extract`.
        config_name: Configuration of a hub dataset.
        split: For example train or train[:1000].
        text_column: Column with the texts, if it is called otherwise than in the fit.
        messages_column: Column with chat messages, likewise.
        num_samples: So many samples only, the first ones.
        sample_seed: With num_samples: a random choice with this seed instead.
        name: Which entry or mixture, such as "resid_post.3/mean euclidean". Default: the one that validation chose.
        out: Write a row for each sample to this .parquet file.
        show: Print so many samples.
        model: The model, if it is called or lies otherwise now.
        tokenizer: Its tokenizer, likewise.
        device: cpu, cuda, cuda:1, ... auto: a GPU if there is one.
        overwrite: Replace the file if it is there.
    """
    from exactivations.lit_modules.extraction.origin import Samples
    from exactivations.lit_modules.moderation.live_moderation import LiveModerator
    from exactivations.lit_modules.moderation.moderator_file import load_moderator
    from exactivations.scripts.moderation_report import in_words, write_predictions
    from exactivations.scripts.verify import chosen_device
    from exactivations.store.errors import InvalidInputError

    if (texts is None) == (dataset is None):
        raise InvalidInputError("name what is to be moderated: --texts or --dataset, one of them")
    if out is not None and (Path(out).suffix != ".parquet" or (Path(out).exists() and not overwrite)):
        raise InvalidInputError(f"{out} must be a .parquet file that is not there yet; to replace one, pass --overwrite")
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    saved = load_moderator(moderator)
    live = LiveModerator(saved, name, model=model, tokenizer=tokenizer, device=chosen_device(device))
    samples = Samples(texts or str(dataset), config_name, split, text_column, messages_column, num_samples, sample_seed)
    index, distances = live.moderate(live.data_of(samples))
    log_probabilities = saved.grid.log_probabilities(live.name, distances)
    threshold = saved.threshold_of(live.name)
    print(f"{saved.content['label']} by {live.name} of {saved.name}")
    for sample, words in zip(
        index.tolist()[:show], in_words(log_probabilities, distances.get(live.name), saved.classes, threshold), strict=False
    ):
        print(f"{sample:>8}  {words}")
    if threshold is not None:
        print(f"* above log-odds of {threshold:.4g}, the threshold for {saved.content['threshold_max_fpr']:.0%} false positives")
    if len(index) > show:
        print(f"{len(index):,} samples; {show} are shown (--show)")
    if out is not None:
        write_predictions(Path(out), index.numpy(), saved.grid, distances, [live.name], saved.classes, {live.name: threshold})
        print(f"{len(index):,} samples -> {out}")


def moderate_curve(
    runs: list[str],
    *,
    label: str,
    plot: str,
    vector: str | None = None,
    metrics: list[str] | None = None,
    sizes: list[int] | None = None,
    draws: int = 20,
    group: str | None = None,
    label_file: str | None = None,
    pooling: list[str] | None = None,
    shares: list[float] | None = None,
    seed: int = 0,
    accelerator: str = "auto",
    overwrite: bool = False,
    allow_unverified: bool = False,
) -> None:
    """Shows how good prototypes of few samples per class are: on one test part, over random choices of training samples.

    With the same shares and seed that is the test part of `moderate fit`, looked at again: choose nothing by this curve.

    Args:
        runs: Run folders, as in `moderate fit`.
        label: The column of labels.
        plot: The picture (.png); the same numbers go into a .json of the same name.
        vector: Which activation. Default: that of the entry that validation chooses with all samples.
        metrics: As in `moderate fit`.
        sizes: Samples per class; a class with fewer gives all it has. Default: those of 10, 100 and 1,000 that the largest class
            exceeds.
        draws: Random choices of each size; the bands hold 95% of them.
        group: Column of which no value is to be in two parts.
        label_file: File with the labels, if they are not in the store.
        pooling: How rows of tokens are pooled.
        shares: Of train, validation and test. Default: 0.6 0.2 0.2.
        seed: Of the split and the draws.
        accelerator: cpu, gpu or auto.
        overwrite: Replace the picture and the .json.
        allow_unverified: Read stores that were not verified.
    """
    from dataclasses import asdict

    from exactivations.lit_modules.moderation.prototype_grid import checked_metrics
    from exactivations.lit_modules.moderation.prototype_moderator import DEFAULT_METRICS, PrototypeModerator
    from exactivations.lit_modules.moderation.sample_curve import refuse_other_sizes, sample_curve
    from exactivations.scripts.moderate_run import Labelled, Machine, opened, write_json
    from exactivations.scripts.moderation_plots import curve_plot
    from exactivations.scripts.png import png_path
    from exactivations.store.errors import InvalidInputError

    path = png_path(plot)
    there = [str(file) for file in (path, path.with_suffix(".json")) if file.exists()]
    if there and not overwrite:
        raise InvalidInputError(f"{' and '.join(there)} would be replaced: name another picture, or pass --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    source = opened(runs, pooling, allow_unverified=allow_unverified)
    labelled = Labelled(label, group, label_file, None if vector is None else [vector], tuple(shares or (0.6, 0.2, 0.2)), seed)
    data, chosen = labelled.data(source), checked_metrics(metrics or DEFAULT_METRICS)
    data.setup()
    largest = int(data.targets("train")[0].bincount().max())
    sizes = sizes or [size for size in DEFAULT_SIZES if size < largest]
    refuse_other_sizes(data, sizes, draws)
    if vector is None:
        moderator = PrototypeModerator(chosen, n_folds=None)
        Machine(1, accelerator).trainer().fit(moderator, datamodule=data)
        vector = moderator.grid.entries[moderator.chosen][0]
    points = sample_curve(data, vector, chosen, sizes, n_draws=draws)
    for point in points:
        size = "all" if point.n_per_class is None else f"{point.n_per_class:,}"
        spans = "  ".join(
            f"{what} {mean:.3f} [{low:.3f}, {high:.3f}]" for what, (mean, low, high) in (("AUROC", point.auroc), ("F1", point.f1))
        )
        print(f"{point.entry}  {size:>6} per class ({'/'.join(map(str, point.counts))})  {spans}")
    title = f"{label}: {vector}; test: {len(data.numbers('test')):,} samples; bands hold 95% of {draws} draws"
    curve_plot(points, title, path)
    write_json(path.with_suffix(".json"), {"label": label, "classes": data.classes, "points": [asdict(point) for point in points]})
    print("The test part is that of `moderate fit` with these shares and this seed, looked at again: choose nothing by this curve.")
    print(f"-> {path}, {path.with_suffix('.json')}")
