"""The folder of one run: run.json (what was run), samples.parquet (what is where) and the shards.

A folder is complete when every planned shard is there. That is looked up, never noted down, so it cannot go stale: folders
that several nodes wrote are merged by copying them into one.
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from exactivations.store.errors import CorruptShardError, IdentityError, InvalidInputError, StoreError, shown
from exactivations.store.shard import open_shard, publish, write_text_atomically

FORMAT_VERSION = 3
RUN_FILE, SAMPLES_FILE, SHARD_FOLDER, VERIFICATION_FILE = "run.json", "samples.parquet", "shards", "verification.json"
MEANS_FILE = "means.safetensors"  # the folded result of a run that takes means
SAMPLES_BLOCK = 8192  # rows of one row group of samples.parquet: so many are in memory at a time
OWN_COLUMNS = ("sample_index", "n_tokens", "token_hash", "truncated", "shard", "row")
ENVIRONMENT_FIELDS = frozenset({"torch", "transformers", "device_type", "cpu_threads"})
"""Fields of the identity that a user may allow to change in the middle of a run; all others never may."""


@dataclass
class RunInfo:
    """The content of run.json.

    Attributes:
        identity: Everything that decides the values, by field name. Two runs with equal identity give equal bytes.
        about: What is told but does not decide the values: names, versions of other packages, the date.
        n_shards: Planned shards. n_samples, n_tokens: what they hold together. n_computed_tokens: with padding.
        activations: By name: whether per token, width, dtype.
        skipped: Sample indices that were left out because their text is empty (only when asked for).
        changes: Environment changes that the user allowed, each with the fingerprint of the shards made after it.
        format_version: Version of the store format.
    """

    identity: dict[str, Any]
    about: dict[str, Any]
    n_shards: int
    n_samples: int
    n_tokens: int
    n_computed_tokens: int
    activations: dict[str, dict[str, Any]]
    skipped: list[int] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """The identity with all allowed changes, as a short hash. Every shard carries the one it was made under."""
        return self.fingerprints[-1]

    @property
    def fingerprints(self) -> list[str]:
        """All fingerprints that shards of this run may carry, the present one last."""
        return [fingerprint_of(self.identity), *(change["fingerprint"] for change in self.changes)]

    @property
    def means(self) -> dict[str, Any] | None:
        """What means are taken of, as JSON (see `MeanOptions`), with the names of the groups; None if none are."""
        return self.identity.get("means")

    @property
    def keeps_rows(self) -> bool:
        """Whether every sample's rows are in the shards; else only sums are, and the rows of some samples as witnesses."""
        return self.means is None or bool(self.means["keeps_rows"])

    @property
    def present_identity(self) -> dict[str, Any]:
        """The identity after all allowed changes."""
        present = dict(self.identity)
        for change in self.changes:
            present |= {name: now for name, (_, now) in change["fields"].items()}
        return present


def places_of_shards(shard: npt.NDArray[Any], row: npt.NDArray[Any], n_shards: int) -> list[npt.NDArray[np.int64]]:
    """Returns for each shard the places of its samples in samples.parquet, in row order, from their shards [n] and rows [n]."""
    by_place = np.lexsort((row, shard))
    return np.split(by_place, np.searchsorted(shard[by_place], np.arange(1, n_shards)))


def contents_of(checksums: dict[int, str], footer: str) -> str:
    """Returns one hash of the bytes of all shards, from the checksums in their headers, and of samples.parquet, from its footer."""
    return xxhash.xxh3_128(json.dumps([sorted(checksums.items()), footer]).encode()).hexdigest()


