"""Components put together are the model; switched off they are nothing; what does not fit is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.models.falcon.modeling_falcon import FalconLinear

from exactivations.lit_modules.decomposition.component_linear import ComponentLinear
from exactivations.lit_modules.decomposition.component_model import ComponentModel, maps_matching
from exactivations.store.errors import InvalidInputError
from tests.lit_modules.pairs import language_model

MAPS = {
    "gpt_neox": ["*.query_key_value", "*.dense", "*.dense_h_to_4h", "*.dense_4h_to_h"],
    "llama": ["*_proj"],
    "gpt2": ["*.c_attn", "*.c_proj", "*.c_fc"],
}
IDS = torch.tensor([[7, 33, 8, 91, 14, 60], [44, 12, 70, 9, 31, 2]])
ATOL = {torch.float32: 1e-5, torch.float64: 1e-12}


def refuses(message):
    return pytest.raises(InvalidInputError, match=message)


def masks_of(components, value, shape=IDS.shape):
    dtype = next(components.parameters()).dtype
    return {path: torch.full((*shape, m.n_components), value, dtype=dtype) for path, m in components.maps.items()}


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("dtype", ATOL, ids=str)
@pytest.mark.parametrize("family", MAPS)
def test_all_singular_components_are_the_model_and_switched_off_it_is_the_original_to_the_bit(family, dtype):
    original = language_model(family, dtype=dtype)
    expected = logits_of(original)
    components = ComponentModel.from_svd(copy.deepcopy(original), MAPS[family])
    assert len(components.maps) == {"gpt_neox": 12, "llama": 21, "gpt2": 12}[family]
    assert torch.equal(logits_of(components.model), expected)
    with components.masked(masks_of(components, 1.0)):
        ours = logits_of(components.model)
    torch.testing.assert_close(ours, expected, rtol=0, atol=ATOL[dtype])
    with components.masked(masks_of(components, 0.5)):
        assert (logits_of(components.model) - expected).abs().max() > 0.1  # it is the components that run
    assert torch.equal(logits_of(components.model), expected)  # and no longer do
    assert {name.rsplit(".", 1)[1] for name, p in components.named_parameters() if p.requires_grad} == {"U", "V"}


@pytest.mark.parametrize("family", MAPS)
def test_any_components_and_what_they_lack_are_the_model(family):
    original = language_model(family)
    components = ComponentModel.from_random(copy.deepcopy(original), MAPS[family], 5, seed=1)
    ones = {path: torch.ones(IDS.shape, dtype=torch.float64) for path in components.maps}
    with components.masked(masks_of(components, 1.0), ones):
        torch.testing.assert_close(logits_of(components.model), logits_of(original), rtol=0, atol=1e-10)
    path = list(components.maps)[-1]
    torch.testing.assert_close(
        components.maps[path].delta() + components.maps[path].V @ components.maps[path].U,
        dict(original.named_modules())[path].weight.detach().T if family != "gpt2" else dict(original.named_modules())[path].weight,
    )


def test_a_mask_scales_each_component_at_each_place_and_leaves_bias_and_other_maps_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    first, second = (m.weight.detach().clone() for m in (net[0], net[2]))
    bias = net[0].bias.detach().clone()
    components = ComponentModel.from_random(net, ["*"], 7, seed=0)
    x, mask, delta_mask = (torch.rand(shape, dtype=torch.float64) for shape in ((5, 4), (5, 7), (5,)))
    one = components.maps["0"]
    expected = torch.stack(
        [
            sum(mask[b, c] * (x[b] @ one.V[:, c]) * one.U[c] for c in range(7))
            + delta_mask[b] * (first - (one.V @ one.U).T) @ x[b]
            + bias
            for b in range(5)
        ]
    )
    with components.masked({"0": mask}, {"0": delta_mask}):
        torch.testing.assert_close(components.model(x), expected.relu() @ second.T)
    with components.inner_activations() as inner:
        out = components.model(x)
    torch.testing.assert_close(inner["0"], x @ one.V)
    torch.testing.assert_close(out, (x @ first.T + bias).relu() @ second.T)
    inner["2"].sum().backward()
    assert components.maps["2"].V.grad is not None and one.V.grad is None


def test_what_does_not_fit_is_refused():
    net = lambda: nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4), "act": nn.ReLU()})  # noqa: E731
    with refuses(r"no linear map of ModuleDict matches 'donw': the nearest of 2 are down, up"):
        ComponentModel.from_svd(net(), ["up", "donw"])
    with refuses("no linear map of ModuleDict matches 'act'"):
        maps_matching(net(), ["act"])
    with refuses("no linear map of ReLU matches .*: it has none"):
        maps_matching(nn.ReLU(), ["*"])
    with refuses("no pattern"):
        maps_matching(net(), [])
    with refuses(r"up: a map of \[4, 6\] has 1 to 4 singular components, 5 were asked for"):
        ComponentModel.from_svd(net(), ["*"], 5)
    with refuses("n_components must be at least 1, got 0"):
        ComponentModel.from_random(net(), ["*"], 0, seed=0)
    with refuses("no map was named"):
        ComponentModel(net(), {})
    with refuses("'upp' is no linear map of ModuleDict: the nearest of 2 are up"):
        ComponentModel(net(), {"upp": (torch.ones(4, 2), torch.ones(2, 6))})
    for V, U in [((4, 2), (3, 6)), ((6, 2), (2, 4)), ((4, 0), (0, 6)), ((4,), (4, 6))]:
        with refuses(r"up: a map of \[4, 6\] needs V \[4, C\] and U \[C, 6\]"):
            ComponentModel(net(), {"up": (torch.ones(V), torch.ones(U))})
    components = ComponentModel.from_svd(nn.Sequential(nn.Linear(4, 4)), ["*"])
    with refuses(r"0: its mask is \[2, 3\], the forward pass needs \[2, 4\]"), components.masked({"0": torch.ones(2, 3)}):
        components.model(torch.ones(2, 4))
    with refuses(r"0: its mask is \[3, 2, 4\]"), components.masked({"0": torch.ones(3, 2, 4)}):  # would make more rows of it
        components.model(torch.ones(2, 4))
    with refuses(r"0: its delta mask is \[2, 1\]"), components.masked({"0": torch.ones(4)}, {"0": torch.ones(2, 1)}):
        components.model(torch.ones(2, 4))
    with refuses("'1' has no components: the nearest of 1 are 0"), components.masked({"1": torch.ones(4)}):
        pass
    with refuses("a delta mask was given for 0"), components.masked({}, {"0": torch.ones(2)}):
        pass


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Normalised(nn.Linear):
    """As the head of Baichuan 2."""

    def forward(self, x):
        return functional.linear(x, functional.normalize(self.weight), self.bias)


class Quantised(nn.Linear):
    """As BitNet's maps: weights of -1, 0 and 1 times a scale."""

    def forward(self, x):
        scale = self.weight.abs().mean()
        return functional.linear(x, (self.weight / scale).round().clamp(-1, 1) * scale, self.bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_subclass_is_taken_for_a_linear_map_if_it_computes_one(dtype):
    torch.manual_seed(0)
    for kind in (nn.Linear, FalconLinear):
        ComponentModel.from_svd(nn.Sequential(nn.ReLU(), kind(64, 48)).to(dtype), ["1"])
    for kind in (Scaled, Normalised, Quantised):
        with refuses(rf"1: this {kind.__name__} does not compute x @ weight \+ bias, .* leave it out"):
            ComponentModel.from_svd(nn.Sequential(nn.ReLU(), kind(64, 48)).to(dtype), ["1"])


def test_a_map_that_runs_twice_in_one_forward_pass_is_refused_and_two_passes_are_not():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, n):
            for _ in range(n):
                x = self.linear(x)
            return x

    components = ComponentModel.from_svd(Twice(), ["*"])
    x = torch.ones(2, 4)
    with components.masked({"linear": torch.ones(4)}):
        torch.testing.assert_close(components.model(x, 1), components.model(x, 1))
        with refuses("map linear runs twice"):
            components.model(x, 2)
    components.model(x, 2)
    assert isinstance(components.maps["linear"], ComponentLinear)
