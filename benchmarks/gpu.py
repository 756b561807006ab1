"""Extraction on a GPU against the bare forward pass: models of 1B, 4B and 8B shape with random weights in bfloat16, ragged texts.

    python benchmarks/gpu.py --shape 1b --mean-length 330 --samples 1000 --peak-tflops 989 [--wanted pooled] [--padding none]
    python benchmarks/gpu.py --shape tiny --device cpu --samples 60      # only to see that it runs

Lengths are log-normal (sigma 1). In one process, in turns, medians: the bound is the model's forward pass over the planned batches,
nothing pooled, nothing stored. Prints the fraction of the bound and of the device's peak (with --peak-tflops), peak memory of both,
and with --trace FILE how much of the time of copies to the host lay under computation, by the profiler. A run that is
verified (16 samples, computed alone) comes last.
"""

import argparse
import math
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer, LlamaConfig

from exactivations.callbacks.activation_writer import ActivationWriter
from exactivations.callbacks.ground_truth_check import GroundTruthCheck
from exactivations.callbacks.memory_watch import MemoryWatch
from exactivations.callbacks.token_progress import TokenProgress
from exactivations.datamodules import TextDataModule
from exactivations.datamodules.demo import demo_functions
from exactivations.datamodules.embedded import resolve_model
from exactivations.datamodules.plan import PlanOptions
from exactivations.datamodules.tokenization import TextOptions
from exactivations.lit_modules import ActivationExtractor
from exactivations.scripts.trainers import trainer_on

SHAPES = {  # width, blocks, heads, key-value heads, width of the MLP
    "tiny": (64, 3, 4, 2, 128),
    "1b": (2048, 16, 32, 8, 8192),
    "4b": (2560, 36, 32, 8, 9728),
    "8b": (4096, 32, 32, 8, 14336),
}
LONGEST = 4096


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="1b")
    parser.add_argument("--mean-length", type=float, default=330)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--wanted", choices=["pooled", "tokens"], default="pooled")
    parser.add_argument("--padding", choices=["none", "tail"], default="none")
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak-tflops", type=float, help="the device's dense peak in bfloat16")
    parser.add_argument("--trace", help="file for a profiler's timeline of one run")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    device, texts = torch.device(arguments.device), ragged_texts(arguments.samples, arguments.mean_length)
    model = random_model(arguments.shape, device)
    n_blocks = SHAPES[arguments.shape][1]
    hooks = [f"resid_post.{n_blocks // 2}", f"resid_post.{n_blocks - 1}"]
    extractor = ActivationExtractor(model, hooks, ["mean", "last"] if arguments.wanted == "pooled" else ["tokens"])
    options = PlanOptions(token_budget=arguments.token_budget, padding=arguments.padding)

    def data() -> TextDataModule:
        of = TextDataModule(texts, resolve_model("demo"), text=TextOptions(max_length=LONGEST), plan_options=options)
        of.setup()
        return of

    planned = data()
    batches = [batch.input_ids for shard in range(planned.plan.n_shards) for batch in batches_of(planned, shard)]
    batches = [batch.pin_memory() for batch in batches] if device.type == "cuda" else batches  # as a DataLoader gives them
    print(
        f"{arguments.shape}, {arguments.samples:,} texts, {int(planned.tokens.n_tokens.sum()):,} tokens, {len(batches):,} batches, "
        f"{planned.plan.padded_share:.1%} padding, {arguments.wanted}, {device}"
    )
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:

        def ours(*checks: Any) -> None:
            shutil.rmtree(f"{folder}/run", ignore_errors=True)
            callbacks = [*checks, ActivationWriter(f"{folder}/run"), TokenProgress(), MemoryWatch()]
            trainer = trainer_on(
                device.type if device.type == "cpu" else "gpu", 1, callbacks=callbacks, logger=False, enable_progress_bar=False
            )
            trainer.predict(extractor, datamodule=data(), return_predictions=False)

        @torch.inference_mode()
        def bound() -> None:
            for batch in batches:
                model(input_ids=batch.to(device, non_blocking=True), use_cache=False)

        ours()
        bare, norm = nn.Identity(), model.norm
        ratios, seconds, peaks = [], [], {}
        for _ in range(arguments.rounds):
            model.norm = bare  # ours stops before it
            of_bound, peaks["bound"] = timed(bound, device)
            model.norm = norm
            of_ours, peaks["ours"] = timed(ours, device)
            ratios.append(of_bound / of_ours)
            seconds.append(of_bound)
        print(f"of the bound: {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
        if arguments.peak_tflops:
            share = operations(model, [batch.shape for batch in batches]) / median(seconds) / (arguments.peak_tflops * 1e12)
            print(f"the bound is {share:.1%} of the peak, ours {share * median(ratios):.1%}")
        print("peak memory: " + ", ".join(f"{name} {peak / 2**30:.2f} GiB" for name, peak in peaks.items()))
        if arguments.trace:
            print(f"of the time of copies to the host {traced(ours, arguments.trace):.1%} lay under computation")
        check = GroundTruthCheck()
        ours(check)
        assert check.verification is not None and check.verification.passed
        print(f"verified: {len(check.verification.samples)} samples, computed again alone")


def batches_of(data: TextDataModule, shard: int) -> list[Any]:
    """Returns the batches of a shard."""
    steps = data.steps_of([shard])
    return [batch for i in range(len(steps)) for batch in steps[i].batches()]


def random_model(shape: str, device: torch.device) -> Any:
    """Returns a Llama without its head, with random weights, made on the device."""
    width, blocks, heads, kv_heads, inner = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=inner, vocab_size=4096, max_position_embeddings=LONGEST, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModel.from_config(config, dtype=torch.bfloat16).eval()


def ragged_texts(n: int, mean: float) -> list[str]:
    """Returns pieces of demo functions whose numbers of tokens are about log-normal, with sigma 1."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("demo"))
    stream = tokenizer("\n".join(demo_functions()["text"][:4000]))["input_ids"]
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(math.log(mean) - 0.5, 1.0, n), 4, LONGEST).astype(int)
    starts = draw.integers(0, len(stream) - LONGEST, n)
    return [tokenizer.decode(stream[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def timed(work: Callable[[], None], device: torch.device) -> tuple[float, int]:
    """Returns seconds, and the most bytes that tensors took on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def operations(model: nn.Module, shapes: list[Any]) -> float:
    """Returns floating-point operations of a forward pass over batches: two a weight and token, and causal attention."""
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and p.ndim == 2)
    config: Any = model.config
    attention = 2 * config.num_hidden_layers * config.hidden_size  # scores and values, half of each by causality
    return float(sum(rows * length * (2 * weights + attention * length) for rows, length in shapes))


