"""`exactivations probe-test`: what saved probes are worth on the stored activations of other samples."""

from pathlib import Path


def probe_test(
    probes: str,
    run: str,
    *,
    out: str,
    label: str | None = None,
    group: str | None = None,
    label_file: str | None = None,
    vectors: list[str] | None = None,
    unseen_only: bool = False,
    baseline: bool = True,
    resamples: int = 1000,
    seed: int = 0,
    dataset: str | None = None,
    tokenizer: str | None = None,
    overwrite: bool = False,
    allow_unverified: bool = False,
) -> None:
    """Applies saved probes to stored activations of other samples, another distribution say, and says what they are worth there.

    Nothing is trained or chosen: the threshold stays as training fixed it, and the share of negatives above it here is told.
    Samples may all be of one class: harmless ones alone give the rate of false positives.

    Args:
        probes: The folder that `probe` wrote.
        run: The run folder, of the same model, tokenizer, hook points and poolings.
        out: Folder for metrics.json and report.md.
        label: The column of labels. Default: as in training.
        group: Column of groups, which the intervals resample.
        label_file: File with the labels, if they are not in the store: .jsonl, .csv or .parquet, with sample_index or token_hash.
        vectors: Which vectors' probes, or "ensemble: average" or "ensemble: stacked". Default: the one that validation chose.
        unseen_only: Leave samples out that have the same tokens as one that the probes were trained or chosen on, or are of the
            same group in training's column of groups. They are an error.
        baseline: Put the length baseline beside, as it was trained with the probes.
        resamples: Of groups, for the intervals.
        seed: Of the resamples.
        dataset: The dataset of the run, if it lies elsewhere now; the length baseline reads it.
        tokenizer: Its tokenizer, likewise.
        overwrite: Replace what is in the folder.
        allow_unverified: Read stores that were not verified.
    """
    from exactivations.lit_modules.extraction.run_description import Elsewhere
    from exactivations.lit_modules.probes.probe_evaluation import Bootstrap
    from exactivations.lit_modules.probes.probe_file import load_probes
    from exactivations.scripts.probe_apply import Application, apply_to_run, tell, write
    from exactivations.store.activation_store import ActivationStore
    from exactivations.store.errors import InvalidInputError

    if (Path(out) / "metrics.json").exists() and not overwrite:
        raise InvalidInputError(f"{out} holds results already: name another folder with --out, or pass --overwrite")
    saved = load_probes(probes)
    store = ActivationStore(run, allow_unverified=allow_unverified)
    application = Application(
        saved, vectors or [str(saved.content["best"])], label or str(saved.content["label"]), label_file, group, unseen_only,
        baseline, Elsewhere(tokenizer=tokenizer, dataset=dataset),
    )  # fmt: skip
    found = apply_to_run(application, store, Bootstrap(resamples, seed))
    tell(found, application, store)
    write(Path(out), found, application, store)
    print(f"-> {out}: metrics.json, report.md")
