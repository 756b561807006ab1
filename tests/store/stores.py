"""Stores written row by row from arrays that a test holds, with content that tells whose it is."""

import numpy as np
import pyarrow as pa
import torch

from exactivations.store.run_folder import RunFolder, RunInfo, contents_of
from exactivations.store.shard import write_shard
from exactivations.store.verification import Verification, write_verification

WIDTHS = {"resid_post.1/mean": 3, "resid_post.1/tokens": 3, "final_norm/last": 2}
IDENTITY = {"model": "m", "dataset": "d", "dtype": "float32", "torch": "2.0", "device_type": "cpu", "cpu_threads": 1}


def value(sample, token, column, name):
    """The one value that belongs to a sample, token and column of a named activation; exact in every dtype used here."""
    return float((sample * 31 + token * 7 + column * 3 + 11 * len(name)) % 251)


def row(sample, name, token=0):
    return [value(sample, token, column, name) for column in range(WIDTHS[name])]


def ids_of(sample, n):
    return [sample * 100 + token for token in range(n)]


def mask_of(sample, n):
    return [(sample + token) % 3 != 0 for token in range(n)]


def run_info(n_shards, lengths, names=WIDTHS, dtype="float32", **changes):
    content = {
        "identity": dict(IDENTITY),
        "about": {"model": "m"},
        "n_shards": n_shards,
        "n_samples": len(lengths),
        "n_tokens": int(sum(lengths)),
        "n_computed_tokens": int(sum(lengths)),
        "activations": {name: {"per_token": name.endswith("/tokens"), "width": WIDTHS[name], "dtype": dtype} for name in names},
    }
    return RunInfo(**(content | changes))


def sample_table(sample_index, lengths, shard, rows, **columns):
    return pa.table(
        {
            "sample_index": np.array(sample_index, dtype=np.int64),
            "n_tokens": np.array(lengths, dtype=np.int32),
            "token_hash": [f"{i:032x}" for i in sample_index],
            "truncated": [False] * len(lengths),
            "shard": np.array(shard, dtype=np.int32),
            "row": np.array(rows, dtype=np.int32),
            **columns,
        }
    )


def shard_tensors(samples, lengths, names=WIDTHS, dtype=torch.float32):
    """A shard's tensors for these samples, in this order of rows."""
    tensors = {"sample_index": torch.tensor(samples), "n_tokens": torch.tensor(lengths, dtype=torch.int32)}
    if any(name.endswith("/tokens") for name in names):
        pairs = list(zip(samples, lengths, strict=True))
        tensors["input_ids"] = torch.tensor([i for s, n in pairs for i in ids_of(s, n)], dtype=torch.int32)
        tensors["token_mask"] = torch.tensor([m for s, n in pairs for m in mask_of(s, n)])
    for name in names:
        if name.endswith("/tokens"):
            rows = [row(s, name, token) for s, n in zip(samples, lengths, strict=True) for token in range(n)]
        else:
            rows = [row(s, name) for s in samples]
        tensors[name] = torch.tensor(rows, dtype=dtype)
    return tensors


def make_store(path, sample_index, lengths, n_shards=3, names=WIDTHS, dtype="float32", skipped=(), leave_out=(), seed=0, **columns):
    """Writes a store whose rows are dealt to shards at random, and returns its RunFolder."""
    order = np.random.default_rng(seed).permutation(len(sample_index))
    shard, rows = np.empty(len(order), int), np.empty(len(order), int)
    parts = np.array_split(order, n_shards)
    for number, part in enumerate(parts):
        shard[part], rows[part] = number, np.arange(len(part))
    folder = RunFolder(path)
    path.mkdir(parents=True, exist_ok=True)
    info = run_info(n_shards, lengths, names, dtype, skipped=list(skipped))
    table = sample_table(sample_index, lengths, shard, rows, **columns)
    folder.prepare(info, [table], overwrite=False, allow_changed=frozenset())
    for number, part in enumerate(parts):
        if number not in leave_out:
            tensors = shard_tensors([sample_index[p] for p in part], [lengths[p] for p in part], names, getattr(torch, dtype))
            write_shard(folder.shard_path(number), tensors, {"shard": number, "fingerprint": info.fingerprint})
    write_verification(folder, verdict(info.fingerprint, contents=contents_of(folder.checksums(info), folder.samples_footer())))
    return folder


def verdict(fingerprint, passed=True, contents="", **changes):
    """A verification as a run would leave it."""
    content = {
        "passed": passed, "fingerprint": fingerprint, "contents": contents, "samples": [0], "figures": [], "dtype": "float32",
        "tolerance": "", "seconds": 1.0, "when": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return Verification(**(content | changes))
