"""Kills a run with SIGKILL at random moments, resumes it with another number of ranks, and compares every byte at the end.

    python benchmarks/soak.py [--kills 20] [--seed 0]

The demo model runs over a part of the demo dataset. Each time the run is killed, whole or only its first rank, and started
again with 1, 2 or 3 ranks. A run that finishes before all kills are spent is compared and started anew. Exits with status 1
if shards or samples.parquet differ in one byte from those of an uninterrupted run on one rank, or if a published shard was
ever written again.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXTRACT = [
    "extract", "demo", "--dataset", "demo", "--num-samples", "900", "--sample-seed", "0", "--max-length", "256",
    "--layers", "1", "3", "--pooling", "tokens", "mean", "--token-budget", "1024", "--shard-tokens", "2048",
    "--accelerator", "cpu", "--cpu-threads", "1",
]  # fmt: skip
PATIENCE_SECONDS = 600.0

Stamps = dict[str, tuple[int, int]]


def main() -> None:
    """Runs the soak and prints a line for each kill."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")  # inherited by all runs
        expected = reference(folder / "reference")
        n_shards = len(expected) - 1
        print(f"reference: {n_shards} shards, {sum(map(len, expected.values())) / 1e6:.1f} MB, one rank, uninterrupted", flush=True)
        print(f"{'kill':>4} {'ranks':>5} {'killed':>10} {'at':>7} {'published':>12}", flush=True)
        faults: list[str] = []
        kills, lap, ranks = 0, 0, 1
        while kills < arguments.kills:
            lap += 1
            out, stamps = folder / f"run{lap}", Stamps()
            while kills < arguments.kills:
                ranks = dice.choice([n for n in (1, 2, 3) if n != ranks])
                before = len(stamps)
                killed, seconds = run_and_kill(out, ranks, dice)
                stamps = follow(stamps, out, faults)
                if killed == "finished":
                    print(f"{'-':>4} {ranks:>5} {killed:>10} {seconds:>6.1f}s {before:>4} -> {len(stamps):>4}", flush=True)
                    break
                kills += 1
                print(f"{kills:>4} {ranks:>5} {killed:>10} {seconds:>6.1f}s {before:>4} -> {len(stamps):>4}", flush=True)
            finish(out, dice.choice([1, 2, 3]))
            follow(stamps, out, faults)
            faults += differences(expected, content(out))
        outcome = "FAULTS" if faults else "all bytes equal, no published shard rewritten"
        print(f"{kills} kills over {lap} runs to the end: {outcome}")
    if faults:
        sys.exit("\n".join(faults))


def reference(out: Path) -> dict[str, bytes]:
    """Returns the files of an uninterrupted run on one rank."""
    finish(out, 1)
    return content(out)


def content(out: Path) -> dict[str, bytes]:
    """Returns name -> bytes of samples.parquet and of everything in shards/."""
    return {str(path.relative_to(out)): path.read_bytes() for path in (out / "samples.parquet", *(out / "shards").iterdir())}


def differences(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    """Names every file that is missing, is too many, or differs."""
    return [f"differs: {name}" for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]


def start(out: Path, ranks: int) -> subprocess.Popen[str]:
    """Starts a run in a process group of its own."""
    command = [str(Path(sys.executable).with_name("exactivations")), *EXTRACT, "--devices", str(ranks), "--out", str(out)]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(out: Path, ranks: int) -> None:
    """Runs to the end, and stops the soak if that fails."""
    process = start(out, ranks)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    if process.returncode:
        sys.exit(f"a run that nobody killed failed with status {process.returncode}:\n{errors}")


def run_and_kill(out: Path, ranks: int, dice: random.Random) -> tuple[str, float]:
    """Starts a run and kills it: one time in four wherever it is after some seconds, else a moment after it published shards."""
    kill_early, early, more, late = dice.random() < 0.25, dice.uniform(0.5, 12), dice.randint(1, 6), dice.uniform(0, 0.4)
    only_first_rank = ranks > 1 and dice.random() < 0.4
    process, began = start(out, ranks), time.monotonic()
    enough = len(published(out)) + more
    while process.poll() is None:
        seconds = time.monotonic() - began
        if seconds > PATIENCE_SECONDS:
            os.killpg(process.pid, signal.SIGKILL)
            sys.exit(f"a run hung for {PATIENCE_SECONDS:.0f} seconds")
        if kill_early and seconds > early:
            break
        if not kill_early and len(published(out)) >= enough:
            time.sleep(late)
            break
        time.sleep(0.005)
    seconds = time.monotonic() - began
    if process.poll() is not None:
        _, errors = process.communicate()
        if process.returncode:
            sys.exit(f"a run that nobody killed failed with status {process.returncode}:\n{errors}")
        return "finished", seconds
    if only_first_rank:
        process.kill()  # the others notice and end by themselves; the next run waits for them at the lock
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return ("rank 0" if only_first_rank else "all"), seconds


def published(out: Path) -> Stamps:
    """Returns inode and time of writing of every published shard."""
    stamps = {}
    for path in (out / "shards").glob("*.safetensors"):
        status = path.stat()
        stamps[path.name] = (status.st_ino, status.st_mtime_ns)
    return stamps


def follow(before: Stamps, out: Path, faults: list[str]) -> Stamps:
    """Returns the stamps of now; notes every shard that was published before and has been written again or is gone."""
    now = published(out)
    faults += [f"rewritten: {out / name}" for name, stamp in before.items() if now.get(name) != stamp]
    return now


if __name__ == "__main__":
    main()
