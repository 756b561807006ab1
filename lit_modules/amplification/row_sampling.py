"""Sampling by row: which token a row gets depends on its own logits, seed and step, and on nothing else in its batch.

A token is drawn as argmax(logits / temperature + Gumbel noise), which is a draw from softmax(logits / temperature) (Gumbel 1954;
Maddison, Tarlow and Minka 2014, "A* Sampling"). The noise is no state of a generator that others advance too, but a function of
(seed, step, token id), computed on the device where the logits are: SplitMix64 (Steele, Lea and Flood 2014, "Fast Splittable
Pseudorandom Number Generators"), one stream for each (seed, step), in it one number for each token id. So it is the same for any
batch, any order of rows, any device and any padding of the vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from torch.nn import functional

from exactivations.store.errors import InvalidInputError

MIN_TEMPERATURE = 1e-6
"""Below it, but for 0, logits divided by the temperature would leave the range in which they can be told apart."""


@dataclass(frozen=True)
class RowSampling:
    """How each of B rows is sampled. Lives on the host.

    Attributes:
        temperature: float64 [B]; 0 is greedy.
        top_p: float64 [B], in (0, 1]: only the smallest set of tokens whose probabilities sum to at least so much is drawn from.
        seed: int64 [B], not negative.

    Raises:
        InvalidInputError: Naming the row whose value is out of range.
    """

    temperature: Float64[Tensor, " b"]
    top_p: Float64[Tensor, " b"]
    seed: Int64[Tensor, " b"]

    def __post_init__(self) -> None:
        warm = (self.temperature >= MIN_TEMPERATURE) & (self.temperature < math.inf)
        _require(warm | (self.temperature == 0), self.temperature, f"temperature must be 0 (greedy) or at least {MIN_TEMPERATURE}")
        _require((self.top_p > 0) & (self.top_p <= 1), self.top_p, "top_p must be above 0 and at most 1")
        _require(self.seed >= 0, self.seed, "seed must not be negative")

    @classmethod
    def alike(cls, temperature: float, top_p: float, seed: Int64[Tensor, " b"]) -> "RowSampling":
        """Makes that of rows which differ in their seeds only."""
        same = torch.ones(len(seed), dtype=torch.float64)
        return cls(temperature * same, top_p * same, seed)

    def select(self, rows: Tensor) -> "RowSampling":
        """Returns that of some rows, given as int64 indices or a bool mask on the host."""
        return RowSampling(self.temperature[rows], self.top_p[rows], self.seed[rows])

    def distribution(self, logits: Float64[Tensor, "b v"]) -> Float64[Tensor, "b v"]:
        """Returns logits of the distribution that `draw` draws from: divided by the temperature, and -inf for what top-p drops.

        A greedy row keeps one token, the first of those with the largest logit.
        """
        temperature, top_p = self.temperature.to(logits.device), self.top_p.to(logits.device)
        is_greedy = self.temperature == 0
        scaled = logits / torch.where(temperature == 0, 1.0, temperature)[:, None]
        cut = ((self.top_p < 1) & ~is_greedy).nonzero()[:, 0].to(logits.device)
        if len(cut):
            scaled[cut] = _nucleus(scaled[cut], top_p[cut])
        if is_greedy.any():
            greedy = is_greedy.nonzero()[:, 0].to(logits.device)
            best = scaled[greedy].argmax(dim=1, keepdim=True)
            kept = torch.full_like(scaled[greedy], -math.inf).scatter(1, best, scaled[greedy].gather(1, best))
            scaled[greedy] = kept
        return scaled

    def draw(self, distribution: Float64[Tensor, "b v"], step: Int64[Tensor, " b"] | int) -> Int64[Tensor, " b"]:
        """Returns a token for each row, on the device. Waits for the device.

        Args:
            distribution: float64 [B, V], what `distribution` returns.
            step: How many tokens each row has drawn before; one number if all have drawn equally many.

        Raises:
            InvalidInputError: If a row has no token with a finite logit, or one that is NaN.
        """
        noisy = distribution
        if (self.temperature > 0).any():
            noisy = distribution + gumbel_noise(self.seed.to(distribution.device), step, distribution.shape[1])
        value, token = noisy.max(dim=1)
        broken = (~value.isfinite()).nonzero()[:, 0].tolist()
        if broken:
            raise InvalidInputError(
                f"row {broken[0]} of {len(value)} has no token to draw at step "
                f"{step if isinstance(step, int) else int(step[broken[0]])}: its largest logit is "
                f"{value[broken[0]].item()}, expected a finite one. The model overflows in its dtype (load it in "
                "bfloat16 or float32), or alpha is too large"
            )
        return token


def gumbel_noise(seed: Int64[Tensor, " b"], step: Int64[Tensor, " b"] | int, n_tokens: int) -> Float64[Tensor, "b v"]:
    """Returns standard Gumbel noise for tokens 0 to n_tokens - 1, which depends on (seed, step, token id) alone.

    It is float64, since float32 has so few numbers near 1 that the noise would end at 17, and rare tokens would tie.
    """
    ids = torch.arange(1, n_tokens + 1, device=seed.device)
    bits = mix64(combined(seed, step)[:, None] + ids * _GOLDEN)
    uniform = (_shifted(bits, 12).double() + 0.5) * 2.0**-52  # neither 0 nor 1 is among them
    return uniform.log_().neg_().log_().neg_()


def row_seed(
    run_seed: int, sample_index: Int64[Tensor, " b"], alpha: Float64[Tensor, " b"], rollout: Int64[Tensor, " b"]
) -> Int64[Tensor, " b"]:
    """Returns each row's seed, int64 [B], not negative: a function of these four values, whatever batch or rank the row is in."""
    run = torch.full_like(sample_index, run_seed)
    bits = (alpha + 0.0).view(torch.int64)  # the sum makes 0 of -0, which is the same alpha
    return _shifted(combined(combined(combined(run, sample_index), bits), rollout), 1)


