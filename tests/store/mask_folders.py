"""Folders of per-batch masks, written as other tools do, and stores with true token hashes to hold them against."""

from unittest import mock

import numpy as np
import torch
import xxhash
from safetensors.torch import save_file

from tests.store import stores
from tests.store.stores import WIDTHS, ids_of, make_store, mask_of

PAD = 0  # also a real id: sample 0 begins with it
POOLED = {name: width for name, width in WIDTHS.items() if not name.endswith("/tokens")}


def hash_by_hand(ids):
    return xxhash.xxh3_128(np.array(ids, dtype="<i4").tobytes()).hexdigest()


def store_of(path, lengths, index=None, names=WIDTHS, kind=None, own=mask_of, **more):
    """A store whose sample i has ids_of(i, n), with their true hashes, and own(i, n) as its token_mask of that kind."""
    index = list(range(len(lengths))) if index is None else index
    hashes = [hash_by_hand(ids_of(i, n)) for i, n in zip(index, lengths, strict=True)]
    said = {} if kind is None else {"token_mask": kind}
    with mock.patch.object(stores, "mask_of", own), mock.patch.dict(stores.IDENTITY, said):
        make_store(path, index, lengths, names=names, token_hash=hashes, **more)
    return path


def padded(rows, side, fill):
    width = max(len(row) for row in rows)
    fills = [[fill] * (width - len(row)) for row in rows]
    return torch.tensor([list(row) + f if side == "right" else f + list(row) for row, f in zip(rows, fills, strict=True)])


def in_batches(items, sizes):
    ends = np.cumsum(sizes)
    return [items[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def padded_batches(sizes, masks, ids=None, side="right"):
    """Per batch {name: [B, L]}, padded to the longest of its rows."""
    assert sum(sizes) == len(masks)
    batches = [{"attention_mask": padded(part, side, 0)} for part in in_batches(masks, sizes)]
    if ids is not None:
        for batch, part in zip(batches, in_batches(ids, sizes), strict=True):
            batch["input_ids"] = padded(part, side, PAD)
    return batches


def save_as_mi_crow(folder, batches, layer="input_ids"):
    """batch_<i>/<layer>/<name>.safetensors with one tensor called "tensor" each, beside JSON and activations."""
    for number, batch in enumerate(batches):
        below = folder / f"batch_{number}" / layer
        below.mkdir(parents=True)
        (folder / f"batch_{number}" / "metadata.json").write_text("{}")
        for name, tensor in batch.items():
            save_file({"tensor": tensor}, below / f"{name}.safetensors")
        if layer == "attention_masks":
            other = below.parent / "model_layers_31"
            other.mkdir()
            save_file({"tensor": torch.rand(len(batch["attention_mask"]), 3, 2)}, other / "activations.safetensors")
    (folder / "meta.json").write_text("{}")
    return folder


def save_flat(folder, batches, digits=1, suffix="safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, batch in enumerate(batches):
        path = folder / f"batch_{number:0{digits}d}.{suffix}"
        save_file(batch, path) if suffix == "safetensors" else torch.save(batch, path)
    return folder


def foreign(folder, lengths, sizes, samples=None, with_ids=True, side="right", masks=None, **how):
    """A folder with masks of these samples (0 to n-1 if not said), in this order."""
    samples = list(range(len(lengths))) if samples is None else samples
    masks = [mask_of(i, n) for i, n in zip(samples, lengths, strict=True)] if masks is None else masks
    ids = [ids_of(i, n) for i, n in zip(samples, lengths, strict=True)] if with_ids else None
    return save_as_mi_crow(folder, padded_batches(sizes, masks, ids, side), **how)
