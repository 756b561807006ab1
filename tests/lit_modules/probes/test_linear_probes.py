"""Each kind of exact probe is scikit-learn's on the same rows, standardised by its StandardScaler."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from exactivations.lit_modules.probes import linear_probes
from exactivations.lit_modules.probes.linear_probes import (
    LinearProbes,
    logistic_probes,
    mass_mean_probes,
    ridge_probes,
    standardised,
)

STRENGTHS = [1e-3, 0.1, 10.0]


def rows_of(seed, n, width, dtype=torch.float32):
    """Columns of different scale and place, of which the first does not vary."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n, width)) * np.exp(rng.normal(size=width)) + 3 * rng.normal(size=width)
    values[:, 0] = 0.1
    return torch.from_numpy(values).to(dtype)


def labels_of(seed, rows, n_classes, variants=2):
    """Labels that the rows tell something of; every class is there."""
    rng = np.random.default_rng(seed + 1)
    along = StandardScaler().fit_transform(rows.double().numpy()) @ rng.normal(size=(rows.shape[1], n_classes))
    found = []
    for _ in range(variants):
        labels = (along + along.std() * rng.normal(size=along.shape)).argmax(axis=1)
        labels[:n_classes] = np.arange(n_classes)
        found.append(labels)
    return torch.from_numpy(np.stack(found))


def logistic(rows, labels, strength, weight=None):
    """scikit-learn's optimum, pressed further than it goes by itself."""
    fit = LogisticRegression(C=strength, tol=1e-9, max_iter=100_000, solver="newton-cg")
    return fit.fit(rows, labels, sample_weight=weight)


def close(found, expected, relative=1e-4):
    """Holds to a share of the largest value."""
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= relative * np.abs(expected).max() + 1e-9


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize(("n", "width"), [(80, 6), (40, 90)])
@pytest.mark.parametrize("weighted", [False, True])
def test_logistic_probes_are_those_of_scikit_learn(n_classes, n, width, weighted):
    rows = rows_of(0, n, width)
    labels = labels_of(0, rows, n_classes)
    weight = torch.from_numpy(np.random.default_rng(2).uniform(0.5, 3, size=labels.shape)) if weighted else None
    found = logistic_probes(rows, labels, n_classes, STRENGTHS, weight)
    scaler = StandardScaler().fit(rows.double().numpy())
    close(found.mean, scaler.mean_, 1e-12)
    close(found.scale, scaler.scale_, 1e-12)
    new = rows_of(5, 11, width) + rows.mean(dim=0)
    scores = found.scores(new)
    assert scores.dtype == torch.float32 and scores.shape == (2, 3, 11, 1 if n_classes == 2 else n_classes)
    for variant, numbers in enumerate(labels.numpy()):
        for at, strength in enumerate(STRENGTHS):
            mine = None if weight is None else weight[variant].numpy()
            oracle = logistic(scaler.transform(rows.double().numpy()), numbers, strength, mine)
            close(found.weight[variant, at], oracle.coef_)
            expected = oracle.decision_function(scaler.transform(new.double().numpy())).reshape(11, -1)
            if n_classes == 3:  # a constant added to the biases of all classes changes nothing
                expected = expected - expected.mean(axis=1, keepdims=True)
                scores[variant, at] -= scores[variant, at].mean(dim=1, keepdim=True)
            close(scores[variant, at], expected)


