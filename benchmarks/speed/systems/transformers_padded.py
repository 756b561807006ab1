"""transformers as most scripts use it: batches of 32, padded on the right, with an attention mask; hooks on the blocks.

Variants: in dataset order, sorted by length, or one by one (which needs no padding, and is what the others are held against).
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.cases import Case, Outputs, Round, by_length, gathered, padded_batches, pooled_states, tokens_gathered


def prepare(case: Case, *, sort: bool = False, size: int = 32) -> Round:
    """Loads the model and tokenizes; a round pads, computes and pools."""
    model, tokenizer, ids = case.load(), case.tokenizer(), case.token_ids()
    order = by_length(ids) if sort else list(range(case.n))

    hooked = {str(block): model.layers[block] for block in case.blocks}
    if size == 1 and case.wanted == "pooled":
        hooked["final_norm"] = model.final_layer_norm

    @torch.inference_mode()
    def run() -> list[tuple[list[int], dict[str, Tensor]]]:
        found, states = [], {}
        with ExitStack() as hooks:
            for name, module in hooked.items():

                def keep(module: Any, args: Any, output: Any, name: str = name) -> None:
                    states[name] = output

                hooks.callback(module.register_forward_hook(keep).remove)
            for samples, batch in alone(ids) if size == 1 else padded_batches(tokenizer, ids, order, size):
                model(**batch, use_cache=False)
                if case.wanted == "pooled":
                    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
                    found.append((samples, pooled_states(states, mask)))
                else:
                    found.append((samples, {f"{name}/tokens": state for name, state in states.items()}))
        return found

    def outputs(found: list[tuple[list[int], dict[str, Tensor]]]) -> Outputs:
        return gathered(found, case.n) if case.wanted == "pooled" else tokens_gathered(found, [len(row) for row in ids])

    return Round(run, outputs)


def alone(ids: list[list[int]]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Yields each sample's number and ids [1, length]."""
    return (([i], {"input_ids": torch.tensor([row])}) for i, row in enumerate(ids))
