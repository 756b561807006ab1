"""Each planted fault gives its own finding and no other; sound prototypes give none; nothing raises."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from exactivations.lit_modules.moderation.prototype_diagnosis import (
    condition_number,
    diagnose_predictions,
    diagnose_prototypes,
)
from exactivations.lit_modules.moderation.prototypes import Prototypes

from .test_prototypes import moments_of

MAKERS = {"euclidean": Prototypes.euclidean, "ridge": Prototypes.mahalanobis}


def gaussians(seed, n, width, gap, n_classes=2):
    """Rows of unit variance whose classes are `gap` deviations apart, all around a mean of 1,000."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % n_classes
    rows = 1e3 + rng.normal(size=(n, width))
    rows[:, :n_classes] += gap / np.sqrt(2) * np.eye(n_classes)[labels]
    return torch.from_numpy(rows), torch.from_numpy(labels)


def names(findings):
    return [finding.name for finding in findings]


def looked_at(make, rows, labels):
    moments = moments_of(rows, labels)
    prototypes = make(moments)
    return diagnose_prototypes(prototypes, moments), diagnose_predictions(prototypes, prototypes.distances(rows))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(("n", "width"), [(400, 5), (400, 300), (100, 300)])
@pytest.mark.parametrize("n_classes", [2, 5])
def test_sound_prototypes_give_no_finding(make, n, width, n_classes):
    assert looked_at(make, *gaussians(0, n, width, gap=6.0, n_classes=n_classes)) == ([], [])


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(("n", "width"), [(400, 5), (100, 1000)])
def test_labels_without_meaning_give_prototypes_that_are_no_farther_apart_than_by_chance(make, n, width):
    """Also with more dimensions than rows, where the prototypes tell their own training rows apart without an error."""
    found, _ = looked_at(make, *gaussians(1, n, width, gap=0.0))
    assert names(found) == ["prototypes-too-close"]
    assert "classes 0 and 1" in found[0].message and "labels" in found[0].advice


def test_chance_is_as_often_as_is_said():
    close = [names(looked_at(Prototypes.euclidean, *gaussians(seed, 60, 40, gap=0.0))[0]) for seed in range(300)]
    assert np.mean([bool(found) for found in close]) >= 0.98


def test_classes_that_overlap_are_too_close_however_many_rows_there_are():
    found, _ = looked_at(Prototypes.euclidean, *gaussians(2, 100_000, 2, gap=0.3))
    assert names(found) == ["prototypes-too-close"]
    assert f"were they Gaussian, {norm.cdf(-0.15):.0%} errors" in found[0].message
    assert looked_at(Prototypes.euclidean, *gaussians(2, 100_000, 2, gap=0.7))[0] == []


def test_the_pair_that_is_too_close_is_named():
    rows, labels = gaussians(3, 500, 20, gap=6.0, n_classes=5)
    rows[labels == 4] = (
        rows[labels == 1] + torch.randn(100, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 9
    )
    found, _ = looked_at(Prototypes.mahalanobis, rows, labels)
    assert len(found) == 1 and "classes 1 and 4 (100 and 100 rows)" in found[0].message


def test_prototypes_that_are_the_same_have_a_separation_of_zero():
    found, _ = looked_at(Prototypes.euclidean, torch.ones(40, 3, dtype=torch.float64), torch.arange(40) % 2)
    assert names(found) == ["prototypes-too-close"] and "nan" not in found[0].message


def test_a_covariance_near_singular_is_found_by_its_condition_number():
    rows, labels = gaussians(4, 400, 6, gap=6.0)
    rows[:, 5] = rows[:, 0] + 1e-6 * rows[:, 5]
    found, _ = looked_at(lambda moments: Prototypes.mahalanobis(moments, "empirical-n-k"), rows, labels)
    assert names(found) == ["covariance-near-singular"] and "e+12 times" in found[0].message
    assert looked_at(Prototypes.mahalanobis, rows, labels)[0] == []


@pytest.mark.parametrize("width", [1, 2, 50, 200])
def test_the_condition_number_is_numpys(width):
    matrix = torch.from_numpy(np.cov(np.random.default_rng(width).normal(size=(width, 3 * width + 2))).reshape(width, width))
    assert condition_number(torch.linalg.cholesky(matrix)) == pytest.approx(np.linalg.cond(matrix.numpy()), rel=0.1)


def test_too_few_rows_for_an_empirical_covariance_are_found():
    rows, labels = gaussians(5, 100, 60, gap=20.0)
    found, _ = looked_at(lambda moments: Prototypes.mahalanobis(moments, "empirical-n-k"), rows, labels)
    assert names(found) == ["few-rows-per-dimension"] and "60 dimensions is made of 98 deviations" in found[0].message


def test_rows_of_another_hook_point_come_out_as_one_class():
    rows, labels = gaussians(6, 200, 10, gap=6.0)
    prototypes = Prototypes.mahalanobis(moments_of(rows, labels))
    elsewhere = prototypes.distances(rows - 30 * torch.eye(10, dtype=torch.float64)[0])
    found = diagnose_predictions(prototypes, elsewhere)
    assert names(found) == ["one-class-predicted"] and "all 200 rows come out as class 1 of 2" in found[0].message
    assert diagnose_predictions(prototypes, elsewhere[:19]) == []


@pytest.mark.parametrize("width", [1, 10, 3000])
def test_copies_of_one_row_have_distances_without_variance(width):
    rows, labels = gaussians(7, 40, max(width, 2), gap=6.0)
    prototypes = Prototypes.euclidean(moments_of(rows, labels))
    copies = rows[:1].expand(10, -1) + 1e-6 * rows[:10]
    assert names(diagnose_predictions(prototypes, prototypes.distances(copies))) == ["distances-without-variance"]
    assert diagnose_predictions(prototypes, prototypes.distances(rows[:2])) == []
    on_it = prototypes.distances(prototypes.means[:1].expand(5, -1))
    assert names(diagnose_predictions(prototypes, on_it)) == ["distances-without-variance"]


def test_no_rows_and_single_rows_raise_nothing():
    rows, labels = gaussians(8, 2, 3, gap=6.0)
    prototypes = Prototypes.euclidean(moments_of(rows, labels))
    assert diagnose_prototypes(prototypes, moments_of(rows, labels)) == []
    assert diagnose_predictions(prototypes, prototypes.distances(rows[:0])) == []
    assert diagnose_predictions(prototypes, prototypes.distances(rows[:1])) == []
