"""nnsight: `trace` over batches of 32 in dataset order, saving the blocks' outputs. It pads on the left."""

import torch
from torch import Tensor

from benchmarks.speed.cases import Case, Outputs, Round, gathered, pooled_states


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
        for start in range(0, case.n, 32):
            samples = list(range(start, min(start + 32, case.n)))
            batch = tokenizer.pad({"input_ids": [ids[i] for i in samples]}, return_tensors="pt")
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
