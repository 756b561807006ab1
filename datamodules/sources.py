"""From a name to a dataset: hub ids, local files, saved folders, lists, and the embedded demo."""

from pathlib import Path

import datasets

from exactivations.datamodules.demo import demo_functions
from exactivations.store.errors import InvalidInputError

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_source(
    source: str | Path | list[str] | datasets.Dataset,
    config: str | None = None,
    split: str | None = None,
    text_column: str = "text",
) -> datasets.Dataset:
    """Returns the dataset that `source` names, in its own order.

    Args:
        source: "demo"; a .jsonl, .json, .csv, .parquet or .txt file (one text a line); a folder written by
            `Dataset.save_to_disk` or laid out like a hub dataset; a hub id; a list of texts; or a dataset.
        config: Configuration of a hub dataset.
        split: For example "train" or "train[:1000]"; needed where a source has several splits.
        text_column: Name of the text column that a list of texts or a .txt file gets.

    Raises:
        InvalidInputError: If there is no such source or split, or a split is needed and none was given.
    """
    if isinstance(source, list):
        return _split_of(datasets.Dataset.from_dict({text_column: source}), split)
    if isinstance(source, datasets.Dataset):
        return _split_of(source, split)
    if str(source) == "demo":
        return _split_of(demo_functions(), split)
    path = Path(source)
    if path.is_file():
        return _load_file(path, split, text_column)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return _split_of(datasets.load_from_disk(str(path)), split)
    if path.suffix in BUILDERS or str(source).startswith(("/", "./", "../", "~")):
        raise InvalidInputError(f"dataset {source}: there is no such file or folder")
    try:
        loaded = datasets.load_dataset(str(source), config, split=split)
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"dataset {source!r} is neither a local path nor could it be loaded from the hub: {error}"
        ) from error
    return _split_of(loaded, None)


def _load_file(path: Path, split: str | None, text_column: str) -> datasets.Dataset:
    builder = BUILDERS.get(path.suffix)
    if builder is None:
        raise InvalidInputError(f"dataset {path}: files may end in {', '.join(BUILDERS)}; this one ends in {path.suffix!r}")
    try:
        loaded = datasets.load_dataset(builder, data_files={"train": str(path)}, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise InvalidInputError(f"dataset {path} cannot be read: {error.__cause__ or error}") from error
    return loaded.rename_column("text", text_column) if builder == "text" and text_column != "text" else loaded


def _split_of(loaded: datasets.Dataset | datasets.DatasetDict, split: str | None) -> datasets.Dataset:
    """Applies a split instruction such as "train[10%:20%]" to what is loaded already."""
    if isinstance(loaded, datasets.Dataset) and split is None:
        return loaded
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split is None:
        raise InvalidInputError(f"the dataset has the splits {', '.join(splits)}: name one (--split {next(iter(splits))})")
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(part) for name, part in splits.items()})
    except (ValueError, AssertionError) as error:
        raise InvalidInputError(f"split {split!r} does not fit the dataset's splits ({', '.join(splits)}): {error}") from error
    selected = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return datasets.concatenate_datasets(selected) if len(selected) > 1 else selected[0]
