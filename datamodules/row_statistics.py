"""What rows are normalised by: their mean, mean squared norm and variance."""

from dataclasses import dataclass

import torch
from torch import Tensor

from exactivations.store.moments import Moments


@dataclass(frozen=True)
class RowStatistics:
    """Statistics of rows, taken in float64.

    Attributes:
        n_tokens: Of so many.
        mean: float64 [D].
        mean_squared_norm: The mean of |x|². Rows divided by its root have 1; times the root of D, they have D.
        total_variance: The mean of |x - mean|²: what a reconstruction must explain.
    """

    n_tokens: int
    mean: Tensor
    mean_squared_norm: float
    total_variance: float

    @classmethod
    def of(cls, moments: Moments) -> "RowStatistics":
        """Returns those of moments of one bin, which keep squares."""
        assert moments.squares is not None and len(moments.count) == 1, "squares of one bin are needed"
        mean = moments.mean[0]
        variance = float(moments.squares[0].sum()) / int(moments.count[0])
        return cls(int(moments.count[0]), torch.from_numpy(mean), variance + float(mean @ mean), variance)
