"""What is asked of mean vectors, measured: widths, the same bits, flat memory, samples per hour. Prints docs/means.md's table.

    python benchmarks/means.py [--skip-memory]

The model of Pythia-12B's width has random weights and three blocks (about 4 GB of disk and memory for a minute). Ranks are
processes on this machine's cores. Exits with status 1 if anything that can be decided here is not met.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memory import peaks_at

WIDTH, BLOCKS, HEADS = 5120, 3, 40  # Pythia-12B has 36 blocks; width and heads are its own
ALLOWED_GROWTH = 1.10


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--skip-memory", action="store_true", help="leave out the runs over 1,000 and 20,000 samples (minutes)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="means-") as name:
        folder = Path(name)
        rows = [widths(folder), same_bits(folder), speed(folder)]
    if not arguments.skip_memory:
        rows.append(memory())
    print("\n| asked | measured | |\n|---|---|---|")
    for asked, measured, met in rows:
        print(f"| {asked} | {measured} | {'met' if met else 'NOT MET'} |")
    sys.exit(0 if all(met for _, _, met in rows) else 1)


Row = tuple[str, str, bool]


def widths(folder: Path) -> Row:
    """Runs the shipped configuration on a model of Pythia-12B's width."""
    program = f"""
import sys, torch
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXModel
from exactivations.datamodules.embedded import resolve_model
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(resolve_model("demo"))
config = GPTNeoXConfig(
    vocab_size=len(tokenizer), hidden_size={WIDTH}, num_hidden_layers={BLOCKS}, num_attention_heads={HEADS},
    intermediate_size={4 * WIDTH}, rotary_pct=0.25, max_position_embeddings=2048,
)
GPTNeoXModel(config).save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
"""
    subprocess.run([sys.executable, "-c", program, str(folder / "wide")], check=True)
    layers = [str(layer) for layer in range(BLOCKS)]
    means(
        folder, "wide-means", "run", str(folder / "wide"), "--config", "pythia-12b", "--layers", *layers, "--dataset", "demo",
        "--num-samples", "24", "--sample-seed", "0", "--max-length", "32", "--verify-samples", "2",
    )  # fmt: skip
    program = (
        "import sys; from exactivations.store import MeanActivations\n"
        "means = MeanActivations.load(sys.argv[1]); print(*(len(means.mean(name)) for name in means.names))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder / "wide-means")], check=True, capture_output=True, text=True)
    short, long = (int(width) for width in done.stdout.split())
    asked = "5,120 values for short, 20,480 for long (Pythia-12B's width)"
    return (
        asked,
        f"{short:,} and {long:,}, layers averaged, with random weights and {BLOCKS} blocks",
        (short, long) == (5120, 20480),
    )


def same_bits(folder: Path) -> Row:
    """Runs on one rank, on two, and killed after the first shard; compares every byte of shards and results."""
    common = ["run", "demo", "--dataset", "demo", "--num-samples", "300", "--sample-seed", "0", "--max-length", "256"]
    common += ["--layers", "1", "3", "--mode", "both", "--shard-tokens", "8192", "--token-budget", "2048"]
    common += ["--cpu-threads", "1", "--accelerator", "cpu"]
    means(folder, "one", *common)
    means(folder, "two", *common, "--devices", "2")
    killed = subprocess.Popen(command(folder / "killed", *common), env=environment(folder), stdout=subprocess.DEVNULL)
    while killed.poll() is None and not list((folder / "killed" / "shards").glob("*.safetensors")):
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    left = len(list((folder / "killed" / "shards").glob("*.safetensors")))
    means(folder, "killed", *common, "--devices", "2")
    found = [content(folder / name) for name in ("one", "two", "killed")]
    n = len(found[0]) - 2
    measured = f"one rank, two ranks, and killed after {left} of {n} shards: all {len(found[0])} files have the same bytes"
    return "the same mean for the same input", measured, found[0] == found[1] == found[2] and 0 < left < n


def speed(folder: Path) -> Row:
    """Times a whole run, model loading and verification included."""
    n, began = 2000, time.monotonic()
    options = ["--num-samples", str(n), "--sample-seed", "0", "--max-length", "1024", "--layers", "1", "3", "--mode", "both"]
    means(folder, "speed", "run", "demo", "--dataset", "demo", *options)
    per_hour = n / (time.monotonic() - began) * 3600
    measured = f"{per_hour:,.0f} functions an hour with the demo model on {os.cpu_count()} CPU cores, start to end"
    return "5,000 samples in under 2 hours", measured, per_hour > 2500


def memory() -> Row:
    """Measures peaks at 1,000, 4,000 and 20,000 samples. 1,000 short texts fill only a few batches; from there on growth counts."""
    peaks = peaks_at([1_000, 4_000, 20_000], means=True)
    measured = ", ".join(f"{peak / 1024:,.0f}" for peak in peaks)
    measured = f"peaks of {measured} MiB at 1,000, 4,000 and 20,000 samples: {peaks[2] / peaks[1]:.2f} times from 4,000 on"
    return "large datasets without running out of memory", measured, peaks[2] / peaks[1] < ALLOWED_GROWTH


def means(folder: Path, out: str, *words: str) -> None:
    """Runs `exactivations means` to its end."""
    subprocess.run(command(folder / out, *words), env=environment(folder), check=True, stdout=subprocess.DEVNULL)


def command(out: Path, *words: str) -> list[str]:
    """Returns the command line of a run of means."""
    return [sys.executable, "-m", "exactivations.scripts.main", "means", *words, "--out", str(out)]


def environment(folder: Path) -> dict[str, str]:
    """Returns an environment with a cache of its own."""
    return {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}


def content(out: Path) -> dict[str, bytes]:
    """Name -> bytes of all that does not tell the time."""
    files = [out / "samples.parquet", out / "means.safetensors", *(out / "shards").iterdir()]
    return {file.name: file.read_bytes() for file in files}


if __name__ == "__main__":
    main()