def traced(work: Callable[[], None], file: str) -> float:
    """Runs under the profiler; returns the share of the copies' time to the host that lay under kernels."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        work()
    found.export_chrome_trace(str(Path(file)))
    events = [(e.name, e.time_range.start, e.time_range.end) for e in found.events() if e.device_type.name == "CUDA"]
    # shorter than 5 microseconds is what transformers asks once a forward pass, and waits for
    copies = [(start, end) for name, start, end in events if "DtoH" in name and end - start >= 5]
    kernels = [(start, end) for name, start, end in events if "Memcpy" not in name and "Memset" not in name]
    return covered_share(copies, kernels)


def covered_share(parts: list[tuple[float, float]], cover: list[tuple[float, float]]) -> float:
    """Returns which share of the length of some intervals lies under the union of others; NaN without either."""
    if not parts or not cover:
        return math.nan
    start, end = np.array(sorted(cover)).T
    reached = np.maximum.accumulate(end)
    first = np.flatnonzero(np.concatenate([[True], start[1:] > reached[:-1]]))  # of each piece of the union
    pieces = np.stack([start[first], reached[np.append(first[1:] - 1, len(end) - 1)]])
    total = np.concatenate([[0.0], np.cumsum(pieces[1] - pieces[0])])
    covered = np.interp(np.array(parts), pieces.T.ravel(), np.stack([total[:-1], total[1:]]).T.ravel())
    return float((covered[:, 1] - covered[:, 0]).sum() / np.diff(np.array(parts)).sum())


if __name__ == "__main__":
    main()