def combined(state: Int64[Tensor, " b"], part: Int64[Tensor, " b"] | int) -> Int64[Tensor, " b"]:
    """Returns a number that depends on both: for equal states it differs where the parts do, and the other way round."""
    return mix64(mix64(state + _GOLDEN) ^ part)


def mix64(values: Tensor) -> Tensor:
    """Returns SplitMix64's output for these states, int64 of any shape, read as unsigned: a bijection whose bits look random."""
    values = (values ^ _shifted(values, 30)) * _FIRST
    values = (values ^ _shifted(values, 27)) * _SECOND
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, by: int) -> Tensor:
    # torch shifts the sign in from the left: it has no unsigned arithmetic.
    return (values >> by) & ((1 << (64 - by)) - 1)


def _nucleus(logits: Float64[Tensor, "b v"], top_p: Float64[Tensor, " b"]) -> Float64[Tensor, "b v"]:
    """Keeps the most probable tokens up to and with the one that reaches top_p; of equal ones, smaller ids come first."""
    ordered, ids = logits.sort(dim=1, descending=True, stable=True)
    mass_before = functional.pad(ordered.softmax(dim=1).cumsum(dim=1), (1, -1))
    dropped = torch.zeros_like(ids, dtype=torch.bool).scatter(1, ids, mass_before >= top_p[:, None])
    return logits.masked_fill(dropped, -math.inf)


def _signed(value: int) -> int:
    return value - (1 << 64)


_GOLDEN, _FIRST, _SECOND = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _require(is_right: Tensor, values: Tensor, rule: str) -> None:
    wrong = (~is_right).nonzero()[:, 0].tolist()
    if wrong:
        raise InvalidInputError(f"{rule}, got {values[wrong[0]].item()} in row {wrong[0]} of {len(values)}")
