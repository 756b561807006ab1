"""From a name to a dataset: hub ids, local files, saved folders, lists, and the embedded demo."""

import glob
from pathlib import Path

import datasets
import xxhash

from exactivations.datamodules.demo import demo_functions
from exactivations.store.errors import InvalidInputError

# The texts "NA" and "null" are texts; only an empty field is missing.
CSV_OPTIONS = {"keep_default_na": False, "na_values": [""]}
READ_ERRORS = (OSError, ValueError, TypeError, RuntimeError, StopIteration, datasets.exceptions.DatasetsError)
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_source(
    source: str | Path | list[str] | datasets.Dataset | datasets.DatasetDict,
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
        return _split_of(_from_list(source, text_column), split)
    if isinstance(source, datasets.Dataset | datasets.DatasetDict):
        return _split_of(source, split)
    if str(source) == "demo":
        return _split_of(demo_functions(), split)
    path = Path(source).expanduser()
    if path.is_file():
        return _split_of(_load_file(path, text_column), split)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return _split_of(_load_saved(path), split)
    if not path.is_dir() and (path.suffix.lower() in BUILDERS or str(source).startswith(("/", "./", "../", "~"))):
        raise InvalidInputError(f"dataset {source}: there is no such file or folder")
    name = str(path) if path.is_dir() else str(source)
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except READ_ERRORS as error:
        where = "is a folder that could not be read" if path.is_dir() else "is no local path, and could not be loaded from the hub"
        raise InvalidInputError(f"dataset {name!r} {where}: {_reason(error)}") from error
    return _split_of(loaded, None)


def _from_list(texts: list[str], text_column: str) -> datasets.Dataset:
    try:
        return datasets.Dataset.from_dict({text_column: texts})
    except (ValueError, TypeError) as error:  # Arrow has one type in a column
        wrong = next((i for i, text in enumerate(texts) if text is not None and not isinstance(text, str)), None)
        where = "" if wrong is None else f"sample {wrong} is of type {type(texts[wrong]).__name__}, expected text; "
        raise InvalidInputError(f"a list of texts must hold nothing but strings: {where}{_reason(error)}") from error


def _load_file(path: Path, text_column: str) -> datasets.Dataset:
    builder = BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise InvalidInputError(f"dataset {path}: files may end in {', '.join(BUILDERS)}; this one ends in {path.suffix!r}")
    if not path.stat().st_size:
        raise InvalidInputError(f"dataset {path}: the file is empty")
    name = glob.escape(str(path))  # `datasets` takes names for patterns: a[1].csv would silently read a1.csv
    options = CSV_OPTIONS if builder == "csv" else {}
    try:
        # The content names the cached copy. `datasets` itself goes by the time of the last change, which a copy may keep.
        loaded = datasets.load_dataset(builder, _content_hash(path), data_files={"train": name}, split="train", **options)
    except READ_ERRORS as error:
        raise InvalidInputError(f"dataset {path} cannot be read: {_reason(error)}") from error
    return loaded.rename_column("text", text_column) if builder == "text" and text_column != "text" else loaded


def _content_hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def _load_saved(path: Path) -> datasets.Dataset | datasets.DatasetDict:
    try:
        return datasets.load_from_disk(str(path))
    except (*READ_ERRORS, KeyError) as error:
        raise InvalidInputError(f"dataset {path} is a saved dataset that cannot be read: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The first cause of an error, on one line."""
    cause = error.__cause__ or error
    return " ".join(str(cause).split()) or type(cause).__name__


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
    # an empty range is a list, since `select` refuses one that starts at the end
    selected = [splits[part.splitname].select(range(part.from_, part.to) if part.from_ < part.to else []) for part in parts]
    return datasets.concatenate_datasets(selected) if len(selected) > 1 else selected[0]
