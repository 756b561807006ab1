"""Names of poolings, as they stand in names of activations; what they do is in lit_modules/extraction/pooling.py."""

import math
import re

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
