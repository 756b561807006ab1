"""Latent prototypes: classes by the distance to their means, as probabilities of Gaussians with a covariance in common.

Chrabaszcz et al. 2025, "Efficient LLM Moderation with Multi-Layer Latent Prototypes" (arXiv 2502.16174). With a covariance it is
linear discriminant analysis (Hastie, Tibshirani and Friedman, "The Elements of Statistical Learning", 4.3).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from exactivations.lit_modules.moderation.class_statistics import ClassMoments
from exactivations.lit_modules.probes.probe_inputs import finite
from exactivations.store.covariance import Covariance
from exactivations.store.errors import InvalidInputError

CovarianceEstimator = Literal["ridge", "ledoit-wolf", "empirical-n", "empirical-n-1", "empirical-n-k"]
"""What the covariance is made of, W being the pooled within-class scatter of N rows of K classes in d dimensions.

- "ridge", as published: its inverse is P = d ((N - 1) S + trace(S) I)^-1 with S = W / (N - 1) (Kubokawa and Srivastava 2008,
  "Estimation of the precision matrix of a singular Wishart distribution"). That is W / N shrunk by s = d / (d + N - 1), times
  N / (s (N - 1)): squared distances are about s of the shrunk covariance's own. Under uniform priors this changes no prediction,
  but with many rows a dimension all probabilities are close to the priors: a mixture of layers has next to nothing to weigh.
- "ledoit-wolf": W / N, shrunk by Ledoit and Wolf's coefficient of the deviations from the class means.
- "empirical-n": W / N, maximum likelihood. scikit-learn's LinearDiscriminantAnalysis divides so (its solvers "lsqr" and "eigen" if
  the priors are the classes' shares: they weigh the classes' covariances by them).
