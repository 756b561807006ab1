"""Multi-layer prototypes (MLPM): a sparse logistic regression of the layers' class probabilities, on samples that they never saw.

Chrabaszcz et al. 2025 (arXiv 2502.16174) feed the positive class's probability at each layer into an L1-regularised logistic
regression with C = 1. Their code takes the probabilities of the prototypes' own training rows, on which every layer looks better
than it is. Here prototypes of the other folds give the probabilities of each fold (Wolpert 1992, "Stacked generalization").
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float64, Int64
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional

from exactivations.lit_modules.moderation.class_statistics import ClassMoments, ClassStatistics
from exactivations.lit_modules.moderation.prototypes import Prototypes
from exactivations.lit_modules.probes.probe_inputs import class_numbers, finite
from exactivations.store.errors import InvalidInputError

FloatArray = npt.NDArray[np.float64]

STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""scikit-learn's C, up to the largest that the authors tried; they publish results of 1."""

TOLERANCE = 1e-3  # of the penalty: how far a subgradient may be from 0; thirty times what was found where C n is largest
MOST_STEPS = 20_000


@dataclass(frozen=True, eq=False)
class LayerMixture:
    """Weights of the layers' probabilities.

    Of two classes, the positive one's (1) probability is the only feature of a layer, and its logit the only output: F = O = 1. Of
    K > 2, all are: F = O = K.

    Attributes:
        weight: float64 [O, L, F]; most are 0.
        bias: float64 [O].
        strength: scikit-learn's C: the smaller, the fewer weights.
        losses: Strengths that were tried, and the mean cross-entropy in nats of samples whose fold was held out; empty if the
            strength was given.
    """

    weight: Float64[Tensor, "o l f"]
    bias: Float64[Tensor, " o"]
    strength: float
    losses: dict[float, float]

    @property
    def layer_weights(self) -> Float64[Tensor, " l"]:
        """How much each layer counts, float64 [L]: the sum of its weights' absolute values."""
        return self.weight.abs().sum(dim=(0, 2))

    def probabilities(self, probabilities: Float[Tensor, "n l k"]) -> Float64[Tensor, "n k"]:
        """Returns the probability of each class, from those at each layer.

        Raises:
            InvalidInputError: If these are no finite probabilities of as many layers and classes.
        """
        n_classes = 2 if len(self.bias) == 1 else len(self.bias)
        features = _features(probabilities)
        if probabilities.shape[1:] != (self.weight.shape[1], n_classes):
            raise InvalidInputError(
                f"probabilities must be [n, {self.weight.shape[1]} layers, {n_classes} classes] as in training, got "
                f"{list(probabilities.shape)}"
            )
        return torch.softmax(_logits(features.flatten(1), self.weight.flatten(1), self.bias), dim=1)


def held_out_prototypes(
    by_fold: Sequence[ClassStatistics], make: Callable[[ClassMoments], Prototypes] = Prototypes.mahalanobis
) -> list[Prototypes]:
    """Returns, for each fold, the prototypes of all the other folds' rows. The rows themselves are not read again.

    Args:
        by_fold: Of the rows of each fold. No group of samples may be in two folds.
        make: Such as `functools.partial(Prototypes.mahalanobis, covariance="ledoit-wolf")`.

    Raises:
        InvalidInputError: If there are fewer than two folds, or no prototypes can be made without one of them: it is named.
    """
    if len(by_fold) < 2:
        raise InvalidInputError(f"holding out takes at least 2 folds, got {len(by_fold)}")
    prototypes = []
    for fold in range(len(by_fold)):
        try:
            # Added up anew: taking a fold's sums off the whole would cost digits.
            others = ClassStatistics.fold(part for number, part in enumerate(by_fold) if number != fold)
            prototypes.append(make(others.result()))
        except InvalidInputError as error:
            raise InvalidInputError(f"without fold {fold} of {len(by_fold)}: {error}") from error
    return prototypes


