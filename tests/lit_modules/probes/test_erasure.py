"""After erasing no linear probe tells the classes apart on training rows, and no map that achieves this changes them less."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from exactivations.lit_modules.probes.erasure import erase
from exactivations.lit_modules.probes.logistic import fit_logistic
from exactivations.lit_modules.probes.probe_inputs import UndefinedMetricError
from exactivations.store.errors import InvalidInputError


def classes(n, width, n_classes, seed, spread=2.0):
    """Standardised, correlated rows, whose classes differ in their means."""
    dice = torch.Generator().manual_seed(seed)
    labels = torch.randint(n_classes, (n,), generator=dice)
    labels[:n_classes] = torch.arange(n_classes)
    mixing = torch.randn(width, width, generator=dice, dtype=torch.float64) * torch.logspace(0, -spread, width, dtype=torch.float64)
    rows = torch.randn(n, width, generator=dice, dtype=torch.float64) @ mixing.T
    rows += torch.randn(n_classes, width, generator=dice, dtype=torch.float64)[labels]
    return (rows - rows.mean(0)) / rows.std(0).clamp(min=1e-12), labels


def oracle(rows, labels, n_classes):
    """The closed form of the paper (theorem 4.3), in numpy, with pseudo-inverses of whole matrices."""
    x, z = rows.numpy(), np.eye(n_classes)[labels.numpy()]
    centred = x - x.mean(0)
    covariance, between = centred.T @ centred / len(x), centred.T @ (z - z.mean(0)) / len(x)
    values, vectors = np.linalg.eigh(covariance)
    keep = values > values.max() * 1e-12
    root = (vectors[:, keep] * values[keep] ** 0.5) @ vectors[:, keep].T
    white = (vectors[:, keep] * values[keep] ** -0.5) @ vectors[:, keep].T
    seen = white @ between
    return x - centred @ (root @ seen @ np.linalg.pinv(seen, rcond=1e-8) @ white).T


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(12, 200), width=st.integers(1, 40), n_classes=st.integers(2, 5), seed=st.integers(0, 1000),
    spread=st.sampled_from([0.0, 2.0, 3.0]),
)  # fmt: skip
def test_rows_are_those_of_the_closed_form_and_all_classes_have_one_mean(n, width, n_classes, seed, spread):
    rows, labels = classes(n, width, n_classes, seed, spread)
    out = erase(rows, labels, n_classes).erased(rows)
    assert out.dtype == torch.float64
    np.testing.assert_allclose(out.numpy(), oracle(rows, labels, n_classes), atol=1e-6)
    for k in range(n_classes):
        torch.testing.assert_close(out[labels == k].mean(0), rows.mean(0), rtol=0, atol=1e-8)


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("width", [8, 300])
def test_a_probe_refitted_on_erased_rows_has_no_weights_and_says_the_shares_of_the_classes(n_classes, width):
    rows, labels = classes(200, width, n_classes, seed=3)
    strength = torch.tensor([1.0], dtype=torch.float64)
    before = fit_logistic(rows, labels[None], n_classes, strength)
    assert (before.probabilities(rows)[0, 0].argmax(1) == labels).double().mean() > 0.9
    out = erase(rows, labels, n_classes).erased(rows)
    # The optimum is 0 up to rounding: the error is large beside the weights that were found, and with them bounds the true ones.
    after = fit_logistic(out, labels[None], n_classes, strength, tolerance=1.0)
    assert after.weight.norm() * (1 + after.error.max()) < 1e-6 * before.weight.norm()
    shares = torch.bincount(labels).double() / len(labels)
    torch.testing.assert_close(after.probabilities(out)[0, 0], shares.expand(200, -1), rtol=0, atol=1e-6)
    sklearn = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(out.numpy(), labels.numpy())
    assert np.abs(sklearn.coef_).max() < 1e-5


def test_what_no_class_goes_with_stays_and_rows_change_least_of_all_maps_that_erase():
    rows, labels = classes(500, 6, 2, seed=1)
    labels[:] = (rows[:, 0] > 0.3).long()  # correlated with the others through the rows' own covariance
    out = erase(rows, labels, 2).erased(rows)
    difference = rows[labels == 1].mean(0) - rows[labels == 0].mean(0)
    change = ((out - rows) ** 2).sum()
    for seed in range(200):  # any projection along the difference of the means erases: (I - difference direction^T) rows
        direction = torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        direction = direction / (direction @ difference)
        assert change <= ((rows @ direction[:, None] * difference) ** 2).sum()
    orthogonal = difference / difference.norm() ** 2
    assert change < 0.99 * ((rows @ orthogonal[:, None] * difference) ** 2).sum()
    unrelated = torch.arange(500) % 2
    dice = torch.Generator().manual_seed(0)
    balanced = torch.randn(250, 6, generator=dice, dtype=torch.float64).repeat_interleave(2, dim=0)
    torch.testing.assert_close(erase(balanced, unrelated, 2).erased(balanced), balanced, rtol=0, atol=1e-8)


def test_dimensions_that_never_vary_or_repeat_others_are_no_obstacle():
    rows, labels = classes(60, 5, 3, seed=2)
    rows = torch.cat([rows, torch.zeros(60, 2, dtype=torch.float64), rows[:, :2]], dim=1)
    out = erase(rows, labels, 3).erased(rows)
    for k in range(3):
        torch.testing.assert_close(out[labels == k].mean(0), rows.mean(0), rtol=0, atol=1e-8)
    torch.testing.assert_close(out[:, 7:], out[:, :2], rtol=0, atol=1e-8)


def test_what_cannot_be_erased_is_refused():
    rows, labels = classes(100, 4, 2, seed=0)
    with pytest.raises(InvalidInputError, match=r"dimension 3 of the rows still has a correlation of .*standardise the rows"):
        erase(rows * torch.tensor([1.0, 1.0, 1.0, 1e-9], dtype=torch.float64), labels, 2)
    with pytest.raises(UndefinedMetricError, match=r"is of class 2"):
        erase(rows, labels, 3)
    with pytest.raises(InvalidInputError, match="at least 2 are needed"):
        erase(rows, torch.zeros(100, dtype=torch.int64), 1)
    with pytest.raises(InvalidInputError, match="labels must be from 0 to 1 for 2 classes, found -1 to 0"):
        erase(rows, labels - 1, 2)
    rows[7, 2] = torch.nan
    with pytest.raises(InvalidInputError, match=r"rows\[7, 2\] is nan"):
        erase(rows, labels, 2)
