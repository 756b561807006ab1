"""The causal importance of components: how little of each may be taken away, predicted from its inner activation."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from exactivations.store.errors import InvalidInputError

LEAK = 0.01
"""The slope of the leaky hard sigmoids where the hard sigmoid is flat (arXiv 2506.20790, appendix)."""


def hard_sigmoid(x: Float[Tensor, "*leading c"]) -> Float[Tensor, "*leading c"]:
    """Returns x clipped to [0, 1]: causal importances proper, as they are read and stored."""
    return x.clamp(0, 1)


def lower_leaky_hard_sigmoid(x: Float[Tensor, "*leading c"]) -> Float[Tensor, "*leading c"]:
    """Returns x clipped to at most 1, and 0.01 x where x is below 0: what masks are made of in training a decomposition.

    A component that does not matter may be turned a little negative, so a mask below 0 does no harm, and keeps the gradient alive.
    """
    return torch.where(x < 0, LEAK * x, x.clamp(max=1))


def upper_leaky_hard_sigmoid(x: Float[Tensor, "*leading c"]) -> Float[Tensor, "*leading c"]:
    """Returns x clipped to at least 0, and 1 + 0.01 (x - 1) where x is above 1: what importance minimality penalises."""
    return torch.where(x > 1, 1 + LEAK * (x - 1), x.clamp(min=0))


def hard_sigmoid_with_lower_leaky_gradient(x: Float[Tensor, "*leading c"]) -> Float[Tensor, "*leading c"]:
    """Returns x clipped to [0, 1]; at or below 0, a gradient that would raise it passes by 0.01. One prompt's masks are made of it.

    Unlike `lower_leaky_hard_sigmoid` it leaks in the gradient only: a value that is optimised by itself may go far below 0, and
    would else stand in the masks with a sign of its own.
    """
    clipped: Tensor = _LowerLeakyGradient.apply(x)  # type: ignore[no-untyped-call]  # torch has no annotation there
    return clipped


class CausalImportanceFunction(nn.Module):
    """One small MLP for each component of each map: from its inner activation to its causal importance before the sigmoid.

    With h the inner activation (x @ V) of a component: w_out . gelu(w_in h + b_in) + b_out, with H hidden units of its own.

    Args:
        n_components: C by the path of each map.
        n_hidden: H.
        seed: Of the start: Kaiming's normal distribution, biases 0.

    Raises:
        InvalidInputError: If there is no map, or a number is below 1.

    Source: arXiv 2506.20790, "Architecture of Causal Importance Function MLPs" (H = 16).
    """

    def __init__(self, n_components: Mapping[str, int], n_hidden: int = 16, *, seed: int = 0) -> None:
        super().__init__()
        if not n_components or min(n_components.values()) < 1 or n_hidden < 1:
            raise InvalidInputError(
                f"a causal-importance function needs at least one map, one component of each, and one hidden unit; got "
                f"{dict(n_components)} and {n_hidden} hidden units"
            )
        self.n_components, self.n_hidden = dict(n_components), n_hidden
        generator = torch.Generator().manual_seed(seed)
        self._of_maps = nn.ModuleList(_OneMap(c, n_hidden, generator) for c in self.n_components.values())

    @property
    def of_maps(self) -> dict[str, nn.Module]:
        """The MLPs by path of the map: weight_in, bias_in and weight_out [C, H], bias_out [C]."""
        return dict(zip(self.n_components, self._of_maps, strict=True))

    def forward(self, inner: Mapping[str, Float[Tensor, "*leading c"]]) -> dict[str, Float[Tensor, "*leading c"]]:
        """Returns what the sigmoids are then applied to, by map.

        Args:
            inner: The inner activations, of all maps.

        Raises:
            InvalidInputError: If they are of other maps, or of another number of components.
        """
        found = {path: activations.shape[-1] for path, activations in inner.items()}
        if found != self.n_components:
            raise InvalidInputError(
                f"the causal-importance function is of the maps (components) {self.n_components}, the inner activations of {found}"
            )
        return {path: of_map(inner[path]) for path, of_map in self.of_maps.items()}


class _OneMap(nn.Module):
    def __init__(self, c: int, h: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight_in = nn.Parameter(math.sqrt(2) * torch.randn(c, h, generator=generator))
        self.bias_in = nn.Parameter(torch.zeros(c, h))
        self.weight_out = nn.Parameter(torch.randn(c, h, generator=generator) / math.sqrt(h))
        self.bias_out = nn.Parameter(torch.zeros(c))

    def forward(self, inner: Float[Tensor, "*leading c"]) -> Float[Tensor, "*leading c"]:
        hidden = functional.gelu(torch.addcmul(self.bias_in, inner[..., None], self.weight_in))
        # Half the time of einsum, which makes of this a matrix product for each component.
        return (hidden * self.weight_out).sum(-1) + self.bias_out


class _LowerLeakyGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return hard_sigmoid(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        return torch.where(x <= 0, LEAK * gradient.clamp(max=0), torch.where(x <= 1, gradient, 0))
