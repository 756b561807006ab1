"""What the scores of probes are worth: probabilities of them, and the one number that strengths and layers are chosen by."""

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from exactivations.lit_modules.probes.auroc import batched_auroc
from exactivations.lit_modules.probes.probe_metrics import auroc, r2


def probabilities(scores: Float[Tensor, "*p n k"], n_classes: int) -> Float64[Tensor, "..."]:
    """Returns the probability of the second of two classes [.., n], of each of more [.., n, K], or values as they are [.., n]."""
    if n_classes > 2:
        return torch.softmax(scores.double(), dim=-1)
    return torch.sigmoid(scores[..., 0].double()) if n_classes == 2 else scores[..., 0].double()


def headline_of(n_classes: int) -> str:
    """Returns the metric that strengths and layers are chosen by: auroc, or for real values r2."""
    return "auroc" if n_classes else "r2"


def headline(scores: Float[Tensor, "p n k"], labels: Shaped[Tensor, " n"], n_classes: int) -> Float64[Tensor, " p"]:
    """Returns the AUROC of P probes on the same samples (of more than two classes, the mean of each against the rest), or R2."""
    if n_classes == 2:
        return batched_auroc(scores[..., 0], labels)
    metric = auroc if n_classes else r2
    return torch.tensor([metric(of_probe, labels) for of_probe in probabilities(scores, n_classes)], dtype=torch.float64)
