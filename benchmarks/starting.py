"""What is done before the first batch: planning a million lengths, `--help`, and a run over a handful of texts.

    python benchmarks/starting.py [--lengths 1000000]

Planning is compared with NumPy's own stable sort of the same lengths, which it cannot do without; starting with an interpreter
that imports torch, transformers and lightning and does nothing. Ratios of medians of five.
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


def seconds(work: Callable[[], object], rounds: int = 5) -> float:
    """Returns the median of some rounds."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return median(found)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lengths", type=int, default=1_000_000)
    arguments = parser.parse_args()

    from exactivations.datamodules.plan import PlanOptions, plan

    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(5.3, 1.0, arguments.lengths).astype(np.int64), 1, 4096)
    sort = seconds(lambda: np.argsort(-lengths, kind="stable"))
    for padding in ("none", "tail"):
        taken = seconds(lambda padding=padding: plan(lengths, PlanOptions(padding=padding)))  # type: ignore[misc]
        planned = plan(lengths, PlanOptions(padding=padding))  # type: ignore[arg-type]
        print(
            f"planning {arguments.lengths:,} lengths, padding {padding}: {taken:.2f} s, {taken / sort:.1f} times sorting them; "
            f"{planned.n_batches:,} batches, {planned.n_shards:,} shards"
        )
    taken = seconds(lambda: planned.steps(planned.assign(1)[0], 8192))
    print(f"dealing them to a rank and cutting steps: {taken:.2f} s")

    def run(*command: str) -> Callable[[], object]:
        return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    program = str(Path(sys.executable).with_name("exactivations"))
    nothing = seconds(run(sys.executable, "-c", "import torch, transformers, lightning.pytorch, datasets; transformers.AutoModel"))
    bare = seconds(run(sys.executable, "-c", ""))
    print(f"an interpreter: {bare:.2f} s; with torch, transformers, lightning and datasets: {nothing:.2f} s")
    for name in ("--help", "extract --help"):
        print(f"exactivations {name}: {seconds(run(program, *name.split())):.2f} s")
    with tempfile.TemporaryDirectory(prefix="starting-") as folder:
        texts = Path(folder, "texts.txt")
        texts.write_text("def f(x):\n" * 4)
        out = f"{folder}/run"
        taken = seconds(run(program, "extract", "demo", "--dataset", str(texts), "--layers", "1", "--out", out, "--overwrite"))
    print(f"exactivations extract of four short texts, verified: {taken:.2f} s, {taken / nothing:.1f} times the imports")


if __name__ == "__main__":
    main()
