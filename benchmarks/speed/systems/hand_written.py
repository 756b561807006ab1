"""A good engineer's own loop: cut model, sorted, padded on the right within a token budget, no mask, hooks, pooled by lengths."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.cases import Case, Outputs, Round, by_length, gathered, pooled_states, tokens_gathered

TOKEN_BUDGET = 8192


def prepare(case: Case) -> Round:
    """Loads the model, tokenizes and makes the batches' lists; a round pads, computes and pools."""
    model, ids = case.load(), case.token_ids()
    del model.layers[max(case.blocks) + 1 :]
    model.final_layer_norm = torch.nn.Identity()  # nobody reads what is behind it
    order, batches = by_length(ids), []
    while order:
        capacity = max(1, TOKEN_BUDGET // len(ids[order[0]]))
        batches.append(order[:capacity])
        order = order[capacity:]

    @torch.inference_mode()
    def run() -> list[tuple[list[int], dict[str, Tensor]]]:
        found, states = [], {}
        with ExitStack() as hooks:
            for block in case.blocks:

                def keep(module: Any, args: Any, output: Any, name: str = str(block)) -> None:
                    states[name] = output

                hooks.callback(model.layers[block].register_forward_hook(keep).remove)
            for samples in batches:
                lengths = torch.tensor([len(ids[i]) for i in samples])
                padded = torch.zeros(len(samples), int(lengths[0]), dtype=torch.int64)
                for row, i in enumerate(samples):
                    padded[row, : lengths[row]] = torch.tensor(ids[i])
                model(input_ids=padded, use_cache=False)
                if case.wanted == "pooled":
                    kept = pooled_states(states, torch.arange(padded.shape[1]) < lengths[:, None])
                else:
                    kept = {f"{name}/tokens": state for name, state in states.items()}
                found.append((samples, kept))
        return found

    def outputs(found: list[tuple[list[int], dict[str, Tensor]]]) -> Outputs:
        return gathered(found, case.n) if case.wanted == "pooled" else tokens_gathered(found, [len(row) for row in ids])

    return Round(run, outputs)
