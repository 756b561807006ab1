"""Stores with rows that a test chooses, a tiny model with texts, and sweeps over both."""

import lightning.pytorch as pl
import numpy as np
import torch
from transformers import GPT2Config, GPT2Model

from exactivations.lit_modules.probes.exact_probes import ExactProbeSweep
from exactivations.store.activation_store import ActivationStore
from exactivations.store.run_folder import RunFolder, contents_of
from exactivations.store.shard import write_shard
from exactivations.store.verification import write_verification
from tests.datamodules.conftest import make_word_tokenizer
from tests.store.stores import run_info, sample_table, verdict

STRENGTHS = (1e-3, 1e-1, 10.0)
N, GROUPS = 240, 40


def write_rows(path, rows, *, sample_index=None, lengths=None, n_shards=3, seed=0, token_hash=None, **columns):
    """Writes a store of these rows (arrays by name, in the order of the samples), dealt to shards at random, and opens it."""
    rows = {name: torch.as_tensor(values) for name, values in rows.items()}
    n = len(lengths if lengths is not None else next(iter(rows.values())))
    sample_index = list(range(n)) if sample_index is None else list(sample_index)
    lengths = [1] * n if lengths is None else list(lengths)
    start = np.concatenate([[0], np.cumsum(lengths)])
    parts = np.array_split(np.random.default_rng(seed).permutation(n), n_shards)
    shard, row = np.empty(n, int), np.empty(n, int)
    for number, part in enumerate(parts):
        shard[part], row[part] = number, np.arange(len(part))
    table = sample_table(sample_index, lengths, shard, row)
    if token_hash is not None:
        table = table.set_column(table.column_names.index("token_hash"), "token_hash", [token_hash])
    for name, values in columns.items():
        table = table.append_column(name, [values])
    activations = {
        name: {"per_token": name.endswith("/tokens"), "width": values.shape[1], "dtype": str(values.dtype).removeprefix("torch.")}
        for name, values in rows.items()
    }
    info = run_info(n_shards, lengths, activations=activations)
    folder = RunFolder(path)
    path.mkdir(parents=True)
    folder.prepare(info, [table], overwrite=False, allow_changed=frozenset())
    for number, part in enumerate(parts):
        tokens = np.concatenate([np.arange(start[place], start[place + 1]) for place in part])
        tensors = {"sample_index": torch.tensor([sample_index[place] for place in part])}
        tensors["n_tokens"] = torch.tensor([lengths[place] for place in part], dtype=torch.int32)
        if any(spec["per_token"] for spec in activations.values()):
            tensors |= {"input_ids": torch.from_numpy(tokens % 97).int(), "token_mask": torch.from_numpy(tokens % 5 != 0)}
        tensors |= {name: values[tokens if activations[name]["per_token"] else part] for name, values in rows.items()}
        write_shard(folder.shard_path(number), tensors, {"shard": number, "fingerprint": info.fingerprint})
    write_verification(folder, verdict(info.fingerprint, contents=contents_of(folder.checksums(info), folder.samples_footer())))
    return ActivationStore(path)


def demo_like(seed=0, n=N, groups=GROUPS, signal=1.0, n_values=40):
    """Rows of four vectors that know more and more of three labels, and the columns of these and of their groups.

    Columns of rows differ in scale, are correlated, and one does not vary; the last vector is wider than the training part is long.
    """
    rng = np.random.default_rng(seed)
    member = rng.permutation(n) % groups
    hidden = rng.normal(size=(n, 3)) + 0.5 * rng.normal(size=(groups, 3))[member]
    rows = {}
    for layer, width in enumerate((8, 12, 12, 200)):
        noise = rng.normal(size=(n, width)) @ (np.eye(width) + 0.3 * rng.normal(size=(width, width)))
        known = signal * layer * hidden @ rng.normal(size=(3, width))
        values = (noise + known) * np.exp(rng.normal(size=width)) + rng.normal(size=width)
        values[:, 0] = 0.3
        rows[f"resid_post.{layer}/mean"] = values.astype(np.float32)
    columns = {
        "label": [["no", "yes"][int(value > 0.3)] for value in hidden[:, 0]],
        "kind": ["abc"[place] for place in hidden.argmax(axis=1)],
        "value": (hidden @ [1, -1, 0.5] + 0.3 * rng.normal(size=n)).round(n_values).tolist(),
        "module": [f"m{group}" for group in member],
    }
    return rows, columns


def trainer(devices=1, max_epochs=1):
    return pl.Trainer(
        accelerator="cpu", devices=devices, max_epochs=max_epochs, logger=False, use_distributed_sampler=False,
        num_sanity_val_steps=0, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def run(data, sweep=None, devices=1, max_epochs=1):
    """Fits and tests."""
    sweep = sweep or ExactProbeSweep("logistic", STRENGTHS)
    made = trainer(devices, max_epochs)
    made.fit(sweep, datamodule=data)
    made.test(sweep, datamodule=data, verbose=False)
    return sweep


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(60))]


def save_model(path, seed=0, n_layer=3):
    """Saves a tiny GPT-2 with random weights, and a tokenizer of a token a word between [CLS] and [SEP]."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=n_layer, n_head=2, n_positions=32, initializer_range=0.2)
    GPT2Model(config).save_pretrained(path)
    make_word_tokenizer(WORDS).save_pretrained(path)
    return str(path)


def texts_of(n=90, seed=0):
    """Texts of one to twelve words, whether there are more of the first thirty than of the others, and which those are."""
    rng = np.random.default_rng(seed)
    numbers = [rng.integers(60, size=rng.integers(1, 13)) for _ in range(n)]
    texts = [" ".join(f"w{number}" for number in of_text) for of_text in numbers]
    labels = [bool((of_text < 30).mean() > 0.5) for of_text in numbers]
    return texts, labels, [[None, *("low" if number < 30 else "high" for number in of_text), None] for of_text in numbers]
