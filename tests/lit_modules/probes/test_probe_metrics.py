"""Metrics of probes are scikit-learn's and scipy's, ties and weights included; where they are undefined they are refused."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from sklearn import metrics as sk
from sklearn.preprocessing import label_binarize
from torchmetrics.functional.classification import binary_auroc

from exactivations.lit_modules.probes import probe_metrics as pm
from exactivations.lit_modules.probes.auroc import batched_auroc
from exactivations.lit_modules.probes.probe_inputs import UndefinedMetricError
from exactivations.store.errors import InvalidInputError

# Our own lines count exactly or sum at most some hundred products in float64.
CLOSE = 1e-12
# torchmetrics divides counts in float32 and, for average precision, sums some hundred quotients of them.
FLOAT32_CLOSE = 2e-6
# Few different values, so that many are tied; some are a rounding apart, which is no tie.
TIED = [0.0, 0.1, 0.25, 0.5, np.nextafter(0.5, 1), 0.75, np.nextafter(1, 0), 1.0]
NEEDS_ALL_CLASSES = ["auroc", "average_precision", "balanced_accuracy", "f1"]


@contextmanager
def float64_by_default():
    """Makes torchmetrics divide counts in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@st.composite
def binary_problems(draw, n_probes=1):
    n = draw(st.integers(2, 40))
    labels = draw(arrays(np.int64, n, elements=st.integers(0, 1)))
    assume(0 < labels.sum() < n)
    scores = draw(arrays(np.float64, (n_probes, n), elements=st.sampled_from(TIED) | st.floats(0, 1)))
    return scores, labels


