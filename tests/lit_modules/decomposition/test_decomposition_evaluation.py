"""Figures of a decomposition where they are known: exact components, none at all, the largest few by hand."""

import copy

import pytest
import torch
from torch.nn import functional

from exactivations.lit_modules.decomposition.causal_importance import CausalImportanceFunction
from exactivations.lit_modules.decomposition.ci_function_file import causal_importances
from exactivations.lit_modules.decomposition.component_model import ComponentModel
from exactivations.lit_modules.decomposition.decomposition import CLEARLY_ALIVE
from exactivations.lit_modules.decomposition.decomposition_evaluation import evaluate, largest_only
from exactivations.store.errors import InvalidInputError
from tests.lit_modules.pairs import language_model

MAPS = ["*.dense_h_to_4h", "*.dense_4h_to_h"]
BATCHES = [torch.tensor([[7, 33, 8, 91], [44, 12, 70, 9], [1, 2, 3, 4]]), torch.tensor([[14, 60]])]


def kl(p_logits, q_logits):
    p, q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).flatten()


@pytest.fixture(scope="module")
def exact():
    components = ComponentModel.from_svd(language_model("gpt_neox"), MAPS)
    return components, CausalImportanceFunction({path: m.n_components for path, m in components.maps.items()}).double()


def test_exact_components_give_the_model_and_none_leave_its_biases(exact):
    components, ci_function = exact
    found = evaluate(components, ci_function, BATCHES, "kl")
    assert found.all_components == pytest.approx(0, abs=1e-12) and max(found.missing.values()) < 1e-20
    without = copy.deepcopy(components.model)
    for path, of_map in components.maps.items():
        without.get_submodule(path).original.weight.data.zero_()
        assert of_map.weight.abs().max() > 0
    with torch.no_grad():
        by_position = [kl(components.model(ids).logits, without(ids).logits) for ids in BATCHES]
    assert found.none == pytest.approx(float(torch.cat(by_position).mean()), rel=1e-9)  # of 14 positions, and not of two batches
    assert found.by_importance > 0 and 0 < found.by_chance < found.none


def test_alive_components_are_counted_over_all_positions(exact):
    components, ci_function = exact
    found = evaluate(components, ci_function, BATCHES, "kl")
    for path in components.maps:
        alive = torch.cat([causal_importances(components, ci_function, ids)[path].flatten(0, 1) for ids in BATCHES]) > CLEARLY_ALIVE
        assert found.alive[path] == pytest.approx(float(alive.double().sum(1).mean()), rel=1e-6)
        assert torch.equal(found.ever_alive[path], alive.any(0))


def test_the_largest_components_of_each_position_are_kept(exact):
    components, _ = exact
    every = {path: m.n_components for path, m in components.maps.items()}
    assert largest_only(components, every, BATCHES, "kl") == pytest.approx(0, abs=1e-12)
    first = next(iter(components.maps))
    n_kept = {**every, first: 2}
    of_map, by_position = components.maps[first], []
    for ids in BATCHES:
        with torch.no_grad():
            target = components.model(ids).logits

            def two_largest(x):
                written = (x @ of_map.V)[..., None] * of_map.U  # [B, L, C, d_out]
                two = written.norm(dim=-1).topk(2, dim=-1).indices
                return torch.take_along_dim(written, two[..., None], dim=-2).sum(-2) + of_map.bias

            with of_map.running_as(two_largest):
                by_position.append(kl(target, components.model(ids).logits))
    assert largest_only(components, n_kept, BATCHES, "kl") == pytest.approx(float(torch.cat(by_position).mean()), rel=1e-9)
    assert functional.relu(torch.cat(by_position).mean()) > 1e-3


def test_no_batch_is_refused(exact):
    with pytest.raises(InvalidInputError, match="no batch to measure on"):
        evaluate(*exact, [], "kl")
    with pytest.raises(InvalidInputError, match="no batch to measure on"):
        largest_only(exact[0], {}, [], "kl")
