"""What makes prototypes useless without making them fail: findings with their numbers and advice, never an exception."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from exactivations.lit_modules.moderation.class_statistics import ClassMoments
from exactivations.lit_modules.moderation.prototypes import Prototypes

CHANCE_DEVIATIONS = 3.0
"""Two random halves of one class are as far apart in 0.1 % (many dimensions that vary alike) to 2 % (one dimension) of cases."""

LEAST_SEPARATION = 0.5
"""In standard deviations. Two Gaussians that are this far apart are told from each other with 40 % errors, and that only if the
prototypes are the true ones: those of the rows at hand look farther apart than they are."""

LARGEST_CONDITION = 1e10
"""A squared distance is wrong by up to its condition number times 1e-16: beyond this, by more than 1e-6."""

LEAST_ROWS_PER_DIMENSION = 2.0
"""The inverse of a covariance of m = N - K deviations is m / (m - d - 1) times the true inverse on average (inverse Wishart
distribution): twice it at two deviations a dimension, and it grows without bound towards one."""

LEAST_VARIATION = 0.1
"""Of 1 / sqrt(2 d), a distance's standard deviation over its mean where all d dimensions vary alike (chi distribution); where some
vary more than others, it is larger."""

LEAST_PREDICTIONS = 20
"""Were two classes equally frequent, as many rows in a row would be of one of them once in 500,000 times."""

POWER_STEPS = 50  # of the power method; what it has not found by then is within some percent of the largest eigenvalue

Problem = Literal[
    "prototypes-too-close",
    "covariance-near-singular",
    "few-rows-per-dimension",
    "distances-without-variance",
    "one-class-predicted",
]


@dataclass(frozen=True)
class PrototypeFinding:
    """Something that makes prototypes useless.

    Attributes:
        name: Which problem it is.
        message: What was found, with the numbers and what they were held against.
        advice: What to do.
    """

    name: Problem
    message: str
    advice: str


def diagnose_prototypes(prototypes: Prototypes, moments: ClassMoments) -> list[PrototypeFinding]:
    """Looks at the prototypes and at the moments that they were made of: are they apart, and is the covariance fit to measure by?

    It costs some hundred products of a matrix [d, d] and a vector.
    """
    found = _too_close(prototypes, moments)
    if prototypes.factor is not None:
        condition = condition_number(prototypes.factor)
        if condition > LARGEST_CONDITION:
            found.append(
                PrototypeFinding(
                    "covariance-near-singular",
                    f"the covariance's largest eigenvalue is {condition:.1e} times its smallest (at most {LARGEST_CONDITION:.0e} "
                    "is good): distances are mostly along directions in which the activations hardly vary, where rounding counts",
                    "take the covariance 'ledoit-wolf' or 'ridge', or add samples",
                )
            )
    deviations, width = moments.total - len(moments.means), moments.means.shape[1]
    if (prototypes.covariance or "").startswith("empirical") and deviations < LEAST_ROWS_PER_DIMENSION * width:
        found.append(
            PrototypeFinding(
                "few-rows-per-dimension",
                f"the covariance of {width} dimensions is made of {deviations} deviations, less than {LEAST_ROWS_PER_DIMENSION:g} "
                "a dimension: rows that it was not made of are much farther from every prototype than those that it was made of",
                "take the covariance 'ledoit-wolf' or 'ridge', or add samples",
            )
        )
    return found


def diagnose_predictions(prototypes: Prototypes, distances: Float64[Tensor, "n k"]) -> list[PrototypeFinding]:
    """Looks at what `prototypes.distances` gave for rows: do they differ, and does every row come out as the same class?"""
    found = []
    bound = LEAST_VARIATION / math.sqrt(2 * prototypes.means.shape[1])
    if len(distances) > 1:
        deviation, mean = torch.std_mean(distances, dim=0)
        # Divided by the mean plus the least float64, for rows that lie on a prototype.
        variation = deviation / (mean + torch.finfo(torch.float64).tiny)
        number = int(variation.argmin())
        if variation[number] < bound:
            found.append(
                PrototypeFinding(
                    "distances-without-variance",
                    f"the distances of {len(distances)} rows to prototype {number} are {float(mean[number]):.6g} with a standard "
                    f"deviation of {float(deviation[number]):.3g}, {float(variation[number]):.1e} of it (rows that differ give "
                    f"at least {bound:.1e})",
                    "see whether the rows are copies of one, are of the hook point, pooling and model of the prototypes, and are "
                    "pooled at a token that depends on the text",
                )
            )
    predicted = prototypes.log_probabilities_at(distances).argmax(dim=1)
    if len(predicted) >= LEAST_PREDICTIONS and (predicted == predicted[0]).all():
        found.append(
            PrototypeFinding(
                "one-class-predicted",
                f"all {len(predicted)} rows come out as class {int(predicted[0])} of {distances.shape[1]}",
                "unless they are of one class in truth: see whether the rows are of the hook point, pooling, template and model of "
                "the prototypes, and whether another layer, or a Mahalanobis distance, tells the classes apart",
            )
        )
    return found


def condition_number(factor: Float64[Tensor, "d d"]) -> float:
    """Returns the condition number of L L^T, L being lower triangular: by the power method, from below and rarely by a few percent.

    All eigenvalues would take a hundred times as long in thousands of dimensions.
    """
    start = torch.randn(len(factor), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    largest = smallest_inverse = 0.0
    forth, back = start / start.norm(), start / start.norm()
    for _ in range(POWER_STEPS):
        forth = factor @ (factor.mT @ forth)
        back = torch.cholesky_solve(back, factor)
        largest, smallest_inverse = float(forth.norm()), float(back.norm())
        forth, back = forth / largest, back / smallest_inverse
    return largest * smallest_inverse


def _too_close(prototypes: Prototypes, moments: ClassMoments) -> list[PrototypeFinding]:
    """Looks for prototypes that are no farther apart than by chance, or than their classes are wide.

    By chance: the squared distance of the means of n_a and n_b rows of one class is trace(S) (1 / n_a + 1 / n_b) on average, with a
    standard deviation of sqrt(2 trace(S^2)) (1 / n_a + 1 / n_b) (Bai and Saranadasa 1996), also in more dimensions than rows.

    Wide: along w = C^-1 (a - b), by which the prototypes tell classes a and b apart, their means are w^T (a - b) apart and rows
    have the variance w^T S w. C is what distances are measured by, and S the covariance within the classes.
    """
    deviations = moments.total - len(moments.means)
    if not deviations:
        return []  # a row for each class: nothing says how wide they are
    s = moments.within / deviations
    means = moments.means - moments.means.mean(0)
    first, second = torch.triu_indices(len(means), len(means), 1)
    gaps = means[first] - means[second]
    directions = gaps if prototypes.factor is None else torch.cholesky_solve(gaps.mT, prototypes.factor).mT
    tiny = torch.finfo(torch.float64).tiny  # so that prototypes that are the same have a separation of 0
    separation = (gaps * directions).sum(1) / ((directions @ s * directions).sum(1).sqrt() + tiny)
    spread, trace = s.norm() * math.sqrt(2), s.trace()
    shares = 1 / moments.count.double()
    chance = shares[first] + shares[second]
    beyond_chance = (gaps.square().sum(1) - trace * chance) / (spread * chance + tiny)
    found = []
    for pair in ((beyond_chance < CHANCE_DEVIATIONS) | (separation < LEAST_SEPARATION)).nonzero().flatten().tolist():
        a, b = int(first[pair]), int(second[pair])
        errors = float(torch.special.ndtr(-separation[pair] / 2))
        found.append(
            PrototypeFinding(
                "prototypes-too-close",
                f"the prototypes of classes {a} and {b} ({int(moments.count[a])} and {int(moments.count[b])} rows) are "
                f"{float(gaps[pair].norm()):.4g} apart: {float(beyond_chance[pair]):.1f} standard deviations more than by chance "
                f"(at least {CHANCE_DEVIATIONS:g} is good), and {float(separation[pair]):.2f} standard deviations of their rows "
                f"(at least {LEAST_SEPARATION:g} is good; were they Gaussian, {errors:.0%} errors on the training rows)",
                "see whether labels belong to their samples; take another layer or pooling, Mahalanobis distances, or more samples",
            )
        )
    return found
