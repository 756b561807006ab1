"""Logistic regression: scikit-learn's optimum, for every strength and variant at once; what has none is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from exactivations.lit_modules.batched_lbfgs import minimise
from exactivations.lit_modules.logistic import fit_logistic
from exactivations.store.errors import InvalidInputError

STRENGTHS = torch.tensor([1e-4, 1e-2, 1.0, 10.0], dtype=torch.float64)


def grouped(n, width, n_classes, seed, spread=3.0):
    """Standardised rows whose dimensions are of very different use and correlated, and noisy labels."""
    dice = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=dice, dtype=torch.float64) * torch.logspace(0, -spread, width, dtype=torch.float64)
    rows = torch.randn(n, width, generator=dice, dtype=torch.float64) @ mixing.T
    rows = (rows - rows.mean(0)) / rows.std(0).clamp(min=1e-12)
    scores = rows @ torch.randn(width, n_classes, generator=dice, dtype=torch.float64)
    labels = (scores + 2 * torch.randn(n, n_classes, generator=dice, dtype=torch.float64)).argmax(1)
    labels[:n_classes] = torch.arange(n_classes)
    return rows, labels


def optimum(rows, labels, strength, weight=None):
    """scikit-learn's, by Newton's method to the last digits."""
    model = LogisticRegression(C=strength, tol=1e-12, max_iter=10_000, solver="newton-cholesky")
    model.fit(rows.numpy(), labels.numpy(), sample_weight=None if weight is None else weight.numpy())
    return torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(20, 200), width=st.integers(1, 60), n_classes=st.integers(2, 4), seed=st.integers(0, 1000),
    weighted=st.booleans(), newton=st.booleans(),
)  # fmt: skip
def test_weights_and_biases_are_scikit_learns_at_every_strength(n, width, n_classes, seed, weighted, newton):
    """By Newton's method, and as where the Hessian is too large for that."""
    rows, labels = grouped(n, width, n_classes, seed)
    weight = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.1 if weighted else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exactivations.lit_modules.logistic.LARGEST_HESSIAN", 1500 if newton else 0)
        fit = fit_logistic(rows, labels[None], n_classes, STRENGTHS, sample_weight=weight)
    assert fit.n_iterations.max() < (40 if newton else 5000)
    assert fit.weight.shape == (1, len(STRENGTHS), 1 if n_classes == 2 else n_classes, width)
    assert (fit.error <= 1e-5).all()
    for s, strength in enumerate(STRENGTHS.tolist()):
        weights, bias = optimum(rows, labels, strength, weight)
        found = fit.weight[0, s]
        if n_classes > 2:  # softmax leaves one constant free; both put it to zero in the weights, not in the bias
            bias, found_bias = bias - bias.mean(), fit.bias[0, s] - fit.bias[0, s].mean()
        else:
            found_bias = fit.bias[0, s]
        assert (found - weights).norm() <= 1e-4 * weights.norm() + 1e-12
        torch.testing.assert_close(found_bias, bias, rtol=1e-3, atol=1e-4)


def test_more_dimensions_than_samples_are_no_hindrance():
    rows, labels = grouped(40, 300, 2, seed=1)
    fit = fit_logistic(rows, labels[None], 2, STRENGTHS)
    for s, strength in enumerate(STRENGTHS.tolist()):
        model = LogisticRegression(C=strength, tol=1e-10, max_iter=100_000).fit(rows.numpy(), labels.numpy())
        assert np.linalg.norm(fit.weight[0, s].numpy() - model.coef_) <= 1e-3 * np.linalg.norm(model.coef_)


def test_variants_of_the_labels_are_fitted_as_if_alone():
    rows, labels = grouped(120, 20, 2, seed=2)
    shuffled = labels[torch.randperm(120, generator=torch.Generator().manual_seed(0))]
    both = fit_logistic(rows, torch.stack([labels, shuffled]), 2, STRENGTHS)
    for variant, alone in enumerate((labels, shuffled)):
        one = fit_logistic(rows, alone[None], 2, STRENGTHS)
        torch.testing.assert_close(both.weight[variant], one.weight[0], rtol=1e-4, atol=1e-7)


