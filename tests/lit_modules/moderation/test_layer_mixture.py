"""The mixture is the optimum, leaves layers of noise out, and its inputs are those of prototypes that never saw the sample."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_score

from exactivations.lit_modules.moderation.class_statistics import ClassStatistics
from exactivations.lit_modules.moderation.layer_mixture import LayerMixture, fit_layer_mixture, held_out_prototypes, out_of_fold
from exactivations.lit_modules.moderation.prototypes import Prototypes
from exactivations.store.errors import InvalidInputError

N_FOLDS = 5


def layers(seed, n, n_layers, n_classes, informative):
    """Class probabilities [n, L, K]: noise, but for the layers named; labels and folds."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) // N_FOLDS % n_classes
    scores = 2 * rng.normal(size=(n, n_layers, n_classes))
    scores[:, informative] += 3 * np.eye(n_classes)[labels][:, None]
    return torch.from_numpy(softmax(scores, axis=2)), torch.from_numpy(labels), torch.arange(n) % N_FOLDS


def by_fold(rows, labels, folds, n_folds=N_FOLDS):
    n_classes = int(labels.max()) + 1
    return [ClassStatistics(n_classes, rows.shape[1]).update(rows[folds == fold], labels[folds == fold]) for fold in range(n_folds)]


@pytest.mark.parametrize("n_classes", [2, 3, 5])
@pytest.mark.parametrize("strength", [0.1, 1.0, 10.0])
def test_it_is_the_optimum_by_its_own_conditions(n_classes, strength):
    """The problem is convex: subgradients that hold 0 are proof. Signs, zeros and biases are all there is."""
    p, labels, folds = layers(0, 400, 6, n_classes, [2])
    found = fit_layer_mixture(p, labels, folds, strengths=[strength])
    x = (p[..., 1:] if n_classes == 2 else p).flatten(1)
    target = torch.nn.functional.one_hot(labels).double()
    residual = (found.probabilities(p) - target)[:, -len(found.bias) :]
    gradient = strength * residual.mT @ x
    weight = found.weight.flatten(1)
    assert (weight != 0).any() and ((weight == 0).any() or strength == 10)
    violation = torch.where(weight != 0, (gradient + weight.sign()).abs(), (gradient.abs() - 1).clamp(min=0))
    assert violation.max() < 1e-4
    assert (strength * residual.sum(0)).abs().max() < 1e-4
    assert found.losses == {} and found.strength == strength


@pytest.mark.parametrize("n_classes", [2, 3])
def test_probabilities_are_scikit_learns_of_the_same_model(n_classes):
    p, labels, folds = layers(1, 300, 4, n_classes, [1])
    found = fit_layer_mixture(p, labels, folds, strengths=[0.3])
    x = (p[..., 1:] if n_classes == 2 else p).flatten(1).numpy()
    model = LogisticRegression(C=0.3, l1_ratio=1, solver="saga", tol=1e-10, max_iter=10_000).fit(x, labels.numpy())
    np.testing.assert_allclose(found.probabilities(p).numpy(), model.predict_proba(x), atol=1e-6)


@pytest.mark.parametrize("n_classes", [2, 5])
def test_the_informative_layer_is_picked_and_noise_has_no_weight(n_classes):
    p, labels, folds = layers(2, 1000, 12, n_classes, [7])
    found = fit_layer_mixture(p, labels, folds, strengths=[0.03])
    assert found.layer_weights.nonzero().flatten().tolist() == [7]
    assert found.weight.shape == ((1, 12, 1) if n_classes == 2 else (5, 12, 5))
    if n_classes == 2:
        assert found.weight[0, 7, 0] > 0


def test_the_strength_has_the_lowest_loss_of_held_out_folds():
    p, labels, folds = layers(3, 300, 8, 2, [1, 2])
    strengths = [1.0, 0.001, 0.1]
    found = fit_layer_mixture(p, labels, folds, strengths=strengths)
    assert found.strength == min(found.losses, key=found.losses.get) and list(found.losses) == sorted(strengths)
    assert found.losses.pop(0.001) == pytest.approx(np.log(2))  # no weights, and classes of one size: SAGA's bias would be off
    for strength, loss in found.losses.items():
        model = LogisticRegression(C=strength, l1_ratio=1, solver="saga", tol=1e-10, max_iter=10_000)
        split = PredefinedSplit(folds.numpy())
        scores = cross_val_score(model, p[..., 1].numpy(), labels.numpy(), cv=split, scoring="neg_log_loss")
        assert loss == pytest.approx(-scores.mean(), abs=1e-6)
    assert torch.equal(found.weight, fit_layer_mixture(p, labels, folds, strengths=[found.strength]).weight)


def test_the_order_of_samples_changes_nothing():
    p, labels, folds = layers(4, 200, 5, 3, [0])
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    found, shuffled = (fit_layer_mixture(p[i], labels[i], folds[i], strengths=[0.03, 0.3]) for i in (torch.arange(200), order))
    assert torch.equal(found.weight, shuffled.weight) and torch.equal(found.bias, shuffled.bias)
    assert found.losses == shuffled.losses


