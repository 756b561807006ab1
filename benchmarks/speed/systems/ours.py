"""exactivations: `extract` to a store on disk, without verification; with variants for verification and tail padding."""

import inspect
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.speed.cases import Case, Outputs, Round
from exactivations.callbacks.activation_writer import ActivationWriter
from exactivations.callbacks.ground_truth_check import GroundTruthCheck
from exactivations.callbacks.memory_watch import MemoryWatch
from exactivations.callbacks.token_progress import TokenProgress
from exactivations.datamodules import TextDataModule
from exactivations.datamodules.plan import PlanOptions
from exactivations.datamodules.tokenization import TextOptions
from exactivations.lit_modules.extraction import extractor as extractor_module
from exactivations.scripts.trainers import trainer_on
from exactivations.store import ActivationStore


def prepare(case: Case, *, padding: str = "none", verify: int = 0) -> Round:
    """Loads the model and tokenizes; a round is the Trainer's predict, with all callbacks of `extract`."""
    out, texts = Path(case.folder, f"run-{padding}-{verify}"), case.read_texts()
    extractor = extractor_module.ActivationExtractor(
        case.model_path, [f"resid_post.{block}" for block in case.blocks], case.poolings, cpu_threads=case.threads
    )
    inside = Inside(extractor.load("cpu").model)

    def run() -> None:
        data = TextDataModule(
            texts,
            case.model_path,
            text=TextOptions(max_length=case.max_length),
            plan_options=PlanOptions(padding=padding),  # type: ignore[arg-type]
        )
        data.setup()
        shutil.rmtree(out, ignore_errors=True)
        callbacks = [*([GroundTruthCheck(verify)] if verify else []), ActivationWriter(out), TokenProgress(), MemoryWatch()]
        trainer = trainer_on("cpu", 1, callbacks=[*callbacks, inside], logger=False, enable_progress_bar=False)
        with inside.measuring():
            trainer.predict(extractor, datamodule=data, return_predictions=False)

    def outputs(_: Any) -> Outputs:
        store = ActivationStore(out, allow_unverified=True)
        n_tokens = int(store.token_start[-1])
        return {
            f"{block}/{pooling}": store.rows(
                f"resid_post.{block}/{pooling}", np.arange(n_tokens if pooling == "tokens" else case.n)
            ).float()
            for block in case.blocks
            for pooling in case.poolings
        }

    return Round(run, outputs, dict if verify else inside.seconds)  # verifying comes after the loop


class Inside(extractor_module.pl.Callback):
    """Measures inside one run: seconds in the model's own forward pass (hooks not counted), and of the whole loop."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.forward = self.hooks = self.loop = 0.0
        self.measured: dict[str, float] = {}

    @contextmanager
    def measuring(self) -> Any:
        """Wraps the model's forward and the reading of hook points for one run."""
        self.forward = self.hooks = 0.0
        forward, reading = self.model.forward, extractor_module.reading

        def timed_forward(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return forward(*args, **kwargs)
            finally:
                self.forward += time.perf_counter() - began

        def timed_reading(model: Any, points: Any, read: Any) -> Any:
            def timed_read(*args: Any) -> None:
                began = time.perf_counter()
                read(*args)
                self.hooks += time.perf_counter() - began

            return reading(model, points, timed_read)

        timed_forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        self.model.forward, extractor_module.reading = timed_forward, timed_reading  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            self.model.forward, extractor_module.reading = forward, reading  # type: ignore[method-assign]

    def on_predict_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the clock of the loop."""
        self.loop, self.forward, self.hooks = time.perf_counter(), 0.0, 0.0

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Stops it: all is on the disk, as the writer stands before this callback."""
        self.loop = time.perf_counter() - self.loop
        self.measured = {"forward": self.forward - self.hooks, "loop": self.loop}

    def seconds(self) -> dict[str, float]:
        """Returns what was measured in the last round."""
        return self.measured
