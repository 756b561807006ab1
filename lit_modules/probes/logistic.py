"""Logistic regression to its true optimum: every strength of regularisation, and every variant of the labels, in one solve."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from exactivations.lit_modules.probes.batched_newton import minimise
from exactivations.lit_modules.probes.logistic_loss import LogisticLoss
from exactivations.store.errors import InvalidInputError

MOST_ITERATIONS = 100


@dataclass(frozen=True)
class LogisticFit:
    """Fitted weights of V variants of the labels x S strengths.

    Attributes:
        weight: float64 [V, S, K, d]; K is 1 for two classes (the logit of the second), else the number of classes.
        bias: float64 [V, S, K].
        error: float64 [V, S], a bound of the relative error of the weights, see `LogisticHessian.error`.
        n_iterations: int64 [V, S], Newton's steps.
    """

    weight: Float64[Tensor, "v s k d"]
    bias: Float64[Tensor, "v s k"]
    error: Float64[Tensor, "v s"]
    n_iterations: Int64[Tensor, "v s"]

    def logits(self, rows: Float[Tensor, "n d"]) -> Float64[Tensor, "v s n k"]:
        """Returns the logits of rows (of two classes: of the second)."""
        return torch.einsum("nd,vskd->vsnk", rows.double(), self.weight) + self.bias[:, :, None]

    def probabilities(self, rows: Float[Tensor, "n d"]) -> Float64[Tensor, "v s n k"]:
        """Returns the probability of every class, also of two."""
        logits = self.logits(rows)
        if logits.shape[-1] == 1:
            positive = torch.sigmoid(logits)
            return torch.cat([1 - positive, positive], dim=-1)
        return torch.softmax(logits, dim=-1)


@torch.no_grad()
def fit_logistic(
    rows: Float[Tensor, "n d"],
    labels: Int64[Tensor, "v n"],
    n_classes: int,
    strengths: Float64[Tensor, " s"],
    *,
    sample_weight: Float64[Tensor, " n"] | Float64[Tensor, "v n"] | None = None,
    tolerance: float = 1e-5,
) -> LogisticFit:
    """Minimises C x (sum of the samples' cross-entropies) + half the squared norm of the weights, for each C in `strengths`.

    The objective is scikit-learn's (`LogisticRegression(C=C)`; biases are not regularised; for more than two classes softmax
    with weights for each). Rows should be standardised.

    All problems are solved together, by Newton's method with conjugate gradients. It ends when the gradient proves the weights to
    be within `tolerance` of the optimum, relatively. Rows are read in blocks and neither copied nor converted as a whole, unless
    they are few or wider than many: of more dimensions than samples only those matter in which the samples lie.

    Args:
        rows: Training rows, float32 or float64; sums are in double precision.
        labels: Class numbers, one row per variant (the true ones, shuffled ones, ...).
        n_classes: K, at least 2.
        strengths: scikit-learn's C: the larger, the less regularised.
        sample_weight: Weight of each sample's loss, the same or another one in each variant. A sample of weight 0 is left out.
        tolerance: See above.

    Raises:
        InvalidInputError: If a variant lacks a class, rows or weights are not finite, or an optimum was not reached.
    """
    _check(rows, labels, n_classes, strengths)
    weight = _checked_weight(sample_weight, labels, n_classes)
    if rows.shape[1] <= len(rows):
        return _fit(rows, labels, n_classes, strengths, weight, tolerance)
    # The optimum lies in the span of the samples: there the problem is the same, and no larger than they are many.
    origin = rows.double().mean(dim=0)
    basis, coordinates = torch.linalg.qr((rows - origin).mT)
    fit = _fit(coordinates.mT, labels, n_classes, strengths, weight, tolerance)
    directions = fit.weight @ basis.mT
    return replace(fit, weight=directions, bias=fit.bias - directions @ origin)


def _fit(rows: Tensor, labels: Tensor, n_classes: int, strengths: Tensor, weight: Tensor, tolerance: float) -> LogisticFit:
    total = weight.sum(dim=1, keepdim=True)
    loss = LogisticLoss(rows, labels, n_classes, weight / total, 1 / (strengths * total))
    n_problems = len(labels) * len(strengths)
    start = torch.zeros(n_problems, loss.contrasts.shape[1], loss.rows.width, dtype=torch.float64, device=rows.device)
    found = minimise(loss, start, tolerance, MOST_ITERATIONS)
    shape = len(labels), len(strengths)
    error = found.error.view(shape)
    if not (error <= tolerance).all():
        worst = int(error.amax(dim=0).argmax())
        raise InvalidInputError(
            f"logistic regression with C = {float(strengths[worst]):g} did not reach its optimum in {MOST_ITERATIONS} steps (error "
            f"bound {float(error.max()):.1g}, allowed {tolerance:g}): leave so weak a regularisation out, or standardise the rows"
        )
    parameters = (loss.contrasts @ found.parameters).unflatten(0, shape)
    directions, bias = parameters[..., :-1], parameters[..., -1]
    return LogisticFit(directions, bias - directions @ loss.rows.mean, error, found.n_iterations.view(shape))


def _check(rows: Tensor, labels: Tensor, n_classes: int, strengths: Tensor) -> None:
    if labels.shape[1:] != rows.shape[:1] or not labels.numel():
        raise InvalidInputError(f"labels must be [variants, {len(rows)}], got {list(labels.shape)}")
    if not torch.isfinite(torch.stack(rows.aminmax())).all():
        raise InvalidInputError(f"row {int((~torch.isfinite(rows)).any(dim=1).nonzero()[0])} is not finite")
    if n_classes < 2 or int(labels.min()) < 0 or int(labels.max()) >= n_classes:
        raise InvalidInputError(f"labels must be 0 to {n_classes - 1}, got {int(labels.min())} to {int(labels.max())}")
    if not len(strengths) or not (strengths > 0).all():
        raise InvalidInputError(f"strengths must be above 0, got {strengths.tolist()}")


def _checked_weight(sample_weight: Tensor | None, labels: Tensor, n_classes: int) -> Tensor:
    """Returns each variant's weights, float64 [V, n]."""
    weight = torch.ones(labels.shape[1:], dtype=torch.float64, device=labels.device) if sample_weight is None else sample_weight
    if weight.shape not in (labels.shape, labels.shape[1:]):
        raise InvalidInputError(f"sample_weight must be {list(labels.shape[1:])} or {list(labels.shape)}, got {list(weight.shape)}")
    if not (torch.isfinite(weight) & (weight >= 0)).all():
        raise InvalidInputError("sample_weight must be finite and not below 0: leave a sample out with 0")
    weight = weight.double().expand(labels.shape)
    for variant, (numbers, weights) in enumerate(zip(labels, weight, strict=True)):
        absent = torch.bincount(numbers, weights, minlength=n_classes) <= 0
        if absent.any():
            number = int(absent.nonzero()[0])
            raise InvalidInputError(f"no training sample of variant {variant} is of class {number}: a probe needs all classes")
    return weight
