"""nnsight: `trace` over batches of 32 in dataset order, saving the blocks' outputs. It pads on the left."""

import torch
from torch import Tensor

from benchmarks.speed.cases import Case, Outputs, Round, gathered, padded_batches, pooled_states


def prepare(case: Case) -> Round:
    """Wraps the model; a round traces all texts."""
    from nnsight import LanguageModel
    from transformers import AutoModelForCausalLM

    ids, tokenizer = case.token_ids(), case.tokenizer()
    model = LanguageModel(AutoModelForCausalLM.from_pretrained(case.model_path, dtype=torch.float32), tokenizer=tokenizer)
    layers = model.gpt_neox.layers

    @torch.inference_mode()
    def run() -> list[tuple[list[int], dict[str, Tensor]]]:
        found = []
        for samples, batch in padded_batches(tokenizer, ids, list(range(case.n)), 32):
            first, second = case.blocks
            with model.trace(dict(batch)):
                one = layers[first].output.save()
                other = layers[second].output.save()
            states = {str(block): out[0] if isinstance(out, tuple) else out for block, out in ((first, one), (second, other))}
            found.append((samples, pooled_states(states, batch["attention_mask"])))
        return found

    def outputs(found: list[tuple[list[int], dict[str, Tensor]]]) -> Outputs:
        return gathered(found, case.n)

    return Round(run, outputs)
