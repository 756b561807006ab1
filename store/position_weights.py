"""The weight that a linear pooling gives to each token, counted from the end."""

import math

import numpy as np

from exactivations.store.errors import InvalidInputError
from exactivations.store.moments import FloatArray
from exactivations.store.pooling_names import TOKENS, half_life_of


def position_weights(pooling: str, n: int) -> FloatArray:
    """Returns float64 [n], the weights with which a pooling adds the states of n tokens that count; the last token's comes first.

    Raises:
        InvalidInputError: If the pooling is not linear.
    """
    weights = np.zeros(n)
    if pooling == "mean":
        weights[:] = 1 / n
    elif pooling == "last":
        weights[0] = 1
    elif pooling == "first":
        weights[-1] = 1
    elif pooling in ("max", TOKENS):
        raise InvalidInputError(f"pooling {pooling} is not a weighted sum of tokens: it cannot be centred by position")
    else:
        weights = np.exp(-math.log(2) * np.arange(n) / (half_life_of(pooling) * n))
        weights /= weights.sum()
    return weights
