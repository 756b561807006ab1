"""The losses of a decomposition against their formulas in numpy and scipy, float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax

from exactivations.lit_modules.decomposition.decomposition_losses import (
    divergence,
    faithfulness,
    importance_minimality,
    sampled_delta_masks,
    sampled_masks,
)

DOUBLE = {"dtype": torch.float64}


def test_faithfulness_is_a_mean_over_all_weights_and_not_over_maps():
    deltas = [torch.randn(3, 5, **DOUBLE), torch.randn(7, 2, **DOUBLE)]
    expected = np.mean(np.concatenate([delta.numpy().ravel() for delta in deltas]) ** 2)
    assert float(faithfulness(iter(deltas))) == pytest.approx(expected, rel=1e-14)


@given(p=st.sampled_from([0.3, 0.9, 1.0, 2.0]), leading=st.sampled_from([(4,), (2, 3), (1, 1, 5)]))
def test_minimality_sums_maps_and_components_and_takes_the_mean_of_positions(p, leading):
    importances = {"a": torch.rand(*leading, 3, **DOUBLE), "b": torch.rand(*leading, 2, **DOUBLE)}
    expected = sum((g.numpy() ** p).reshape(-1, g.shape[-1]).sum(1).mean() for g in importances.values())
    assert float(importance_minimality(importances, p)) == pytest.approx(expected, rel=1e-8)


def test_minimality_has_a_gradient_at_importance_0():
    g = torch.zeros(4, 3, requires_grad=True)
    assert torch.autograd.grad(importance_minimality({"a": g.clamp(min=0)}, 0.5), g)[0].isfinite().all()


@pytest.mark.parametrize("leading", [(5,), (2, 3)])
def test_divergences_are_those_of_numpy_and_scipy(leading):
    outputs, target = torch.randn(*leading, 7, **DOUBLE), 3 * torch.randn(*leading, 7, **DOUBLE)
    assert float(divergence(outputs, target, "mse")) == pytest.approx(((outputs - target).numpy() ** 2).mean(), rel=1e-14)
    p, q = softmax(target.numpy(), -1), softmax(outputs.numpy(), -1)
    assert float(divergence(outputs, target, "kl")) == pytest.approx(rel_entr(p, q).sum(-1).mean(), rel=1e-12)


def test_masks_are_drawn_evenly_between_importance_and_1_and_carry_its_gradient():
    g = torch.tensor([-0.005, 0.0, 0.4, 1.0], requires_grad=True).expand(20_000, 4)
    masks, again, other = (sampled_masks({"a": g, "b": g}, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(masks["a"], again["a"]) and not torch.equal(masks["a"], other["a"])
    assert not torch.equal(masks["a"], masks["b"])
    mask = masks["a"].detach()
    assert (mask >= g).all() and (mask <= 1).all() and (mask[:, 3] == 1).all()
    share = (mask[:, 1:3] - g[0, 1:3].detach()) / (1 - g[0, 1:3].detach())
    torch.testing.assert_close(
        share.quantile(torch.tensor([0.25, 0.5, 0.75]), dim=0),
        torch.tensor([[0.25], [0.5], [0.75]]).expand(3, 2),
        rtol=0,
        atol=0.02,
    )
    weights = torch.randn(20_000, 4)
    gradient = torch.autograd.grad((masks["a"] * weights).sum(), g, retain_graph=True)[0]
    r = (mask[:, :3] - g[:, :3]) / (1 - g[:, :3])
    torch.testing.assert_close(gradient[:, :3], (weights[:, :3] * (1 - r)).detach(), rtol=0, atol=1e-5)


def test_masks_of_deltas_have_no_component_dimension():
    masks = sampled_delta_masks({"a": torch.zeros(3, 5, 7), "b": torch.zeros(3, 5, 2)}, torch.Generator().manual_seed(0))
    assert masks["a"].shape == masks["b"].shape == (3, 5) and not torch.equal(masks["a"], masks["b"])
    assert masks["a"].min() >= 0 and masks["a"].max() < 1
