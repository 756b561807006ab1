"""Causal importances: the sigmoids at their corners, each component's MLP by itself, hostile shapes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from exactivations.lit_modules.decomposition.causal_importance import (
    CausalImportanceFunction,
    hard_sigmoid,
    hard_sigmoid_with_lower_leaky_gradient,
    lower_leaky_hard_sigmoid,
    upper_leaky_hard_sigmoid,
)
from exactivations.store.errors import InvalidInputError

X = [-3.0, -0.5, 0.25, 0.75, 1.5, 11.0]
SIGMOIDS = {
    hard_sigmoid: ([0, 0, 0.25, 0.75, 1, 1], [0, 0, 1, 1, 0, 0]),
    lower_leaky_hard_sigmoid: ([-0.03, -0.005, 0.25, 0.75, 1, 1], [0.01, 0.01, 1, 1, 0, 0]),
    upper_leaky_hard_sigmoid: ([0, 0, 0.25, 0.75, 1.005, 1.1], [0, 0, 1, 1, 0.01, 0.01]),
}


@pytest.mark.parametrize("sigmoid", SIGMOIDS, ids=lambda sigmoid: sigmoid.__name__)
def test_sigmoids_have_the_published_values_and_slopes(sigmoid):
    x = torch.tensor(X, dtype=torch.float64, requires_grad=True)
    values, slopes = (torch.tensor(wanted, dtype=torch.float64) for wanted in SIGMOIDS[sigmoid])
    torch.testing.assert_close(sigmoid(x), values, rtol=0, atol=1e-15)
    torch.testing.assert_close(torch.autograd.grad(sigmoid(x).sum(), x)[0], slopes, rtol=0, atol=1e-15)


def test_the_lower_leak_of_the_gradient_alone_leaves_values_clipped_and_lets_pass_only_what_raises_them():
    x = torch.tensor(X, dtype=torch.float64, requires_grad=True)
    for direction, slopes in ((-1, [0.01, 0.01, 1, 1, 0, 0]), (1, [0, 0, 1, 1, 0, 0])):  # descent goes against the gradient
        values = hard_sigmoid_with_lower_leaky_gradient(x)
        assert torch.equal(values, hard_sigmoid(x))
        (gradient,) = torch.autograd.grad((direction * values).sum(), x)
        torch.testing.assert_close(gradient, direction * torch.tensor(slopes, dtype=torch.float64), rtol=0, atol=1e-15)


@given(leading=st.lists(st.integers(0, 4), max_size=3), c=st.integers(1, 5), h=st.integers(1, 4))
def test_each_component_has_an_mlp_of_its_own_at_any_leading_dimensions(leading, c, h):
    function = CausalImportanceFunction({"a": c, "b.c": 2}, h, seed=1).double()
    with torch.no_grad():
        for parameter in function.parameters():  # biases begin at 0, where nobody would see them mixed up
            parameter.add_(torch.randn_like(parameter))
    inner = {"a": torch.randn(*leading, c, dtype=torch.float64), "b.c": torch.randn(*leading, 2, dtype=torch.float64)}
    found = function(inner)
    for path, of_map in function.of_maps.items():
        for component in range(inner[path].shape[-1]):
            mlp = nn.Sequential(nn.Linear(1, h), nn.GELU(), nn.Linear(h, 1)).double()
            with torch.no_grad():
                mlp[0].weight.copy_(of_map.weight_in[component, :, None])
                mlp[0].bias.copy_(of_map.bias_in[component])
                mlp[2].weight.copy_(of_map.weight_out[component, None])
                mlp[2].bias.copy_(of_map.bias_out[component])
            torch.testing.assert_close(found[path][..., component], mlp(inner[path][..., component, None])[..., 0])


def test_a_seed_repeats_and_another_differs():
    one, again, other = (CausalImportanceFunction({"a": 3}, 4, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["_of_maps.0.weight_in"], other["_of_maps.0.weight_in"])


def test_what_does_not_fit_is_refused():
    for n_components, n_hidden in (({}, 4), ({"a": 0}, 4), ({"a": 3}, 0)):
        with pytest.raises(InvalidInputError, match="needs at least one map, one component of each, and one hidden unit"):
            CausalImportanceFunction(n_components, n_hidden)
    function = CausalImportanceFunction({"a": 3}, 4)
    for inner in ({"a": torch.zeros(2, 4)}, {"b": torch.zeros(2, 3)}, {}):
        with pytest.raises(InvalidInputError, match=r"is of the maps \(components\) {'a': 3}, the inner activations of"):
            function(inner)
