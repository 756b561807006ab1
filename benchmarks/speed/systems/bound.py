"""The bound: the bare forward pass of the truncated model over the planned batches, nothing pooled, nothing stored."""

import torch

from benchmarks.speed.cases import Case, Round
from exactivations.datamodules.plan import PlanOptions, plan


def prepare(case: Case, padding: str = "none") -> Round:
    """Cuts the model, and makes all batches beforehand."""
    model, ids = case.load(), case.token_ids()
    del model.layers[max(case.blocks) + 1 :]
    model.final_layer_norm = torch.nn.Identity()  # nobody reads what is behind it
    planned = plan([len(row) for row in ids], PlanOptions(padding=padding))
    batches = []
    for number in range(planned.n_batches):
        samples, width = planned.batch(number), int(planned.batch_length[number])
        batches.append(torch.tensor([ids[sample] + [0] * (width - len(ids[sample])) for sample in samples]))

    @torch.inference_mode()
    def run() -> None:
        for batch in batches:
            model(input_ids=batch, use_cache=False)

    return Round(run, lambda _: {})
