"""The area under the ROC curve of many probes at once, and under many weightings of their samples: what a bootstrap asks for."""

import torch
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor

from exactivations.lit_modules.probes.probe_inputs import UndefinedMetricError, class_numbers, finite, refuse_missing_class
from exactivations.store.errors import InvalidInputError


def batched_auroc(
    scores: Float[Tensor, "p n"], labels: Int64[Tensor, " n"], weights: Shaped[Tensor, "r n"] | None = None
) -> Float64[Tensor, " p"] | Float64[Tensor, "r p"]:
    """Returns the area under the ROC curve of P probes on the same samples, float64 [P], or [R, P] for R weightings.

    It is the share of pairs of a positive and a negative in which the positive has the higher score, a tie counting half, and a
    pair as much as the product of its weights. Pairs are counted exactly (of whole weights, up to 2^53), and divided once. Each
    probe's scores are sorted once, whatever the number of weightings. Memory is about three times that of the weights in float64.

    Args:
        scores: Finite floats [P, n], of any range.
        labels: int64 [n] of 0 and 1.
        weights: [R, n], 0 or more: how often each resample holds each sample.

    Raises:
        UndefinedMetricError: If there are no positives or no negatives, or all of them have the weight 0.
        InvalidInputError: If the shapes or values are others.
    """
    if scores.ndim != 2:
        raise InvalidInputError(f"scores must be [P, n], a row for each probe, got {list(scores.shape)}: scores[None] is one probe")
    scores, labels = finite("scores", scores), class_numbers(labels, 2, scores.shape[1])
    refuse_missing_class(labels, 2)
    is_positive = labels == 1
    positives, (negatives, order) = scores[:, is_positive].contiguous(), scores[:, ~is_positive].sort(dim=1)
    # Negatives below a positive, and those not above it: half of both together are its wins, which is what midranks count.
    below, up_to = torch.searchsorted(negatives, positives), torch.searchsorted(negatives, positives, right=True)
    if weights is None:
        return (below + up_to).sum(1).double() / (2 * positives.shape[1] * negatives.shape[1])
    by_sample = _weights(weights, len(labels)).mT  # a sample's weights side by side: it is samples that are picked and summed
    of_positives, of_negatives = by_sample[is_positive], by_sample[~is_positive]
    for number, of_class in enumerate((of_negatives, of_positives)):
        if not (totals := of_class.sum(0)).all():
            resample = int((totals == 0).nonzero()[0])
            raise UndefinedMetricError(f"AUROC is undefined in row {resample} of the weights: class {number} weighs nothing")
    n_pairs = of_positives.sum(0) * of_negatives.sum(0)
    areas = torch.empty(len(weights), len(scores), dtype=torch.float64)
    cumulated = torch.zeros(len(of_negatives) + 1, len(weights), dtype=torch.float64)
    for probe in range(len(scores)):
        torch.cumsum(of_negatives[order[probe]], 0, out=cumulated[1:])
        wins = cumulated[below[probe]].add_(cumulated[up_to[probe]])
        areas[:, probe] = wins.mul_(of_positives).sum(0) / (2 * n_pairs)
    return areas


def _weights(weights: Shaped[Tensor, "r n"], n_samples: int) -> Float64[Tensor, "r n"]:
    if weights.ndim != 2 or weights.shape[1] != n_samples or not len(weights):
        raise InvalidInputError(f"weights must be [R, {n_samples}], a row for each resample, got {list(weights.shape)}")
    values = finite("weights", weights.detach().to("cpu", torch.float64))
    if values.min() < 0:
        raise InvalidInputError(f"weights must be 0 or more, found {float(values.min()):g}")
    return values
