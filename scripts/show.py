"""`exactivations show`: what is in a run folder."""


def show(run: str, *, checksums: bool = False) -> None:
    """Shows what a store holds, whether it is complete, how large it is, and how to read it.

    Args:
        run: The run folder.
        checksums: Read every shard and compare it with its checksum.
    """
    from exactivations.store.activation_store import ActivationStore
    from exactivations.store.run_folder import RunFolder
    from exactivations.store.verification import read_verification

    if "alphas" in RunFolder(run).read_info().identity:
        return _show_completions(run, checksums)
    store = ActivationStore(run, allow_incomplete=True, allow_unverified=True, allow_witnesses=True, verify_checksums=checksums)
    verification = read_verification(store.folder, store.info)
    info, about = store.info, store.info.about
    missing = info.n_shards - len(store.published)
    state = "complete" if not missing else f"INCOMPLETE: {missing:,} shards are missing; the same command goes on"
    size = sum(store.folder.shard_path(shard).stat().st_size for shard in store.published)
    padding = 1 - info.n_tokens / info.n_computed_tokens
    dataset, column = about["dataset"] or f"a {about['dataset_kind']} in Python", about["messages_column"] or about["text_column"]
    split = f" {about['split']}" if about["split"] else ""
    model = f"{info.identity['model_class']}, {info.identity['dtype']}, weights {info.identity['model'][:12]}"
    print(f"{run}: {state}{'; all checksums agree' if checksums else ''}")
    print(f"  model     {about['model'] or 'held in Python'} ({model})")
    print(f"  dataset   {dataset}{split}, column {column}")
    there = int(store.n_published_samples)
    print(f"  samples   {there:,} of {info.n_samples:,}; {about['n_truncated']:,} cut, {len(info.skipped):,} skipped as empty")
    print(f"  tokens    {info.n_tokens:,}; {padding:.1%} padding computed, none stored")
    print(f"  shards    {len(store.published):,} of {info.n_shards:,}, {size / 1e6:,.1f} MB")
    print(f"  columns   {', '.join(store.samples.column_names)}")
    if info.means is not None:
        rows_kept = "beside their rows" if info.keeps_rows else f"and the rows of {len(store):,} samples as witnesses"
        told = f": exactivations means show {run}" if not missing else ", not folded yet"
        print(f"  means     of {len(info.means['vectors']):,} vectors, {rows_kept}{told}")
    print("  activations")
    for name, spec in info.activations.items():
        n_tokens = info.n_tokens if info.keeps_rows else store.n_tokens_kept
        rows = n_tokens if spec["per_token"] else info.n_samples if info.keeps_rows else len(store)
        print(f"    {name:<28} [{rows:,}, {spec['width']:,}] {spec['dtype']}")
    for change in info.changes:
        changes = ", ".join(f"{name} from {was} to {now}" for name, (was, now) in change["fields"].items())
        print(f"  changed on the way: {changes}")
    if verification is None:
        print(
            f"  NOT VERIFIED: readers refuse it until you run: exactivations verify {run}" if not missing else "  not verified yet"
        )
    elif not verification.passed:
        print(f"  FAILED its verification of {verification.when}: {(verification.failures or ['nothing was checked'])[0]}")
        print(f"  and {verification.n_failures - 1:,} more; readers refuse it")
    else:
        what = f"{len(verification.samples)} samples, computed again alone in {verification.dtype}"
        print(f"  verified  {verification.when}: {what}, agree")
    if info.keeps_rows:
        print(how_to_read(run, store.names[0], incomplete=bool(missing)))


def _show_completions(run: str, checksums: bool) -> None:
    from exactivations.store.completions import CompletionStore

    store = CompletionStore(run, allow_incomplete=True, verify_checksums=checksums)
    identity, about = store.info.identity, store.info.about
    missing = store.info.n_shards - len(store.folder.published(store.info))
    state = "complete" if not missing else f"INCOMPLETE: {missing:,} shards are missing; the same command goes on"
    print(f"{run}: {identity['kind']}, {state}{'; all checksums agree' if checksums else ''}")
    for part in ("before", "after"):
        weights = f"{identity[f'{part}_model_class']}, {identity['dtype']}, weights {identity[f'{part}_model'][:12]}"
        print(f"  {part:<9} {about[part] or 'held in Python'} ({weights})")
    print(f"  dataset   {about['dataset'] or 'held in Python'}, column {about['messages_column'] or about['text_column']}")
    print(f"  prompts   {len(store.sample_index):,} of {store.info.n_samples:,}; {about['n_truncated']:,} cut")
    print(f"  each      {store.rollouts:,} rollouts at alpha {', '.join(f'{alpha:g}' for alpha in store.alphas)}")
    told = ("max_new_tokens", "temperature", "top_p", "seed", "ignore_eos", "scores")
    print(f"  drawn     {', '.join(f'{name} {identity[name]}' for name in told)}")


def how_to_read(run: str, name: str, *, incomplete: bool = False) -> str:
    """Returns the three lines of Python that read an activation of a store."""
    hook_point, _, pooling = name.rpartition("/")
    if pooling == "tokens":
        read = f'for block in store.tokens("{hook_point}"): print(block.sample_index, block.values.shape)'
    else:
        read = f'rows = store.pooled("{hook_point}", "{pooling}")'
    opened = f'store = ActivationStore("{run}"{", allow_incomplete=True" if incomplete else ""})'
    return "\n    ".join(["read it with", "from exactivations.store import ActivationStore", opened, read])
