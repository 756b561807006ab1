"""Reading a store against a raw memory map of the same rows: dataset order and random, pooled rows and tokens.

    python benchmarks/reading.py [--samples 10000] [--rounds 7] [--threads 1 2]

For rows as wide as the demo model's (160), GPT-2's (768) and an 8B model's (4,096), and stores of so many samples and of ten times
as many (not of the widest), with ragged lengths and many shards. The raw map is one NumPy file with the rows in dataset order,
which nobody has without writing it again; NumPy copies from it with one thread, whatever --threads says, which is what the store
may use. Rounds are in turns; the figure is the map's seconds over the store's. Wanted is 0.8 for all pooled rows.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from exactivations.datamodules.embedded import resolve_model
from exactivations.store import ActivationStore

WANTED = 0.8
MOST_BYTES = 1 << 30  # of pooled rows: the map and what is read fit into memory beside each other


def main() -> None:
    """Makes a store, measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="reading-") as name:
        folder = Path(name)
        for width, samples in itertools.product((160, 768, 4096), (arguments.samples, 10 * arguments.samples)):
            if width * samples * 4 > MOST_BYTES:
                print(f"{samples:,} samples, {width:,} wide: left out, too large for this benchmark\n")
                continue
            save_model(folder / "model", width)
            save_texts(folder / "texts.jsonl", samples)
            measure(extract(folder), arguments.rounds, arguments.threads)
            shutil.rmtree(folder / "store")


def save_model(folder: Path, width: int) -> None:
    """Writes a model with rows of so many values, with random weights."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=width, num_hidden_layers=1, num_attention_heads=width // 16, intermediate_size=32, vocab_size=4096
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_model("demo")).save_pretrained(folder)


def save_texts(file: Path, samples: int) -> None:
    """Writes so many texts, each its own, of ragged lengths: log-normal, as those of a corpus are, but short."""
    words = np.random.default_rng(0).lognormal(1.0, 0.8, samples).astype(int)
    file.write_text("".join(json.dumps({"text": f"x{i}" + " in" * n}) + "\n" for i, n in enumerate(words.tolist())))


def extract(folder: Path) -> ActivationStore:
    """Extracts means and tokens, and opens the store."""
    program = Path(sys.executable).with_name("exactivations")
    subprocess.run(
        [program, "extract", folder / "model", "--dataset", folder / "texts.jsonl", "--hooks", "embed",
         "--pooling", "mean", "tokens", "--shard-tokens", "20000", "--out", folder / "store", "--verify-samples", "1"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return ActivationStore(folder / "store")


def measure(store: ActivationStore, rounds: int, threads: list[int]) -> None:
    """Prints how the store compares."""
    n, n_tokens, folder = len(store), int(store.token_start[-1]), store.folder.path
    pooled, tokens = folder / "pooled.npy", folder / "tokens.npy"
    np.save(pooled, store.pooled("embed", "mean").numpy())
    np.save(tokens, store.rows("embed/tokens", np.arange(n_tokens)).numpy())
    check(store, "embed/mean", pooled)
    map_of_pooled, map_of_tokens = np.load(pooled, mmap_mode="r"), np.load(tokens, mmap_mode="r")
    random = np.random.default_rng(0).permutation(n)[:2000]
    start = store.token_start

    def compare(title: str, ours: Callable[[], torch.Tensor], raw: Callable[[], np.ndarray]) -> float:
        assert np.array_equal(ours().numpy(), raw())
        ratios, of_map = [], []
        for _ in range(rounds):
            seconds = []
            for work in (raw, ours):
                began = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - began)
            ratios.append(seconds[0] / seconds[1])
            of_map.append(seconds[0])
        spread = f"{median(ratios):6.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"  {title:<58}{spread}; the map {1e3 * median(of_map):.1f} ms", flush=True)
        return median(ratios)

    lengths = np.diff(start)
    print(
        f"{n:,} samples of {lengths.min()} to {lengths.max()} tokens, {n_tokens:,} in all; {map_of_pooled.shape[1]:,} wide; "
        f"{store.info.n_shards} shards: the map's seconds over the store's"
    )
    of_pooled = []
    for n_threads in threads:
        torch.set_num_threads(n_threads)
        title = f"all pooled rows, dataset order, {n_threads} thread{'s' if n_threads > 1 else ''}"
        of_pooled.append(compare(title, lambda: store.pooled("embed", "mean"), lambda: np.array(map_of_pooled)))
    compare("2,000 pooled rows at random", lambda: store.rows("embed/mean", random), lambda: map_of_pooled[random])
    compare(
        f"all tokens, dataset order, {threads[-1]} threads",
        lambda: store.rows("embed/tokens", np.arange(n_tokens)),
        lambda: np.array(map_of_tokens),
    )
    compare(
        "tokens of 2,000 samples at random, one by one",
        lambda: torch.cat([store.read(int(i)).activations["embed/tokens"] for i in random]),
        lambda: np.concatenate([map_of_tokens[start[i] : start[i + 1]] for i in random]),
    )
    met = " / ".join("met" if ratio >= WANTED else "NOT MET" for ratio in of_pooled)
    print(f"  wanted of all pooled rows: {WANTED}: {met}\n")


def check(store: ActivationStore, name: str, pooled: Path) -> None:
    """Holds the raw map against the shards' own files, by the index that each of their rows carries."""
    rows, place = np.load(pooled), {int(index): i for i, index in enumerate(store.sample_index)}
    for file in sorted(Path(store.folder.path, "shards").glob("*.safetensors")):
        with safe_open(file, framework="np") as shard:
            index = [place[int(i)] for i in shard.get_tensor("sample_index")]
            assert np.array_equal(rows[index], shard.get_tensor(name)), file


if __name__ == "__main__":
    main()
