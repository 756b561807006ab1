"""Newton's method for many smooth convex problems at once, its equations solved by preconditioned conjugate gradients.

Each problem has its own step and end; all share the passes over the data that values, gradients and products with Hessians take.
Far from the minimum the equations are solved roughly, near it well (Eisenstat and Walker 1996, "Choosing the forcing terms in an
inexact Newton method"), and in single precision: an error of a step costs further steps, but no digits of the minimum, which is
told by gradients in double precision.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float32, Float64, Int64
from torch import Tensor

ROUGHEST, FINEST = 0.3, 1e-4  # share of the gradient that a step may leave of its equations, far from the minimum and near it
SUFFICIENT = 1e-4  # share of the promised decrease that a step must bring (Armijo)
MOST_HALVINGS = 40
LONGEST = 2.0  # times Newton's step
ROUNDING = 1e-14  # relative: values that differ by less are equal


@runtime_checkable
class Hessians(Protocol):
    """Those of A problems, each at its point."""

    def keep(self, which: Bool[Tensor, " a"]) -> "Hessians":
        """Returns those of some of the problems."""

    def at(self, state: Float32[Tensor, "a ..."]) -> "Hessians":
        """Returns those at other points, of which `Loss.evaluate` gave the state."""

    def times(self, vectors: Float32[Tensor, "a k d"]) -> Float32[Tensor, "a k d"]:
        """Returns each Hessian times its vector."""

    def precondition(self, vectors: Float32[Tensor, "a k d"]) -> Float32[Tensor, "a k d"]:
        """Returns each vector times roughly the inverse of its Hessian: something symmetric and positive definite."""

    @property
    def price(self) -> int:
        """How many products with the Hessians cost as much as a better preconditioner."""

    def improved(self) -> "Hessians":
        """Returns them with a better preconditioner."""

    def error(self, parameters: Float64[Tensor, "a k d"], gradient: Float64[Tensor, "a k d"]) -> Float64[Tensor, " a"]:
        """Returns how far each problem is from its minimum, in the measure of the tolerance."""


@runtime_checkable
class Loss(Protocol):
    """P convex functions of K x D parameters."""

    def evaluate(
        self, parameters: Float64[Tensor, "a k d"], problems: Int64[Tensor, " a"]
    ) -> tuple[Float64[Tensor, " a"], Float64[Tensor, "a k d"], Float32[Tensor, "a ..."]]:
        """Returns values and gradients of some of the problems, and what their Hessians are made of."""

    def hessians(self, state: Float32[Tensor, "p ..."]) -> Hessians:
        """Returns the Hessians of all problems at the points of which `evaluate` gave the state."""


@dataclass(frozen=True)
class Minimum:
    """Where the problems ended.

    Attributes:
        parameters: float64 [P, K, D].
        error: float64 [P], what `Hessians.error` said there.
        n_iterations: int64 [P].
    """

    parameters: Float64[Tensor, "p k d"]
    error: Float64[Tensor, " p"]
    n_iterations: Int64[Tensor, " p"]


@torch.no_grad()
def minimise(loss: Loss, start: Float64[Tensor, "p k d"], tolerance: float, most_iterations: int) -> Minimum:
    """Minimises P problems from `start`, each until its error is within `tolerance`.

    A problem that is done takes no further part. Errors above the tolerance in the result say that a problem was given up, after
    `most_iterations` steps or where rounding hides any further decrease.
    """
    parameters = start.clone()
    active = torch.arange(len(start), device=start.device)
    errors = torch.full((len(start),), torch.inf, dtype=torch.float64, device=start.device)
    iterations = torch.zeros_like(active)
    here, (value, gradient, state) = start, loss.evaluate(start, active)
    hessians = loss.hessians(state)
    before, n_products = torch.full_like(value, torch.inf), 0
    patience, length = hessians.price, torch.ones_like(value)
    for n_steps in range(most_iterations + 1):
        error = hessians.error(here, gradient)
        parameters[active], errors[active] = here, error
        left = error > tolerance
        if n_steps == most_iterations or not left.any():
            break
        if not left.all():
            active, here, value, gradient = active[left], here[left], value[left], gradient[left]
            error, before, hessians = error[left], before[left], hessians.keep(left)
        iterations[active] += 1
        # To pay as much for products as a better preconditioner costs, and then to buy it, is never far from the best.
        if n_products == patience:
            hessians, patience = hessians.improved(), 2 * patience
        norm = _norm(gradient)
        # Gradients may fall with the square of how they fell last, and need not fall below what the tolerance asks for.
        share = (0.9 * (norm / before) ** 2).clamp(min=FINEST).maximum(0.5 * tolerance / error).clamp(max=ROUGHEST)
        direction, n_products = _solve(
            hessians, -gradient / norm[:, None, None], torch.where(before.isinf(), ROUGHEST, share), patience
        )
        step = direction * (norm * length[active])[:, None, None]
        old, (here, value, gradient, state, stuck) = gradient, _line_search(loss, here, value, gradient, step, active)
        # Where curvature falls on the way, Newton's steps are too short: by as much as the slopes at the ends of the last one tell.
        slope = _dot(old, step)
        length[active] = (slope / (slope - _dot(gradient, step))).clamp(1.0, LONGEST).flatten()
        hessians = hessians.at(state)
        before = norm
        if stuck.any():
            active, here, value, gradient = active[~stuck], here[~stuck], value[~stuck], gradient[~stuck]
            before, hessians = before[~stuck], hessians.keep(~stuck)
    return Minimum(parameters, errors, iterations)


def _solve(hessians: Hessians, wanted: Tensor, share: Tensor, patience: int) -> tuple[Tensor, int]:
    """Solves Hessian x = wanted, of norm 1, until the residual's norm is below `share` or for so many products.

    Returns:
        x, which leads downhill also if unfinished, and how many products it took.
    """
    residual = wanted.float()
    solution = torch.zeros_like(residual)
    bound = share.float()[:, None, None] ** 2
    towards = hessians.precondition(residual)
    direction, progress = towards, _dot(residual, towards)
    unsolved = torch.ones_like(bound, dtype=torch.bool)
    n_products = 0
    while n_products < patience:
        product = hessians.times(direction)
        n_products += 1
        # A problem that is solved stays as it is: further steps would divide rounding by rounding.
        length = torch.where(unsolved, progress / _dot(direction, product), 0.0)
        solution.addcmul_(length, direction)
        residual.addcmul_(length, product, value=-1)
        unsolved = _dot(residual, residual) > bound
        if not unsolved.any():
            break
        towards = hessians.precondition(residual)
        progress, last = _dot(residual, towards), progress
        direction = torch.addcmul(towards, progress / last.clamp(min=1e-38), direction)
    return solution.double(), n_products


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=(1, 2), keepdim=True)


def _norm(a: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(a, dim=(1, 2))
    return norm


def _line_search(
    loss: Loss, here: Tensor, value: Tensor, gradient: Tensor, step: Tensor, active: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Halves each problem's step until its value falls enough.

    Returns:
        Parameters, values, gradients and state there; and who got stuck, bool [A]: no smaller value can be told from rounding.
    """
    slope, norm = (gradient * step).sum(dim=(1, 2)), _norm(gradient)
    moved, length = here + step, 1.0
    new_value, new_gradient, state = loss.evaluate(moved, active)
    for _ in range(MOST_HALVINGS):
        fall = new_value - value
        left = ~(fall <= SUFFICIENT * length * slope)
        if left.any():  # near the minimum the fall drowns in rounding; there a smaller gradient counts
            left &= ~((fall.abs() <= ROUNDING * value.abs()) & (_norm(new_gradient) < norm))
        if not left.any():
            break
        length *= 0.5
        moved[left] = here[left] + length * step[left]
        new_value[left], new_gradient[left], state[left] = loss.evaluate(moved[left], active[left])
    return moved, new_value, new_gradient, state, left