@pytest.mark.parametrize(("n", "width"), [(80, 6), (40, 90)])
@pytest.mark.parametrize("weighted", [False, True])
def test_ridge_probes_are_those_of_scikit_learn(n, width, weighted):
    rows, rng = rows_of(1, n, width), np.random.default_rng(3)
    values = torch.from_numpy(rows.double().numpy() @ rng.normal(size=(width, 2)) + 5 * rng.normal(size=(n, 2)) + 7).T.contiguous()
    weight = torch.from_numpy(rng.uniform(0.5, 3, size=n)).expand(2, n) if weighted else None
    found = ridge_probes(rows, values, 0, STRENGTHS, weight)
    scaler = StandardScaler().fit(rows.double().numpy())
    new = rows_of(5, 11, width) + rows.mean(dim=0)
    for variant in range(2):
        for at, strength in enumerate(STRENGTHS):
            oracle = Ridge(alpha=1 / strength, solver="svd")
            oracle.fit(
                scaler.transform(rows.double().numpy()), values[variant].numpy(), None if weight is None else weight[0].numpy()
            )
            close(found.weight[variant, at, 0], oracle.coef_, 1e-9)
            close(found.bias[variant, at], [oracle.intercept_], 1e-9)
            close(found.scores(new)[variant, at, :, 0], oracle.predict(scaler.transform(new.double().numpy())), 1e-6)


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize(("n", "width"), [(80, 6), (40, 90)])
def test_mass_mean_probes_go_along_the_differences_of_means_and_are_calibrated_by_scikit_learn(n_classes, n, width):
    rows = rows_of(0, n, width)
    labels = labels_of(0, rows, n_classes)
    found = mass_mean_probes(rows, labels, n_classes, [1.0])
    assert torch.equal(found.scale, torch.ones(width).double())
    new = rows_of(5, 11, width) + rows.mean(dim=0)
    train, test = rows.double().numpy(), new.double().numpy()
    for variant, numbers in enumerate(labels.numpy()):
        means = np.stack([train[numbers == number].mean(axis=0) for number in range(n_classes)])
        directions = means[1:] - means[:1] if n_classes == 2 else means - means.mean(axis=0)
        if n_classes == 2:
            weight = found.weight[variant, 0, 0].numpy()
            close(weight / np.linalg.norm(weight), directions[0] / np.linalg.norm(directions[0]), 1e-9)
        scaler = StandardScaler().fit(train @ directions.T)
        oracle = logistic(scaler.transform(train @ directions.T), numbers, 1.0)
        expected = oracle.decision_function(scaler.transform(test @ directions.T)).reshape(11, -1)
        scores = found.scores(new)[variant, 0]
        if n_classes == 3:
            expected, scores = expected - expected.mean(axis=1, keepdims=True), scores - scores.mean(dim=1, keepdim=True)
        close(scores, expected)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    width=st.integers(1, 9),
    block=st.integers(1, 50),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_rows_are_standardised_as_by_standard_scaler_whatever_the_blocks(n, width, block, dtype, seed):
    rows = rows_of(seed, n, width, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_probes, "ROWS_OF_BLOCK", block)
        mean, scale, standard = standardised(rows)
    oracle = StandardScaler().fit(rows.double().numpy())
    close(mean, oracle.mean_, 1e-12)
    close(scale, oracle.scale_, 1e-9)
    assert standard.dtype == torch.float64
    np.testing.assert_allclose(standard, oracle.transform(rows.double().numpy()), atol=1e-9)
    assert (standard[:, 0] == 0).all()  # exactly: what does not vary cannot be weighed


def test_rows_too_many_for_double_precision_stay_single_and_give_the_same_probes(monkeypatch):
    rows = rows_of(0, 80, 6)
    labels = labels_of(0, rows, 2)
    expected = logistic_probes(rows, labels, 2, STRENGTHS)
    monkeypatch.setattr(linear_probes, "SINGLE_FROM", rows.numel())
    assert standardised(rows)[2].dtype == torch.float32 and standardised(rows.double())[2].dtype == torch.float64
    found = logistic_probes(rows, labels, 2, STRENGTHS)
    close(found.weight, expected.weight, 1e-4)
    monkeypatch.setattr(linear_probes, "SINGLE_FROM", rows.numel() + 1)
    assert torch.equal(logistic_probes(rows, labels, 2, STRENGTHS).weight, expected.weight)


@pytest.mark.parametrize("n", [0, 1, 7, 23])
def test_scores_are_a_plain_product_of_all_probes_in_blocks(monkeypatch, n):
    rng = np.random.default_rng(n)
    mean, scale, weight, bias = (rng.normal(size=shape) for shape in ((5,), (5,), (2, 3, 4, 5), (2, 3, 4)))
    probes = LinearProbes(*map(torch.from_numpy, (mean, np.abs(scale) + 0.1, weight, bias)))
    rows = torch.from_numpy(rng.normal(size=(n, 5))).bfloat16()
    monkeypatch.setattr(linear_probes, "ROWS_OF_BLOCK", 7)
    found = probes.scores(rows)
    assert found.shape == (2, 3, n, 4) and found.dtype == torch.float32
    standard = (rows.double().numpy() - mean) / (np.abs(scale) + 0.1)
    for variant, setting, output in np.ndindex(2, 3, 4):
        expected = [float(row @ weight[variant, setting, output] + bias[variant, setting, output]) for row in standard]
        np.testing.assert_allclose(found[variant, setting, :, output], expected, rtol=1e-5, atol=1e-6)


def test_rows_that_do_not_vary_at_all_tell_nothing():
    rows, labels = torch.full((30, 3), 0.7), torch.tensor([[0, 1] * 15])
    for probes in (
        logistic_probes(rows, labels, 2, STRENGTHS), mass_mean_probes(rows, labels, 2, [1.0]),
        ridge_probes(rows, labels.double(), 0, STRENGTHS),
    ):  # fmt: skip
        assert (probes.weight == 0).all()
        scores = probes.scores(rows)
        assert (scores == scores[:, :, :1]).all() and torch.isfinite(scores).all()
