"""Logistic regression: scikit-learn's optimum, for every strength and variant at once; what has none is refused."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from exactivations.lit_modules.probes.batched_newton import minimise
from exactivations.lit_modules.probes.logistic import fit_logistic
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


def assert_at_optimum(fit, rows, labels, weight=None, variant=0):
    """Weights within the bound that the fit itself gives (plus scikit-learn's own rounding), biases alike."""
    assert (fit.error[variant] <= 1e-5).all()
    for s, strength in enumerate(STRENGTHS.tolist()):
        weights, bias = optimum(rows, labels, strength, weight)
        found, found_bias = fit.weight[variant, s], fit.bias[variant, s]
        if len(bias) > 1:  # softmax leaves one constant free; both put it to zero in the weights, not in the bias
            bias, found_bias = bias - bias.mean(), found_bias - found_bias.mean()
        assert (found - weights).norm() <= (fit.error[variant, s] + 1e-6) * weights.norm() + 1e-12
        torch.testing.assert_close(found_bias, bias, rtol=1e-3, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(20, 200), width=st.integers(1, 60), n_classes=st.integers(2, 4), seed=st.integers(0, 1000),
    weighted=st.booleans(), price=st.sampled_from([1, 20, 10**6]), block=st.sampled_from([100, 1 << 19]),
)  # fmt: skip
def test_weights_and_biases_are_scikit_learns_at_every_strength(n, width, n_classes, seed, weighted, price, block):
    """With and without Cholesky factors for a preconditioner, of rows in one block and in many."""
    rows, labels = grouped(n, width, n_classes, seed)
    weight = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.1 if weighted else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exactivations.lit_modules.probes.logistic_hessian.PARAMETERS_PER_PRODUCT", price)
        patch.setattr("exactivations.lit_modules.probes.logistic_loss.BLOCK", block)
        patch.setattr("exactivations.lit_modules.probes.centred_rows.KEPT", block)
        fit = fit_logistic(rows, labels[None], n_classes, STRENGTHS, sample_weight=weight)
    assert fit.weight.shape == (1, len(STRENGTHS), 1 if n_classes == 2 else n_classes, width)
    assert_at_optimum(fit, rows, labels, weight)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_more_dimensions_than_samples_are_no_hindrance(n_classes):
    rows, labels = grouped(40, 300, n_classes, seed=1)
    assert_at_optimum(fit_logistic(rows + 5, labels[None], n_classes, STRENGTHS), rows + 5, labels)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_constant_and_duplicated_columns_are_no_hindrance(n_classes):
    rows, labels = grouped(150, 6, n_classes, seed=7)
    rows = torch.cat([rows, torch.full((150, 1), 3.0, dtype=torch.float64), rows[:, :2]], dim=1)
    fit = fit_logistic(rows, labels[None], n_classes, STRENGTHS)
    assert_at_optimum(fit, rows, labels)
    assert fit.weight[..., 6].abs().max() < 1e-12
    torch.testing.assert_close(fit.weight[..., :2], fit.weight[..., 7:], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_rows_in_single_precision_far_from_zero_lose_nothing(n_classes):
    """The oracle gets the same rows about their mean, in double precision; the bias moves by what the mean gives."""
    rows, labels = grouped(400, 30, n_classes, seed=8, spread=1.0)
    rows = (rows + torch.linspace(-3000, 3000, 30, dtype=torch.float64)).float()
    fit = fit_logistic(rows, labels[None], n_classes, STRENGTHS)
    mean = rows.double().mean(dim=0)
    assert_at_optimum(replace(fit, bias=fit.bias + fit.weight @ mean), rows.double() - mean, labels)


def test_the_bound_of_the_error_holds_also_where_it_is_large():
    rows, labels = grouped(300, 40, 2, seed=9)
    for n_classes, numbers in ((2, labels), (3, labels + (torch.arange(300) % 5 == 0))):
        exact = fit_logistic(rows, numbers[None], n_classes, STRENGTHS, tolerance=1e-8)
        for tolerance in (3.0, 0.3, 0.03):
            fit = fit_logistic(rows, numbers[None], n_classes, STRENGTHS, tolerance=tolerance)
            off = (fit.weight - exact.weight).flatten(2).norm(dim=2)
            assert (off <= fit.error * fit.weight.flatten(2).norm(dim=2) + 1e-8).all()
            assert off.max() > 1e-6  # or it would show nothing


def test_rows_that_say_nothing_leave_the_biases_alone():
    """Every row comes with both labels; and rows that are all the same."""
    rows, _ = grouped(60, 5, 2, seed=10)
    both = fit_logistic(rows.repeat(2, 1), (torch.arange(120) // 60)[None], 2, STRENGTHS)
    assert both.weight.abs().max() < 1e-6 and both.bias.abs().max() < 1e-6
    labels = (torch.arange(60) < 15).long()
    same = fit_logistic(torch.ones(60, 5), labels[None], 2, STRENGTHS)
    assert same.weight.abs().max() < 1e-12
    torch.testing.assert_close(same.bias, torch.full_like(same.bias, np.log(15 / 45)), rtol=1e-4, atol=0)


def test_variants_of_labels_and_weights_are_fitted_as_if_alone():
    rows, labels = grouped(120, 20, 2, seed=2)
    shuffled = labels[torch.randperm(120, generator=torch.Generator().manual_seed(0))]
    weight = torch.rand(2, 120, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    weight[1, 100:] = 0
    both = fit_logistic(rows, torch.stack([labels, shuffled]), 2, STRENGTHS, sample_weight=weight)
    assert_at_optimum(both, rows, labels, weight[0], variant=0)
    assert_at_optimum(both, rows[:100], shuffled[:100], weight[1, :100], variant=1)


def test_probabilities_are_those_of_the_model():
    rows, labels = grouped(90, 10, 3, seed=3)
    fit = fit_logistic(rows, labels[None], 3, STRENGTHS)
    model = LogisticRegression(C=1.0, tol=1e-12, max_iter=10_000, solver="newton-cholesky").fit(rows.numpy(), labels.numpy())
    np.testing.assert_allclose(fit.probabilities(rows)[0, 2].numpy(), model.predict_proba(rows.numpy()), atol=1e-5)
    binary = fit_logistic(rows, (labels > 0).long()[None], 2, STRENGTHS).probabilities(rows)
    assert binary.shape == (1, 4, 90, 2)
    torch.testing.assert_close(binary.sum(dim=-1), torch.ones(1, 4, 90, dtype=torch.float64))


def test_separable_classes_have_an_optimum_too():
    dice = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 5, dtype=torch.float64, generator=dice) + torch.tensor([9.0, -9.0]).repeat_interleave(30)[:, None]
    labels = torch.arange(60) // 30
    weak = torch.tensor([10.0, 1e3, 1e5], dtype=torch.float64)
    fit = fit_logistic(rows, labels[None], 2, weak)
    for s, strength in enumerate(weak.tolist()):
        weights, _ = optimum(rows, labels, strength)
        assert (fit.weight[0, s] - weights).norm() <= 2e-5 * weights.norm()


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
    with pytest.raises(InvalidInputError, match="sample_weight must be finite and not below 0"):
        fit_logistic(rows, labels[None], 2, STRENGTHS, sample_weight=-torch.ones(30, dtype=torch.float64))
    with pytest.raises(InvalidInputError, match="no training sample of variant 0 is of class 1"):
        fit_logistic(rows, labels[None], 2, STRENGTHS, sample_weight=(labels == 0).double())
    with pytest.raises(InvalidInputError, match="labels must be 0 to 1, got 0 to 2"):
        fit_logistic(rows, labels[None].clone().index_fill_(1, torch.tensor([0]), 2), 2, STRENGTHS)


def test_an_optimum_that_is_not_reached_is_no_result(monkeypatch):
    monkeypatch.setattr("exactivations.lit_modules.probes.logistic.MOST_ITERATIONS", 2)
    rows, labels = grouped(200, 30, 2, seed=5)
    with pytest.raises(InvalidInputError, match="with C = 10 did not reach its optimum in 2 steps"):
        fit_logistic(rows, labels[None], 2, STRENGTHS)


@dataclass(frozen=True)
class LogCosh:
    """Problems log cosh(c (x - target)), whose Newton's steps from afar go too far; Hessians are diagonal."""

    target: torch.Tensor
    curvature: torch.Tensor
    evaluated: list
    state: torch.Tensor | None = None
    price: int = 1000

    def evaluate(self, parameters, problems):
        self.evaluated.append(len(problems))
        c = self.curvature[problems, None, None]
        off = c * (parameters - self.target[problems])
        return torch.log(torch.cosh(off)).sum(dim=(1, 2)), c * torch.tanh(off), (c / torch.cosh(off)).float() ** 2

    def hessians(self, state):
        return self.at(state)

    def at(self, state):
        return replace(self, state=state)

    def keep(self, which):
        return replace(self, state=self.state[which])

    def times(self, vectors):
        return self.state * vectors

    def precondition(self, vectors):
        return vectors

    def improved(self):
        return self

    def error(self, parameters, gradient):
        return gradient.flatten(1).norm(dim=1)


def test_each_problem_ends_by_itself_at_its_own_minimum():
    dice = torch.Generator().manual_seed(0)
    target = torch.randn(5, 2, 3, generator=dice, dtype=torch.float64)
    loss = LogCosh(target, torch.linspace(0.01, 3, 5, dtype=torch.float64), [])
    found = minimise(loss, torch.zeros_like(target), 1e-9, 100)
    assert (found.error <= 1e-9).all()
    torch.testing.assert_close(found.parameters, target, rtol=1e-4, atol=1e-4)
    assert found.n_iterations[0] < found.n_iterations[-1] and min(loss.evaluated) < 5
