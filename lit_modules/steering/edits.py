"""What is done to the states at a hook point: a vector added, directions projected out, or a vector put in their place."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from exactivations.lit_modules.steering.steered_positions import Positions, check_positions
from exactivations.store.errors import InvalidInputError, shown

DEPENDENT = 1e-5  # of directions of length 1, the least singular value over the largest: below it float32 does not tell them apart


class Edit(ABC):
    """A change of the states at one hook point, at some positions; see `steering`.

    Attributes:
        hook_point: Where: `resid_post.2`, `attn_out.2`, `mlp_out.2`, `embed`, `final_norm` or `module:<path>`, as in extraction.
        positions: Which tokens; see `Positions`.
    """

    hook_point: str
    positions: Positions

    @property
    @abstractmethod
    def width(self) -> int:
        """D, of the states that it fits."""

    @abstractmethod
    def constant(self, dtype: torch.dtype) -> Tensor:
        """Returns what `changed` needs of the vectors, a copy on the host in this dtype."""

    @abstractmethod
    def changed(self, states: Tensor, constant: Tensor) -> Tensor:
        """Returns new states [B, L, D], each made of the old one at its place alone; the old ones stay as they are."""


@dataclass(frozen=True, eq=False)
class Add(Edit):
    """Adds coefficient x vector to each state.

    Attributes:
        hook_point: See `Edit`.
        vector: [D], any floating dtype and device.
        coefficient: How much of it; of a vector of length 1, how far. 0 changes nothing, for a baseline.
        positions: See `Positions`.

    Raises:
        InvalidInputError: If the vector is of another shape, not finite or zero, or the coefficient is not finite.
    """

    hook_point: str
    vector: Tensor
    coefficient: float = 1.0
    positions: Positions = "all"

    def __post_init__(self) -> None:
        title = f"Add at {self.hook_point}: vector"
        _check(title, self.vector, (1,))
        _refuse_zero(title, self.vector[None])
        if (
            isinstance(self.coefficient, bool)
            or not isinstance(self.coefficient, int | float)
            or not math.isfinite(self.coefficient)
        ):
            raise InvalidInputError(
                f"Add at {self.hook_point}: coefficient must be a finite number, got {shown(self.coefficient)}; turn a tensor into "
                "one with float(…)"
            )
        check_positions(self.positions)

    @property
    def width(self) -> int:
        """D."""
        return self.vector.shape[0]

    def constant(self, dtype: torch.dtype) -> Tensor:
        """Returns coefficient x vector [D]."""
        return self.coefficient * _copied(self.vector, dtype)

    def changed(self, states: Tensor, constant: Tensor) -> Tensor:
        """Returns states + coefficient x vector."""
        return states + constant


@dataclass(frozen=True, eq=False)
class Ablate(Edit):
    """Projects directions out: each state becomes the nearest one that has no part along any of them.

    Attributes:
        hook_point: See `Edit`.
        directions: [D], or [k, D] for the subspace that they span; their lengths do not matter.
        positions: See `Positions`.

    Raises:
        InvalidInputError: If the directions are of another shape, not finite, zero, or linearly dependent.
    """

    hook_point: str
    directions: Tensor
    positions: Positions = "all"

    def __post_init__(self) -> None:
        title = f"Ablate at {self.hook_point}: directions"
        _check(title, self.directions, (1, 2))
        units = _refuse_zero(title, self.directions.reshape(-1, self.width))
        singular = torch.linalg.svdvals(units)
        if len(units) > self.width or float(singular[-1]) <= DEPENDENT * float(singular[0]):
            raise InvalidInputError(
                f"{title} must be linearly independent, and these {len(units)} of width {self.width} are not: leave out those that "
                "others make up"
            )
        check_positions(self.positions)

    @property
    def width(self) -> int:
        """D."""
        return self.directions.shape[-1]

    def constant(self, dtype: torch.dtype) -> Tensor:
        """Returns an orthonormal basis [k, D] of the subspace, found in float64."""
        rows = _refuse_zero("directions", self.directions.reshape(-1, self.width))
        basis: Tensor = torch.linalg.qr(rows.T).Q.T.to(dtype)
        return basis.contiguous()

    def changed(self, states: Tensor, constant: Tensor) -> Tensor:
        """Returns states less their projection."""
        return states - (states @ constant.T) @ constant


@dataclass(frozen=True, eq=False)
class Replace(Edit):
    """Puts a vector in the place of each state: a mean (mean ablation), or zeros.

    Attributes:
        hook_point: See `Edit`.
        vector: [D].
        positions: See `Positions`.

    Raises:
        InvalidInputError: If the vector is of another shape, or not finite.
    """

    hook_point: str
    vector: Tensor
    positions: Positions = "all"

    def __post_init__(self) -> None:
        _check(f"Replace at {self.hook_point}: vector", self.vector, (1,))
        check_positions(self.positions)

    @property
    def width(self) -> int:
        """D."""
        return self.vector.shape[0]

    def constant(self, dtype: torch.dtype) -> Tensor:
        """Returns the vector [D]."""
        return _copied(self.vector, dtype)

    def changed(self, states: Tensor, constant: Tensor) -> Tensor:
        """Returns the vector at every position."""
        return constant.expand_as(states)


def _copied(vector: Tensor, dtype: torch.dtype) -> Tensor:
    return vector.detach().cpu().to(dtype, copy=True)


def _check(title: str, values: Tensor, dimensions: tuple[int, ...]) -> None:
    shapes = " or ".join("[D]" if n == 1 else "[k, D]" for n in dimensions)
    if not isinstance(values, Tensor) or not values.is_floating_point():
        found = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise InvalidInputError(f"{title} must be a floating tensor {shapes}, got {found}")
    if values.ndim not in dimensions or not values.numel():
        raise InvalidInputError(f"{title} must be {shapes}, got shape {list(values.shape)}")
    finite = values.detach().isfinite()
    if not finite.all():
        where = (~finite).nonzero()[0].tolist()
        raise InvalidInputError(f"{title} must be finite, and is {float(values[tuple(where)])} at {where}")


def _refuse_zero(title: str, rows: Tensor) -> Tensor:
    """Returns rows [k, D] of length 1, in float64 on the host."""
    rows = rows.detach().cpu().double()
    rows = rows / rows.abs().amax(dim=1, keepdim=True).where(rows.any(dim=1, keepdim=True), 1.0)  # so that squares cannot vanish
    lengths = rows.norm(dim=1, keepdim=True)
    if not lengths.all():
        raise InvalidInputError(f"{title} must have a direction, and row {int((lengths[:, 0] == 0).int().argmax())} is zero")
    units: Tensor = rows / lengths
    return units
