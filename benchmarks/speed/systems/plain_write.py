"""As many bytes as the store holds of activations, written to one file and flushed to disk: what storing costs at least."""

import os
from pathlib import Path

from benchmarks.speed.cases import Case, Round


def prepare(case: Case) -> Round:
    """Makes the bytes; a round writes them."""
    n_rows = sum(len(row) for row in case.token_ids())
    width = {"demo": 160, "neox-256": 256}[case.model]
    content, path = os.urandom(2**20), Path(case.folder, "plain-write")
    blocks = n_rows * width * 4 * len(case.blocks) // len(content)

    def run() -> None:
        with path.open("wb") as file:
            for _ in range(blocks):
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        path.unlink()

    return Round(run, lambda _: {})
