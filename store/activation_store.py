"""Reading a finished run: any sample in one step, pooled rows in dataset order, tokens in blocks."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import xxhash
from torch import Tensor

from exactivations.store.errors import CorruptShardError, IncompleteStoreError, InvalidInputError, StoreError
from exactivations.store.host_memory import empty_on_host
from exactivations.store.row_bytes import row_bytes
from exactivations.store.run_folder import SAMPLES_FILE, RunFolder, places_of_shards
from exactivations.store.shard import verify_shard
from exactivations.store.verification import refuse_unverified

BYTES_FOR_THREADS = 64 << 20  # for less, starting threads takes longer than they save


@dataclass(frozen=True)
class Sample:
    """One sample with everything that is known of it.

    Attributes:
        sample_index: Its position in the dataset as given.
        n_tokens: Its tokens.
        columns: Its row of samples.parquet.
        activations: By name: [D] for a pooled one, [n_tokens, D] for "<hook point>/tokens".
        input_ids: int32 [n_tokens], and token_mask: bool [n_tokens]; None when the store holds no token rows.
    """

    sample_index: int
    n_tokens: int
    columns: dict[str, Any]
    activations: dict[str, Tensor]
    input_ids: Tensor | None
    token_mask: Tensor | None


@dataclass(frozen=True)
class TokenBlock:
    """Token rows of whole samples: values [T, D], input_ids [T], token_mask [T]; sample_index [n] and n_tokens [n] say whose."""

    sample_index: Tensor
    n_tokens: Tensor
    input_ids: Tensor
    token_mask: Tensor
    values: Tensor


@dataclass(frozen=True)
class Piece:
    """Rows to copy from one shard: its `rows` go to those whose numbers are `to` [n]."""

    to: npt.NDArray[np.int64]
    shard: int
    rows: slice | npt.NDArray[np.int64]

    def parts(self, n_rows: int) -> Iterator["Piece"]:
        """Yields it as pieces of at most so many rows."""
        for first in range(0, len(self.to), n_rows):
            to, rows = self.to[first : first + n_rows], self.rows
            if isinstance(rows, slice):
                yield Piece(to, self.shard, slice(rows.start + first, rows.start + first + len(to)))
            else:
                yield Piece(to, self.shard, rows[first : first + n_rows])


class ActivationStore:
    """A run folder, opened for reading. Tensors are mapped from the files; nothing is read before it is used.

    Rows of `pooled`, `to_numpy`, `samples` and the iteration all follow `sample_index`, ascending, which is 0 to n-1 unless
    samples were selected or skipped. So a column of `samples` and a row of `pooled` always belong together.

    Args:
        path: The run folder.
        allow_incomplete: Open a run of which shards are missing, and which is therefore not verified yet. Asking for a sample in
            one of those is still an error.
        allow_unverified: Open a run that failed its verification, or was never verified.
        allow_witnesses: Open a run that kept means only. It is then the store of the few samples whose rows were kept so that they
            can be computed again.
        verify_checksums: Read every shard once and compare it with its checksum before anything else.

    Raises:
        StoreError: If only means were kept and that was not allowed.
        IncompleteStoreError: If shards are missing and that was not allowed.
        VerificationError: If its verification failed, or there was none, and that was not allowed.
        CorruptShardError: If a shard is truncated, renamed or (with verify_checksums) damaged; later, if a shard that is read
            for the first time holds other samples than samples.parquet says.
        StoreError: If it is no run folder or of a newer format.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        allow_incomplete: bool = False,
        allow_unverified: bool = False,
        allow_witnesses: bool = False,
        verify_checksums: bool = False,
    ) -> None:
        self.folder = RunFolder(path)
        self.info = self.folder.read_info()
        self.folder.refuse_completions(self.info, f"read it with open_completions({str(path)!r})")
        if not self.info.keeps_rows and not allow_witnesses:
            raise StoreError(
                f"{path} keeps means, and not the rows of its samples: read it with MeanActivations.load({str(path)!r}), or "
                "extract the rows into another folder"
            )
        checksums = self.folder.checksums(self.info)
        self.published = set(checksums)
        missing = self.info.n_shards - len(self.published)
        if missing and not allow_incomplete:
            raise IncompleteStoreError(
                f"{path} is not complete: {missing} of {self.info.n_shards} shards are missing. Start the same command again "
                "to finish it, or open it with allow_incomplete=True"
            )
        if not allow_unverified:
            refuse_unverified(self.folder, self.info, checksums)
        if verify_checksums:
            for shard in sorted(self.published):
                verify_shard(self.folder.shard_path(shard))
        places = self.folder.read_samples(["sample_index", "n_tokens", "shard", "row"])
        self._present = np.isin(places.column("shard").to_numpy(), list(self.published))
        self.n_published_samples = int(self._present.sum())  # those of the shards that are there, whether rows were kept or not
        witnesses = None if self.info.keeps_rows else self._witnesses()
        if witnesses is not None:
            self._present &= np.isin(places.column("sample_index").to_numpy(), list(witnesses))
        places = places.filter(pa.array(self._present))
        self._shard, self._row = places.column("shard").to_numpy(), places.column("row").to_numpy()
        if witnesses is not None:
            self._row = np.array([witnesses[int(i)] for i in places.column("sample_index").to_numpy()], dtype=np.int32)
        self._n_tokens = places.column("n_tokens").to_numpy()
        self.sample_index: npt.NDArray[np.int64] = places.column("sample_index").to_numpy()
        places_of = places_of_shards(self._shard, self._row, self.info.n_shards)
        self._positions = {shard: places_of[shard] for shard in sorted(self.published)}
        self._open: dict[int, dict[str, Tensor]] = {}
        self._ends: dict[int, npt.NDArray[np.int64]] = {}

    def _witnesses(self) -> dict[int, int]:
        """Returns the row in its shard of each sample whose rows were kept beside means."""
        indices = {shard: self.folder.open_shard(shard, self.info)["sample_index"].tolist() for shard in sorted(self.published)}
        return {index: row for shard in indices.values() for row, index in enumerate(shard)}

    def __len__(self) -> int:
        return len(self.sample_index)

    def __repr__(self) -> str:
        return f"ActivationStore({str(self.folder.path)!r}: {len(self)} samples, {', '.join(self.names)})"

    @cached_property
    def samples(self) -> pa.Table:
        """samples.parquet as an Arrow table, without the samples of missing shards. Read when it is first asked for."""
        table = self.folder.read_samples()
        return table if self._present.all() else table.filter(pa.array(self._present))

    @property
    def names(self) -> list[str]:
        """The activations in this store, as "<hook point>/<pooling>"."""
        return list(self.info.activations)

    def __getitem__(self, sample_index: int) -> Sample:
        """Returns the sample with this index in the dataset as given; negative indices mean nothing here.

        Raises:
            IndexError: If the store has no such sample; the message says why.
        """
        position = self._position(sample_index)
        return replace(self.read(sample_index), columns=self.samples.slice(position, 1).to_pylist()[0])

    def read(self, sample_index: int) -> Sample:
        """Returns a sample like `[]`, but without its columns (empty here), so that samples.parquet need not be read."""
        position = self._position(sample_index)
        shard, row = int(self._shard[position]), int(self._row[position])
        tensors = self._tensors(shard)
        tokens = slice(*self._token_range(shard, row)) if "input_ids" in tensors else None
        return Sample(
            sample_index=sample_index,
            n_tokens=int(self._n_tokens[position]),
            columns={},
            activations={name: tensors[name][tokens if self.info.activations[name]["per_token"] else row] for name in self.names},
            input_ids=None if tokens is None else tensors["input_ids"][tokens],
            token_mask=None if tokens is None else tensors["token_mask"][tokens],
        )

    def _position(self, sample_index: int) -> int:
        position = int(np.searchsorted(self.sample_index, sample_index))
        if position == len(self) or self.sample_index[position] != sample_index:
            raise IndexError(self._why_absent(sample_index))
        return position

    def __iter__(self) -> Iterator[Sample]:
        """Yields every sample in dataset order."""
        return (self[int(index)] for index in self.sample_index)

    def pooled(self, hook_point: str, pooling: str) -> Tensor:
        """Returns one row per sample [n, D], in the order of `sample_index`.

        Raises:
            InvalidInputError: If the store does not hold it, or it has one row per token.
        """
        name = self._name(hook_point, pooling, per_token=False)
        spec = self.info.activations[name]
        out = empty_on_host(len(self), spec["width"], dtype=getattr(torch, spec["dtype"]))
        pieces = [
            Piece(positions, shard, slice(0, len(positions))) for shard, positions in self._positions.items() if len(positions)
        ]
        self._copy(name, pieces, out)
        return out

    def _copy(self, name: str, pieces: list[Piece], out: Tensor) -> None:
        """Copies rows of shards to rows of `out`."""
        if not pieces:
            return
        rows = row_bytes(out)
        of_shard = {piece.shard: row_bytes(self._tensors(piece.shard)[name]) for piece in pieces}

        def copy(piece: Piece) -> None:
            rows[piece.to] = of_shard[piece.shard][piece.rows]

        n_threads = torch.get_num_threads() if out.nbytes >= BYTES_FOR_THREADS else 1
        if n_threads == 1:
            for piece in pieces:
                copy(piece)
            return
        parts = [part for piece in pieces for part in piece.parts(-(-len(out) // n_threads))]
        with ThreadPoolExecutor(n_threads) as threads:  # NumPy copies without the interpreter's lock
            list(threads.map(copy, parts))  # raises what one of them raised

    def tokens(self, hook_point: str, block_tokens: int = 65536) -> Iterator[TokenBlock]:
        """Yields the rows of all tokens in blocks of whole samples, in the order of the shards (the fastest to read).

        A block holds at most `block_tokens` tokens, or one sample. Every shard is a fair sample of the dataset's lengths.

        Raises:
            InvalidInputError: If the store does not hold token rows of this hook point.
        """
        name = self._name(hook_point, "tokens", per_token=True)
        return self._token_blocks(name, block_tokens)

    def _token_blocks(self, name: str, block_tokens: int) -> Iterator[TokenBlock]:
        for shard in sorted(self.published):
            tensors = self._tensors(shard)
            ends = self._token_ends(shard)
            first = 0
            while first < len(ends):
                start = int(ends[first - 1]) if first else 0
                stop = max(first + 1, int(np.searchsorted(ends, start + block_tokens, side="right")))
                rows, tokens = slice(first, stop), slice(start, int(ends[stop - 1]))
                yield TokenBlock(
                    tensors["sample_index"][rows], tensors["n_tokens"][rows],
                    tensors["input_ids"][tokens], tensors["token_mask"][tokens], tensors[name][tokens],
                )  # fmt: skip
                first = stop

    def rows(self, name: str, numbers: npt.NDArray[np.int64]) -> Tensor:
        """Returns rows by number [m, D], in the order of the numbers; only those are read from the memory map.

        Args:
            name: "<hook point>/<pooling>".
            numbers: int64 [m]. Of a pooled activation, places in `sample_index`. Of tokens, those of all samples counted through in
                this order: sample i has tokens token_start[i] to token_start[i + 1] - 1.

        Raises:
            InvalidInputError: If the store does not hold it, or has no such row.
        """
        spec = self.info.activations.get(name)
        if spec is None:
            raise InvalidInputError(f"{self.title} holds no {name}; it holds {', '.join(self.names)}")
        return self._by_number(name, numbers, (spec["width"],), getattr(torch, spec["dtype"]), bool(spec["per_token"]))

    def token_ids(self, numbers: npt.NDArray[np.int64]) -> Tensor:
        """Returns the ids int32 [m] of tokens by number (see `rows`).

        Raises:
            InvalidInputError: If the store holds no token rows, or has no such token.
        """
        self._refuse_without_tokens()
        return self._by_number("input_ids", numbers, (), torch.int32, per_token=True)

    def are_content(self, numbers: npt.NDArray[np.int64]) -> Tensor:
        """Returns whether tokens by number (see `rows`) are content, bool [m], and not special.

        Raises:
            InvalidInputError: If the store holds no token rows, or has no such token.
        """
        self._refuse_without_tokens()
        return self._by_number("token_mask", numbers, (), torch.bool, per_token=True)

    def _refuse_without_tokens(self) -> None:
        if not self._has_tokens:
            raise InvalidInputError(
                f"{self.title} holds no tokens: extract with --pooling tokens; it holds {', '.join(self.names)}"
            )

    def _by_number(
        self, name: str, numbers: npt.NDArray[np.int64], shape: tuple[int, ...], dtype: torch.dtype, per_token: bool
    ) -> Tensor:
        n = int(self.token_start[-1]) if per_token else len(self)
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= n):
            raise InvalidInputError(f"{self.title} has {name} of rows 0 to {n - 1}, asked for {numbers.min()} to {numbers.max()}")
        position = np.searchsorted(self.token_start, numbers, side="right") - 1 if per_token else numbers
        row = (
            self._first_token[position] + numbers - self.token_start[position] if per_token else self._row[numbers].astype(np.int64)
        )
        shard = self._shard[position]
        order = np.argsort(shard.astype(np.int64) << 40 | row)  # by shard, and in it as the rows lie there
        starts = np.flatnonzero(np.diff(shard[order], prepend=-1))
        out = empty_on_host(len(numbers), *shape, dtype=dtype)
        pieces = []
        for chosen in np.split(order, starts)[1:]:  # what is before the first start is nothing
            wanted = row[chosen]
            in_one_piece = bool((np.diff(wanted) == 1).all())  # then they are copied once, and not gathered before
            rows = slice(int(wanted[0]), int(wanted[-1]) + 1) if in_one_piece else wanted
            pieces.append(Piece(chosen, int(shard[chosen[0]]), rows))
        self._copy(name, pieces, out)
        return out

    @cached_property
    def token_start(self) -> npt.NDArray[np.int64]:
        """int64 [n+1]: how many tokens the samples before each one have, in the order of `sample_index`."""
        return np.concatenate([[0], np.cumsum(self._n_tokens, dtype=np.int64)])

    @cached_property
    def _first_token(self) -> npt.NDArray[np.int64]:
        """int64 [n]: the row of each sample's first token in its shard."""
        first = np.empty(len(self), dtype=np.int64)
        for shard, positions in self._positions.items():
            ends = self._token_ends(shard)
            first[positions] = ends - self._n_tokens[positions]
        return first

    @property
    def per_token(self) -> dict[str, bool]:
        """Whether there is a row for each token, and not for each sample, by the name of the activation."""
        return {name: bool(spec["per_token"]) for name, spec in self.info.activations.items()}

    @property
    def title(self) -> str:
        """What messages call it."""
        return str(self.folder.path)

    def to_numpy(self, hook_point: str, pooling: str) -> npt.NDArray[Any]:
        """Returns `pooled` as a numpy array; bfloat16, which numpy does not know, becomes float32 (exactly)."""
        return _numpy(self.pooled(hook_point, pooling))

    def to_dataset(self) -> datasets.Dataset:
        """Returns samples.parquet's columns and all activations as a Hugging Face dataset, in dataset order, cached on disk.

        Raises:
            InvalidInputError: If a kept column has the name of something that would be added.
        """
        added = {*self.names, *(("input_ids", "token_mask") if self._has_tokens else ())}
        doubled = sorted(added.intersection(self.samples.column_names))
        if doubled:
            raise InvalidInputError(f"samples.parquet has a column {doubled[0]!r}, which to_dataset would overwrite")
        contents = xxhash.xxh3_128((self.folder.path / SAMPLES_FILE).read_bytes()).hexdigest()
        return datasets.Dataset.from_generator(
            _dataset_rows,
            # All of it is the cache's key. The shards are no list: `datasets` would split that up.
            gen_kwargs={
                "path": str(self.folder.path.resolve()),
                "key": f"{self.info.fingerprints} {contents} {sorted(self.published)}",
            },
            split=datasets.NamedSplit("activations"),
        )

    @property
    def n_tokens_kept(self) -> int:
        """Tokens of the samples that this store can give."""
        return int(self._n_tokens.sum())

    @property
    def _has_tokens(self) -> bool:
        return any(spec["per_token"] for spec in self.info.activations.values())

    def _tensors(self, shard: int) -> dict[str, Tensor]:
        """Maps a shard; before its first use its identity is held against samples.parquet."""
        if shard not in self._open:
            tensors = self.folder.open_shard(shard, self.info)
            positions = self._positions[shard]
            expected_n_tokens = self._n_tokens[positions]
            for name, expected in (("sample_index", self.sample_index[positions]), ("n_tokens", expected_n_tokens)):
                if not np.array_equal(tensors[name].numpy(), expected):
                    raise CorruptShardError(
                        f"{self.folder.shard_path(shard)} and {SAMPLES_FILE} disagree on {name}: one of them is damaged or belongs "
                        "to another run; open the store with verify_checksums=True to see whether it is the shard"
                    )
            n_tokens = int(expected_n_tokens.sum())
            for name, spec in self.info.activations.items():
                found = str(tensors[name].dtype).removeprefix("torch."), tuple(tensors[name].shape)
                planned = spec["dtype"], (n_tokens if spec["per_token"] else len(positions), spec["width"])
                if found != planned:
                    raise CorruptShardError(
                        f"{self.folder.shard_path(shard)} holds {name} as {found[0]} {list(found[1])}, expected {planned[0]} "
                        f"{list(planned[1])} by run.json and {SAMPLES_FILE}: one of them is damaged or belongs to another run"
                    )
            self._open[shard] = tensors
        return self._open[shard]

    def _token_ends(self, shard: int) -> npt.NDArray[np.int64]:
        if shard not in self._ends:
            self._ends[shard] = np.cumsum(self._tensors(shard)["n_tokens"].numpy(), dtype=np.int64)
        return self._ends[shard]

    def _token_range(self, shard: int, row: int) -> tuple[int, int]:
        ends = self._token_ends(shard)
        return (int(ends[row - 1]) if row else 0), int(ends[row])

    def _name(self, hook_point: str, pooling: str, *, per_token: bool) -> str:
        name = f"{hook_point}/{pooling}"
        spec = self.info.activations.get(name)
        if spec is None:
            raise InvalidInputError(f"{self.folder.path} holds no {name}; it holds {', '.join(self.names)}")
        if spec["per_token"] != per_token:
            raise InvalidInputError(
                f"{name} has one row per {'token: read it with tokens()' if spec['per_token'] else 'sample: read it with pooled()'}"
            )
        return name

    def _why_absent(self, sample_index: int) -> str:
        if sample_index in self.info.skipped:
            return f"sample {sample_index} was skipped in extraction: its text is empty"
        if not self.info.keeps_rows:
            return f"the rows of sample {sample_index} were not kept: it went into the means only"
        if len(self) < self.info.n_samples:
            return f"sample {sample_index} is not in this incomplete store ({len(self)} of {self.info.n_samples} samples)"
        first, last = (self.sample_index[0], self.sample_index[-1]) if len(self) else ("none", "none")
        return f"sample {sample_index} is not in this store: it holds {len(self)} samples with indices from {first} to {last}"


def _dataset_rows(path: str, key: str) -> Iterator[dict[str, Any]]:
    store = ActivationStore(path, allow_incomplete=True, allow_unverified=True)  # it was opened before, and so allowed
    assert key.endswith(f" {sorted(store.published)}"), f"{path} changed while it was read"
    for sample in store:
        row = dict(sample.columns)
        if sample.input_ids is not None and sample.token_mask is not None:
            row |= {"input_ids": sample.input_ids.numpy(), "token_mask": sample.token_mask.numpy()}
        yield row | {name: _numpy(values) for name, values in sample.activations.items()}


def _numpy(values: Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return array