def fingerprint_of(identity: dict[str, Any]) -> str:
    """Returns the xxh3-128 of an identity in canonical JSON."""
    return xxhash.xxh3_128(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class RunFolder:
    """Reads and writes the files of a run. Does not look inside the activations.

    Args:
        path: The folder. Nothing is made or read before it is asked for.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.shard_folder = self.path / SHARD_FOLDER

    def shard_path(self, shard: int) -> Path:
        """Returns the final name of a shard's file."""
        return self.shard_folder / f"{shard:05d}.safetensors"

    @property
    def exists(self) -> bool:
        """Whether a run was ever started here."""
        return (self.path / RUN_FILE).is_file()

    def read_info(self) -> RunInfo:
        """Reads run.json.

        Raises:
            StoreError: If there is none, it cannot be read, or it is of another format version.
        """
        path = self.path / RUN_FILE
        try:
            content = json.loads(path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(f"{self.path} is not a run folder: there is no {RUN_FILE} in it") from None
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise StoreError(f"{path} cannot be read: it holds a {type(content).__name__}, not a run's description")
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            is_older = isinstance(version, int) and version < FORMAT_VERSION
            raise StoreError(
                f"{path} has store format version {version}, this exactivations reads version {FORMAT_VERSION}: install the "
                f"exactivations that wrote it{', or make it anew with --overwrite' if is_older else ', or a newer one'}"
            )
        missing = [f.name for f in fields(RunInfo) if f.name not in content]
        if missing:
            raise StoreError(f"{path} cannot be read: it lacks {', '.join(missing)}")
        return RunInfo(**{f.name: content[f.name] for f in fields(RunInfo)})

    def refuse_completions(self, info: RunInfo, instead: str) -> None:
        """Refuses a run whose rows are completions, and no activations.

        Raises:
            StoreError: Saying what to do instead.
        """
        if "alphas" in info.identity:
            raise StoreError(f"{self.path} holds completions, and no activations: {instead}")

    def read_samples(self, columns: list[str] | None = None) -> pa.Table:
        """Reads samples.parquet, or some columns of it."""
        try:
            return pq.read_table(self.path / SAMPLES_FILE, columns=columns, memory_map=True, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"{self.path / SAMPLES_FILE} cannot be read ({type(error).__name__}: {error})") from error

    def columns(self) -> list[str]:
        """Returns the names of samples.parquet's columns."""
        try:
            return list(pq.read_schema(self.path / SAMPLES_FILE).names)
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"{self.path / SAMPLES_FILE} cannot be read ({type(error).__name__}: {error})") from error

    def samples_footer(self) -> str:
        """Returns a hash of samples.parquet's footer: sizes, places and statistics of all columns, which no rewriting leaves alone.

        Raises:
            StoreError: If the file is not there, or no Parquet file.
        """
        path = self.path / SAMPLES_FILE
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 8))
                length = int.from_bytes(file.read(4), "little")
                if file.read(4) != b"PAR1" or length + 8 > size:
                    raise StoreError(f"{path} is no whole Parquet file: copy it from another copy of this store")
                file.seek(size - 8 - length)
                return xxhash.xxh3_128(file.read(length)).hexdigest()
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror}. Copy it from another copy of this store") from error

    def prepare(self, info: RunInfo, samples: Iterable[pa.Table], *, overwrite: bool, allow_changed: frozenset[str]) -> None:
        """Starts a new run here, or goes on with the one that is here if it is the same.

        Only to be called while no other process works in the folder. Left-over temporary files are removed. Killed at any
        moment, it leaves a folder that it can be called for again: run.json comes first, and is replaced, never removed.

        Args:
            info: What is to be run.
            samples: The rows of samples.parquet, in tables of SAMPLES_BLOCK rows (the last one may be shorter).
            overwrite: Remove the run that is there.
            allow_changed: Fields of the environment that may differ from the run that is there.

        Raises:
            IdentityError: If the folder holds another run; every differing field is named with both values.
            StoreError: If the folder cannot be written to or holds something that is not a run.
        """
        try:
            if self.exists and not overwrite:
                self._go_on(info, samples, allow_changed)
            else:
                self._remove_content() if self.exists else self.refuse_strangers()
                self._write_info(info)
                self._write_samples(samples)
            self.shard_folder.mkdir(exist_ok=True)
            for leftover in (*self.path.glob(".*.tmp"), *self.shard_folder.glob(".*.safetensors.*.tmp")):
                leftover.unlink()
        except OSError as error:
            raise StoreError(f"cannot write to the run folder {self.path}: {error}") from error

    def published(self, info: RunInfo) -> set[int]:
        """Returns the shards that are there; see `checksums`."""
        return set(self.checksums(info))

    def checksums(self, info: RunInfo) -> dict[int, str]:
        """Returns the shards that are there, ascending, with the checksum that each one's header tells.

        Each one's header, size and fingerprint are checked, its content is not.

        Raises:
            CorruptShardError: If a file is truncated or not a shard.
            IdentityError: If a shard was made by another run.
        """
        found = {}
        for path in sorted(self.shard_folder.glob("*.safetensors")):
            if not self._is_shard_path(path) or int(path.stem) >= info.n_shards:
                raise IdentityError(
                    f"{path} does not belong to this run, which has shards {self.shard_path(0).name} to "
                    f"{self.shard_path(info.n_shards - 1).name}: remove it"
                )
            _, metadata = self._open(int(path.stem), info)
            found[int(path.stem)] = str(metadata.get("checksum"))
        return dict(sorted(found.items()))

    def open_shard(self, shard: int, info: RunInfo) -> dict[str, Any]:
        """Maps a shard's tensors from its file, and refuses a shard that another run made."""
        return self._open(shard, info)[0]

    def _open(self, shard: int, info: RunInfo) -> tuple[dict[str, Any], dict[str, Any]]:
        path = self.shard_path(shard)
        tensors, metadata = open_shard(path)
        if metadata.get("fingerprint") not in info.fingerprints:
            raise IdentityError(
                f"{path} was made by another run: its fingerprint is {metadata.get('fingerprint')}, "
                f"expected was {' or '.join(info.fingerprints)}. Remove it, or copy it to the folder where it belongs"
            )
        if metadata.get("shard") != shard:
            raise CorruptShardError(f"{path} holds shard {metadata.get('shard')}, not {shard}: it was renamed; name it back")
        return tensors, metadata

    def _is_shard_path(self, path: Path) -> bool:
        return path.stem.isdecimal() and path == self.shard_path(int(path.stem))

    def refuse_strangers(self) -> None:
        """Refuses a folder that holds no run and anything else than what a start that was killed at once can have left.

        Raises:
            StoreError: Naming what it holds.
        """
        if not self.path.is_dir():
            return
        ours = re.compile(rf"\.lock|\.{re.escape(RUN_FILE)}\..*tmp")
        strangers = [p.name for p in self.path.iterdir() if not ours.fullmatch(p.name)]
        if strangers and not self.exists:  # looked at last: another rank may begin the run meanwhile
            raise StoreError(
                f"{self.path} is not empty and not a run folder (it holds {', '.join(sorted(strangers)[:5])}): name a new one"
            )

    def _write_samples(self, samples: Iterable[pa.Table]) -> None:
        temporary = self.path / f".{SAMPLES_FILE}.tmp"
        blocks = iter(samples)
        first = next(blocks)
        try:
            with pq.ParquetWriter(temporary, first.schema, compression="zstd", write_page_checksum=True) as file:
                for block in chain([first], blocks):
                    file.write_table(block, row_group_size=SAMPLES_BLOCK)
        except pa.ArrowNotImplementedError as error:
            raise InvalidInputError(f"a column cannot be kept in {SAMPLES_FILE}: {error}; name others with keep") from error
        publish(temporary, self.path / SAMPLES_FILE)

    def first_difference(self, n_samples: int, samples: Iterable[pa.Table]) -> str | None:
        """Says in what samples.parquet differs first from the samples as they are now, or None."""
        path = self.path / SAMPLES_FILE
        try:
            with pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as stored:
                if stored.metadata.num_rows != n_samples:
                    return f"{stored.metadata.num_rows} samples there, {n_samples} now"
                differences = (first_difference(stored.read_row_group(group), now) for group, now in enumerate(samples))
                return next(filter(None, differences), None)
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"{path} cannot be read: {error}") from error

    def _go_on(self, info: RunInfo, samples: Iterable[pa.Table], allow_changed: frozenset[str]) -> None:
        stored = self.read_info()
        changed = {
            name: (stored.present_identity.get(name), info.identity.get(name))
            for name in sorted(stored.present_identity.keys() | info.identity.keys())
            if stored.present_identity.get(name) != info.identity.get(name)
        }
        was_started = (self.path / SAMPLES_FILE).is_file()  # else the start was killed before anything was computed
        samples_differ = self.first_difference(info.n_samples, samples) if was_started else None
        refused = {name: values for name, values in changed.items() if name not in allow_changed & ENVIRONMENT_FIELDS}
        if refused or samples_differ:
            lines = [f"  {name}: {shown(was)} there, {shown(now)} now" for name, (was, now) in refused.items()]
            allowable = sorted(refused.keys() & ENVIRONMENT_FIELDS)
            hint = f" (or allow it: --allow-changed {' '.join(allowable)})" if allowable and len(allowable) == len(refused) else ""
            raise IdentityError(
                f"{self.path} holds another run. Go on with the same settings{hint}, name another folder, or pass --overwrite.\n"
                + "\n".join(lines + ([f"  samples: {samples_differ}"] if samples_differ else []))
            )
        if not was_started:
            self._write_samples(samples)
        if changed:
            stored.changes.append({"fields": changed, "fingerprint": fingerprint_of(info.identity)})
            self._write_info(stored)

    def _write_info(self, info: RunInfo) -> None:
        write_text_atomically(self.path / RUN_FILE, json.dumps({**asdict(info), "fingerprint": info.fingerprint}, indent=1) + "\n")

    def _remove_content(self) -> None:
        """Removes the files of a run but run.json, and nothing else; the lock stays, since it is held."""
        (self.path / MEANS_FILE).unlink(missing_ok=True)  # first: a result of what is gone would look whole
        for path in self.shard_folder.glob("*.safetensors"):
            if self._is_shard_path(path):
                path.unlink()
        (self.path / SAMPLES_FILE).unlink(missing_ok=True)
        (self.path / VERIFICATION_FILE).unlink(missing_ok=True)


def first_difference(stored: pa.Table, now: pa.Table) -> str | None:
    """Says in what two sample tables differ first, or None if they are equal in every value."""
    if stored.column_names != now.column_names:
        return f"columns are {stored.column_names} there, {now.column_names} now"
    if len(stored) != len(now):
        return f"{len(stored)} samples there, {len(now)} now"
    for name in stored.column_names:
        if stored.column(name).equals(now.column(name)):
            continue
        pairs = zip(stored.column(name), now.column(name), strict=True)
        for row, (was, value) in enumerate((was.as_py(), value.as_py()) for was, value in pairs):
            if was != value and repr(was) != repr(value):  # NaN is not equal to itself, but is no change
                index = now.column("sample_index")[row].as_py()
                return f"the dataset changed: sample {index} has {name} {shown(was)} there, {shown(value)} now"
    return None
