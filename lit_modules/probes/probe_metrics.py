"""How good a probe is on held-out samples: of its probabilities against classes, or of its predictions against real values.

A metric that the samples do not define (a class is missing, a value never varies) is an UndefinedMetricError; never NaN, never 0.
Where torchmetrics offers a metric it is used: it divides counts in float32, so that a value is good to about 1e-6. Lines of our own
are AUROC (`batched_auroc`, exact, for many probes at once), the Brier score (torchmetrics has none), R2 (torchmetrics takes squared
residuals of less than 1e-4 in all for a perfect fit, whatever the unit of the labels), and Spearman's ranks (for it adds 1e-6 to
the denominator, and sums ranks in 32 bits, which 65,536 equal values overflow).
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float64
from torch import Tensor
from torchmetrics.functional import classification, regression

from exactivations.lit_modules.probes.auroc import batched_auroc
from exactivations.lit_modules.probes.probe_inputs import (
    UndefinedMetricError,
    class_numbers,
    finite,
    probabilities_of,
    real_values,
    refuse_constant,
    refuse_missing_class,
)
from exactivations.store.errors import InvalidInputError

Metric = Callable[[Tensor, Tensor], float]
"""Takes what a probe says of n samples, and their labels."""

N_BINS = 15
"""Of the expected calibration error."""


def classification_metrics(probabilities: Tensor, labels: Tensor, *, threshold: float | None = None) -> dict[str, float]:
    """Returns every metric of CLASSIFICATION by name.

    Args:
        probabilities: Float [n] of the positive class (1) of two, or [n, K]; K = 2 is the same as its second column.
        labels: int64 [n], the class numbers.
        threshold: Of two classes, what `threshold_at_fpr` found on another set: adds "recall_at_threshold" and
            "false_positive_rate_at_threshold", the shares of this set's positives and negatives that lie above it.

    Raises:
        UndefinedMetricError: If a class is missing.
        InvalidInputError: If these are no probabilities or class numbers of as many samples.
    """
    values = {name: metric(probabilities, labels) for name, metric in CLASSIFICATION.items()}
    if threshold is not None:
        positive = probabilities[:, 1] if probabilities.ndim == 2 and probabilities.shape[1] == 2 else probabilities
        values["recall_at_threshold"] = recall_above(positive, labels, threshold)
        values["false_positive_rate_at_threshold"] = false_positive_rate_above(positive, labels, threshold)
    return values


def regression_metrics(predictions: Tensor, labels: Tensor) -> dict[str, float]:
    """Returns every metric of REGRESSION by name, of float predictions [n] of real-valued labels [n].

    Raises:
        UndefinedMetricError: If the labels, or the predictions, are all the same.
        InvalidInputError: If they are not finite floats of as many samples.
    """
    return {name: metric(predictions, labels) for name, metric in REGRESSION.items()}


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve of scores [n] of any range; of probabilities [n, K], the mean of each class against the rest."""
    if scores.ndim == 1:
        return float(batched_auroc(scores[None], labels))
    probabilities, labels = probabilities_of(scores, labels)
    if probabilities.ndim == 1:
        return float(batched_auroc(probabilities[None], labels))
    refuse_missing_class(labels, probabilities.shape[1])
    areas = [batched_auroc(column[None], (labels == number).long()) for number, column in enumerate(probabilities.mT)]
    return float(torch.cat(areas).mean())


def average_precision(probabilities: Tensor, labels: Tensor) -> float:
    """Average precision (the sum over thresholds, not interpolated); of K > 2 classes the mean of each against the rest."""
    probabilities, labels = _with_all_classes(probabilities, labels)
    if probabilities.ndim == 1:
        return float(classification.binary_average_precision(probabilities, labels, validate_args=False))
    n_classes = probabilities.shape[1]
    return float(
        classification.multiclass_average_precision(probabilities, labels, n_classes, average="macro", validate_args=False)
    )


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Share of samples whose most probable class is theirs; of two, the positive one above 0.5."""
    probabilities, labels = probabilities_of(probabilities, labels)
    if probabilities.ndim == 1:
        return float(classification.binary_accuracy(probabilities, labels, validate_args=False))
    return float(
        classification.multiclass_accuracy(probabilities, labels, probabilities.shape[1], average="micro", validate_args=False)
    )


def balanced_accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Mean over classes of the share of their samples that are found."""
    probabilities, labels = _with_all_classes(probabilities, labels)
    if probabilities.ndim == 1:  # torchmetrics averages over classes only if they are counted as classes
        return float(
            classification.multiclass_accuracy((probabilities > 0.5).long(), labels, 2, average="macro", validate_args=False)
        )
    return float(
        classification.multiclass_accuracy(probabilities, labels, probabilities.shape[1], average="macro", validate_args=False)
    )


def f1(probabilities: Tensor, labels: Tensor) -> float:
    """F1 of the positive class of two (above 0.5); of K > 2 classes the mean over them."""
    probabilities, labels = _with_all_classes(probabilities, labels)
    if probabilities.ndim == 1:
        return float(classification.binary_f1_score(probabilities, labels, validate_args=False))
    return float(
        classification.multiclass_f1_score(probabilities, labels, probabilities.shape[1], average="macro", validate_args=False)
    )


