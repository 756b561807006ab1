"""One system in a process of its own: loads, says so, and runs a round for each line it is sent."""

import importlib
import json
import sys
import time
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.speed.cases import Case


def main() -> None:
    """Reads commands from standard input, answers on standard output; all else that is printed goes to standard error."""
    system, case = sys.argv[1], Case(**json.loads(sys.argv[2]))
    answers, sys.stdout = sys.stdout, sys.stderr
    warnings.simplefilter("ignore")
    torch.set_num_threads(case.threads)
    name, _, variant = system.partition(":")
    try:
        prepared = importlib.import_module(f"benchmarks.speed.systems.{name}").prepare(case, **json.loads(variant or "{}"))
    except ModuleNotFoundError as error:
        if error.name in ("nnsight", "sentence_transformers", "transformer_lens"):
            raise SystemExit(f"{error}: `make bench` installs the other tools") from None
        raise
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        result = prepared.run()
        seconds = time.perf_counter() - began
        answer = {"seconds": seconds, **prepared.inside()}
        if line.strip() == "keep":
            outputs = prepared.outputs(result)
            if outputs:
                file = Path(case.folder, f"{abs(hash(system))}.safetensors")
                save_file({key: value.contiguous() for key, value in outputs.items()}, file)
                answer["outputs"] = str(file)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
