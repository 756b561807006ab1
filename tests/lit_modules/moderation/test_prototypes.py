"""Prototypes are scikit-learn's linear discriminant analysis, and the Mahalanobis distance as it is defined."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.special import softmax
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from exactivations.lit_modules.moderation.class_statistics import ClassStatistics
from exactivations.lit_modules.moderation.prototypes import Prototypes
from exactivations.store.errors import InvalidInputError

from .test_class_statistics import rows_of

EXACT = 1e-9  # both sides are float64; the condition numbers here are below 1e4

BOTH = pytest.mark.parametrize("n_classes", [2, 5])


def moments_of(rows, labels):
    labels = torch.as_tensor(labels)
    return ClassStatistics(int(labels.max()) + 1, rows.shape[1]).update(torch.as_tensor(rows), labels).result()


def scatter(rows, labels):
    """The within-class scatter W by definition, and the deviations."""
    deviations = rows - np.stack([rows[labels == number].mean(0) for number in range(labels.max() + 1)])[labels]
    return deviations.T @ deviations, deviations


def covariances(rows, labels):
    """Every estimator as it is published, from the rows themselves."""
    w, deviations = scatter(rows, labels)
    n, d, k = len(rows), rows.shape[1], labels.max() + 1
    s = w / (n - 1)
    return {
        "ridge": np.linalg.inv(d * np.linalg.inv((n - 1) * s + np.trace(s) * np.eye(d))),
        "ledoit-wolf": ledoit_wolf(deviations, assume_centered=True)[0],
        "empirical-n": w / n,
        "empirical-n-1": s,
        "empirical-n-k": w / (n - k),
    }


@BOTH
@pytest.mark.parametrize("covariance", ["ridge", "ledoit-wolf", "empirical-n", "empirical-n-1", "empirical-n-k"])
def test_distances_and_probabilities_are_those_of_the_published_covariance(covariance, n_classes):
    rows, labels = rows_of(3, 300, 10, n_classes, offset=100.0)
    new, _ = rows_of(3, 350, 10, n_classes, offset=100.0)
    moments = moments_of(rows, labels)
    found = Prototypes.mahalanobis(moments, covariance)
    expected = covariances(rows, labels)[covariance]
    factor = found.factor.numpy()
    assert np.linalg.norm(factor @ factor.T - expected) <= EXACT * np.linalg.norm(expected)
    assert np.array_equal(factor, np.tril(factor))
    distances = cdist(new, moments.means.numpy(), "mahalanobis", VI=np.linalg.inv(expected))
    np.testing.assert_allclose(found.distances(torch.from_numpy(new)).numpy(), distances, rtol=EXACT)
    probabilities = found.probabilities(torch.from_numpy(new))
    np.testing.assert_allclose(probabilities.numpy(), softmax(-(distances**2) / 2, axis=1), atol=EXACT)
    assert torch.equal(found.predict(torch.from_numpy(new)), torch.from_numpy(distances.argmin(1)))


@pytest.mark.parametrize("covariance", ["ridge", "ledoit-wolf"])
def test_fewer_rows_than_dimensions_need_a_shrinkage(covariance):
    rows, labels = rows_of(4, 30, 80, 2)
    moments = moments_of(rows, labels)
    expected = covariances(rows, labels)[covariance]
    distances = cdist(rows, moments.means.numpy(), "mahalanobis", VI=np.linalg.inv(expected))
    np.testing.assert_allclose(
        Prototypes.mahalanobis(moments, covariance).distances(torch.from_numpy(rows)).numpy(), distances, rtol=EXACT
    )
    for empirical in ("empirical-n", "empirical-n-1", "empirical-n-k"):
        with pytest.raises(InvalidInputError, match="at most 28 dimensions; take the covariance 'ridge' or 'ledoit-wolf'"):
            Prototypes.mahalanobis(moments, empirical)


@BOTH
def test_it_is_scikit_learns_linear_discriminant_analysis(n_classes):
    """Classes are of one size: given uniform priors, its solver weighs the classes' covariances by them and not by rows."""
    rows, _ = rows_of(5, 100 * n_classes, 12, n_classes)
    labels = np.arange(len(rows)) % n_classes
    rows[:, :n_classes] += np.eye(n_classes)[labels]
    moments = moments_of(rows, labels)
    uniform = np.full(n_classes, 1 / n_classes)
    shrinkage = moments.pooled.ledoit_wolf_shrinkage
    assert 0 < shrinkage < 1
    for covariance, amount in (("empirical-n", None), ("ledoit-wolf", shrinkage)):
        lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=amount, priors=uniform).fit(rows, labels)
        found = Prototypes.mahalanobis(moments, covariance)
        np.testing.assert_allclose(found.probabilities(torch.from_numpy(rows)).numpy(), lda.predict_proba(rows), atol=EXACT)
        assert np.array_equal(found.predict(torch.from_numpy(rows)).numpy(), lda.predict(rows))


