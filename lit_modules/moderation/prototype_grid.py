"""Prototypes of many activations by many metrics, and the mixtures of their layers: what a moderator is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

import torch
from jaxtyping import Float64
from torch import Tensor

from exactivations.lit_modules.moderation.class_statistics import ClassMoments
from exactivations.lit_modules.moderation.layer_mixture import LayerMixture
from exactivations.lit_modules.moderation.prototypes import CovarianceEstimator, Prototypes
from exactivations.store.errors import InvalidInputError

MLPM = "MLPM"
METRICS: dict[str, CovarianceEstimator | None] = {
    "euclidean": None, **{f"mahalanobis:{covariance}": covariance for covariance in get_args(CovarianceEstimator)}
}  # fmt: skip
"""By what a distance is measured: "euclidean", or "mahalanobis:" and the estimator of the covariance; see `CovarianceEstimator`."""

Distances = Mapping[str, Float64[Tensor, "n k"]]
"""To each class's prototype, by entry."""


@dataclass(frozen=True)
class Mixture:
    """The layers of one aggregation, by one metric, and how their probabilities are weighed."""

    vectors: list[str]
    metric: str
    weights: LayerMixture

    @property
    def entries(self) -> list[str]:
        """What is mixed."""
        return [entry_name(vector, self.metric) for vector in self.vectors]


@dataclass(frozen=True)
class PrototypeGrid:
    """Prototypes by vector and metric, and mixtures by name.

    An *entry* is a vector by a metric, such as "resid_post.3/mean mahalanobis:ridge". A mixture of the layers of an aggregation is
    called "MLPM/mean mahalanobis:ridge". Both have probabilities; only entries have distances.
    """

    prototypes: dict[str, dict[str, Prototypes]] = field(default_factory=dict)
    mixtures: dict[str, Mixture] = field(default_factory=dict)

    @property
    def entries(self) -> dict[str, tuple[str, str]]:
        """Vector and metric of each entry."""
        return {entry_name(vector, metric): (vector, metric) for vector, made in self.prototypes.items() for metric in made}

    @property
    def names(self) -> list[str]:
        """All that has probabilities: entries and mixtures."""
        return [*self.entries, *self.mixtures]

    def entries_of(self, name: str) -> list[str]:
        """Returns the entries that an entry or mixture needs.

        Raises:
            InvalidInputError: If there is none of that name.
        """
        if name in self.mixtures:
            return self.mixtures[name].entries
        if name not in self.entries:
            raise InvalidInputError(f"there is no moderator {name!r}; there are {', '.join(self.names)}")
        return [name]

    def vectors_of(self, name: str) -> list[str]:
        """Returns the vectors that an entry or mixture needs."""
        return [self.entries[entry][0] for entry in self.entries_of(name)]

    def part_of(self, name: str) -> "PrototypeGrid":
        """Returns what an entry or mixture needs, and nothing else."""
        made: dict[str, dict[str, Prototypes]] = {}
        for entry in self.entries_of(name):
            vector, metric = self.entries[entry]
            made[vector] = {metric: self.prototypes[vector][metric]}
        return PrototypeGrid(made, {name: self.mixtures[name]} if name in self.mixtures else {})

    def distances(self, vector: str, rows: Tensor, metrics: Sequence[str] | None = None) -> dict[str, Float64[Tensor, "n k"]]:
        """Returns the distances of a vector's rows [n, D], by entry; of all its metrics, or of some."""
        made = self.prototypes[vector]
        return {entry_name(vector, metric): made[metric].distances(rows) for metric in (made if metrics is None else metrics)}

    def log_probabilities(self, name: str, distances: Distances) -> Float64[Tensor, "n k"]:
        """Returns the log of each class's probability by an entry or mixture, from the distances of (at least) its entries."""
        each = []
        for entry in self.entries_of(name):
            vector, metric = self.entries[entry]
            each.append(self.prototypes[vector][metric].log_probabilities_at(distances[entry]))
        if name not in self.mixtures:
            return each[0]
        return self.mixtures[name].weights.probabilities(torch.stack(each, dim=1).exp()).log()


def entry_name(vector: str, metric: str) -> str:
    """Returns what a vector by a metric is called."""
    return f"{vector} {metric}"


def mixture_name(aggregation: str, metric: str) -> str:
    """Returns what the mixture of an aggregation's layers by a metric is called."""
    return f"{MLPM}/{aggregation} {metric}"


def by_aggregation(vectors: Sequence[str]) -> dict[str, list[str]]:
    """Returns the vectors of each aggregation, in their order: "mean" of "resid_post.1/mean" and "resid_post.2/mean"."""
    found: dict[str, list[str]] = {}
    for vector in vectors:
        found.setdefault(vector.rpartition("/")[2], []).append(vector)
    return found


def checked_metrics(metrics: Sequence[str]) -> list[str]:
    """Returns metrics as they are.

    Raises:
        InvalidInputError: If there is none, or one that is not of METRICS or there twice.
    """
    wrong = [metric for metric in metrics if metric not in METRICS]
    if wrong or not metrics or len(set(metrics)) < len(metrics):
        raise InvalidInputError(f"metrics must be some of {', '.join(METRICS)}, each once; got {', '.join(metrics) or 'none'}")
    return list(metrics)


def prototypes_by(metric: str, moments: ClassMoments) -> Prototypes:
    """Makes prototypes by one of METRICS.

    Raises:
        InvalidInputError: If the covariance is not positive definite.
    """
    covariance = METRICS[metric]
    return Prototypes.euclidean(moments) if covariance is None else Prototypes.mahalanobis(moments, covariance)


def scores_of(log_probabilities: Float64[Tensor, "n k"]) -> Float64[Tensor, "n j"]:
    """Returns what metrics of probes take: of two classes the log-odds of the second [n, 1], of more the log-probabilities [n, K].

    Log-odds have digits where the probability is 0 or 1 to the last bit.
    """
    if log_probabilities.shape[1] > 2:
        return log_probabilities
    return log_probabilities[:, 1:] - log_probabilities[:, :1]
