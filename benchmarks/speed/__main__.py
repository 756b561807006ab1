"""Side by side: every system in a process of its own, round by round in turns; ratios to the bound of the same round.

    python -m benchmarks.speed [--cases demo:ragged:200:pooled …] [--systems …] [--rounds 5] [--threads 2] [--out speed.json]

Prints a table and writes JSON. "of the bound" is the bound's seconds over the system's (median of the rounds, lowest to highest);
"inside" is, within the system's own process, seconds in the model's forward pass over seconds of the whole loop, which a machine
that drifts cannot disturb (what the writer beside it takes from the forward pass does not show in it, but in the first figure);
"worst difference" is that from one text at a time, over the root mean square of all values.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.speed.cases import Case, make_folder, to_json

ALLOWED = 1e-3
BOUND, ALONE = "bound", 'transformers_padded:{"size": 1}'
TITLES = {
    BOUND: "bound: bare forward pass, planned batches",
    "ours": "exactivations extract",
    'ours:{"verify": 16}': "exactivations extract, verified (16 samples)",
    'ours:{"padding": "tail"}': "exactivations extract, padding tail",
    "hand_written": "hand-written: cut, sorted, padded, no mask",
    ALONE: "transformers, one by one",
    'transformers_padded:{"sort": true}': "transformers, sorted, padded, mask",
    "transformers_padded": "transformers, dataset order, padded, mask",
    "pipeline": "transformers feature-extraction pipeline [1]",
    "sentence_transformers_encode": "sentence-transformers encode [2]",
    'nnsight_trace:{"sort": true}': "nnsight trace, sorted, stopped early",
    "nnsight_trace": "nnsight trace, dataset order",
    'transformer_lens_cache:{"sort": true}': "TransformerLens run_with_cache, sorted",
    "transformer_lens_cache": "TransformerLens run_with_cache, dataset order",
    "plain_write": "plain write of the same bytes",
}
STORING = ("ours", "plain_write")
NOTES = (
    "[1] after the final norm only, of all tokens   [2] after the final norm only, mean only\n"
    "MB/s stored: activations over all seconds, those of the forward pass included"
)
OURS = [BOUND, "ours", 'ours:{"verify": 16}', 'ours:{"padding": "tail"}', "hand_written", ALONE]
PEERS = [
    'transformers_padded:{"sort": true}', "transformers_padded", "pipeline", "sentence_transformers_encode",
    'nnsight_trace:{"sort": true}', "nnsight_trace", 'transformer_lens_cache:{"sort": true}', "transformer_lens_cache",
]  # fmt: skip
DEFAULT = {
    "demo:ragged:200:pooled": OURS + PEERS,
    "neox-256:ragged:200:pooled": OURS + PEERS,
    "demo:equal:200:pooled": OURS + PEERS,
    "demo:ragged:2000:pooled": OURS,
    "neox-256:ragged:1000:pooled": [BOUND, "ours", 'ours:{"padding": "tail"}', "hand_written"],
    "demo:ragged:2000:tokens": [BOUND, "ours", "hand_written", ALONE, "plain_write"],
    "demo:ragged:2000:tokens-all": [BOUND, "ours", ALONE, "plain_write"],
    "demo:ragged:20000:pooled": [BOUND, "ours", 'ours:{"padding": "tail"}', "hand_written"],
}


class Worker:
    """A system in its process."""

    def __init__(self, system: str, case: Case) -> None:
        command = [sys.executable, "-m", "benchmarks.speed.worker", system, to_json(case)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # it lives as long as the process
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True)
        self.system = system
        self._answer()

    def round(self, command: str) -> dict[str, Any]:
        """Runs one round, alone on the machine, and returns what was measured."""
        assert self._process.stdin is not None
        print(command, file=self._process.stdin, flush=True)
        found: dict[str, Any] = json.loads(self._answer())
        return found

    def end(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise SystemExit(f"{self.system} failed:\n{self._log.read()[-3000:]}")
        return line


def measure(case: Case, systems: list[str], rounds: int) -> dict[str, Any]:
    """Runs all systems in turns, first a round that does not count, and returns what was found of each."""
    workers = [Worker(system, case) for system in systems]
    kept = {worker.system: worker.round("keep") for worker in workers}
    found: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
    for _ in range(rounds):
        for worker in workers:
            found[worker.system].append(worker.round("run"))
    for worker in workers:
        worker.end()
    truth = load_file(kept[ALONE]["outputs"]) if ALONE in kept else {}
    table, stored = {}, 0 if case.wanted == "pooled" else case.activation_bytes()
    for system, of_rounds in found.items():
        ratios = [bound["seconds"] / own["seconds"] for bound, own in zip(found[BOUND], of_rounds, strict=True)]
        inside = [own["forward"] / own["loop"] for own in of_rounds if "loop" in own]
        table[system] = {
            "of_the_bound": median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "inside": median(inside) if inside else None,
            "worst_difference": worst(kept[system].get("outputs"), truth),
            "seconds": median(own["seconds"] for own in of_rounds),
        }
        if system.startswith(STORING) and stored:
            table[system]["bytes_per_second"] = stored / table[system]["seconds"]
    return table


def worst(file: str | None, truth: dict[str, torch.Tensor]) -> float | None:
    """Returns the largest difference from the truth, over its root mean square; None if a system gives nothing."""
    if file is None or not truth:
        return None
    found = load_file(file)
    blocks = {name for name in truth if not name.startswith("final_norm")}
    if not (blocks <= found.keys() <= truth.keys() or (found and found.keys() <= truth.keys() - blocks)):
        raise SystemExit(f"{file} holds {sorted(found)}, expected {sorted(blocks)}, or what is after the final norm")
    differences = [
        (rows.double() - truth[name].double()) / truth[name].double().square().mean().sqrt() for name, rows in found.items()
    ]
    largest = float(torch.stack([difference.abs().max() for difference in differences]).max())
    if not largest < ALLOWED:
        raise SystemExit(f"{file} differs from one text at a time by {largest}, allowed {ALLOWED}")
    return largest


def show(case: Case, table: dict[str, Any]) -> None:
    """Prints one case."""
    print(f"\n{case.title}, {case.threads} threads")
    print(f"{'':<48}{'of the bound':>24}{'inside':>9}{'worst difference':>19}{'MB/s stored':>12}")
    for system, row in table.items():
        spread = f"{row['of_the_bound']:.3f} ({row['lowest']:.2f} to {row['highest']:.2f})"
        inside = "" if row["inside"] is None else f"{row['inside']:.3f}"
        difference = "" if row["worst_difference"] is None else f"{row['worst_difference']:.1e}"
        rate = f"{row['bytes_per_second'] / 1e6:,.0f}" if "bytes_per_second" in row else ""
        print(f"{TITLES.get(system, system):<48}{spread:>24}{inside:>9}{difference:>19}{rate:>12}", flush=True)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="+", default=list(DEFAULT), metavar="MODEL:TEXTS:N:WANTED")
    parser.add_argument("--systems", nargs="+", choices=list(TITLES), help="default: those that suit the case")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("speed.json"))
    arguments = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory(prefix="speed-") as folder:
        make_folder(Path(folder))
        for name in arguments.cases:
            model, texts, n, wanted = name.split(":")
            case = Case(model, texts, int(n), wanted, arguments.threads, folder)
            systems = arguments.systems or DEFAULT.get(name, OURS)
            found[name] = measure(case, list(dict.fromkeys([BOUND, *systems])), arguments.rounds)
            show(case, found[name])
            arguments.out.write_text(
                json.dumps({"threads": arguments.threads, "rounds": arguments.rounds, "cases": found}, indent=2)
            )
    print(f"\n{NOTES}")


if __name__ == "__main__":
    main()
