"""L-BFGS for many smooth convex problems at once: each has its own history, step and end, all share their evaluations."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

MEMORY = 20  # pairs of steps and gradient changes that are kept
SUFFICIENT = 1e-4  # share of the promised decrease that a step must bring (Armijo)
MOST_HALVINGS = 40

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(parameters [A, D], which problems these are [A]) -> (values [A], gradients [A, D])."""


@dataclass(frozen=True)
class Minimum:
    """Where the problems ended.

    Attributes:
        parameters: float64 [P, D].
        gradient_norm: float64 [P], Euclidean norm of the gradient there.
        converged: bool [P].
        n_iterations: int64 [P].
    """

    parameters: Float64[Tensor, "p d"]
    gradient_norm: Float64[Tensor, " p"]
    converged: Tensor
    n_iterations: Tensor


@torch.no_grad()
def minimise(
    evaluate: Evaluate, start: Float64[Tensor, "p d"], is_done: Callable[[Tensor, Tensor, Tensor], Tensor], most_iterations: int
) -> Minimum:
    """Minimises P problems from `start` by L-BFGS with backtracking (Liu and Nocedal 1989).

    A problem that is done is no longer evaluated.

    Args:
        evaluate: Values and gradients of some of the problems.
        start: Parameters to begin with.
        is_done: (parameters [A, D], gradients [A, D], problems [A]) -> bool [A].
        most_iterations: After so many steps a problem is given up, and said not to have converged.
    """
    parameters = start.clone()
    n = len(parameters)
    active = torch.arange(n, device=start.device)
    value, gradient = evaluate(parameters, active)
    norms = gradient.norm(dim=1)
    converged = torch.zeros(n, dtype=torch.bool, device=start.device)
    iterations = torch.zeros(n, dtype=torch.int64, device=start.device)
    here, history = parameters.clone(), _History(start)
    for step in range(most_iterations + 1):
        done = is_done(here, gradient, active)
        parameters[active], norms[active] = here, gradient.norm(dim=1)
        converged[active[done]] = True
        if step == most_iterations or done.all():
            break
        keep = ~done
        active, here, value, gradient = active[keep], here[keep], value[keep], gradient[keep]
        history.keep(keep)
        iterations[active] += 1
        direction = history.direction(gradient)
        moved, new_value, new_gradient, stuck = line_search(evaluate, here, value, gradient, direction, active, step == 0)
        history.add(moved - here, new_gradient - gradient)
        here, value, gradient = moved, new_value, new_gradient
        if stuck.any():  # no smaller value can be told from rounding
            parameters[active[stuck]], norms[active[stuck]] = here[stuck], gradient[stuck].norm(dim=1)
            keep = ~stuck
            active, here, value, gradient = active[keep], here[keep], value[keep], gradient[keep]
            history.keep(keep)
            if not len(active):
                break
    return Minimum(parameters, norms, converged, iterations)


class _History:
    """The last steps and gradient changes of every problem, [A, m, D], the oldest first."""

    def __init__(self, like: Tensor) -> None:
        self.steps = self.changes = like[:, None, :][:, :0]

    def keep(self, which: Tensor) -> None:
        self.steps, self.changes = self.steps[which], self.changes[which]

    def add(self, step: Tensor, change: Tensor) -> None:
        useful = ((step * change).sum(dim=1) > 0)[:, None]  # where rounding ate the curvature, the pair says nothing
        self.steps = torch.cat([self.steps, torch.where(useful, step, 0.0)[:, None]], dim=1)[:, -MEMORY:]
        self.changes = torch.cat([self.changes, torch.where(useful, change, 0.0)[:, None]], dim=1)[:, -MEMORY:]

    def direction(self, gradient: Tensor) -> Tensor:
        """Returns minus the inverse Hessian's estimate times the gradient, in compact form (Byrd, Nocedal and Schnabel 1994)."""
        s, y = self.steps, self.changes
        if not s.shape[1]:
            return -gradient
        products = s @ y.mT  # [A, m, m]
        curvature = products.diagonal(dim1=1, dim2=2)
        empty = curvature <= 0
        # An empty pair is a row of zeros: one on the diagonal keeps the triangle solvable, and it adds nothing.
        triangle = products.triu() + torch.diag_embed(empty.to(products.dtype))
        last = ((s[:, -1] * y[:, -1]).sum(dim=1) / (y[:, -1] ** 2).sum(dim=1).clamp(min=1e-300)).clamp(min=0)
        scale = torch.where(last > 0, last, 1.0)[:, None, None]
        along_s, along_y = s @ gradient[..., None], y @ gradient[..., None]  # [A, m, 1]
        solved = torch.linalg.solve_triangular(triangle, along_s, upper=True)
        inner = curvature.clamp(min=0)[..., None] * solved + scale * (y @ (y.mT @ solved)) - scale * along_y
        first = torch.linalg.solve_triangular(triangle.mT, inner, upper=False)
        ascent: Tensor = (scale * gradient[..., None] + s.mT @ first - scale * (y.mT @ solved))[..., 0]
        return -ascent


def line_search(
    evaluate: Evaluate, here: Tensor, value: Tensor, gradient: Tensor, direction: Tensor, active: Tensor, is_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Halves each problem's step until its value falls enough.

    Returns:
        Parameters, values and gradients there, and who got stuck, bool [A]: no smaller value can be told from rounding.
    """
    slope = (gradient * direction).sum(dim=1)
    uphill = slope >= 0
    direction = torch.where(uphill[:, None], -gradient, direction)
    slope = torch.where(uphill, -(gradient * gradient).sum(dim=1), slope)
    length = torch.ones_like(value)
    if is_first:
        length = (1 / direction.norm(dim=1).clamp(min=1e-300)).clamp(max=1.0)
    moved, new_value, new_gradient = here.clone(), value.clone(), gradient.clone()
    left = torch.arange(len(here), device=here.device)
    for _ in range(MOST_HALVINGS):
        trial = here[left] + length[left, None] * direction[left]
        trial_value, trial_gradient = evaluate(trial, active[left])
        # Near the minimum the decrease drowns in rounding; there a smaller gradient counts.
        enough = trial_value <= value[left] + SUFFICIENT * length[left] * slope[left]
        flat = (trial_value - value[left]).abs() <= 1e-14 * value[left].abs().clamp(min=1e-300)
        enough |= flat & (trial_gradient.norm(dim=1) < gradient[left].norm(dim=1))
        took = left[enough]
        moved[took], new_value[took], new_gradient[took] = trial[enough], trial_value[enough], trial_gradient[enough]
        left = left[~enough]
        if not len(left):
            break
        length[left] *= 0.5
    stuck = torch.zeros(len(here), dtype=torch.bool, device=here.device)
    stuck[left] = True
    return moved, new_value, new_gradient, stuck
