"""Peak resident memory of `extract` at 2,000 and at 20,000 samples, which must differ by less than 10%.

    python benchmarks/memory.py [--samples 2000 20000] [--max-length 64] [--token-budget 1024] [--means]

With --means it is `means run` that is measured.

Both runs read the same 2,000 functions, as often as it takes, so that lengths are distributed alike. Each run has a process and
a cache of its own. Exits with status 1 if the larger run needs 10% more.

The token budget is small so that both runs compute batches of the same size. With the default of 8,192 tokens, 2,000 short
samples leave most batches far from full: the larger run then has larger batches, which is what its memory goes into. To see
that memory is flat there too, once batches are full: `--token-budget 8192 --samples 20000 60000`.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

TEXTS, ALLOWED = 2_000, 1.10


def main() -> None:
    """Runs both and prints their peaks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, nargs=2, default=[2_000, 20_000])
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--token-budget", type=int, default=1024)
    parser.add_argument("--means", action="store_true")
    parser.add_argument("--run", nargs=2, metavar=("DATASET", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run(arguments.run[0], arguments.run[1], arguments.max_length, arguments.token_budget, arguments.means)
        return
    peaks = peaks_at(arguments.samples, arguments.max_length, arguments.token_budget, arguments.means)
    ratio = peaks[1] / peaks[0]
    print(f"ratio {ratio:.3f}, allowed below {ALLOWED:.2f}: {'met' if ratio < ALLOWED else 'NOT MET'}")
    sys.exit(0 if ratio < ALLOWED else 1)


def peaks_at(samples: list[int], max_length: int = 64, token_budget: int = 1024, means: bool = False) -> list[int]:
    """Returns the peaks of runs over so many samples each, in KiB."""
    with tempfile.TemporaryDirectory(prefix="memory-") as name:
        folder = Path(name)
        texts = demo_texts(folder)
        return [measure(folder, texts, n, max_length, token_budget, means) for n in samples]


def demo_texts(folder: Path) -> list[str]:
    """Returns TEXTS functions, in a process of its own: what a parent has in memory counts for the children it starts."""
    program = (
        "import json, sys; from exactivations.datamodules.demo import demo_functions; rows = demo_functions()\n"
        f"json.dump(rows.select(range(0, len(rows), len(rows) // {TEXTS}))['text'][:{TEXTS}], sys.stdout)"
    )
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "texts"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=True, stdout=subprocess.PIPE)
    texts: list[str] = json.loads(done.stdout)
    assert len(texts) == TEXTS
    return texts


def measure(folder: Path, texts: list[str], n: int, max_length: int, token_budget: int, means: bool) -> int:
    """Returns the peak of a run over n samples, in KiB."""
    dataset = folder / f"{n}.jsonl"
    with dataset.open("w") as file:
        for i in range(n):
            file.write(json.dumps({"text": texts[i % TEXTS], "number": i}) + "\n")
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / f"cache{n}")}
    options = ["--max-length", str(max_length), "--token-budget", str(token_budget), *(["--means"] if means else [])]
    command = [sys.executable, __file__, *options, "--run", str(dataset), str(folder / f"run{n}")]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    peak = int(output.splitlines()[-1])
    print(f"{n:>6,} samples: {peak / 1024:,.0f} MiB", flush=True)
    return peak


def run(dataset: str, out: str, max_length: int, token_budget: int, means: bool) -> None:
    """Extracts, or takes means, in this process and prints its peak."""
    from exactivations.scripts.main import main as exactivations

    exactivations(
        [
            *(["means", "run"] if means else ["extract"]), "demo", "--dataset", dataset, "--out", out, "--layers", "1",
            *(["--mode", "both"] if means else ["--pooling", "tokens", "mean"]),
            "--max-length", str(max_length), "--token-budget", str(token_budget),
            "--shard-tokens", "32768", "--accelerator", "cpu", "--cpu-threads", "1",
        ]
    )  # fmt: skip
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


if __name__ == "__main__":
    main()
