"""Logistic regression to its true optimum: every strength of regularisation, and every variant of the labels, in one solve."""

from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from torch.nn import functional

from exactivations.lit_modules.batched_lbfgs import minimise
from exactivations.lit_modules.batched_newton import minimise_by_newton
from exactivations.store.errors import InvalidInputError

MOST_ITERATIONS = 5000
BEFORE_NEWTON = 10  # steps of L-BFGS: far from the optimum they are cheaper
LARGEST_HESSIAN = 1500  # parameters of a problem; more take L-BFGS all the way
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

    The problems share one singular value decomposition of the rows. In its coordinates the Hessian at zero is diagonal, and the
    weights of directions that no row has are zero. A few steps of L-BFGS go near the optimum, Newton's method to it (where the
    Hessian is too large, L-BFGS goes on). It ends when the gradient proves the weights to be within `tolerance` of the optimum,
    relatively (by strong convexity, the bias left aside).

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
    problems = _Problems(rows, labels, n_classes, strengths, sample_weight)
    fit = problems.fit(tolerance)
    if not (fit.error <= tolerance).all():
        worst = int(fit.error.argmax())
        raise InvalidInputError(
            f"logistic regression with C = {float(strengths[worst % len(strengths)]):g} did not reach its optimum in "
            f"{MOST_ITERATIONS} steps (error bound {float(fit.error.max()):.1g}, allowed {tolerance:g}): leave so weak a "
            "regularisation out"
        )
    return fit