def brier(probabilities: Tensor, labels: Tensor) -> float:
    """Brier score: the mean of (p - label)^2; of K > 2 classes that of the squares summed over classes, 0 to 2."""
    probabilities, labels = probabilities_of(probabilities, labels)
    if probabilities.ndim == 1:
        return float((probabilities - labels).square().mean())
    truth = torch.nn.functional.one_hot(labels, probabilities.shape[1])
    return float((probabilities - truth).square().sum(1).mean())


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Expected calibration error in N_BINS bins of equal width: of the positive class of two; of K > 2, of the most probable one.

    It is torchmetrics': a probability of exactly 1 has a bin of its own.
    """
    probabilities, labels = probabilities_of(probabilities, labels)
    if probabilities.ndim == 1:
        return float(classification.binary_calibration_error(probabilities, labels, n_bins=N_BINS, validate_args=False))
    return float(
        classification.multiclass_calibration_error(
            probabilities, labels, probabilities.shape[1], n_bins=N_BINS, validate_args=False
        )
    )


def threshold_at_fpr(scores: Tensor, labels: Tensor, max_fpr: float = 0.01) -> float:
    """Returns the threshold above which most positives lie, while at most a share max_fpr of these negatives does.

    A sample is called positive if its score is greater than the threshold, which is the score of a negative: negatives that share
    it stay below together. Positives play no part, so that negatives alone will do. Fix it on another set than the one that is
    evaluated, and report the rate that is reached there: of n negatives that are drawn alike, a share of about
    (floor(max_fpr n) + 1) / (n + 1) lies above, which for fewer than 1 / max_fpr of them is more than max_fpr.

    Args:
        scores: Finite floats [n], of any range.
        labels: int64 [n] of 0 and 1.
        max_fpr: From 0 to below 1.

    Raises:
        UndefinedMetricError: If there are no negatives.
        InvalidInputError: If the shapes or values are others.
    """
    if not 0 <= max_fpr < 1:
        raise InvalidInputError(f"max_fpr is a share of negatives, from 0 to below 1, got {max_fpr}")
    negatives = _scores_of_class(0, scores, labels, "a threshold for a rate of false positives").sort(descending=True).values
    shares = torch.arange(len(negatives), dtype=torch.float64) / len(negatives)  # above each, if none were tied
    return float(negatives[int((shares <= max_fpr).sum()) - 1])


def recall_above(scores: Tensor, labels: Tensor, threshold: float) -> float:
    """Share of the positives whose score is greater than a threshold."""
    return float((_scores_of_class(1, scores, labels, "recall") > threshold).double().mean())


def false_positive_rate_above(scores: Tensor, labels: Tensor, threshold: float) -> float:
    """Share of the negatives whose score is greater than a threshold."""
    return float((_scores_of_class(0, scores, labels, "the false positive rate") > threshold).double().mean())


def r2(predictions: Tensor, labels: Tensor) -> float:
    """Coefficient of determination: 1 less the squared residuals as a share of the labels' squared deviations from their mean."""
    predictions, labels = real_values(predictions, labels)
    refuse_constant("labels", labels)
    return _number(1 - (labels - predictions).square().sum() / (labels - labels.mean()).square().sum())


def pearson(predictions: Tensor, labels: Tensor) -> float:
    """Pearson's correlation."""
    predictions, labels = real_values(predictions, labels)
    refuse_constant("labels", labels)
    refuse_constant("predictions", predictions)
    return _number(regression.pearson_corrcoef(predictions, labels))


def spearman(predictions: Tensor, labels: Tensor) -> float:
    """Spearman's correlation: Pearson's of the ranks, those of equal values being the mean of theirs."""
    predictions, labels = real_values(predictions, labels)
    refuse_constant("labels", labels)
    refuse_constant("predictions", predictions)
    return pearson(_midranks(predictions), _midranks(labels))


def mean_absolute_error(predictions: Tensor, labels: Tensor) -> float:
    """Mean absolute difference, in the unit of the labels."""
    return float(regression.mean_absolute_error(*real_values(predictions, labels)))


CLASSIFICATION: Mapping[str, Metric] = {
    "auroc": auroc,
    "average_precision": average_precision,
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "f1": f1,
    "brier": brier,
    "calibration_error": calibration_error,
}
REGRESSION: Mapping[str, Metric] = {
    "r2": r2,
    "pearson": pearson,
    "spearman": spearman,
    "mean_absolute_error": mean_absolute_error,
}


def _with_all_classes(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    probabilities, labels = probabilities_of(probabilities, labels)
    refuse_missing_class(labels, 2 if probabilities.ndim == 1 else probabilities.shape[1])
    return probabilities, labels


def _scores_of_class(number: int, scores: Tensor, labels: Tensor, what: str) -> Float64[Tensor, " m"]:
    if scores.ndim != 1:
        raise InvalidInputError(f"{what} is of two classes, and scores must be [n], got {list(scores.shape)}")
    scores, labels = finite("scores", scores), class_numbers(labels, 2, len(scores))
    if not (of_class := scores[labels == number]).numel():
        raise UndefinedMetricError(f"{what} is undefined: none of {len(labels)} samples is of class {number}")
    return of_class


def _number(value: Tensor) -> float:
    if not torch.isfinite(value):  # variances below float64's smallest number, or lost beside an outlier
        raise UndefinedMetricError(f"the metric is undefined: it came out as {float(value)}; rescale labels and predictions")
    return float(value)


def _midranks(values: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    ordered = values.sort().values
    return (torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True) + 1).double() / 2