def test_probabilities_are_those_of_the_model():
    rows, labels = grouped(90, 10, 3, seed=3)
    fit = fit_logistic(rows, labels[None], 3, STRENGTHS)
    model = LogisticRegression(C=1.0, tol=1e-12, max_iter=10_000, solver="newton-cholesky").fit(rows.numpy(), labels.numpy())
    np.testing.assert_allclose(fit.probabilities(rows)[0, 2].numpy(), model.predict_proba(rows.numpy()), atol=1e-5)
    binary = fit_logistic(rows, (labels > 0).long()[None], 2, STRENGTHS).probabilities(rows)
    assert binary.shape == (1, 4, 90, 2)
    torch.testing.assert_close(binary.sum(dim=-1), torch.ones(1, 4, 90, dtype=torch.float64))


def test_separable_classes_have_an_optimum_too():
    rows = torch.cat([torch.randn(30, 5, dtype=torch.float64) + 9, torch.randn(30, 5, dtype=torch.float64) - 9])
    labels = torch.arange(60) // 30
    fit = fit_logistic(rows, labels[None], 2, STRENGTHS)
    weights, _ = optimum(rows, labels, 10.0)
    assert (fit.weight[0, 3] - weights).norm() <= 1e-4 * weights.norm()


def test_what_cannot_be_fitted_is_refused_by_name():
    rows, labels = grouped(30, 4, 2, seed=4)
    with pytest.raises(InvalidInputError, match="no training sample of variant 1 is of class 1"):
        fit_logistic(rows, torch.stack([labels, torch.zeros_like(labels)]), 2, STRENGTHS)
    broken = rows.clone()
    broken[7, 2] = torch.nan
    with pytest.raises(InvalidInputError, match="row 7 is not finite"):
        fit_logistic(broken, labels[None], 2, STRENGTHS)
    with pytest.raises(InvalidInputError, match="strengths must be above 0"):
        fit_logistic(rows, labels[None], 2, torch.tensor([0.0], dtype=torch.float64))
    with pytest.raises(InvalidInputError, match="labels must be 0 to 1, got 0 to 2"):
        fit_logistic(rows, labels[None].clone().index_fill_(1, torch.tensor([0]), 2), 2, STRENGTHS)


def test_an_optimum_that_is_not_reached_is_no_result(monkeypatch):
    monkeypatch.setattr("exactivations.lit_modules.logistic.MOST_ITERATIONS", 2)
    rows, labels = grouped(200, 30, 2, seed=5)
    with pytest.raises(InvalidInputError, match="with C = 10 did not reach its optimum in 2 steps"):
        fit_logistic(rows, labels[None], 2, STRENGTHS)


def test_each_problem_ends_by_itself_at_its_own_minimum():
    """Quadratics of very different conditions; the minimum is known."""
    dice = torch.Generator().manual_seed(0)
    curvature = torch.logspace(0, 4, 6, dtype=torch.float64)[None] ** torch.linspace(0, 1, 5, dtype=torch.float64)[:, None]
    target = torch.randn(5, 6, generator=dice, dtype=torch.float64)
    evaluated = []

    def evaluate(parameters, problems):
        evaluated.append(len(problems))
        off = parameters - target[problems]
        return (curvature[problems] * off**2).sum(1) / 2, curvature[problems] * off

    found = minimise(evaluate, torch.zeros(5, 6, dtype=torch.float64), lambda p, g, i: g.norm(dim=1) < 1e-9, 500)
    assert found.converged.all()
    torch.testing.assert_close(found.parameters, target, rtol=1e-8, atol=1e-8)
    assert found.n_iterations[0] < found.n_iterations[-1] and evaluated[-1] < 5
