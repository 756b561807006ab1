"""Rates of what completions show, whose intervals and tests take prompts, and not rollouts, for independent.

Rollouts of one prompt resemble each other: five of one prompt say less than one of each of five. What takes them for independent
(Wilson's interval, Fisher's test) calls chance a finding: the more rollouts, the oftener.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, bootstrap

CONFIDENCE = 0.95
MIN_PROMPTS = 10
"""So many prompts must show it, and so many lack it, in some rollout, for resamples of prompts to mean anything. Of a behaviour
that one or two of 200 prompts show, 17 to 35 % of bootstrap intervals missed the rate in simulations; where none shows it, all
do."""
N_RESAMPLES = 2000
_BLOCK = 1 << 22
"""Draws at a time, of a prompt in a resample."""

Interval = Literal["wilson", "bootstrap over prompts", "wilson over prompts"]
Shown = Mapping[int, Mapping[int, bool]]
"""By prompt and number of the rollout: whether this completion shows it."""


@dataclass(frozen=True)
class Comparison:
    """A rate held against that of the same prompts in another condition.

    Attributes:
        prompts_up: Prompts of which more rollouts show it than in the other condition.
        prompts_down: Prompts of which fewer do.
        p_value: Exact sign test over these (two-sided).
    """

    prompts_up: int
    prompts_down: int
    p_value: float


def compared(shown: Shown, reference: Shown) -> Comparison:
    """Compares prompt by prompt, in the rollouts that came in both conditions.

    Were the conditions one, a prompt would as likely go up as down, however much its rollouts resemble each other. That needs
    equally many rollouts on both sides (with more of them it is likelier that one shows it), hence those only that came in both.
    """
    up = down = 0
    for prompt, rollouts in shown.items():
        others = reference.get(prompt, {})
        both = rollouts.keys() & others.keys()
        difference = sum(rollouts[rollout] - others[rollout] for rollout in both)
        up, down = up + (difference > 0), down + (difference < 0)
    return Comparison(up, down, float(binomtest(up, up + down).pvalue) if up + down else 1.0)


def interval_of(shown: Sequence[int], came: Sequence[int]) -> tuple[float, float, Interval]:
    """Returns the 95% interval of the rate sum(shown) / sum(came), and which one it is.

    With one rollout of each prompt it is Wilson's. With several it is the bootstrap's (BCa: Efron 1987) that resamples prompts, or,
    where fewer than MIN_PROMPTS show it or lack it, Wilson's with as many completions as there are prompts: as if all rollouts of a
    prompt were one, which is the widest. In simulations (40 and 200 prompts of 5 rollouts, rates of 0.2 to 50 %, correlations of
    0.05 and 0.5 within a prompt) 93 to 100 % of these intervals held the rate, and of Wilson's over completions 70 to 97 %.

    Args:
        shown: By prompt, in an order that does not depend on chance: completions that show it.
        came: By prompt: its completions, at least one.
    """
    counts, totals = np.asarray(shown, dtype=np.float64), np.asarray(came, dtype=np.float64)
    if totals.max() == 1:
        return *_wilson(counts.sum(), totals.sum()), "wilson"
    if min((counts > 0).sum(), (counts < totals).sum()) >= MIN_PROMPTS and len(set(zip(shown, came, strict=True))) > 1:
        found = bootstrap(
            (counts, totals), _rate, paired=True, vectorized=True, method="BCa", confidence_level=CONFIDENCE,
            n_resamples=N_RESAMPLES, batch=max(1, _BLOCK // len(counts)), random_state=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
        if np.isfinite([found.low, found.high]).all():
            return float(found.low), float(found.high), "bootstrap over prompts"
    return *_wilson(counts.sum() / totals.sum() * len(counts), len(counts)), "wilson over prompts"


def _rate(shown: npt.NDArray[np.float64], came: npt.NDArray[np.float64], axis: int = -1) -> npt.NDArray[np.float64]:
    rates: npt.NDArray[np.float64] = shown.sum(axis) / came.sum(axis)
    return rates


def _wilson(count: float, total: float) -> tuple[float, float]:
    """Wilson's interval (1927), also of a count that is no whole number."""
    z, rate = 1.959963984540054, count / total
    centre, half = rate + z * z / (2 * total), z * (rate * (1 - rate) / total + z * z / (4 * total * total)) ** 0.5
    low, high = (float(bound) / (1 + z * z / total) for bound in (centre - half, centre + half))
    return max(0.0, min(low, float(rate))), min(1.0, max(high, float(rate)))  # at a rate of 0 or 1 but for rounding
