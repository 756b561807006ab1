"""Erasing what a linear probe can tell: LEACE (Belrose et al. 2023, arXiv 2306.03819), by its authors' package.

A probe that is trained again on erased rows says whether what it found was linear, and lay where it was erased. On the rows that
the eraser was made of every such probe is at chance by construction: only others show what is left. Of few rows much is: erasing
"has_docstring" by 100, 200, 400 and 1,000 functions of the demo took a probe of others from an AUROC of 0.97 to 0.83, 0.76, 0.68
and 0.57.
"""

from dataclasses import dataclass

import torch
from concept_erasure import LeaceEraser, LeaceFitter
from jaxtyping import Float64, Int64
from torch import Tensor
from torch.nn import functional

from exactivations.lit_modules.probes.probe_inputs import class_numbers, finite, refuse_missing_class
from exactivations.store.errors import InvalidInputError

NEGLIGIBLE = 1e-10  # singular values of the whitened covariance with the labels, and relative widths: below it they are rounding
LEFT_OVER = 1e-6  # what rounding may leave of a correlation


@dataclass(frozen=True)
class Eraser:
    """An affine map of rows after which the classes it was made of have the same mean."""

    leace: LeaceEraser

    def erased(self, rows: Float64[Tensor, "n d"]) -> Float64[Tensor, "n d"]:
        """Returns rows, on the host and standardised as those that it was made of, without what tells the classes apart."""
        out: Tensor = self.leace(rows)
        return out


@torch.no_grad()
def erase(rows: Float64[Tensor, "n d"], labels: Int64[Tensor, " n"], n_classes: int) -> Eraser:
    """Returns the eraser of some classes.

    After it, all classes have the same mean on these rows, and no linear probe, whatever its convex loss, does better on them than
    the shares of the classes. Of all affine maps that achieve this it changes these rows least, in the mean square and by any inner
    product. Other rows are changed more, the more dimensions there are for each row: have several times as many rows.

    Args:
        rows: Training rows, standardised: a dimension of less than about 1e-7 of the largest deviation is taken for rounding.
        labels: Class numbers.
        n_classes: K, at least 2.

    Raises:
        InvalidInputError: If rows are not finite, labels do not fit them, a class is missing, or a dimension could not be erased.
    """
    rows = finite("rows", rows)
    if n_classes < 2:
        raise InvalidInputError(f"there is nothing to erase of {n_classes} classes: at least 2 are needed")
    labels = class_numbers(labels, n_classes, len(rows))
    refuse_missing_class(labels, n_classes)
    indicators = functional.one_hot(labels, n_classes)[:, 1:].double()  # the first one is 1 minus the others
    # Not the package's defaults: its shrinkage can give a covariance with negative variances (of 50 white rows with 2 dimensions),
    # of which nothing is erased; its tolerance keeps small correlations; and without shrinkage the trace cannot grow.
    fitter = LeaceFitter(
        rows.shape[1], n_classes - 1, dtype=torch.float64, shrinkage=False, constrain_cov_trace=False, svd_tol=NEGLIGIBLE
    )
    eraser = Eraser(fitter.update(rows, indicators).eraser)
    _refuse_left_over(rows, eraser.erased(rows), indicators)
    return eraser


def _refuse_left_over(rows: Float64[Tensor, "n d"], erased: Float64[Tensor, "n d"], indicators: Float64[Tensor, "n k"]) -> None:
    """Raises InvalidInputError, naming the dimension, if the correlation of one with a class is more than rounding."""
    centred = indicators - indicators.mean(dim=0)
    width = (rows - rows.mean(dim=0)).norm(dim=0)
    width = width.clamp(min=NEGLIGIBLE * float(width.max()))  # a dimension that never varies has no correlation
    left = ((centred.mT @ (erased - erased.mean(dim=0))).abs() / centred.norm(dim=0)[:, None] / width).amax(dim=0)
    if not (left <= LEFT_OVER).all():
        raise InvalidInputError(
            f"dimension {int(left.argmax())} of the rows still has a correlation of {float(left.max()):.1g} with a class after "
            f"erasing, allowed are {LEFT_OVER:g}: it is too narrow beside others; standardise the rows first"
        )
