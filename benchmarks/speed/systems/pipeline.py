"""transformers' feature-extraction pipeline, batches of 32 in dataset order. It gives one hook point, after the final norm."""

import torch
from torch import Tensor

from benchmarks.speed.cases import Case, Outputs, Round


def prepare(case: Case) -> Round:
    """Makes the pipeline; a round gives it all texts."""
    import transformers

    texts, lengths = case.read_texts(), [len(row) for row in case.token_ids()]
    extract = transformers.pipeline(
        "feature-extraction", model=case.load(), tokenizer=case.tokenizer(), framework="pt", device="cpu"
    )

    def run() -> tuple[list[Tensor], list[Tensor]]:
        mean, last = [], []
        found = extract(texts, batch_size=32, return_tensors=True, truncation=True, max_length=case.max_length)
        for states, length in zip(found, lengths, strict=True):
            mean.append(states[0, :length].mean(0))  # what is after it is padding
            last.append(states[0, length - 1])
        return mean, last

    def outputs(found: tuple[list[Tensor], list[Tensor]]) -> Outputs:
        return {"final_norm/mean": torch.stack(found[0]), "final_norm/last": torch.stack(found[1])}

    return Round(run, outputs)
