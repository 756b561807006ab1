"""`exactivations means from-store`, `merge`, `show` and `export`: what is done with results, without a model."""

from typing import Literal


def means_from_store(
    run: str,
    *,
    pooling: list[str] | None = None,
    hooks: list[str] | None = None,
    average_layers: bool = False,
    positions: int = 0,
    group: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Takes mean vectors of a finished store's rows: the same bits as if they had been taken while it was written.

    Args:
        run: The run folder of an `extract`.
        pooling: Of the store: mean, last, ..., or short and long if it holds their parts. Default: all that it holds pooled.
        hooks: Hook points of the store, such as resid_post.3. Default: all.
        average_layers: Average the hook points, in one mean, instead of a mean for each.
        positions: Also means of the states at so many positions from the end; the store must hold tokens.
        group: A column of the store: also a mean for each of its values.
        out: The file to write. Default: means.safetensors in the run folder.
        overwrite: Replace a result that is there.
    """
    from pathlib import Path

    from exactivations.scripts.means_table import tell_means
    from exactivations.store.errors import InvalidInputError
    from exactivations.store.means_file import alone_with
    from exactivations.store.means_fold import fold_rows
    from exactivations.store.pooling_names import TOKENS
    from exactivations.store.run_folder import MEANS_FILE, RunFolder
    from exactivations.store.shard_sums import MeanOptions
    from exactivations.store.vectors import vectors_of

    folder = RunFolder(run)
    info = folder.read_info()
    held = [name.rpartition("/") for name in info.activations]
    points = hooks or list(dict.fromkeys(point for point, _, _ in held))
    poolings = pooling or list(dict.fromkeys(name for _, _, name in held if name != TOKENS))
    if not poolings:
        raise InvalidInputError(f"{run} holds tokens only, and no vector per sample: extract it with --pooling mean, say")
    options = MeanOptions(vectors_of(points, poolings, average=average_layers), group, positions)
    path = Path(out or Path(run) / MEANS_FILE)
    if path.exists() and not overwrite:
        raise InvalidInputError(f"{path} is there already: name another file with --out, or replace it with --overwrite")
    result = fold_rows(folder, options)
    with alone_with(path):
        result.write(path)
    tell_means(str(path))


def means_merge(results: list[str], *, out: str, allow_duplicates: bool = False) -> None:
    """Joins the results of separate runs in one.

    Args:
        results: Run folders or means files, of the same model and vectors.
        out: The file to write.
        allow_duplicates: Let samples count twice that are in several of them, by the hash of their tokens.
    """
    from pathlib import Path

    from exactivations.scripts.means_table import tell_means
    from exactivations.store.errors import InvalidInputError
    from exactivations.store.means_file import read_means
    from exactivations.store.means_join import merge

    if len(results) < 2:
        raise InvalidInputError(f"merging needs at least two results, got {' '.join(results) or 'none'}")
    if Path(out).exists():
        raise InvalidInputError(f"{out} is there already: name a new file")
    merge([read_means(result) for result in results], allow_duplicates=allow_duplicates).write(Path(out))
    tell_means(out)


def means_show(result: str) -> None:
    """Shows what a result holds and where it comes from.

    Args:
        result: A run folder or a means file.
    """
    from exactivations.scripts.means_table import tell_means

    tell_means(result)


def means_export(
    result: str,
    *,
    out: str,
    vector: list[str] | None = None,
    what: Literal["mean", "normalised", "difference", "normalised-difference"] = "mean",
    groups: list[str] | None = None,
    allow_unverified: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes mean vectors in other formats, by the name's ending: .safetensors, .npz, .npy, .gguf (for llama.cpp).

    Args:
        result: A run folder or a means file.
        out: The file to write.
        vector: Which vectors. Default: all.
        what: The means, the means divided by their norm, or differences of the means of two groups.
        groups: With differences: the two groups, the mean of the second subtracted from that of the first.
        allow_unverified: Export means whose run was not verified.
        overwrite: Replace a file that is there.
    """
    from exactivations.store.errors import InvalidInputError
    from exactivations.store.mean_activations import MeanActivations
    from exactivations.store.means_export import export_means

    if groups is not None and len(groups) != 2:
        raise InvalidInputError(f"--groups takes two groups, got {len(groups)}")
    pair = None if groups is None else (groups[0], groups[1])
    means = MeanActivations.load(result, allow_unverified=allow_unverified)
    names = export_means(means, out, names=vector, what=what, groups=pair, overwrite=overwrite)
    print(f"wrote {out}: {what} of {', '.join(names)}")