@BOTH
def test_with_the_classes_shares_as_priors_it_is_scikit_learns_by_default(n_classes):
    rows, labels = rows_of(6, 400, 8, n_classes)
    keep = (labels != 0) | (np.arange(400) % 3 == 0)  # classes of unequal sizes
    rows, labels = rows[keep], labels[keep]
    shares = np.bincount(labels) / len(labels)
    found = Prototypes.mahalanobis(moments_of(rows, labels), "empirical-n", priors=shares.tolist())
    for solver in ("lsqr", "eigen"):
        lda = LinearDiscriminantAnalysis(solver=solver).fit(rows, labels)
        np.testing.assert_allclose(found.log_probabilities(torch.from_numpy(rows)).exp(), lda.predict_proba(rows), atol=EXACT)


def test_ledoit_wolfs_coefficient_is_scikit_learns_of_the_deviations():
    for seed, n, width in ((0, 40, 60), (1, 500, 7), (2, 200, 50)):
        rows, labels = rows_of(seed, n, width, 3, offset=1e3)
        _, deviations = scatter(rows, labels)
        assert moments_of(rows, labels).pooled.ledoit_wolf_shrinkage == pytest.approx(ledoit_wolf(deviations)[1], rel=1e-9)


def test_euclidean_prototypes_are_the_nearest_means_with_unit_variance():
    rows, labels = rows_of(7, 50, 6, 5)
    found = Prototypes.euclidean(moments_of(rows, labels))
    distances = cdist(rows, found.means.numpy())
    np.testing.assert_allclose(found.distances(torch.from_numpy(rows)).numpy(), distances, rtol=EXACT)
    np.testing.assert_allclose(found.probabilities(torch.from_numpy(rows)), softmax(-(distances**2) / 2, axis=1), atol=EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_rows_are_taken_as_they_are(dtype):
    rows, labels = rows_of(8, 200, 6, 2, offset=10.0)
    narrow = torch.from_numpy(rows).to(dtype)
    found, wide = (Prototypes.mahalanobis(moments_of(values, labels)) for values in (narrow, narrow.double()))
    assert torch.equal(found.distances(narrow), wide.distances(narrow.double()))
    assert found.distances(narrow).dtype == torch.float64


def test_neither_the_order_of_samples_nor_the_batches_matter():
    rows, labels = rows_of(9, 300, 20, 2, offset=1e4)
    order = np.random.default_rng(0).permutation(300)
    values = torch.from_numpy(rows)
    found, shuffled = (
        Prototypes.mahalanobis(moments_of(rows, labels)),
        Prototypes.mahalanobis(moments_of(rows[order], labels[order])),
    )
    together = found.log_probabilities(values)
    torch.testing.assert_close(shuffled.log_probabilities(values), together, rtol=1e-10, atol=1e-10)
    batches = torch.cat([found.log_probabilities(batch) for batch in values.split([64, 64, 64, 64, 44, 0])])
    torch.testing.assert_close(batches, together, rtol=1e-10, atol=1e-10)


def test_log_probabilities_have_digits_where_probabilities_have_none():
    rows = torch.tensor([[0.0], [1.0], [100.0], [101.0]], dtype=torch.float64)
    found = Prototypes.mahalanobis(moments_of(rows, [0, 0, 1, 1]), "empirical-n")
    log_p = found.log_probabilities(rows)
    assert found.probabilities(rows)[0].tolist() == [1.0, 0.0]
    assert log_p[0, 1] == pytest.approx((0.5**2 - 100.5**2) / 0.25 / 2)


def test_what_cannot_be_measured_is_refused_by_name():
    rows, labels = rows_of(10, 60, 4, 2)
    moments = moments_of(rows, labels)
    found = Prototypes.mahalanobis(moments)
    with pytest.raises(InvalidInputError, match=r"rows must be \[n, 4\] as the prototypes are, got \[60, 3\]"):
        found.distances(torch.from_numpy(rows[:, :3]))
    broken = torch.from_numpy(rows).clone()
    broken[5, 1] = torch.inf
    with pytest.raises(InvalidInputError, match=r"rows\[5, 1\] is inf"):
        found.predict(broken)
    for priors in ([0.5, 0.6], [1.0, 0.0], [1.0]):
        with pytest.raises(InvalidInputError, match="priors must be 2 positive numbers that sum to 1"):
            Prototypes.euclidean(moments, priors)
    rows[:, 3] = rows[:, 0]
    with pytest.raises(InvalidInputError, match=r"not positive definite; take the covariance 'ridge'.*dimension 3 is constant"):
        Prototypes.mahalanobis(moments_of(rows, labels), "empirical-n-k")
    with pytest.raises(InvalidInputError, match="do not differ from the means of their classes at all"):
        Prototypes.mahalanobis(moments_of(rows[:2], np.array([0, 1])), "ridge")
    with pytest.raises(InvalidInputError, match=r"covariance must be one of ridge, ledoit-wolf, .* got 'oas'"):
        Prototypes.mahalanobis(moments, "oas")
