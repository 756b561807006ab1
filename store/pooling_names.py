"""Names of poolings, as they stand in names of activations; what they do is in lit_modules/extraction/pooling.py."""

import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from exactivations.store.errors import InvalidInputError

TOKENS = "tokens"
"""The pooling that pools nothing: one row per token."""

POOLINGS = ("last", "first", "mean", "max", "exp_decay:<half-life>", "position:<k>")


def check_pooling(name: str) -> None:
    """Refuses a name that is no pooling.

    Raises:
        InvalidInputError: With the names that there are.
    """
    if name not in (TOKENS, "mean", "max") and position_of(name) is None:
        half_life_of(name)


def position_of(name: str) -> int | None:
    """Returns which one of the counted tokens a pooling takes, from 0, or from the end if negative; None if it takes no single one.

    `position:<k>` takes token k: `first` is `position:0`, and `last` is `position:-1`.
    """
    if name in ("last", "first"):
        return -1 if name == "last" else 0
    match = re.fullmatch(r"position:(0|-?[1-9][0-9]*)", name)  # one spelling for each: names of activations are compared
    return int(match.group(1)) if match else None


def tokens_needed(name: str) -> int:
    """Returns how many tokens a sample must count for a pooling to be defined: 3 for "position:2" and for "position:-3"."""
    position = position_of(name) or 0
    return position + 1 if position >= 0 else -position


def refuse_short(poolings: Iterable[str], n_counted: npt.NDArray[Any], numbers: npt.NDArray[Any], what: str = "sample") -> None:
    """Refuses samples of which fewer tokens count than a pooling needs.

    Args:
        poolings: What is to be taken of each sample.
        n_counted: int [n], tokens that count in each, at least 1.
        numbers: int [n], how each is called.
        what: What is called so.

    Raises:
        InvalidInputError: Naming the shortest sample, its tokens that count, and the pooling that needs most.
    """
    name = max(poolings, key=tokens_needed, default=TOKENS)
    needed = tokens_needed(name)
    if needed == 1 or not (short := n_counted < needed).any():
        return
    first = int(np.argmin(n_counted))
    raise InvalidInputError(
        f"{what} {numbers[first]} has {n_counted[first]} tokens that count, the pooling {name} needs {needed} "
        f"({int(short.sum())} of {len(n_counted)} are too short): leave them out, take a position that all have, or, if special "
        "tokens (a chat template's) are to be among the positions, count them all (--token-mask all)"
    )


def half_life_of(name: str) -> float:
    """Returns the half-life, as a fraction of the number of counted tokens, of a name like "exp_decay:0.067"."""
    match = re.fullmatch(r"exp_decay:([0-9.]+)", name)
    try:
        half_life = float(match.group(1)) if match else math.nan
    except ValueError:
        half_life = math.nan
    if not half_life > 0:
        raise InvalidInputError(
            f"pooling {name!r} is not one of {TOKENS}, {', '.join(POOLINGS)} (a half-life above 0, as in exp_decay:0.067; a whole "
            "number, as in position:-2)"
        )
    return half_life
