"""Trains the demo language model and its tokenizer on the source of Python's standard library.

Not a command of the package: it is run once by its developers, and its result ships in `datamodules/demo_model`.
From the repository's root, after `make setup`: `.venv/bin/python scripts/train_demo_model.py` (an hour or more on two cores).
"""

import math
import platform
import time
from pathlib import Path

import jsonargparse
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from exactivations.datamodules.demo import HELD_OUT, library_sources, read_source

END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
TABLES = ("encodings.", "pydoc_data.", "test.cjkencodings", "test.encoded_modules")  # generated tables, not language
CONTEXT = 1024


def train_demo_model(
    out: Path = Path("datamodules/demo_model"),
    steps: int = 4000,
    tokens_per_step: int = 4096,
    muon_lr: float = 8e-3,
    adam_lr: float = 4e-3,
    seed: int = 0,
) -> None:
    """Trains tokenizer and model, measures them on the held-out modules, and saves both with a model card.

    Args:
        out: Folder to write to.
        steps: Optimiser steps.
        tokens_per_step: Tokens in one optimiser step.
        muon_lr: Peak learning rate of the blocks' matrices (Muon, scaled to AdamW's update size).
        adam_lr: Peak learning rate of the embedding, norms and biases (AdamW).
        seed: Seed of initialisation and sampling.
    """
    torch.manual_seed(seed)
    library, tests, held_out = training_texts()
    tokenizer = train_tokenizer(library + tests)
    streams = [encode_stream(tokenizer, texts) for texts in (library, tests)]
    print(
        f"{sum(map(len, library)):,} characters of library and {sum(map(len, tests)):,} of its tests; "
        f"{sum(map(len, held_out)):,} held out",
        flush=True,
    )

    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=len(tokenizer), hidden_size=160, num_hidden_layers=4, num_attention_heads=5, intermediate_size=640,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=1,
        )
    )  # fmt: skip
    compiled = torch.compile(model)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        Float32Muon(matrices, lr=muon_lr),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: schedule(step, steps)) for o in optimizers]
    generator = torch.Generator().manual_seed(seed)
    started, running = time.monotonic(), math.nan
    for step in range(steps):
        length = CONTEXT // 2 if step < 0.75 * steps else CONTEXT  # long contexts cost more and pay at the end
        batch = sample_windows(streams, tokens_per_step // length, length, generator)
        loss: Tensor = compiled(input_ids=batch, labels=batch, use_cache=False).loss
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 20 == 0:
            print(f"step {step}: loss {running:.3f} nats per token, {time.monotonic() - started:.0f} s", flush=True)

    minutes = (time.monotonic() - started) / 60
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    bits = bits_per_character(GPTNeoXForCausalLM.from_pretrained(out, dtype=torch.float32), tokenizer, held_out)
    print(f"held-out modules: {bits:.4f} bits per character", flush=True)
    n_parameters = sum(p.numel() for p in model.parameters())
    (out / "README.md").write_text(model_card(n_parameters, len(tokenizer), steps, tokens_per_step, minutes, bits, held_out))


def training_texts() -> tuple[list[str], list[str], list[str]]:
    """Returns the texts of library modules, of their tests, and of the held-out modules (whose tests are in none)."""
    library, tests, held_out = [], [], []
    for module, path in library_sources():
        if module.startswith(TABLES):
            continue
        try:
            text = read_source(path)
        except (SyntaxError, UnicodeDecodeError):  # test data that is broken on purpose
            print(f"left out of the training text: {module} is not valid text in its declared encoding")
            continue
        in_tests = module.partition(".")[0] == "test" or ".test" in module
        if module.partition(".")[0] in HELD_OUT:
            held_out.append(text)
        elif not in_tests:
            library.append(text)
        elif not any(f"test_{name}" in module or f".{name}" in module for name in HELD_OUT):
            tests.append(text)
    return library, tests, held_out


def train_tokenizer(texts: list[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer in the manner of GPT-NeoX (no BOS is added)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT, PADDING], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers has no annotation there
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT, pad_token=PADDING,
        model_max_length=CONTEXT,
    )  # fmt: skip


def encode_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Returns all texts as one sequence of token ids, each text after an end-of-text token."""
    ids: list[int] = []
    for text in texts:
        ids.append(tokenizer.eos_token_id)
        ids.extend(tokenizer.backend_tokenizer.encode(text).ids)
    return torch.tensor(ids)


def sample_windows(streams: list[Tensor], n: int, length: int, generator: torch.Generator) -> Tensor:
    """Returns [n, length] random windows, slightly more of the library than of its (larger) tests."""
    windows = []
    for _ in range(n):
        stream = streams[int(torch.rand((), generator=generator).item() > 0.6)]
        start = int(torch.randint(len(stream) - length, (), generator=generator))
        windows.append(stream[start : start + length])
    return torch.stack(windows)


class Float32Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024), updates scaled to AdamW's size. Torch's own iterates in bfloat16, ten times slower on a CPU."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is ever given
        """Takes one step."""
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalised(p.grad.lerp(average, group["momentum"]))
                p.add_(update, alpha=-0.2 * math.sqrt(max(p.shape)) * group["lr"])


def orthogonalised(matrix: Tensor) -> Tensor:
    """Returns the matrix with its singular values brought near one by five Newton-Schulz iterations."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    update: Tensor = x.T if matrix.shape[0] > matrix.shape[1] else x
    return update


def schedule(step: int, steps: int) -> float:
    """Warm-up, constant, then linear decay to zero over the last 60%."""
    return min(1.0, (step + 1) / 100, (steps - step) / (0.6 * steps))


@torch.inference_mode()
def bits_per_character(model: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Returns the model's loss on the texts in bits per character, each token with at least half a context before it."""
    model.train(False)
    nats = 0.0
    for text in texts:
        ids = encode_stream(tokenizer, [text])
        for start in range(0, max(1, len(ids) - 1), CONTEXT // 2):
            window = ids[max(0, start - CONTEXT // 2) : start + CONTEXT // 2 + 1]
            n_new = len(ids[start + 1 : start + CONTEXT // 2 + 1])
            losses = torch.nn.functional.cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="none")
            nats += losses[len(losses) - n_new :].sum().item()
    return nats / math.log(2) / sum(map(len, texts))


def model_card(
    n_parameters: int, vocab_size: int, steps: int, tokens_per_step: int, minutes: float, bits: float, held_out: list[str]
) -> str:
    """Returns the model card with the figures of this training run."""
    return f"""---
language: code
library_name: transformers
license: psf-2.0
---
# The demo model of exactivations

A small causal language model of Python source (GPT-NeoX architecture: 4 blocks, width 160, 5 heads, rotary positions, parallel
residual, tied embedding; {n_parameters:,} parameters; byte-level BPE, {vocab_size:,} tokens; context {CONTEXT}; float16).
It is there so that every example and test runs on a *trained* model without a network. It is not meant for anything else.

- **Trained on**: the source of the standard library of Python {platform.python_version()} and of its tests, as found
  through `sysconfig` on the machine of training; generated tables left out.
  {steps:,} steps of {tokens_per_step:,} tokens, Muon and AdamW, {minutes:.0f} minutes on two CPU cores,
  by `scripts/train_demo_model.py`.
- **Held out**, with their tests: {", ".join(f"`{name}`" for name in sorted(HELD_OUT))}
  ({sum(map(len, held_out)):,} characters).
- **Loss on the held-out modules**: **{bits:.3f} bits per character** (the shipped float16 weights, run in float32; every token
  with 512 to 1,024 tokens of context where the file has them). The same script prints it.
- **Licence**: the training text is under the PSF licence; the weights are given under the same terms.
"""


if __name__ == "__main__":
    jsonargparse.auto_cli(train_demo_model)
