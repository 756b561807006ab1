"""How alike rows are: cosines of all pairs, and what they come to on average."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from exactivations.store.errors import InvalidInputError


def pairwise_cosine(rows: Float[Tensor, "n d"]) -> Float64[Tensor, "n n"]:
    """Returns the cosine of each row to each other, float64 [n, n]: symmetric to the bit, from -1 to 1, with 1 on the diagonal.

    Args:
        rows: [n, d], of any dtype and length; computed in float64.

    Raises:
        InvalidInputError: If there are fewer than two rows, or one is zero or not finite, with its number.
    """
    if rows.ndim != 2 or len(rows) < 2:
        raise InvalidInputError(f"pairs are of rows [n, d] with n at least 2, got shape {list(rows.shape)}")
    values = rows.detach().to("cpu", torch.float64)
    finite = torch.isfinite(values).all(dim=1)
    if not finite.all():
        raise InvalidInputError(f"row {_first(~finite)} of {len(rows)} is not finite: it has no cosine to others. Leave it out")
    nonzero = (values != 0).any(dim=1)
    if not nonzero.all():
        raise InvalidInputError(f"row {_first(~nonzero)} of {len(rows)} is zero: it has no direction. Leave it out")
    values = values / values.abs().amax(dim=1, keepdim=True)  # so no square can overflow, or vanish
    unit = values / torch.linalg.vector_norm(values, dim=1, keepdim=True)
    product = unit @ unit.T
    cosines: Tensor = ((product + product.T) / 2).clamp(-1, 1)  # rounding may part the two halves, and pass 1 by a last bit
    cosines.fill_diagonal_(1.0)
    return cosines


def mean_off_diagonal(cosines: Float64[Tensor, "n n"]) -> float:
    """Returns the mean of a matrix [n, n] without its diagonal, n at least 2.

    Of `pairwise_cosine` it is how alike the rows are: near 1 if they all share a direction, as rows that were not centred do.

    Raises:
        InvalidInputError: If there is no pair in it, or it is not square.
    """
    n = len(cosines) if cosines.ndim else 0
    if cosines.shape != (n, n) or n < 2:
        raise InvalidInputError(f"a matrix of pairs is [n, n] with n at least 2, got shape {list(cosines.shape)}")
    others = ~torch.eye(n, dtype=torch.bool)
    return float(cosines.double()[others].mean())


def _first(wrong: Tensor) -> int:
    return int(wrong.nonzero()[0, 0])