class _Problems:
    """V variants of the labels x S strengths on the same rows; problem v * S + s is variant v with strength s.

    Their parameters are, for each output, the weights in the coordinates of the singular vectors and the bias, scaled so that the
    Hessian at zero is about the identity.
    """

    def __init__(self, rows: Tensor, labels: Tensor, n_classes: int, strengths: Tensor, sample_weight: Tensor | None) -> None:
        weight = torch.ones(len(rows), dtype=torch.float64, device=rows.device) if sample_weight is None else sample_weight
        self._labels, self._shape, self._width = labels, (len(labels), len(strengths)), rows.shape[1]
        self._share = weight / weight.sum()
        l2 = 1 / (strengths * weight.sum())  # of the objective divided by C x the sum of weights
        self._l2 = l2.repeat(len(labels))
        # A sample's weight scales its row in the Hessian, not in the logits: decomposed are the weighted rows, about their mean.
        self._mean = self._share @ rows
        centred = rows - self._mean
        _, singular, basis = torch.linalg.svd(centred * self._share.sqrt()[:, None], full_matrices=False)
        kept = singular > NEGLIGIBLE * singular[:1].clamp(min=1e-300)
        self._basis = basis[kept]
        self._coordinates = torch.cat([centred @ self._basis.T, torch.ones_like(centred[:, :1])], dim=1)  # [n, r + 1], bias last
        self._single = self._coordinates.float()  # for Hessians: their errors cost steps, and no digits of the optimum
        self._outputs = 1 if n_classes == 2 else n_classes
        curvature = 0.25 if n_classes == 2 else 0.5 / n_classes + 0.25
        of_weights = 1 / (curvature * singular[kept] ** 2 + l2[:, None]).sqrt()
        self._scale = torch.cat([of_weights, torch.full_like(l2, curvature**-0.5)[:, None]], dim=1).repeat(len(labels), 1)
        self._one_hot = functional.one_hot(labels, n_classes).double()

    def fit(self, tolerance: float) -> LogisticFit:
        """Minimises all: by L-BFGS near the optimum, and then by Newton's method if the Hessian is small enough, else on."""

        def is_done(parameters: Tensor, gradient: Tensor, problems: Tensor) -> Tensor:
            return self._error(parameters, gradient, problems) <= tolerance

        size = self._outputs * self._coordinates.shape[1]
        start = torch.zeros(len(self._l2), size, dtype=torch.float64, device=self._share.device)
        few = size <= LARGEST_HESSIAN and MOST_ITERATIONS > BEFORE_NEWTON
        found = minimise(self._evaluate, start, is_done, BEFORE_NEWTON if few else MOST_ITERATIONS)
        n_iterations = found.n_iterations
        if few and not found.converged.all():
            found = minimise_by_newton(self._evaluate, self._hessians, found.parameters, is_done, MOST_ITERATIONS - BEFORE_NEWTON)
            n_iterations = n_iterations + found.n_iterations
        every = torch.arange(len(start), device=start.device)
        error = self._error(found.parameters, self._evaluate(found.parameters, every)[1], every)
        weight, bias = self._unpack(found.parameters, every)
        weight = weight @ self._basis
        bias = bias - weight @ self._mean
        v, s = self._shape
        return LogisticFit(
            weight.view(v, s, self._outputs, self._width), bias.view(v, s, self._outputs),
            error.view(v, s), n_iterations.view(v, s),
        )  # fmt: skip

    def _unpack(self, parameters: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        """Returns weights [A, K, r] and biases [A, K]."""
        shaped = parameters.view(len(parameters), self._outputs, -1) * self._scale[problems][:, None]
        return shaped[..., :-1], shaped[..., -1]

    def _probabilities(self, parameters: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the loss of each sample [A, n] and the probability of each output [A, n, K]."""
        shaped = parameters.view(len(parameters), self._outputs, -1) * self._scale[problems][:, None]
        logits = (self._coordinates @ shaped.mT).contiguous()
        labels = self._labels[problems // self._shape[1]]
        if self._outputs == 1:
            logits = logits[..., 0]
            return functional.softplus(logits) - labels * logits, torch.sigmoid(logits)[..., None]
        log_p = torch.log_softmax(logits, dim=-1)
        return -log_p.gather(2, labels[..., None])[..., 0], log_p.exp()

    def _evaluate(self, parameters: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        loss, probabilities = self._probabilities(parameters, problems)
        target = self._one_hot[problems // self._shape[1]][..., -self._outputs :]  # of two classes that of the second
        residual = (probabilities - target) * self._share[:, None]
        weights, _ = self._unpack(parameters, problems)
        value = loss @ self._share + self._l2[problems] / 2 * (weights**2).sum(dim=(1, 2))
        gradient = residual.mT @ self._coordinates
        gradient[..., :-1] += self._l2[problems, None, None] * weights
        return value, (gradient * self._scale[problems][:, None]).flatten(1)

    def _hessians(self, parameters: Tensor, problems: Tensor) -> Tensor:
        _, p = self._probabilities(parameters, problems)
        n_problems, k, width = len(problems), self._outputs, self._coordinates.shape[1]
        out = parameters.new_empty(n_problems, k, width, k, width)
        scale = self._scale[problems]
        penalty = torch.cat([self._l2[problems, None].expand(-1, width - 1), torch.zeros_like(scale[:, :1])], dim=1) * scale**2
        for a in range(k):
            for b in range(a + 1):
                between = p[..., a] * ((1 - p[..., a]) if a == b else -p[..., b]) * self._share
                block = torch.stack([(self._single.T * one) @ self._single for one in between.float()]).double()
                block *= scale[:, :, None] * scale[:, None, :]
                if a == b:
                    block.diagonal(dim1=1, dim2=2).add_(penalty)
                out[:, a, :, b] = out[:, b, :, a] = block
        return out.view(n_problems, k * width, k * width)

    def _error(self, parameters: Tensor, gradient: Tensor, problems: Tensor) -> Tensor:
        """Returns a bound of the relative error of the weights."""
        weights, _ = self._unpack(parameters, problems)
        raw = gradient.view(len(gradient), self._outputs, -1) / self._scale[problems][:, None]
        bound: Tensor = raw.flatten(1).norm(dim=1) / (self._l2[problems] * weights.flatten(1).norm(dim=1)).clamp(min=1e-300)
        return bound


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
