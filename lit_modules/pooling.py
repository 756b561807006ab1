"""Poolings: from the states of all tokens of a sample to one vector.

Every pooling counts only the tokens that the mask marks, computes in float32, and looks at each row by itself.
"""

import math
import re

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from exactivations.store.errors import InvalidInputError

TOKENS = "tokens"
"""The pooling that pools nothing: one row per token."""

POOLINGS = ("last", "first", "mean", "max", "exp_decay:<half-life>")


def check_pooling(name: str) -> None:
    """Refuses a name that is no pooling.

    Raises:
        InvalidInputError: With the names that there are.
    """
    if name not in (TOKENS, "last", "first", "mean", "max"):
        half_life_of(name)


def half_life_of(name: str) -> float:
    """Returns the half-life, as a fraction of the number of counted tokens, of a name like "exp_decay:0.067"."""
    match = re.fullmatch(r"exp_decay:([0-9.]+)", name)
    try:
        half_life = float(match.group(1)) if match else math.nan
    except ValueError:
        half_life = math.nan
    if not half_life > 0:
        raise InvalidInputError(
            f"pooling {name!r} is not one of {TOKENS}, {', '.join(POOLINGS)} (a half-life above 0, as in exp_decay:0.067)"
        )
    return half_life


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
