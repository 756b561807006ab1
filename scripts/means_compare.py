"""`exactivations means compare`: how near texts or stored samples are to a mean, before and after it is subtracted."""


def means_compare(
    result: str,
    *,
    vector: str | None = None,
    texts: list[str] | None = None,
    dataset: str | None = None,
    split: str | None = None,
    text_column: str | None = None,
    num_samples: int | None = None,
    sample_seed: int | None = None,
    store: str | None = None,
    group: str | None = None,
    by_position: bool = False,
    min_count: int = 10,
    plot: str | None = None,
    labels: str | None = None,
    model: str | None = None,
    tokenizer: str | None = None,
    device: str = "auto",
    allow_unverified: bool = False,
) -> None:
    """Compares texts or stored samples with a mean, and with each other before and after it is subtracted.

    Args:
        result: A run folder or a means file.
        vector: Which vector, such as resid_post.3/mean. Default: the only one.
        texts: Texts to compare; the model of the means is run on them.
        dataset: Or a dataset, as in `means run`.
        split: For example train or train[:1000].
        text_column: Column with the texts, if it is called otherwise than before.
        num_samples: Compare so many samples only, of the dataset or the store. Default: all, 40 of a store.
        sample_seed: With num_samples: a random choice with this seed instead of the first ones.
        store: Or the run folder of an `extract`: its samples.
        group: The mean of this group, instead of that of all.
        by_position: Subtract the means by position instead (texts and datasets only).
        min_count: With by_position: how many tokens a position's mean must have.
        plot: Draw the pairwise cosines before and after into this PNG.
        labels: Name the samples in the plot by this column. Default: by sample index.
        model: The model of the means, if it is called or lies otherwise now.
        tokenizer: Its tokenizer, likewise.
        device: cpu, cuda, cuda:1, ... auto: a GPU if there is one.
        allow_unverified: Compare with means, or samples of a store, that were not verified.
    """
    import torch

    from exactivations.datamodules.draw import choose
    from exactivations.lit_modules.extraction.live_rows import live_rows
    from exactivations.lit_modules.extraction.origin import Samples
    from exactivations.scripts.heat_map import heat_maps
    from exactivations.scripts.verify import chosen_device
    from exactivations.store.activation_store import ActivationStore
    from exactivations.store.errors import InvalidInputError
    from exactivations.store.mean_activations import MeanActivations
    from exactivations.store.similarity import mean_off_diagonal, pairwise_cosine

    if sum(given is not None for given in (texts, dataset, store)) != 1:
        raise InvalidInputError("name what is to be compared: --texts, --dataset or --store, one of them")
    if by_position and (store is not None or group is not None):
        raise InvalidInputError("--by-position needs the tokens of --texts or --dataset, and has no groups")
    means = MeanActivations.load(result, allow_unverified=allow_unverified)
    if vector is None and len(means.names) > 1:
        raise InvalidInputError(f"there are several means: choose one with --vector ({', '.join(means.names)})")
    name = vector or means.names[0]
    n_counted = None
    if store is not None:
        stored = ActivationStore(store, allow_unverified=allow_unverified)
        n = min(len(stored), 40) if num_samples is None else num_samples
        if not 1 <= n <= len(stored):
            raise InvalidInputError(f"{n} samples were asked for, {store} has {len(stored)}")
        if labels is not None and labels not in stored.samples.column_names:
            raise InvalidInputError(f"{store} has no column {labels!r}; it has {', '.join(stored.samples.column_names)}")
        chosen = torch.arange(n) if sample_seed is None else torch.from_numpy(choose(len(stored), n, sample_seed))
        rows = means.rows_of(stored, name, chosen)
        index = stored.sample_index[chosen.numpy()].tolist()
        names = stored.samples.column(labels).take(chosen.numpy()).to_pylist() if labels else index
    else:
        samples = Samples(texts or str(dataset), None, split, text_column, None, num_samples, sample_seed)
        live = live_rows(
            means.file, means.vector(name), samples,
            device=chosen_device(device), model=model, tokenizer=tokenizer, label_column=labels,
        )  # fmt: skip
        rows, n_counted, index, names = live.rows, live.n_counted, live.sample_index, live.labels
    centred = (
        means.centre_by_position(rows, name, n_counted, min_count=min_count)
        if by_position and n_counted is not None
        else means.centre(rows, name, group)
    )
    to_mean, after = means.cosine(rows, name, group), means.cosine(centred.values, name, group)
    print(f"{name}: {len(rows)} samples against the mean of {means.count(name, group):,}; centred by: {centred.by}")
    print(f"  {'sample':>8} {'cosine':>8} {'centred':>8}   with the mean, before and after centring")
    for row in range(min(len(rows), 10)):
        what = f"   {texts[row][:60]!r}" if texts is not None else f"   {names[row]}" if labels else ""
        print(f"  {index[row]:>8} {to_mean[row]:8.3f} {after[row]:8.3f}{what}")
    more = f"   of all {len(rows)}; 10 are shown" if len(rows) > 10 else ""
    print(f"  {'mean':>8} {to_mean.mean():8.3f} {after.mean():8.3f}{more}")
    if len(rows) < 2:
        return
    before, behind = pairwise_cosine(rows), pairwise_cosine(centred.values)
    print(f"cosine between two samples, on average: {mean_off_diagonal(before):.3f} before, {mean_off_diagonal(behind):.3f} after")
    if plot:
        heat_maps(before, behind, plot, titles=(f"{name} as it is", f"less its {centred.by}"), labels=[str(n) for n in names])
        print(f"drawn in {plot}")
