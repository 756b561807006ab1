"""ComponentLinear: one linear map of a model, written as a sum of rank-one components."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from exactivations.store.errors import InvalidInputError

LinearMap = nn.Linear | Conv1D


class ComponentLinear(nn.Module):
    """A linear map x -> x @ weight + bias whose weight is the sum of V[:, c] U[c] over components c, and of what is left (delta).

    By itself it runs as the original map, to the bit. Inside `running_as` it runs as told; `ComponentModel` does the telling.

    Args:
        original: The map. Its weight and bias are kept and no longer trained.
        V: [d_in, C], what each component reads.
        U: [C, d_out], what it writes.

    Attributes:
        original: The map as it was.
        V, U: Trainable, in the original's dtype and on its device.

    Raises:
        InvalidInputError: If V and U do not fit the map or each other, or the map computes something else than x @ weight + bias,
            as some subclasses of nn.Linear do.
    """

    def __init__(self, original: LinearMap, V: Float[Tensor, "d_in c"], U: Float[Tensor, "c d_out"]) -> None:
        super().__init__()
        d_in, d_out = weight_of(original).shape
        n_components = V.shape[1] if V.ndim == 2 else 0
        if n_components < 1 or V.shape != (d_in, n_components) or U.shape != (n_components, d_out):
            raise InvalidInputError(
                f"a map of [{d_in}, {d_out}] needs V [{d_in}, C] and U [C, {d_out}] with C of at least 1, got V {list(V.shape)} "
                f"and U {list(U.shape)}"
            )
        if not is_plain(original):
            raise InvalidInputError(
                f"this {type(original).__name__} does not compute x @ weight + bias, so components of its weight are not parts of "
                "what it does; leave it out"
            )
        self.original = original.requires_grad_(False)
        self.V = nn.Parameter(V.detach().to(original.weight, copy=True))
        self.U = nn.Parameter(U.detach().to(original.weight, copy=True))
        self._instead: Callable[[Tensor], Tensor] | None = None

    @property
    def n_components(self) -> int:
        """C."""
        return self.V.shape[1]

    @property
    def weight(self) -> Float[Tensor, "d_in d_out"]:
        """The original weight, a view; for nn.Linear it is the transpose of what that keeps."""
        return weight_of(self.original)

    @property
    def bias(self) -> Float[Tensor, " d_out"] | None:
        """The original bias."""
        return self.original.bias

    def delta(self) -> Float[Tensor, "d_in d_out"]:
        """Returns what the components lack: weight - V @ U, with gradients to both."""
        return self.weight - self.V @ self.U

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """Runs the original map, or what `running_as` put in its place."""
        out: Tensor = self.original(x) if self._instead is None else self._instead(x)
        return out

    def masked(
        self, x: Float[Tensor, "... d_in"], mask: Float[Tensor, "... c"], delta_mask: Float[Tensor, "..."] | None = None
    ) -> Float[Tensor, "... d_out"]:
        """Returns the sum of the components, each times its mask, and of delta times its own, if that is given; and the bias.

        Args:
            x: What the map reads.
            mask: One number for each component, at each place of x or broadcast over places.
            delta_mask: One number for each place, or broadcast over places.
        """
        out = self.outward((x @ self.V) * mask)
        return out if delta_mask is None else out + delta_mask[..., None] * (x @ self.delta())

    def outward(self, inner: Float[Tensor, "... c"]) -> Float[Tensor, "... d_out"]:
        """Returns what components write that read off so much, and the bias."""
        return functional.linear(inner, self.U.T, self.bias)

    @contextmanager
    def running_as(self, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Puts another forward pass in the place of the map's own inside the `with` block."""
        before, self._instead = self._instead, forward
        try:
            yield
        finally:
            self._instead = before


def weight_of(linear: LinearMap) -> Float[Tensor, "d_in d_out"]:
    """Returns the weight W of a map x -> x @ W, a view: nn.Linear keeps its transpose, transformers' Conv1D keeps W."""
    return linear.weight.T if isinstance(linear, nn.Linear) else linear.weight


@torch.no_grad()
def is_plain(linear: LinearMap) -> bool:
    """Whether a map computes x @ weight + bias, up to rounding, for one random x: subclasses may scale, normalise or quantise."""
    weight = weight_of(linear)
    x = torch.randn(1, weight.shape[0], generator=torch.Generator().manual_seed(0)).to(weight)
    found, expected = linear(x).double(), functional.linear(x, weight.T, linear.bias).double()
    return bool((found - expected).norm() <= torch.finfo(weight.dtype).eps ** 0.5 * expected.norm())


def singular_components(weight: Float[Tensor, "d_in d_out"], n_components: int | None = None) -> tuple[Tensor, Tensor]:
    """Returns V [d_in, C] and U [C, d_out] of a weight's largest singular values, which U carries.

    Computed in float64, whatever the weight's dtype, so that all min(d_in, d_out) of them give the weight back to its last digits.

    Raises:
        InvalidInputError: If there are fewer than n_components.
    """
    most = min(weight.shape)
    if n_components is not None and not 1 <= n_components <= most:
        raise InvalidInputError(
            f"a map of {list(weight.shape)} has 1 to {most} singular components, {n_components} were asked for: ask for fewer, or "
            "for all (None)"
        )
    left, values, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    kept = slice(n_components)
    return left[:, kept].to(weight.dtype), (values[:, None] * right)[kept].to(weight.dtype)
