"""Probes that are linear in a vector, fitted exactly: every strength of regularisation and every variant of the labels at once."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from exactivations.lit_modules.probes.logistic import fit_logistic

SINGLE_FROM = 2**26
"""Values from which on a matrix of rows that came in single or half precision is not made double: 512 MiB in double."""
ROWS_OF_BLOCK = 65536


@dataclass(frozen=True)
class LinearProbes:
    """Probes of one vector: V variants of the labels x S strengths.

    Attributes:
        mean: float64 [d], of the training rows.
        scale: float64 [d], their standard deviation; 1 where they do not vary, or where the kind does not scale.
        weight: float64 [V, S, K', d], of rows that are standardised so. K' is 1 for two classes and for values, else K.
        bias: float64 [V, S, K'].
    """

    mean: Float64[Tensor, " d"]
    scale: Float64[Tensor, " d"]
    weight: Float64[Tensor, "v s k d"]
    bias: Float64[Tensor, "v s k"]

    def to(self, device: torch.device | str) -> "LinearProbes":
        """Returns them on a device."""
        return LinearProbes(self.mean.to(device), self.scale.to(device), self.weight.to(device), self.bias.to(device))

    def scores(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "v s n k"]:
        """Returns logits (of two classes: of the second), or predicted values, float32, of rows as they are stored."""
        v, s, k, width = self.weight.shape
        weight = (self.weight / self.scale).reshape(v * s * k, width)
        blocks = [(block.double() - self.mean) @ weight.T for block in torch.split(rows, ROWS_OF_BLOCK)]
        flat = torch.cat([(block + self.bias.flatten()).float() for block in blocks])
        return flat.T.reshape(v, s, k, len(rows)).mT


Fit = Callable[[Float[Tensor, "n d"], Shaped[Tensor, "v n"], int, list[float], Float64[Tensor, "v n"] | None], LinearProbes]
"""Takes training rows, labels of V variants, the number of classes (0 for values), strengths, and weights of the samples."""


@torch.no_grad()
def logistic_probes(
    rows: Float[Tensor, "n d"],
    labels: Shaped[Tensor, "v n"],
    n_classes: int,
    strengths: list[float],
    sample_weight: Float64[Tensor, "v n"] | None = None,
) -> LinearProbes:
    """Fits logistic regression on standardised rows to its optimum; strengths are scikit-learn's C. See `fit_logistic`."""
    mean, scale, standard = standardised(rows)
    fit = fit_logistic(
        standard, labels, n_classes, torch.tensor(strengths, dtype=torch.float64, device=rows.device), sample_weight=sample_weight
    )
    return LinearProbes(mean, scale, fit.weight, fit.bias)


@torch.no_grad()
def mass_mean_probes(
    rows: Float[Tensor, "n d"],
    labels: Shaped[Tensor, "v n"],
    n_classes: int,
    strengths: list[float],
    sample_weight: Float64[Tensor, "v n"] | None = None,
) -> LinearProbes:
    """Takes the difference of the classes' means for the direction (Marks and Tegmark, arXiv 2310.06824); rows are not scaled.

    For K > 2 the direction of a class is its mean less the mean over classes. There is nothing to regularise, so there must be one
    strength, which is for the last step: how far along the directions a row lies is made a logit by logistic regression on that
    alone.
    """
    assert len(strengths) == 1
    mean = rows.double().mean(dim=0)
    centred = rows.double() - mean
    weights, biases = [], []
    for variant, numbers in enumerate(labels):
        weight = None if sample_weight is None else sample_weight[variant]
        means = torch.stack([centred[numbers == number].mean(dim=0) for number in range(n_classes)])
        directions = means[1:] - means[:1] if n_classes == 2 else means - means.mean(dim=0)
        along = centred @ directions.T
        spread = along.std(dim=0, correction=0)
        spread = torch.where(spread > 0, spread, 1.0)
        fit = fit_logistic(
            along / spread,
            numbers[None],
            n_classes,
            torch.tensor(strengths, dtype=torch.float64, device=rows.device),
            sample_weight=weight,
        )
        weights.append(fit.weight[0, 0] / spread @ directions)
        biases.append(fit.bias[0, 0])
    return LinearProbes(mean, torch.ones_like(mean), torch.stack(weights)[:, None], torch.stack(biases)[:, None])


@torch.no_grad()
def ridge_probes(
    rows: Float[Tensor, "n d"],
    labels: Shaped[Tensor, "v n"],
    n_classes: int,
    strengths: list[float],
    sample_weight: Float64[Tensor, "v n"] | None = None,
) -> LinearProbes:
    """Fits ridge regression of real values on standardised rows; alpha, scikit-learn's, is 1 / strength."""
    mean, scale, standard = standardised(rows)
    values = labels.double()
    share = torch.full_like(values[:1], 1.0) if sample_weight is None else sample_weight[:1]
    share = share[0]
    centre = (share @ standard.double()) / share.sum()
    means = values @ share / share.sum()
    left, singular, right = torch.linalg.svd((standard.double() - centre) * share.sqrt()[:, None], full_matrices=False)
    along = ((values - means[:, None]) * share.sqrt()) @ left  # [v, r]
    alpha = 1 / torch.tensor(strengths, dtype=torch.float64, device=rows.device)
    shrunk = singular / (singular**2 + alpha[:, None])  # [s, r]
    weight = torch.einsum("vr,sr,rd->vsd", along, shrunk, right)
    return LinearProbes(mean, scale, weight[:, :, None], (means[:, None] - weight @ centre)[:, :, None])


def standardised(rows: Float[Tensor, "n d"]) -> tuple[Float64[Tensor, " d"], Float64[Tensor, " d"], Float[Tensor, "n d"]]:
    """Returns the mean and the standard deviation of rows (1 where they do not vary), and the rows standardised by them."""
    blocks = torch.split(rows, ROWS_OF_BLOCK)
    mean = torch.stack([block.double().sum(dim=0) for block in blocks]).sum(dim=0) / len(rows)
    variance = torch.stack([(block.double() - mean).square().sum(dim=0) for block in blocks]).sum(dim=0) / len(rows)
    varies = variance > (1e-12 * mean) ** 2
    scale = torch.where(varies, variance, 1.0).sqrt()
    dtype = torch.float32 if rows.dtype != torch.float64 and rows.numel() >= SINGLE_FROM else torch.float64
    standard = torch.cat([((block.double() - mean) / scale * varies).to(dtype) for block in blocks])
    return mean, scale, standard


KINDS: dict[str, Fit] = {"logistic": logistic_probes, "mass-mean": mass_mean_probes, "ridge": ridge_probes}
