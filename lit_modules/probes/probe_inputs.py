"""What the metrics of probes accept: tensors on any device and of any float dtype, which are checked and taken to the host."""

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from exactivations.store.errors import InvalidInputError

SUM_TOLERANCE = 1e-5
"""How far the probabilities of a sample may be from 1 in sum: a softmax in float32 over some hundred classes is that close."""


class UndefinedMetricError(InvalidInputError):
    """A metric that these samples do not define, because a class is missing or a value never varies."""


def finite(name: str, values: Tensor) -> Float64[Tensor, "..."]:
    """Returns floats in float64 on the host; `name` is theirs in an error.

    Raises:
        InvalidInputError: If they are not of a float dtype, none at all, or not finite.
    """
    if not values.is_floating_point() or not values.numel():
        raise InvalidInputError(f"{name} must be floats of at least one sample, got {values.dtype} {list(values.shape)}")
    values = values.detach().to("cpu", torch.float64)
    if not torch.isfinite(values).all():
        where = (~torch.isfinite(values)).nonzero()[0].tolist()
        raise InvalidInputError(f"{name}{where} is {values[tuple(where)].item()}: find out what made it, or leave the sample out")
    return values


def class_numbers(labels: Tensor, n_classes: int, n_samples: int) -> Int64[Tensor, " n"]:
    """Returns class numbers on the host.

    Raises:
        InvalidInputError: If they are not int64 [n_samples] from 0 to n_classes - 1.
    """
    if labels.dtype != torch.int64 or labels.shape != (n_samples,):
        raise InvalidInputError(
            f"labels must be class numbers int64 [{n_samples}], one a sample, got {labels.dtype} {list(labels.shape)}"
        )
    labels = labels.detach().cpu()
    lowest, highest = (int(value) for value in torch.aminmax(labels))
    if lowest < 0 or highest >= n_classes:
        raise InvalidInputError(f"labels must be from 0 to {n_classes - 1} for {n_classes} classes, found {lowest} to {highest}")
    return labels


def refuse_missing_class(labels: Int64[Tensor, " n"], n_classes: int) -> None:
    """Raises UndefinedMetricError, naming them, if samples of a class are missing."""
    missing = (torch.bincount(labels, minlength=n_classes) == 0).nonzero().flatten().tolist()
    if missing:
        raise UndefinedMetricError(
            f"the metric is undefined: none of {len(labels)} samples is of class {', '.join(map(str, missing))} (of {n_classes} "
            "classes); evaluate on samples of every class"
        )


def probabilities_of(probabilities: Tensor, labels: Tensor) -> tuple[Float64[Tensor, "n ..."], Int64[Tensor, " n"]]:
    """Returns probabilities [n] of the positive class of two, or [n, K] of K > 2 classes, and the class numbers [n].

    Raises:
        InvalidInputError: If they are not probabilities, or do not fit the labels.
    """
    values = finite("probabilities", probabilities)
    if values.ndim not in (1, 2) or (values.ndim == 2 and values.shape[1] < 2):
        raise InvalidInputError(f"probabilities must be [n], or [n, K] for K >= 2 classes, got {list(values.shape)}")
    if values.min() < 0 or values.max() > 1:
        raise InvalidInputError(
            f"probabilities must be from 0 to 1, found {float(values.min()):g} to {float(values.max()):g}: of scores, "
            "take the sigmoid or softmax"
        )
    n_classes = 2 if values.ndim == 1 else values.shape[1]
    labels = class_numbers(labels, n_classes, len(values))
    if values.ndim == 2 and (off := (values.sum(1) - 1).abs()).max() > SUM_TOLERANCE:
        sample = int(off.argmax())
        raise InvalidInputError(f"the probabilities of sample {sample} must sum to 1, they sum to {float(values[sample].sum()):g}")
    return values[:, 1].contiguous() if values.ndim == 2 and n_classes == 2 else values, labels


def real_values(predictions: Tensor, labels: Tensor) -> tuple[Float64[Tensor, " n"], Float64[Tensor, " n"]]:
    """Returns predictions and real-valued labels [n].

    Raises:
        InvalidInputError: If they are not finite floats [n], the same number of them.
    """
    if predictions.ndim != 1 or labels.shape != predictions.shape:
        raise InvalidInputError(f"predictions and labels must both be [n], got {list(predictions.shape)} and {list(labels.shape)}")
    return finite("predictions", predictions), finite("labels", labels)


def refuse_constant(name: str, values: Float64[Tensor, " n"]) -> None:
    """Raises UndefinedMetricError if all values are the same."""
    if values.min() == values.max():
        raise UndefinedMetricError(f"the metric is undefined: the {name} of all {len(values)} samples are {float(values[0]):g}")