def multiclass_problem(seed, n=300, n_classes=4):
    """Classes of unequal size, and probabilities of few different values that say something about them."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(n_classes, n, p=[0.5, 0.3, 0.15, 0.05])
    parts = rng.integers(1, 6, (n, n_classes)) + 4 * (np.arange(n_classes) == labels[:, None])
    return parts / parts.sum(1, keepdims=True), labels


def binary_problem(seed, n=300):
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.3).astype(np.int64)
    return np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0, 1).round(2), labels


def tensors(*values):
    return tuple(torch.from_numpy(np.asarray(value)) for value in values)


def refuses(message, error=InvalidInputError):
    return pytest.raises(error, match=message)


@settings(max_examples=100, deadline=None)
@given(binary_problems(n_probes=3))
def test_auroc_of_many_probes_is_that_of_each_in_scikit_learn_and_torchmetrics_ties_included(problem):
    scores, labels = problem
    found = batched_auroc(*tensors(scores, labels))
    assert found.dtype == torch.float64 and found.shape == (3,)
    with float64_by_default():
        by_torchmetrics = [float(binary_auroc(*tensors(row, labels))) for row in scores]
    assert found.tolist() == pytest.approx([sk.roc_auc_score(labels, row) for row in scores], abs=CLOSE)
    assert found.tolist() == pytest.approx(by_torchmetrics, abs=CLOSE)
    pairs = [[(p > q) + 0.5 * (p == q) for p in row[labels == 1] for q in row[labels == 0]] for row in scores]
    assert found.tolist() == [sum(of_row) / len(of_row) for of_row in pairs]  # to the bit: counted, and divided once


@settings(max_examples=75, deadline=None)
@given(data=st.data(), problem=binary_problems(n_probes=2), whole=st.booleans())
def test_weighted_auroc_is_scikit_learns_weights_of_zero_included(data, problem, whole):
    scores, labels = problem
    elements = st.integers(0, 3) if whole else st.sampled_from([0.0, 0.3]) | st.floats(0.01, 10)
    weights = data.draw(arrays(np.int64 if whole else np.float64, (4, len(labels)), elements=elements))
    assume(all((row[labels == number] > 0).any() for row in weights for number in (0, 1)))
    found = batched_auroc(*tensors(scores, labels, weights))
    assert found.shape == (4, 2)
    expected = [[sk.roc_auc_score(labels, row, sample_weight=weight) for row in scores] for weight in weights]
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE)
    if whole:  # a weight is as many copies, to the bit
        copies = [np.repeat(np.arange(len(labels)), weight) for weight in weights]
        repeated = torch.stack([batched_auroc(*tensors(scores[:, rows], labels[rows])) for rows in copies])
        assert torch.equal(found, repeated)


def test_auroc_of_scores_is_unmoved_by_what_keeps_their_order_and_by_none_is_a_tie_made():
    scores, labels = tensors(*binary_problem(1))
    scores += torch.arange(len(scores)) * 1e-9
    # A sigmoid of these would be 1 for all: metrics that take logits for probabilities would see ties.
    assert pm.auroc(1e6 * (1 + scores), labels) == pm.auroc(scores, labels)
    assert pm.auroc(-scores, labels) == pytest.approx(1 - pm.auroc(scores, labels), abs=CLOSE)
    assert pm.auroc(scores.float(), labels) == pm.auroc(scores.float().double(), labels)


def test_a_class_that_is_missing_or_weighs_nothing_is_named():
    scores, labels = torch.rand(2, 6), torch.tensor([0, 1, 0, 1, 1, 0])
    with refuses("none of 6 samples is of class 0", UndefinedMetricError):
        batched_auroc(scores, torch.ones(6, dtype=torch.int64))
    with refuses("none of 6 samples is of class 1", UndefinedMetricError):
        batched_auroc(scores, torch.zeros(6, dtype=torch.int64))
    with refuses("row 1 of the weights: class 1 weighs nothing", UndefinedMetricError):
        batched_auroc(scores, labels, torch.stack([torch.ones(6), 1.0 - labels]))
    with refuses("row 0 of the weights: class 0 weighs nothing", UndefinedMetricError):
        batched_auroc(scores, labels, labels[None])


def test_shapes_and_values_that_auroc_does_not_take_are_named():
    scores, labels = torch.rand(2, 6), torch.tensor([0, 1, 0, 1, 1, 0])
    with refuses(r"scores\[None\] is one probe"):
        batched_auroc(scores[0], labels)
    with refuses(r"int64 \[6\], one a sample, got torch.int64 \[5\]"):
        batched_auroc(scores, labels[:5])
    with refuses("got torch.float32"):
        batched_auroc(scores, labels.float())
    with refuses("0 to 1 for 2 classes, found 0 to 2"):
        batched_auroc(scores, 2 * labels)
    with refuses(r"scores\[1, 3\] is nan"):
        batched_auroc(scores.index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(torch.nan)), labels)
    with refuses("scores must be floats"):
        batched_auroc(scores.long(), labels)
    with refuses(r"weights must be \[R, 6\]"):
        batched_auroc(scores, labels, torch.ones(6))
    with refuses("weights must be 0 or more, found -1"):
        batched_auroc(scores, labels, -torch.ones(1, 6))


@settings(max_examples=40, deadline=None)
@given(binary_problems())
def test_metrics_of_two_classes_are_scikit_learns(problem):
    (scores,), labels = problem
    found = pm.classification_metrics(*tensors(scores, labels))
    called = scores > 0.5
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(labels, scores), abs=CLOSE)
    assert found["average_precision"] == pytest.approx(sk.average_precision_score(labels, scores), abs=FLOAT32_CLOSE)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, called), abs=FLOAT32_CLOSE)
    assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(labels, called), abs=FLOAT32_CLOSE)
    assert found["f1"] == pytest.approx(sk.f1_score(labels, called), abs=FLOAT32_CLOSE)
    assert found["brier"] == pytest.approx(sk.brier_score_loss(labels, scores), abs=CLOSE)
    assert list(found) == list(pm.CLASSIFICATION)
    assert pm.classification_metrics(*tensors(np.stack([1 - scores, scores], 1), labels)) == found


@pytest.mark.parametrize("seed", range(5))
def test_metrics_of_many_classes_are_scikit_learns(seed):
    probabilities, labels = multiclass_problem(seed)
    found = pm.classification_metrics(*tensors(probabilities, labels))
    called, one_hot = probabilities.argmax(1), label_binarize(labels, classes=range(4))
    each = [sk.roc_auc_score(one_hot[:, number], probabilities[:, number]) for number in range(4)]
    assert found["auroc"] == pytest.approx(np.mean(each), abs=CLOSE)
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(labels, probabilities, multi_class="ovr"), abs=CLOSE)
    expected = {
        "average_precision": sk.average_precision_score(one_hot, probabilities, average="macro"),
        "accuracy": sk.accuracy_score(labels, called),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, called),
        "f1": sk.f1_score(labels, called, average="macro"),
        "brier": sk.brier_score_loss(labels, probabilities),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=FLOAT32_CLOSE)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_calibration_error_is_the_mean_gap_between_confidence_and_truth_in_bins(n_classes):
    if n_classes == 2:
        confidence, right = binary_problem(0)
        found = pm.calibration_error(*tensors(confidence, right))
    else:
        probabilities, labels = multiclass_problem(0)
        confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
        found = pm.calibration_error(*tensors(probabilities, labels))
    bins = np.digitize(confidence, np.arange(1, 16) / 15)
    gaps = [abs((confidence - right)[bins == number].sum()) for number in range(16)]
    assert found == pytest.approx(sum(gaps) / len(right), abs=FLOAT32_CLOSE)
    assert found > 0.01


@pytest.mark.parametrize("name", pm.CLASSIFICATION)
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_metric_is_refused_where_a_class_that_it_needs_is_missing(name, missing):
    probabilities, labels = multiclass_problem(0)
    there = labels != missing
    probabilities, labels = tensors(probabilities[there], labels[there])
    if name not in NEEDS_ALL_CLASSES:
        assert np.isfinite(pm.CLASSIFICATION[name](probabilities, labels))
        return
    with refuses(rf"is of class {missing} \(of 4 classes\)", UndefinedMetricError):
        pm.CLASSIFICATION[name](probabilities, labels)
    if missing < 2:
        one_class = torch.full_like(labels, 1 - missing)
        with refuses(f"is of class {missing}", UndefinedMetricError):
            pm.CLASSIFICATION[name](probabilities[:, 0], one_class)
    with refuses(f"is of class {missing}", UndefinedMetricError):
        pm.classification_metrics(probabilities, labels)


@pytest.mark.parametrize("name", [name for name in pm.CLASSIFICATION if name != "auroc"])
def test_what_are_no_probabilities_is_refused(name):
    metric, labels = pm.CLASSIFICATION[name], torch.tensor([0, 1, 0])
    with refuses("found -1 to 2: of scores, take the sigmoid or softmax"):
        metric(torch.tensor([-1.0, 2.0, 0.5]), labels)
    with refuses("probabilities of sample 1 must sum to 1, they sum to 0.9"):
        metric(torch.tensor([[0.5, 0.5], [0.5, 0.4], [1.0, 0.0]]), labels)
    with refuses(r"must be \[n\], or \[n, K\] for K >= 2 classes, got \[3, 1\]"):
        metric(torch.rand(3, 1), labels)
    with refuses(r"probabilities\[1\] is inf"):
        metric(torch.tensor([0.5, torch.inf, 0.5]), labels)
    with refuses(r"floats of at least one sample, got torch.float32 \[0\]"):
        metric(torch.zeros(0), labels[:0])


def test_a_softmax_in_float32_over_many_classes_sums_to_one_well_enough():
    logits = 5 * torch.randn(2000, 300, generator=torch.Generator().manual_seed(0))
    assert 0 <= pm.accuracy(logits.softmax(1), logits.argmax(1)) <= 1


@settings(max_examples=100, deadline=None)
@given(problem=binary_problems(), max_fpr=st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.9]))
def test_no_threshold_catches_more_positives_for_so_few_false_positives(problem, max_fpr):
    (scores,), labels = problem
    threshold = pm.threshold_at_fpr(*tensors(scores, labels), max_fpr)
    rate = pm.false_positive_rate_above(*tensors(scores, labels), threshold)
    assert rate == (scores[labels == 0] > threshold).mean() <= max_fpr
    others = [at for at in [-1.0, *scores] if (scores[labels == 0] > at).mean() <= max_fpr]
    best = max((scores[labels == 1] > at).mean() for at in others)
    assert pm.recall_above(*tensors(scores, labels), threshold) == best


def test_negatives_that_share_the_score_at_the_threshold_stay_below_it_together():
    scores = torch.tensor([0.9] * 3 + [0.5] * 197, dtype=torch.float64)
    benign = torch.zeros(200, dtype=torch.int64)
    assert pm.threshold_at_fpr(scores, benign, 0.01) == 0.9  # two may lie above: three do not fit
    assert pm.threshold_at_fpr(scores, benign, 0.015) == 0.5
    assert pm.false_positive_rate_above(scores, benign, 0.5) == 0.015


@pytest.mark.parametrize("n", [99, 100, 101, 200, 300, 700, 1000, 4900])
def test_one_percent_is_counted_as_it_is_written(n):
    threshold = pm.threshold_at_fpr(torch.arange(n).double(), torch.zeros(n, dtype=torch.int64), 0.01)
    assert threshold == n - 1 - n // 100  # of 300, for one, 0.01 * 300 is not 3 in all roundings


def test_the_rate_that_is_reached_on_another_set_is_reported_beside_the_recall():
    fixing, test = (tensors(*binary_problem(seed, n=3000)) for seed in (0, 1))
    threshold = pm.threshold_at_fpr(*fixing, 0.01)
    found = pm.classification_metrics(*test, threshold=threshold)
    called = test[0] > threshold
    assert found["recall_at_threshold"] == pytest.approx(called[test[1] == 1].double().mean().item(), abs=CLOSE)
    assert found["false_positive_rate_at_threshold"] == pytest.approx(called[test[1] == 0].double().mean().item(), abs=CLOSE)
    assert found["false_positive_rate_at_threshold"] != pm.false_positive_rate_above(*fixing, threshold)
    columns = torch.stack([1 - test[0], test[0]], 1)
    assert pm.classification_metrics(columns, test[1], threshold=threshold) == found


def test_a_threshold_needs_negatives_and_what_is_held_against_it_too():
    scores, ones = torch.rand(4), torch.ones(4, dtype=torch.int64)
    with refuses("threshold for a rate of false positives is undefined: none of 4 samples is of class 0", UndefinedMetricError):
        pm.threshold_at_fpr(scores, ones)
    with refuses("false positive rate is undefined: none of 4 samples is of class 0", UndefinedMetricError):
        pm.false_positive_rate_above(scores, ones, 0.5)
    with refuses("recall is undefined: none of 4 samples is of class 1", UndefinedMetricError):
        pm.recall_above(scores, 0 * ones, 0.5)
    with refuses("from 0 to below 1, got 1"):
        pm.threshold_at_fpr(scores, 0 * ones, 1)
    with refuses(r"is of two classes, and scores must be \[n\], got \[300, 4\]"):
        pm.classification_metrics(*tensors(*multiclass_problem(0)), threshold=0.5)


@settings(max_examples=75, deadline=None)
@given(data=st.data(), n=st.integers(3, 60), unit=st.sampled_from([1e-6, 1.0, 1e6]))
def test_metrics_of_real_values_are_scikit_learns_and_scipys_in_any_unit(data, n, unit):
    values = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0]) | st.floats(-5, 5).map(lambda value: round(value, 3))
    predictions, labels = (data.draw(arrays(np.float64, n, elements=values)) * unit for _ in range(2))
    assume(np.ptp(predictions) > 0 and np.ptp(labels) > 0)
    found = pm.regression_metrics(*tensors(predictions, labels))
    assert list(found) == list(pm.REGRESSION)
    # Values differ by at least 1e-3 of the unit and are at most 5: their squared deviations lose some digits of the sixteen.
    assert found["r2"] == pytest.approx(sk.r2_score(labels, predictions), rel=1e-9, abs=1e-9)
    assert found["pearson"] == pytest.approx(stats.pearsonr(predictions, labels).statistic, abs=1e-9)
    assert found["spearman"] == pytest.approx(stats.spearmanr(predictions, labels).statistic, abs=1e-9)
    assert found["mean_absolute_error"] == pytest.approx(sk.mean_absolute_error(labels, predictions), rel=CLOSE)


def test_correlations_of_what_never_varies_are_refused():
    varied, constant = torch.tensor([0.1, 0.2, 0.4]), torch.full((3,), 0.1)
    for metric in (pm.r2, pm.pearson, pm.spearman):
        with refuses("the labels of all 3 samples are 0.1", UndefinedMetricError):
            metric(varied, constant)
    for metric in (pm.pearson, pm.spearman):
        with refuses("the predictions of all 3 samples are 0.1", UndefinedMetricError):
            metric(constant, varied)
    assert pm.r2(constant, varied) < 0  # a poor prediction, but one
    with refuses("rescale labels", UndefinedMetricError):
        pm.r2(varied, 1e-300 * varied.double())
    with refuses(r"must both be \[n\], got \[3\] and \[2\]"):
        pm.mean_absolute_error(varied, varied[:2])
    with refuses("labels must be floats"):
        pm.r2(varied, torch.tensor([0, 1, 2]))
