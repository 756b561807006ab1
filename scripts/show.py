"""`exactivations show`: what is in a run folder."""


def show(run: str, *, checksums: bool = False) -> None:
    """Shows what a store holds, whether it is complete, how large it is, and how to read it.

    Args:
        run: The run folder.
        checksums: Read every shard and compare it with its checksum.
    """
    from exactivations.store.activation_store import ActivationStore

    store = ActivationStore(run, allow_incomplete=True, verify_checksums=checksums)
    info, folder = store.info, store.folder
    missing = info.n_shards - len(store.published)
    size = sum(folder.shard_path(shard).stat().st_size for shard in store.published)
    state = "complete" if not missing else f"INCOMPLETE: {missing} shards are missing; the same extract command goes on"
    print(f"{run}: {state}{'; all checksums agree' if checksums else ''}")
    print(
        f"  model      {info.about['model']} ({info.identity['model_class']}, {info.identity['dtype']}, weights {info.identity['model'][:12]})"
    )
    print(
        f"  dataset    {info.about['dataset']}{' ' + info.about['split'] if info.about['split'] else ''}, column {info.about['text_column']}"
    )
    print(
        f"  samples    {len(store):,} of {info.n_samples:,}, {info.n_tokens:,} tokens, {info.about['n_truncated']:,} truncated, {len(info.skipped):,} skipped as empty"
    )
    print(
        f"  shards     {len(store.published):,} of {info.n_shards:,}, {size / 1e6:,.1f} MB, {1 - info.n_tokens / info.n_computed_tokens:.1%} padding computed, none stored"
    )
    print(f"  columns    {', '.join(store.samples.column_names)}")
    for name, spec in info.activations.items():
        rows = info.n_tokens if spec["per_token"] else info.n_samples
        print(f"  {name:<26} [{rows:,}, {spec['width']}] {spec['dtype']}")
    for change in info.changes:
        print(f"  changed on the way: {', '.join(f'{name} from {was} to {now}' for name, (was, now) in change['fields'].items())}")
    hook_point, _, pooling = store.names[0].rpartition("/")
    print("read it with\n    from exactivations.store import ActivationStore")
    print(f'    store = ActivationStore("{run}"{", allow_incomplete=True" if missing else ""})')
    print(
        f'    for block in store.tokens("{hook_point}"): ...'
        if pooling == "tokens"
        else f'    rows = store.pooled("{hook_point}", "{pooling}")'
    )
