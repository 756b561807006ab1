"""Poolings: from the states of all tokens of a sample to one vector.

Every pooling counts only the tokens that the mask marks, computes in float32, and looks at each row by itself.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from exactivations.store.pooling_names import half_life_of


def pool(states: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"], name: str) -> Float[Tensor, "b d"]:
    """Pools the states of each row over the tokens that its mask marks. Never waits for the device.

    - `last`, `first`: the state of the last or first marked token.
    - `mean`, `max`: over the marked tokens.
    - `exp_decay:f`: weights proportional to exp(-ln 2 * i / (f * n)), i = 0 for the last of the n marked tokens.

    Returns:
        Float32 [B, D]. A row without a marked token gives NaN (mean, exp_decay), -inf (max) or the state of some other token
        (last, first): the data module refuses such samples, so that there are none here.

    Raises:
        InvalidInputError: If there is no such pooling.
    """
    if name in ("last", "first"):
        order = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        position = (mask * (order if name == "last" else order.flip(0))).argmax(dim=1)
        return states[torch.arange(len(states), device=states.device), position].float()
    if name == "max":
        return states.float().masked_fill(~mask[:, :, None], -torch.inf).amax(dim=1)
    weights = mask.float() if name == "mean" else _decay(mask, half_life_of(name))
    return torch.einsum("bl,bld->bd", weights / weights.sum(dim=1, keepdim=True), states.float())


def _decay(mask: Bool[Tensor, "b l"], half_life: float) -> Float[Tensor, "b l"]:
    n = mask.sum(dim=1, keepdim=True)
    from_the_end = n - mask.cumsum(dim=1)  # 0 for the last marked token
    return torch.where(mask, torch.exp(-math.log(2) * from_the_end / (half_life * n)), 0.0)
