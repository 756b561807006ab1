"""Masks by sample index: one Parquet file for one store, which refuses every other store."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from exactivations.store.activation_store import ActivationStore
from exactivations.store.errors import InvalidInputError, StoreError
from exactivations.store.mask_layout import LaidMasks, SampleTable, named
from exactivations.store.shard import publishing

METADATA_KEY = b"exactivations_masks"
FORMAT_VERSION = 1
SCHEMA = pa.schema(
    [
        ("sample_index", pa.int64()),
        ("n_tokens", pa.int32()),
        ("token_hash", pa.string()),
        ("hash_checked", pa.bool_()),
        ("token_mask", pa.list_(pa.bool_())),
    ]
)


@dataclass(frozen=True)
class SampleMasks:
    """Masks of a store's samples, each found by its sample index.

    Attributes:
        sample_index: int64 [n], ascending.
        hash_checked: bool [n], whether ids proved that the mask is this sample's; elsewhere only its length was looked at.
    """

    sample_index: npt.NDArray[np.int64]
    hash_checked: npt.NDArray[np.bool_]
    _ends: npt.NDArray[np.int64]
    _values: Tensor

    def __len__(self) -> int:
        return len(self.sample_index)

    def __getitem__(self, sample_index: int) -> Tensor:
        """Returns a sample's mask, bool [n_tokens].

        Raises:
            IndexError: If there is no such sample.
        """
        position = int(np.searchsorted(self.sample_index, sample_index))
        if position == len(self) or self.sample_index[position] != sample_index:
            raise IndexError(f"there is no mask of sample {sample_index}: there are {named(self.sample_index)}")
        return self._values[int(self._ends[position - 1]) if position else 0 : int(self._ends[position])]


def write_masks(path: str | Path, table: SampleTable, laid: LaidMasks, source: str) -> None:
    """Writes masks by sample index as Parquet, beside the final name and then under it.

    Raises:
        InvalidInputError: If any sample has no mask; the first few are named.
        StoreError: If the file cannot be written.
    """
    if laid.problems or laid.side_problem:
        reasons = [f"sample {table.sample_index[position]}: {why}" for position, why in sorted(laid.problems.items())[:5]]
        more = [f"and {len(laid.problems) - 5:,} more"] if len(laid.problems) > 5 else []
        raise InvalidInputError(f"{source}: " + "; ".join([*([laid.side_problem] if laid.side_problem else []), *reasons, *more]))
    path = Path(path)
    metadata = {"format_version": FORMAT_VERSION, "source": source, "padding_side": laid.side}
    rows = pa.table(
        {
            "sample_index": table.sample_index,
            "n_tokens": table.n_tokens,
            "token_hash": table.token_hash,
            "hash_checked": laid.proven,
            "token_mask": [mask.numpy() for mask in laid.masks if mask is not None],
        }
    ).cast(SCHEMA.with_metadata({METADATA_KEY: json.dumps(metadata)}))
    try:
        with publishing(path) as temporary:
            pq.write_table(rows, temporary, compression="zstd", write_page_checksum=True)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"cannot write {path}: {error}") from error


def read_masks(path: str | Path, store: ActivationStore) -> SampleMasks:
    """Reads masks that were written for a store, and holds each one's identity against it.

    Raises:
        StoreError: If it is no such file, it is damaged, or a sample's hash or length is not the store's.
    """
    try:
        rows = pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    metadata = json.loads((rows.schema.metadata or {}).get(METADATA_KEY, b"{}"))
    if metadata.get("format_version") != FORMAT_VERSION or not rows.schema.equals(SCHEMA):
        raise StoreError(f"{path} is no file of masks by sample that this exactivations reads: write it with import-masks")
    if any(column.null_count for column in rows.columns):
        raise StoreError(f"{path} has rows with nothing in them: import the masks anew")
    _check_identity(path, rows, SampleTable.of(store.folder.path))
    marks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in rows.column("token_mask").chunks]
    values = torch.from_numpy(np.concatenate([np.empty(0, dtype=bool), *marks]))
    return SampleMasks(
        rows.column("sample_index").to_numpy(), rows.column("hash_checked").to_numpy(), np.cumsum(_lengths(rows)), values
    )


def _check_identity(path: str | Path, rows: pa.Table, table: SampleTable) -> None:
    index, hashes = rows.column("sample_index").to_numpy(), rows.column("token_hash").to_pylist()
    if not np.array_equal(index, table.sample_index):
        raise StoreError(
            f"{path} has masks of {named(index)}, {table.path} holds {named(table.sample_index)}: it was written for another store"
        )
    lengths = _lengths(rows)
    other_hash = np.array([found != expected for found, expected in zip(hashes, table.token_hash, strict=True)], dtype=bool)
    wrong = np.flatnonzero(other_hash | (lengths != table.n_tokens) | (rows.column("n_tokens").to_numpy() != table.n_tokens))
    if len(wrong):
        first = int(wrong[0])
        raise StoreError(
            f"{path}: sample {index[first]} has {lengths[first]} positions and token hash {hashes[first]}, in the store "
            f"{table.n_tokens[first]} and {table.token_hash[first]} ({len(wrong):,} of {len(table):,} samples differ): the masks "
            "belong to another dataset, tokenizer or cut; import them anew for this store"
        )


def _lengths(rows: pa.Table) -> npt.NDArray[np.int64]:
    lengths = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in rows.column("token_mask").chunks]
    return np.concatenate([np.empty(0, dtype=np.int64), *lengths]).astype(np.int64)
