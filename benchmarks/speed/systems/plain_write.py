"""As many bytes as the store holds of activations, written to one file and flushed to disk: what storing costs at least."""

import os
from pathlib import Path

from benchmarks.speed.cases import Case, Round


def prepare(case: Case) -> Round:
    """Makes the bytes; a round writes them."""
    content, path = os.urandom(2**20), Path(case.folder, "plain-write")
    blocks = case.activation_bytes() // len(content)

    def run() -> None:
        with path.open("wb") as file:
            for _ in range(blocks):
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        path.unlink()

    return Round(run, lambda _: {})
