"""Reading a store against a raw memory map of the same rows: random samples, dataset order, and all pooled rows at once.

    python benchmarks/reading.py [--samples 20000] [--rounds 7]

The raw map is one NumPy file with the rows in dataset order, which nobody has without writing it again. Rounds are in turns; the
figure is the map's seconds over the store's. Exits with status 1 if reading all pooled rows is below 0.8.
"""

import argparse
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

from exactivations.store import ActivationStore

WANTED = 0.8


def main() -> None:
    """Makes a store, measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="reading-") as name:
        program = Path(sys.executable).with_name("exactivations")
        subprocess.run(
            [program, "extract", "demo", "--dataset", "demo", "--num-samples", str(arguments.samples), "--max-length", "64",
             "--layers", "1", "3", "--pooling", "mean", "tokens", "--out", f"{name}/run", "--verify-samples", "1"],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        store = ActivationStore(f"{name}/run")
        n, n_tokens = len(store), int(store.token_start[-1])
        pooled, tokens = Path(name, "pooled.npy"), Path(name, "tokens.npy")
        np.save(pooled, store.pooled("resid_post.3", "mean").numpy())
        np.save(tokens, store.rows("resid_post.3/tokens", np.arange(n_tokens)).numpy())
        check(store, pooled)
        map_of_pooled, map_of_tokens = np.load(pooled, mmap_mode="r"), np.load(tokens, mmap_mode="r")
        random = np.random.default_rng(0).permutation(n)[:2000]
        start = store.token_start

        def compare(title: str, ours: Callable[[], torch.Tensor], raw: Callable[[], np.ndarray]) -> float:
            assert np.array_equal(ours().numpy(), raw())
            ratios = []
            for _ in range(arguments.rounds):
                seconds = []
                for work in (raw, ours):
                    began = time.perf_counter()
                    work()
                    seconds.append(time.perf_counter() - began)
                ratios.append(seconds[0] / seconds[1])
            print(f"{title:<58}{median(ratios):6.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)
            return median(ratios)

        print(f"{n:,} samples, {n_tokens:,} tokens, {store.info.n_shards} shards; the map's seconds over the store's")
        found = compare(
            "all pooled rows, dataset order", lambda: store.pooled("resid_post.3", "mean"), lambda: np.array(map_of_pooled)
        )
        compare("2,000 pooled rows at random", lambda: store.rows("resid_post.3/mean", random), lambda: map_of_pooled[random])
        compare(
            "all tokens, dataset order",
            lambda: store.rows("resid_post.3/tokens", np.arange(n_tokens)),
            lambda: np.array(map_of_tokens),
        )
        compare(
            "tokens of 2,000 samples at random, one by one",
            lambda: torch.cat([store.read(int(i)).activations["resid_post.3/tokens"] for i in random]),
            lambda: np.concatenate([map_of_tokens[start[i] : start[i + 1]] for i in random]),
        )
    print(f"wanted: all pooled rows at least {WANTED}: {'met' if found >= WANTED else 'NOT MET'}")
    sys.exit(0 if found >= WANTED else 1)


def check(store: ActivationStore, pooled: Path) -> None:
    """Holds the raw map against the shards' own files, by the index that each of their rows carries."""
    rows, place = np.load(pooled), {int(index): i for i, index in enumerate(store.sample_index)}
    for file in sorted(Path(store.folder.path, "shards").glob("*.safetensors")):
        with safe_open(file, framework="np") as shard:
            index = [place[int(i)] for i in shard.get_tensor("sample_index")]
            assert np.array_equal(rows[index], shard.get_tensor("resid_post.3/mean")), file


if __name__ == "__main__":
    main()
