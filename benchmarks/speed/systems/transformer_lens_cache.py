"""TransformerLens: `run_with_cache` of its bridge over batches of 32, naming the two hook points.

Variants: in dataset order, or sorted by length and stopped behind the deeper block (it runs the head where that is the last one).
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.cases import Case, Outputs, Round, by_length, gathered, padded_batches, pooled_states


def prepare(case: Case, *, sort: bool = False) -> Round:
    """Wraps the model; a round runs all texts."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    ids, tokenizer = case.token_ids(), case.tokenizer()
    whole = AutoModelForCausalLM.from_pretrained(case.model_path, dtype=torch.float32)
    model: Any = TransformerBridge.boot_transformers(case.model_path, hf_model=whole, tokenizer=tokenizer, device="cpu")
    order = by_length(ids) if sort else list(range(case.n))
    stop = {"stop_at_layer": max(case.blocks) + 1} if sort and max(case.blocks) + 1 < len(model.blocks) else {}
    names = {block: f"blocks.{block}.hook_resid_post" for block in case.blocks}

    @torch.inference_mode()
    def run() -> list[tuple[list[int], dict[str, Tensor]]]:
        found = []
        for samples, batch in padded_batches(tokenizer, ids, order, 32):
            mask = batch["attention_mask"]
            _, cache = model.run_with_cache(batch["input_ids"], attention_mask=mask, names_filter=list(names.values()), **stop)
            found.append((samples, pooled_states({str(block): cache[name] for block, name in names.items()}, mask)))
        return found

    def outputs(found: list[tuple[list[int], dict[str, Tensor]]]) -> Outputs:
        return gathered(found, case.n)

    return Round(run, outputs)
