"""`exactivations score`: what saved probes say of texts."""


def score(
    probes: str,
    *,
    texts: list[str] | None = None,
    dataset: str | None = None,
    config_name: str | None = None,
    split: str | None = None,
    text_column: str | None = None,
    messages_column: str | None = None,
    num_samples: int | None = None,
    sample_seed: int | None = None,
    vector: str | None = None,
    out: str | None = None,
    show: int = 20,
    model: str | None = None,
    tokenizer: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Scores texts by a saved probe, running the model only as deep as the probe needs.

    A probe of tokens shows each text with its tokens coloured by their scores, on a terminal or as a page (--out page.html).

    Args:
        probes: The folder that `probe` wrote.
        texts: Texts to score.
        dataset: Or a dataset, as in `extract`.
        config_name: Configuration of a hub dataset.
        split: For example train or train[:1000].
        text_column: Column with the texts, if it is called otherwise than in training.
        messages_column: Column with chat messages, likewise.
        num_samples: Score so many samples only, the first ones.
        sample_seed: With num_samples: a random choice with this seed instead.
        vector: Which vector's probe, or "ensemble: average" or "ensemble: stacked". Default: the one that validation chose.
        out: Write all scores to this .jsonl or .parquet file, or those of tokens to an .html page.
        show: Print so many samples.
        model: The model, if it is called or lies otherwise now.
        tokenizer: Its tokenizer, likewise.
        device: cpu, cuda, cuda:1, ... auto: a GPU if there is one.
        overwrite: Replace the file if it is there.
    """
    from pathlib import Path

    from exactivations.lit_modules.extraction.origin import Samples
    from exactivations.lit_modules.probes.probe_file import load_probes
    from exactivations.lit_modules.probes.scoring import Scorer
    from exactivations.scripts.scores import refuse_out, tell_scores, write_scores
    from exactivations.scripts.verify import chosen_device
    from exactivations.store.errors import InvalidInputError

    if (texts is None) == (dataset is None):
        raise InvalidInputError("name what is to be scored: --texts or --dataset, one of them")
    saved = load_probes(probes)
    refuse_out(out, saved, overwrite=overwrite)
    scorer = Scorer(saved, vector, model=model, tokenizer=tokenizer, device=chosen_device(device))
    samples = Samples(texts or str(dataset), config_name, split, text_column, messages_column, num_samples, sample_seed)
    data = scorer.data_of(samples)
    scored = sorted(scorer.score(data), key=lambda sample: sample.sample_index)
    tell_scores(scored, scorer, data, show)
    if out is not None:
        write_scores(Path(out), scored, scorer, data)
        print(f"{len(scored):,} samples -> {out}")