@pytest.mark.parametrize("covariance", ["ridge", "ledoit-wolf", "empirical-n"])
def test_folds_held_out_are_fitted_as_if_alone(covariance):
    """Against prototypes refitted on the other folds' rows, and scikit-learn's of them; in any batches."""
    rng = np.random.default_rng(5)
    labels = torch.from_numpy(rng.integers(0, 3, 400))
    rows = torch.from_numpy(1e4 + rng.normal(size=(400, 9))) + torch.eye(3, 9, dtype=torch.float64)[labels]
    folds = torch.from_numpy(rng.integers(0, N_FOLDS, 400))
    prototypes = held_out_prototypes(by_fold(rows, labels, folds), partial(Prototypes.mahalanobis, covariance=covariance))
    found = out_of_fold(prototypes, rows, folds)
    batches = zip(rows.split(90), folds.split(90), strict=True)
    torch.testing.assert_close(torch.cat([out_of_fold(prototypes, *batch) for batch in batches]), found, rtol=0, atol=1e-10)
    for fold in range(N_FOLDS):
        mine, others = folds == fold, folds != fold
        moments = ClassStatistics(3, 9).update(rows[others], labels[others]).result()
        direct = Prototypes.mahalanobis(moments, covariance)
        torch.testing.assert_close(found[mine], direct.probabilities(rows[mine]), rtol=0, atol=1e-10)
        if covariance == "empirical-n":
            shares = moments.count / moments.total
            lda = LinearDiscriminantAnalysis(solver="lsqr").fit(rows[others].numpy(), labels[others].numpy())
            unweighted = torch.from_numpy(lda.predict_proba(rows[mine].numpy())) / shares
            torch.testing.assert_close(found[mine], unweighted / unweighted.sum(1, keepdim=True), rtol=0, atol=1e-6)


def test_layers_are_not_weighed_on_their_own_training_rows():
    """A wide layer of noise tells its own training rows apart better than a good narrow one does; held out, it says nothing."""
    rng = torch.Generator().manual_seed(0)
    n = 200
    labels, folds = torch.arange(n) % 2, torch.arange(n) // 2 % N_FOLDS
    noise = torch.randn(n, 400, generator=rng, dtype=torch.float64)
    good = torch.randn(n, 2, generator=rng, dtype=torch.float64) + labels[:, None]
    make = partial(Prototypes.mahalanobis, covariance="ledoit-wolf")
    held_out, in_sample = [], []
    for rows in (noise, good):
        statistics = by_fold(rows, labels, folds)
        held_out.append(out_of_fold(held_out_prototypes(statistics, make), rows, folds))
        in_sample.append(make(ClassStatistics.fold(statistics).result()).probabilities(rows))
    right = [[float((p.argmax(1) == labels).double().mean()) for p in kind] for kind in (in_sample, held_out)]
    assert right[0][0] > 0.9 > right[0][1] > 0.7 and right[1][0] < 0.6 < 0.7 < right[1][1]
    honest, fooled = (fit_layer_mixture(torch.stack(p, dim=1), labels, folds, strengths=[0.1]) for p in (held_out, in_sample))
    assert honest.layer_weights[0] == 0 < honest.layer_weights[1]
    assert fooled.layer_weights[0] > fooled.layer_weights[1]


def test_what_cannot_be_mixed_is_refused_by_name(monkeypatch):
    p, labels, folds = layers(6, 60, 3, 2, [0])
    refused = [
        (p[:, 0], labels, folds, {}, r"probabilities must be \[n, L layers, K >= 2 classes\], got \[60, 2\]"),
        (p * 2, labels, folds, {}, "probabilities must be from 0 to 1"),
        (p.index_fill(0, torch.tensor([4]), torch.nan), labels, folds, {}, r"probabilities\[4, 0, 0\] is nan"),
        (p, labels + 1, folds, {}, "labels must be from 0 to 1"),
        (p, labels, folds[:9], {}, r"folds must be int64 \[60\]"),
        (p, labels * 0, folds, {}, "no sample outside fold 0 is of class 1"),
        (p, labels * 0, folds, {"strengths": [1.0]}, "no sample is of class 1"),
        (p, labels, folds * 0, {}, "all samples are of one: give one strength"),
        (p, labels, folds, {"strengths": [0.1, 0.0]}, "strengths must be at least one number above 0"),
    ]
    for *inputs, options, message in refused:
        with pytest.raises(InvalidInputError, match=message):
            fit_layer_mixture(*inputs, **options)
    mixture: LayerMixture = fit_layer_mixture(p, labels, folds, strengths=[1.0])
    with pytest.raises(InvalidInputError, match=r"must be \[n, 3 layers, 2 classes\] as in training, got \[60, 2, 2\]"):
        mixture.probabilities(p[:, :2])
    monkeypatch.setattr("exactivations.lit_modules.moderation.layer_mixture.MOST_STEPS", 2)
    with pytest.raises(InvalidInputError, match="C = 1 outside fold 0 did not reach its optimum in 2 steps"):
        fit_layer_mixture(p, labels, folds, strengths=[1.0, 3.0])


def test_a_fold_without_which_nothing_can_be_fitted_is_named():
    rows, labels = torch.randn(12, 3, dtype=torch.float64), torch.arange(12) // 6
    statistics = by_fold(rows, labels, labels, 2)
    with pytest.raises(InvalidInputError, match="without fold 0 of 2: no row is of class 0"):
        held_out_prototypes(statistics)
    with pytest.raises(InvalidInputError, match="at least 2 folds, got 1"):
        held_out_prototypes(statistics[:1])
    prototypes = held_out_prototypes(by_fold(rows, labels, torch.arange(12) % 2, 2))
    with pytest.raises(InvalidInputError, match=r"folds must be one a row, from 0 to 1, got \[12\] for 12 rows, from 0 to 2"):
        out_of_fold(prototypes, rows, torch.arange(12) % 3)
    with pytest.raises(InvalidInputError, match=r"got \[5\] for 12 rows"):
        out_of_fold(prototypes, rows, torch.zeros(5, dtype=torch.int64))