- "empirical-n-1": W / (N - 1), as the authors of the paper divide before they apply the ridge.
- "empirical-n-k": W / (N - K), without bias, as in Mi-Crow.
"""


@dataclass(frozen=True, eq=False)
class Prototypes:
    """The means of K classes, and what distances to them are measured by. Made by `euclidean` and `mahalanobis`.

    Attributes:
        means: float64 [K, d].
        log_priors: float64 [K].
        factor: float64 [d, d], the lower triangular L of the covariance L L^T; None for Euclidean distances.
        covariance: The covariance's estimator; None for Euclidean distances.
    """

    means: Float64[Tensor, "k d"]
    log_priors: Float64[Tensor, " k"]
    factor: Float64[Tensor, "d d"] | None
    covariance: CovarianceEstimator | None

    @classmethod
    def euclidean(cls, moments: ClassMoments, priors: Sequence[float] | None = None) -> "Prototypes":
        """Makes prototypes with the Euclidean distance |x - mean|.

        Probabilities take it as it is, as published: as if every variance were 1. Activations have other units, so the
        probabilities are not calibrated. Under uniform priors the predicted classes do not depend on the unit.

        Args:
            moments: Of the training rows.
            priors: Probability of each class beforehand [K]; None: all the same, as published.

        Raises:
            InvalidInputError: If priors are not K positive numbers that sum to 1.
        """
        return cls(moments.means, _log_priors(priors, len(moments.means)), None, None)

    @classmethod
    def mahalanobis(
        cls, moments: ClassMoments, covariance: CovarianceEstimator = "ridge", priors: Sequence[float] | None = None
    ) -> "Prototypes":
        """Makes prototypes with the Mahalanobis distance sqrt((x - mean)^T C^-1 (x - mean)), C being the classes' in common.

        Args:
            moments: Of the training rows.
            covariance: How C is estimated.
            priors: Probability of each class beforehand [K]; None: all the same, as published.

        Raises:
            InvalidInputError: If C is not positive definite, as far as float64 can tell: an empirical one of fewer than d + K rows
                never is. If priors are not K positive numbers that sum to 1.
        """
        return cls(moments.means, _log_priors(priors, len(moments.means)), _factor(moments, covariance), covariance)

    def distances(self, rows: Float[Tensor, "n d"]) -> Float64[Tensor, "n k"]:
        """Returns the distance (not squared) of rows of any float dtype and device to each prototype; on the host.

        Raises:
            InvalidInputError: If rows are not of the prototypes' width, or not finite (naming the row and dimension).
        """
        if rows.ndim != 2 or rows.shape[1] != self.means.shape[1]:
            raise InvalidInputError(
                f"rows must be [n, {self.means.shape[1]}] as the prototypes are, got {list(rows.shape)}: they come from another "
                "hook point or model"
            )
        if not len(rows):
            return self.means.new_empty(0, len(self.means))
        # Not by |a|^2 - 2ab + |b|^2, which torch takes for many rows: differences of large numbers lose their digits.
        exact = "donot_use_mm_for_euclid_dist"
        distances: Tensor = torch.cdist(self._whiten(finite("rows", rows)), self._white_means, compute_mode=exact)
        return distances

    def log_probabilities(self, rows: Float[Tensor, "n d"]) -> Float64[Tensor, "n k"]:
        """Returns the log of each class's probability, log softmax(log prior - distance^2 / 2).

        It has digits where the probability is 0 or 1 to the last bit, as is common in many dimensions. The published code takes the
        softmax of minus the distance itself for Euclidean prototypes; under uniform priors the
        predicted classes are the same.

        Raises:
            InvalidInputError: As `distances`.
        """
        return self.log_probabilities_at(self.distances(rows))

    def log_probabilities_at(self, distances: Float64[Tensor, "n k"]) -> Float64[Tensor, "n k"]:
        """Returns `log_probabilities` of rows at these distances, so that these need not be taken twice."""
        return torch.log_softmax(self.log_priors - distances.square() / 2, dim=1)

    def probabilities(self, rows: Float[Tensor, "n d"]) -> Float64[Tensor, "n k"]:
        """Returns the probability of each class; errors as in `distances`."""
        return self.log_probabilities(rows).exp()

    def predict(self, rows: Float[Tensor, "n d"]) -> Int64[Tensor, " n"]:
        """Returns the most probable class of each row, the first of several; errors as in `distances`."""
        return self.log_probabilities(rows).argmax(dim=1)

    def _whiten(self, rows: Float64[Tensor, "n d"]) -> Float64[Tensor, "n d"]:
        deviations = rows - self.means.mean(0)  # large means would leave no digits of the differences that count
        if self.factor is None:
            return deviations
        white: Tensor = torch.linalg.solve_triangular(self.factor.mT, deviations, upper=True, left=False)
        return white

    @cached_property
    def _white_means(self) -> Float64[Tensor, "k d"]:
        return self._whiten(self.means)


def _factor(moments: ClassMoments, covariance: CovarianceEstimator) -> Float64[Tensor, "d d"]:
    """Returns the Cholesky factor; every estimator is a shrunk W / N, times a number."""
    n_classes, width = moments.means.shape
    total, pooled = moments.total, moments.pooled
    if not moments.within.any():
        raise InvalidInputError(
            f"the {total:,} rows of {n_classes} classes do not differ from the means of their classes at all, so that there is no "
            "covariance: add samples, or look at the activations"
        )
    shrinkage, scale = _as_shrinkage(covariance, pooled, n_classes)
    name = f"the covariance ({covariance}) of {total:,} rows of {n_classes} classes in {width} dimensions is not positive definite"
    remedy = "take the covariance 'ridge' or 'ledoit-wolf', or add samples"
    if shrinkage == 0 and total - n_classes < width:  # rounding can hide it, so that the factorization goes through
        raise InvalidInputError(f"{name}: deviations from {n_classes} means span at most {total - n_classes} dimensions; {remedy}")
    try:
        return math.sqrt(scale) * pooled.cholesky(shrinkage)
    except InvalidInputError as error:
        raise InvalidInputError(f"{name}; {remedy} (in detail: {error})") from error


def _as_shrinkage(covariance: CovarianceEstimator, pooled: Covariance, n_classes: int) -> tuple[float, float]:
    """Returns which shrinkage of W / N the estimator is, and what it is multiplied by."""
    total, width = pooled.count, pooled.width
    match covariance:
        case "ridge":
            share = width / (width + total - 1)
            return share, total / (share * (total - 1))
        case "ledoit-wolf":
            return pooled.ledoit_wolf_shrinkage, 1.0
        case "empirical-n":
            return 0.0, 1.0
        case "empirical-n-1":
            return 0.0, total / (total - 1)
        case "empirical-n-k":  # N = K leaves no deviations, which was refused
            return 0.0, total / (total - n_classes)
    raise InvalidInputError(f"covariance must be one of {', '.join(get_args(CovarianceEstimator))}, got {covariance!r}")


def _log_priors(priors: Sequence[float] | None, n_classes: int) -> Float64[Tensor, " k"]:
    values = [1 / n_classes] * n_classes if priors is None else [float(prior) for prior in priors]
    if len(values) != n_classes or not all(value > 0 for value in values) or not math.isclose(sum(values), 1, abs_tol=1e-6):
        raise InvalidInputError(f"priors must be {n_classes} positive numbers that sum to 1, one a class, got {values}")
    return torch.tensor(values, dtype=torch.float64).log()
