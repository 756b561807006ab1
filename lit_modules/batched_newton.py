"""Newton's method for many smooth convex problems at once, where their Hessians are small enough to be made."""

from collections.abc import Callable

import torch
from jaxtyping import Float64
from torch import Tensor

from exactivations.lit_modules.batched_lbfgs import Evaluate, Minimum, line_search

JITTER = 1e-6  # of the mean diagonal: a softmax's biases have a direction without curvature, which rounding can turn downhill

Hessians = Callable[[Tensor, Tensor], Tensor]
"""(parameters [A, D], which problems these are [A]) -> Hessians [A, D, D]."""


@torch.no_grad()
def minimise_by_newton(
    evaluate: Evaluate,
    hessians: Hessians,
    start: Float64[Tensor, "p d"],
    is_done: Callable[[Tensor, Tensor, Tensor], Tensor],
    most_iterations: int,
) -> Minimum:
    """Minimises P problems from `start` by Newton's method with backtracking; arguments as in `batched_lbfgs.minimise`."""
    parameters = start.clone()
    active = torch.arange(len(start), device=start.device)
    value, gradient = evaluate(parameters, active)
    norms = gradient.norm(dim=1)
    converged = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    iterations = torch.zeros(len(start), dtype=torch.int64, device=start.device)
    here = parameters.clone()
    for step in range(most_iterations + 1):
        done = is_done(here, gradient, active)
        parameters[active], norms[active] = here, gradient.norm(dim=1)
        converged[active[done]] = True
        active, here, value, gradient = active[~done], here[~done], value[~done], gradient[~done]
        if step == most_iterations or not len(active):
            break
        iterations[active] += 1
        direction = -_solve(hessians(here, active), gradient)
        here, value, gradient, stuck = line_search(evaluate, here, value, gradient, direction, active, False)
        parameters[active], norms[active] = here, gradient.norm(dim=1)
        active, here, value, gradient = active[~stuck], here[~stuck], value[~stuck], gradient[~stuck]
    return Minimum(parameters, norms, converged, iterations)


def _solve(hessians: Tensor, gradient: Tensor) -> Tensor:
    diagonal = hessians.diagonal(dim1=1, dim2=2)
    diagonal += JITTER * diagonal.mean(dim=1, keepdim=True)
    factor, failed = torch.linalg.cholesky_ex(hessians)
    solved = torch.cholesky_solve(gradient[..., None], factor)[..., 0]
    return torch.where((failed > 0)[:, None] | ~torch.isfinite(solved).all(dim=1, keepdim=True), gradient, solved)
