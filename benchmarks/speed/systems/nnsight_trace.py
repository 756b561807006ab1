"""nnsight: `trace` over batches of 32, saving the blocks' outputs. It pads on the left.

Variants: in dataset order, or sorted by length and stopped behind the deeper block.
"""

import torch
from torch import Tensor

from benchmarks.speed.cases import Case, Outputs, Round, by_length, gathered, padded_batches, pooled_states


def prepare(case: Case, *, sort: bool = False) -> Round:
    """Wraps the model; a round traces all texts."""
    from nnsight import LanguageModel
    from transformers import AutoModelForCausalLM

    ids, tokenizer = case.token_ids(), case.tokenizer()
    model = LanguageModel(AutoModelForCausalLM.from_pretrained(case.model_path, dtype=torch.float32), tokenizer=tokenizer)
    layers = model.gpt_neox.layers
    order = by_length(ids) if sort else list(range(case.n))

    @torch.inference_mode()
    def run() -> list[tuple[list[int], dict[str, Tensor]]]:
        found = []
        for samples, batch in padded_batches(tokenizer, ids, order, 32):
            first, second = case.blocks
            with model.trace(dict(batch)) as tracer:
                one = layers[first].output.save()
                other = layers[second].output.save()
                if sort:
                    tracer.stop()
            states = {str(block): out[0] if isinstance(out, tuple) else out for block, out in ((first, one), (second, other))}
            found.append((samples, pooled_states(states, batch["attention_mask"])))
        return found

    def outputs(found: list[tuple[list[int], dict[str, Tensor]]]) -> Outputs:
        return gathered(found, case.n)

    return Round(run, outputs)
