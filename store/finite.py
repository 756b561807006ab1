"""Nothing that is not finite is stored: inf and NaN come from an overflow or a fault, and poison every mean and probe."""

import torch
from torch import Tensor

from exactivations.store.batches import ActivationBatch
from exactivations.store.errors import NotFiniteError


def refuse_not_finite(batch: ActivationBatch) -> None:
    """Refuses a batch, whose tensors are on the host, with inf or NaN in it.

    Raises:
        NotFiniteError: Naming the sample, the activation, the token and what to do.
    """
    for name, values in batch.activations.items():
        least, largest = torch.aminmax(values)  # NaN comes through; as fast as copying, where isfinite takes thirty times that
        if not (torch.isfinite(least) and torch.isfinite(largest)):
            raise NotFiniteError(_message(batch, name, values))


def _message(batch: ActivationBatch, name: str, values: Tensor) -> str:
    row, dimension = (int(place) for place in (~torch.isfinite(values)).nonzero()[0])
    sample, where = row, ""
    if name.endswith("/tokens"):
        ends = batch.n_tokens.cumsum(0)
        sample = int(torch.searchsorted(ends, row, right=True))
        where = f" at token {row - int(ends[sample] - batch.n_tokens[sample])}"
    value = values[row, dimension].item()
    bad = int((~torch.isfinite(values[row])).sum())
    remedy = (
        "float16 ends at 65,504: extract with --dtype bfloat16 or float32 (and --store-dtype, if that is what overflows)"
        if values.dtype == torch.float16
        else "look at this sample in the model itself; leave it out if the model cannot take it"
    )
    return (
        f"sample {int(batch.sample_index[sample])}: {name} is {value}{where}, dimension {dimension} ({bad} of the row's "
        f"{values.shape[1]} values are not finite). Nothing of its shard is published; {remedy}"
    )