def out_of_fold(prototypes: Sequence[Prototypes], rows: Float[Tensor, "n d"], folds: Int64[Tensor, " n"]) -> Float64[Tensor, "n k"]:
    """Returns the class probabilities of rows by the prototypes that never saw their fold; any block of the rows can be given.

    Args:
        prototypes: Of each fold, from `held_out_prototypes`.
        rows: Of one hook point.
        folds: The fold of each row, 0 to F - 1: that under which its statistics were taken.

    Raises:
        InvalidInputError: If a fold is none of these, or rows are not of the prototypes' width, or not finite.
    """
    if folds.shape != rows.shape[:1] or (len(folds) and not (0 <= int(folds.min()) <= int(folds.max()) < len(prototypes))):
        raise InvalidInputError(
            f"folds must be one a row, from 0 to {len(prototypes) - 1}, got {list(folds.shape)} for {len(rows)} rows"
            + (f", from {int(folds.min())} to {int(folds.max())}" if len(folds) else "")
        )
    out = torch.empty(len(rows), len(prototypes[0].means), dtype=torch.float64)
    for fold, held_out in enumerate(prototypes):
        mine = folds == fold
        out[mine] = held_out.probabilities(rows[mine])
    return out


def fit_layer_mixture(
    probabilities: Float[Tensor, "n l k"],
    labels: Int64[Tensor, " n"],
    folds: Int64[Tensor, " n"],
    *,
    strengths: Sequence[float] = STRENGTHS,
) -> LayerMixture:
    """Minimises C x (sum of cross-entropies) + the sum of the weights' absolute values; the biases go free.

    Of several strengths C, that is taken under which samples of held-out folds have the lowest mean cross-entropy; of equal ones,
    the smallest. (The probabilities of other folds come from prototypes that saw the held-out one, as in any stacking; this touches
    the choice of C only.) Samples are sorted first, so that their order changes nothing. The objective is scikit-learn's
    (`LogisticRegression(C=C, l1_ratio=1, solver="saga")`); the authors' solver, liblinear, regularises the bias as well.

    Args:
        probabilities: Of each sample at each layer, from `out_of_fold`: the prototypes must not have seen the sample.
        labels: Class numbers.
        folds: The fold of each sample, the same.
        strengths: To choose from; one is taken as it is.

    Raises:
        InvalidInputError: If these are no probabilities, labels or folds of the same samples, a class is missing (in all samples,
            or in those outside a fold), a strength is not positive, or an optimum was not reached.
    """
    x, y = _features(probabilities).flatten(1), class_numbers(labels, probabilities.shape[2], len(probabilities))
    if folds.dtype != torch.int64 or folds.shape != y.shape:
        raise InvalidInputError(f"folds must be int64 [{len(y)}], one a sample, got {folds.dtype} {list(folds.shape)}")
    if not len(strengths) or not all(strength > 0 for strength in strengths):
        raise InvalidInputError(f"strengths must be at least one number above 0, got {list(strengths)}")
    order = np.lexsort((*x.mT.numpy(), y.numpy(), folds.numpy()))
    x, y, folds = x[order], y[order], folds[order]
    n_classes = probabilities.shape[2]
    losses = {}
    if len(strengths) > 1:
        losses = {strength: _held_out_loss(x, y, folds, n_classes, strength) for strength in sorted(strengths)}
    strength = min(losses, key=losses.__getitem__) if losses else float(strengths[0])
    weight, bias = _minimise(x, y, n_classes, strength)
    return LayerMixture(weight.view(len(bias), probabilities.shape[1], -1), bias, strength, losses)


def _held_out_loss(x: Tensor, y: Tensor, folds: Tensor, n_classes: int, strength: float) -> float:
    numbers = sorted(set(folds.tolist()))
    if len(numbers) < 2:
        raise InvalidInputError("the strength is chosen on held-out folds, and all samples are of one: give one strength")
    total = 0.0
    for fold in numbers:
        held_out = folds == fold
        weight, bias = _minimise(x[~held_out], y[~held_out], n_classes, strength, f" outside fold {fold}")
        total += float(functional.cross_entropy(_logits(x[held_out], weight, bias), y[held_out], reduction="sum"))
    return total / len(y)


