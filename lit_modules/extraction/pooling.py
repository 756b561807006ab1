"""Poolings: from the states of all tokens of a sample to one vector.

Every pooling counts only the tokens that the mask marks, computes in float32, and looks at each row by itself.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from exactivations.store.batches import padded, to_device
from exactivations.store.pooling_names import half_life_of, position_of, refuse_short


class Pooling:
    """One pooling of the rows of several batches, prepared from their masks once for all hook points and batches.

    - `last`, `first`: the state of the last or first marked token.
    - `position:k`: that of marked token k, counted from 0, or from the end if k is negative.
    - `mean`, `max`: over the marked tokens.
    - `exp_decay:f`: weights proportional to exp(-ln 2 * i / (f * n)), i = 0 for the last of the n marked tokens.

    A row without a marked token gives NaN (mean, exp_decay), -inf (max) or the state of its first token (last, first): the data
    module refuses such samples, so that there are none here. A row with fewer marked tokens than `position:k` needs is refused.

    Args:
        name: Of the pooling.
        token_mask: bool [T] on the host, which tokens of all rows are marked, one row after the other.
        n_tokens: int64 [B] on the host, at least 1.
        device: Where the states are. What is copied there is copied without waiting for it.

    Raises:
        InvalidInputError: If there is no such pooling, or a row has no token at the position that it takes.
    """

    def __init__(self, name: str, token_mask: Bool[Tensor, " t"], n_tokens: Int64[Tensor, " b"], device: torch.device) -> None:
        self._takes_one = position_of(name) is not None
        self._name = name
        marked, lengths = token_mask.numpy(), n_tokens.numpy()
        start = np.cumsum(lengths) - lengths
        if name in ("last", "first"):
            # of unmarked tokens a place that neither the largest nor the smallest can be
            place = np.arange(len(marked)) - np.repeat(start, lengths)
            ends = (
                np.maximum.reduceat(np.where(marked, place, 0), start)
                if name == "last"
                else np.minimum.reduceat(np.where(marked, place, len(marked)), start) % len(marked)
            )
            self._of_row = to_device(torch.from_numpy(ends), device)
        elif self._takes_one:
            self._of_row = to_device(torch.from_numpy(_places(name, marked, start, lengths)), device)
        elif name == "max":
            self._of_token = to_device(token_mask, device)
        else:
            self._of_token = to_device(torch.from_numpy(_weights(name, marked, start, lengths)), device)

    def __call__(
        self, states: Float[Tensor, "b l d"], row: int, token: int, real: Int64[Tensor, " t"] | None = None
    ) -> Float[Tensor, "b d"]:
        """Pools the states of a batch over marked tokens, in float32.

        Args:
            states: On the device.
            row: Number of the batch's first row.
            token: Number of its first token.
            real: Its `real_positions` on the device, if it is padded.
        """
        n_rows, width = states.shape[:2]
        if self._takes_one:
            return states[torch.arange(n_rows, device=states.device), self._of_row[row : row + n_rows]].float()
        n_real = n_rows * width if real is None else len(real)
        of_token = padded(self._of_token[token : token + n_real], n_rows, width, real)
        if self._name == "max":
            return states.float().masked_fill(~of_token[:, :, None], -torch.inf).amax(dim=1)
        return torch.bmm(of_token[:, None], states.float())[:, 0]


def pool(states: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"], name: str) -> Float[Tensor, "b d"]:
    """Pools the states of each row over the tokens that its mask marks; see `Pooling`."""
    rows, length = mask.shape
    return Pooling(name, mask.flatten().cpu(), torch.full((rows,), length), states.device)(states, 0, 0)


def _places(name: str, marked: npt.NDArray[np.bool_], start: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Returns the place in its row of the one marked token that a pooling takes of each."""
    position = position_of(name)
    assert position is not None
    of_marked = np.flatnonzero(marked)
    first = np.searchsorted(of_marked, start)  # the number of each row's first marked token, over all rows
    n = np.searchsorted(of_marked, start + lengths) - first
    refuse_short([name], n, np.arange(len(n)), "row")
    places: npt.NDArray[np.int64] = of_marked[first + (position if position >= 0 else n + position)] - start
    return places


def _weights(
    name: str, marked: npt.NDArray[np.bool_], start: npt.NDArray[Any], lengths: npt.NDArray[Any]
) -> npt.NDArray[np.float32]:
    """Returns the weight of each token in its row: they sum to 1, or are NaN where none is marked."""
    until = np.cumsum(marked)  # marked tokens up to here, over all rows
    before = until[start] - marked[start]
    n = np.repeat(until[start + lengths - 1] - before, lengths)
    if name == "mean":
        weights = marked.astype(np.float64)
    else:
        from_the_end = n - (until - np.repeat(before, lengths))  # 0 for the last marked token
        weights = np.where(marked, np.exp(-math.log(2) * from_the_end / (half_life_of(name) * np.maximum(n, 1))), 0.0)
    with np.errstate(invalid="ignore"):
        shares: npt.NDArray[np.float32] = (weights / np.repeat(np.add.reduceat(weights, start), lengths)).astype(np.float32)
    return shares
