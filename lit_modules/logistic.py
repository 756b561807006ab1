"""Logistic regression to its true optimum: every strength of regularisation, and every variant of the labels, in one solve."""

from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from torch.nn import functional

from exactivations.lit_modules.batched_lbfgs import minimise
from exactivations.store.errors import InvalidInputError

MOST_ITERATIONS = 5000
NEGLIGIBLE = 1e-10  # of the largest singular value: directions below it are rounding


@dataclass(frozen=True)
class LogisticFit:
    """Fitted weights of V variants of the labels x S strengths.

    Attributes:
        weight: float64 [V, S, K, d]; K is 1 for two classes (the logit of the second), else the number of classes.
        bias: float64 [V, S, K].
        error: float64 [V, S], a bound of the relative error of the weights: norm of the gradient over (l2 x norm of the weights).
        n_iterations: int64 [V, S].
    """

    weight: Float64[Tensor, "v s k d"]
    bias: Float64[Tensor, "v s k"]
    error: Float64[Tensor, "v s"]
    n_iterations: Int64[Tensor, "v s"]

    def logits(self, rows: Float64[Tensor, "n d"]) -> Float64[Tensor, "v s n k"]:
        """Returns the logits of rows (of two classes: of the second)."""
        return torch.einsum("nd,vskd->vsnk", rows, self.weight) + self.bias[:, :, None]

    def probabilities(self, rows: Float64[Tensor, "n d"]) -> Float64[Tensor, "v s n k"]:
        """Returns the probability of every class, also of two."""
        logits = self.logits(rows)
        if logits.shape[-1] == 1:
            positive = torch.sigmoid(logits)
            return torch.cat([1 - positive, positive], dim=-1)
        return torch.softmax(logits, dim=-1)


