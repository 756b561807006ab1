"""The weight that a linear pooling gives to each token, counted from the end."""

import math

import numpy as np

from exactivations.store.errors import InvalidInputError
from exactivations.store.moments import FloatArray
from exactivations.store.pooling_names import TOKENS, half_life_of, position_of, refuse_short


def position_weights(pooling: str, n: int) -> FloatArray:
    """Returns float64 [n], the weights with which a pooling adds the states of n tokens that count; the last token's comes first.

    Raises:
        InvalidInputError: If the pooling is not linear, or takes a token that n tokens do not have.
    """
    weights = np.zeros(n)
    if pooling == "mean":
        weights[:] = 1 / n
    elif (position := position_of(pooling)) is not None:
        refuse_short([pooling], np.array([n]), np.array([n]), "a sample of length")
        weights[-1 - position] = 1
    elif pooling in ("max", TOKENS):
        raise InvalidInputError(f"pooling {pooling} is not a weighted sum of tokens: it cannot be centred by position")
    else:
        weights = np.exp(-math.log(2) * np.arange(n) / (half_life_of(pooling) * n))
        weights /= weights.sum()
    return weights
