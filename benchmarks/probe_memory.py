"""Peak memory of training token probes from a store that is ten times larger than what is allowed.

    python benchmarks/probe_memory.py [--allowed-mib 96]

Allowed is what the process takes beyond what it had when everything was imported. Counted is memory of its own (RssAnon of
/proc/<pid>/status, looked at every few milliseconds from outside; Linux only): pages of the memory map are the system's cache,
which it takes back when it needs them. Linear and attention probes are trained and tested, each in a process of its own. Exits
with status 1 if one takes more.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TIMES, WIDTH, SAMPLE_TOKENS, SHARD_SAMPLES = 10, 1024, 64, 128
NAME = "resid_post.0/tokens"
BATCH = {"logistic": 512, "attention": 8}  # tokens, and samples of 64 tokens


def main() -> None:
    """Writes the store, trains from it and prints what that took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--allowed-mib", type=int, default=96)
    parser.add_argument("--train", nargs=2, metavar=("STORE", "KIND"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(*arguments.train)
        return
    allowed = arguments.allowed_mib * 2**20
    with tempfile.TemporaryDirectory(prefix="probe-memory-") as name:
        path = Path(name) / "store"
        subprocess.run([sys.executable, "-c", f"import probe_memory; probe_memory.write({str(path)!r}, {TIMES * allowed})"],
                       check=True, cwd=Path(__file__).parent)  # fmt: skip
        size = sum(file.stat().st_size for file in (path / "shards").iterdir())
        print(f"store {size / 2**20:,.0f} MiB, allowed {allowed / 2**20:,.0f} MiB beyond imports", flush=True)
        assert size >= TIMES * allowed
        peaks = [peak(path, kind) for kind in BATCH]
    met = max(peaks) <= allowed
    print("met" if met else "NOT MET")
    sys.exit(0 if met else 1)


def write(path: str, size: int) -> None:
    """Writes a store of float32 token rows of so many bytes; one dimension tells the label of each token, and of each sample."""
    import numpy as np
    import pyarrow as pa
    import torch

    from exactivations.store.run_folder import RunFolder, RunInfo, contents_of
    from exactivations.store.shard import write_shard
    from exactivations.store.verification import Verification, write_verification

    n_shards = -(-size // (4 * WIDTH * SAMPLE_TOKENS * SHARD_SAMPLES))
    n = n_shards * SHARD_SAMPLES
    dice = np.random.default_rng(0)
    of_tokens, of_samples = dice.integers(0, 2, (n, SAMPLE_TOKENS)), dice.integers(0, 2, n)
    spec = {"per_token": True, "width": WIDTH, "dtype": "float32"}
    info = RunInfo(
        identity={"model": "none", "dataset": "random"}, about={}, n_shards=n_shards, n_samples=n, n_tokens=n * SAMPLE_TOKENS,
        n_computed_tokens=n * SAMPLE_TOKENS, activations={NAME: spec}, skipped=[],
    )  # fmt: skip
    index = np.arange(n)
    table = pa.table(
        {
            "sample_index": index, "n_tokens": np.full(n, SAMPLE_TOKENS, dtype=np.int32), "token_hash": index.astype(str),
            "truncated": np.zeros(n, dtype=bool), "shard": (index // SHARD_SAMPLES).astype(np.int32),
            "row": (index % SHARD_SAMPLES).astype(np.int32), "of_tokens": list(of_tokens), "of_samples": of_samples,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    folder = RunFolder(Path(path))
    Path(path).mkdir()
    folder.prepare(info, [table], overwrite=False, allow_changed=frozenset())
    for shard in range(n_shards):
        inside = index[shard * SHARD_SAMPLES : (shard + 1) * SHARD_SAMPLES]
        rows = torch.randn(SHARD_SAMPLES * SAMPLE_TOKENS, WIDTH)
        rows[:, 0] += torch.from_numpy(of_tokens[inside].reshape(-1))
        rows[:, 1] += torch.from_numpy(of_samples[inside].repeat(SAMPLE_TOKENS))
        tensors = {
            "sample_index": torch.from_numpy(inside), "n_tokens": torch.full((len(inside),), SAMPLE_TOKENS, dtype=torch.int32),
            "input_ids": torch.zeros(len(rows), dtype=torch.int32), "token_mask": torch.ones(len(rows), dtype=torch.bool),
            NAME: rows,
        }  # fmt: skip
        write_shard(folder.shard_path(shard), tensors, {"shard": shard, "fingerprint": info.fingerprint})
    contents = contents_of(folder.checksums(info), folder.samples_footer())
    write_verification(folder, Verification(
        passed=True, fingerprint=info.fingerprint, contents=contents, samples=[], figures=[], dtype="float32", tolerance="",
        seconds=0.0, when="2026-01-01T00:00:00+00:00",
    ))  # fmt: skip


def peak(path: Path, kind: str) -> int:
    """Returns the most memory of its own that training took beyond imports, in bytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--train", str(path), kind]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    process.stdout.readline()  # everything is imported
    before = most = own_memory(process.pid)
    process.stdin.write("go\n")
    process.stdin.flush()
    while process.poll() is None:
        most = max(most, own_memory(process.pid))
        time.sleep(0.003)
    if process.returncode:
        sys.exit(f"training of {kind} probes failed")
    print(
        f"{kind}: {process.stdout.read().strip()}, imports {before / 2**20:,.0f} MiB, peak {(most - before) / 2**20:,.0f} MiB more"
    )
    return most - before


def own_memory(pid: int) -> int:
    """Returns the resident memory in bytes of a process that is not mapped from files; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def train(path: str, kind: str) -> None:
    """Trains for one epoch, in this process, when told to."""
    import lightning.pytorch as pl

    from exactivations.datamodules.activations import ActivationDataModule
    from exactivations.lit_modules.probes.probe_scores import headline
    from exactivations.lit_modules.probes.trained_probes import TrainedProbeSweep
    from exactivations.store import ActivationStore

    print("imported", flush=True)
    sys.stdin.readline()
    start = time.monotonic()
    attention = kind == "attention"
    data = ActivationDataModule(
        ActivationStore(path), "of_samples" if attention else "of_tokens", unit="sample" if attention else "token",
        over_tokens=attention, batch_size=BATCH[kind],
    )  # fmt: skip
    sweep = TrainedProbeSweep("attention" if attention else "logistic", (0.01, 1.0))
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, use_distributed_sampler=False, num_sanity_val_steps=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(sweep, datamodule=data)
    trainer.test(sweep, datamodule=data, verbose=False)
    auroc = float(headline(sweep.tested[NAME][:1], data.targets("test")[0], 2))
    assert auroc > 0.7, f"nothing was learned: AUROC {auroc:.3f}"
    print(f"{time.monotonic() - start:.0f} s, AUROC {auroc:.3f}")


if __name__ == "__main__":
    main()