def _minimise(x: Tensor, y: Tensor, n_classes: int, strength: float, where: str = "") -> tuple[Tensor, Tensor]:
    """Returns the optimal weights [O, p] and biases [O], by L-BFGS with bounds on w = u - v, u and v at least 0.

    At a bound, a weight is 0 to the bit. scikit-learn's SAGA was tried: it takes thirty times as long where C is large, and, since
    it looks at the weights alone, stops before the biases are right where C is so small that all weights are 0.
    """
    shares = torch.bincount(y, minlength=n_classes).double() / len(y)
    absent = (shares == 0).nonzero().flatten().tolist()
    if absent:
        raise InvalidInputError(f"no sample{where} is of class {absent[0]} (of {n_classes}): a mixture needs all classes")
    penalty = 1 / (strength * len(y))  # of the objective divided by C x n
    n_outputs = 1 if n_classes == 2 else n_classes
    size = n_outputs * x.shape[1]
    target = functional.one_hot(y, n_classes).double()

    def unpacked(parameters: FloatArray) -> tuple[Tensor, Tensor]:
        values = torch.from_numpy(parameters)
        return (values[:size] - values[size : 2 * size]).view(n_outputs, -1), values[2 * size :]

    def evaluate(parameters: FloatArray) -> tuple[float, FloatArray]:
        log_p = torch.log_softmax(_logits(x, *unpacked(parameters)), dim=1)
        residual = (log_p.exp() - target)[:, -n_outputs:] / len(y)
        slope = (residual.mT @ x).flatten()
        value = -float(log_p.gather(1, y[:, None]).mean()) + penalty * float(parameters[: 2 * size].sum())
        return value, torch.cat([slope + penalty, penalty - slope, residual.sum(0)]).numpy()

    # From the optimum without weights.
    start = np.concatenate([np.zeros(2 * size), (shares.log() - shares[0].log())[-n_outputs:].numpy()])
    bounds = [(0, None)] * (2 * size) + [(None, None)] * n_outputs
    limits = {"maxiter": MOST_STEPS, "maxfun": 2 * MOST_STEPS, "ftol": 0.0, "gtol": 1e-3 * TOLERANCE * penalty}
    found = minimize(evaluate, start, jac=True, method="L-BFGS-B", bounds=bounds, options=limits)
    gradient = evaluate(found.x)[1]
    at_bound = np.concatenate([found.x[: 2 * size] == 0, np.zeros(n_outputs, dtype=bool)])
    violation = float(np.abs(np.where(at_bound, np.minimum(gradient, 0), gradient)).max()) / penalty
    if not violation <= TOLERANCE:
        raise InvalidInputError(
            f"the mixture of layers with C = {strength:g}{where} did not reach its optimum in {found.nit} steps (a gradient is off "
            f"by {violation:.1g} of the penalty, allowed {TOLERANCE:g}): leave so weak a regularisation out"
        )
    return unpacked(found.x)


def _logits(x: Tensor, weight: Tensor, bias: Tensor) -> Float64[Tensor, "n k"]:
    """Returns the logits of all classes; of two, that of the first is 0."""
    logits: Tensor = x @ weight.mT + bias
    return torch.cat([torch.zeros_like(logits), logits], dim=1) if len(bias) == 1 else logits


def _features(probabilities: Tensor) -> Float64[Tensor, "n l f"]:
    """Returns what of the probabilities [n, L, K] is fed in: of two classes the second's."""
    if probabilities.ndim != 3 or probabilities.shape[2] < 2:
        raise InvalidInputError(f"probabilities must be [n, L layers, K >= 2 classes], got {list(probabilities.shape)}")
    values = finite("probabilities", probabilities)
    if values.min() < 0 or values.max() > 1:
        raise InvalidInputError(f"probabilities must be from 0 to 1, found {float(values.min()):g} to {float(values.max()):g}")
    return values[..., 1:] if values.shape[2] == 2 else values