@torch.no_grad()
def fit_logistic(
    rows: Float64[Tensor, "n d"],
    labels: Int64[Tensor, "v n"],
    n_classes: int,
    strengths: Float64[Tensor, " s"],
    *,
    sample_weight: Float64[Tensor, " n"] | None = None,
    tolerance: float = 1e-5,
) -> LogisticFit:
    """Minimises C x (sum of the samples' cross-entropies) + half the squared norm of the weights, for each C in `strengths`.

    The objective is scikit-learn's (`LogisticRegression(C=C)`; biases are not regularised; for more than two classes softmax
    with weights for each). Rows should be standardised.

    The problems share one singular value decomposition of the rows. In its coordinates the Hessian is nearly diagonal, and the
    weights of directions that no row has are zero: so few steps of L-BFGS reach an optimum for which they need thousands
    otherwise. It ends when the gradient proves the weights to be within `tolerance` of the optimum, relatively (by strong
    convexity, the bias left aside).

    Args:
        rows: Training rows.
        labels: Class numbers, one row per variant (the true ones, shuffled ones, ...).
        n_classes: K, at least 2.
        strengths: scikit-learn's C: the larger, the less regularised.
        sample_weight: Weight of each sample's loss.
        tolerance: See above.

    Raises:
        InvalidInputError: If a variant lacks a class, rows are not finite, or an optimum was not reached.
    """
    _check(rows, labels, n_classes, strengths)
    n, n_variants, n_strengths = len(rows), len(labels), len(strengths)
    weight = torch.ones(n, dtype=torch.float64, device=rows.device) if sample_weight is None else sample_weight
    share = weight / weight.sum()
    l2 = 1 / (strengths * weight.sum())  # of the objective divided by C x the sum of weights
    # A sample's weight scales its row in the Hessian, not in the logits: decomposed are the weighted rows, about their mean.
    mean = share @ rows
    centred = rows - mean
    _, singular, basis = torch.linalg.svd(centred * share.sqrt()[:, None], full_matrices=False)
    kept = singular > NEGLIGIBLE * singular[:1].clamp(min=1e-300)
    singular, basis = singular[kept], basis[kept]
    coordinates = centred @ basis.T  # [n, r]
    n_outputs = 1 if n_classes == 2 else n_classes
    curvature = 0.25 if n_classes == 2 else 0.5 / n_classes + 0.25
    # Parameters are scaled so that the Hessian at zero is about the identity.
    scale = 1 / (curvature * singular**2 + l2[:, None]).sqrt()  # [S, r]
    scale_of = scale.repeat(n_variants, 1)  # problem v * S + s
    l2_of = l2.repeat(n_variants)
    width = n_outputs * (len(singular) + 1)
    one_hot = functional.one_hot(labels, n_classes).double()

    def unpack(parameters: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        shaped = parameters.view(len(parameters), n_outputs, -1)
        return shaped[..., :-1] * scale_of[problems][:, None], shaped[..., -1] / curvature**0.5

    def evaluate(parameters: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        weights, bias = unpack(parameters, problems)
        logits = torch.einsum("nr,akr->ank", coordinates, weights) + bias[:, None]
        variant = problems // n_strengths
        if n_outputs == 1:
            target = labels[variant].double()
            loss = functional.softplus(logits[..., 0]) - target * logits[..., 0]
            residual = (torch.sigmoid(logits[..., 0]) - target)[..., None]
        else:
            log_p = torch.log_softmax(logits, dim=-1)
            loss = -log_p.gather(2, labels[variant][..., None])[..., 0]
            residual = log_p.exp() - one_hot[variant]
        residual *= share[None, :, None]
        value = loss @ share + l2_of[problems] / 2 * (weights**2).sum(dim=(1, 2))
        gradient = torch.einsum("ank,nr->akr", residual, coordinates) + l2_of[problems, None, None] * weights
        scaled = torch.cat([gradient * scale_of[problems][:, None], residual.sum(dim=1)[..., None] / curvature**0.5], dim=2)
        return value, scaled.flatten(1)

    def error(parameters: Tensor, gradient: Tensor, problems: Tensor) -> Tensor:
        weights, _ = unpack(parameters, problems)
        raw = gradient.view(len(gradient), n_outputs, -1)
        of_weights = raw[..., :-1] / scale_of[problems][:, None]
        of_bias = raw[..., -1] * curvature**0.5
        norm: Tensor = (of_weights.flatten(1).norm(dim=1) ** 2 + of_bias.norm(dim=1) ** 2).sqrt()
        bound: Tensor = norm / (l2_of[problems] * weights.flatten(1).norm(dim=1)).clamp(min=1e-300)
        return bound

    def is_done(parameters: Tensor, gradient: Tensor, problems: Tensor) -> Tensor:
        return error(parameters, gradient, problems) <= tolerance

    start = torch.zeros(n_variants * n_strengths, width, dtype=torch.float64, device=rows.device)
    found = minimise(evaluate, start, is_done, MOST_ITERATIONS)
    problems = torch.arange(len(start), device=rows.device)
    _, gradient = evaluate(found.parameters, problems)
    bound = error(found.parameters, gradient, problems)
    weights, bias = unpack(found.parameters, problems)
    full = weights @ basis
    bias = bias - full @ mean
    shape = (n_variants, n_strengths)
    if not found.converged.all():
        worst = int(bound.argmax())
        raise InvalidInputError(
            f"logistic regression with C = {float(strengths[worst % n_strengths]):g} did not reach its optimum in "
            f"{MOST_ITERATIONS} steps (error bound {float(bound[worst]):.1g}, allowed {tolerance:g}): leave so weak a "
            "regularisation out"
        )
    return LogisticFit(
        full.view(*shape, n_outputs, -1), bias.view(*shape, n_outputs), bound.view(shape), found.n_iterations.view(shape)
    )


def _check(rows: Tensor, labels: Tensor, n_classes: int, strengths: Tensor) -> None:
    if labels.shape[1:] != rows.shape[:1] or not len(rows):
        raise InvalidInputError(f"labels must be [variants, {len(rows)}], got {list(labels.shape)}")
    if not torch.isfinite(rows).all():
        raise InvalidInputError(f"row {int((~torch.isfinite(rows)).any(dim=1).nonzero()[0])} is not finite")
    if n_classes < 2 or int(labels.min()) < 0 or int(labels.max()) >= n_classes:
        raise InvalidInputError(f"labels must be 0 to {n_classes - 1}, got {int(labels.min())} to {int(labels.max())}")
    for variant, numbers in enumerate(labels):
        absent = [k for k in range(n_classes) if not (numbers == k).any()]
        if absent:
            raise InvalidInputError(f"no training sample of variant {variant} is of class {absent[0]}: a probe needs all classes")
    if not len(strengths) or not (strengths > 0).all():
        raise InvalidInputError(f"strengths must be above 0, got {strengths.tolist()}")
