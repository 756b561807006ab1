"""Decomposition by training: one step by hand, resumed as if never stopped, a toy's mechanisms found again, saved and put back."""

import copy
import functools

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from exactivations.callbacks.step_checkpoint import StepCheckpoint
from exactivations.datamodules.step_batches import StepBatches, generator_at
from exactivations.lit_modules.decomposition.causal_importance import lower_leaky_hard_sigmoid, upper_leaky_hard_sigmoid
from exactivations.lit_modules.decomposition.ci_function_file import causal_importances, read_ci_function, write_ci_function
from exactivations.lit_modules.decomposition.component_model import ComponentModel
from exactivations.lit_modules.decomposition.decomposition import CLEARLY_ALIVE, Decomposition, Objective
from exactivations.lit_modules.decomposition.toy_superposition import (
    ToySuperposition,
    recovery,
    sparse_features,
    train_toy_superposition,
)
from exactivations.store.errors import CorruptShardError, IdentityError, InvalidInputError
from tests.lit_modules.pairs import language_model

MSE = Objective("mse", minimality=3e-3, p=1.0)
IDS = torch.tensor([[7, 33, 8, 91, 14, 60], [44, 12, 70, 9, 31, 2]])


@functools.cache
def trained_toy(seed=0, hidden_identity=False):
    return train_toy_superposition(5, 2, seed=seed, batch_size=256, steps=2000, hidden_identity=hidden_identity)


def toy_batches(size=64, seed=0):
    return StepBatches(lambda step: sparse_features(size, 5, generator_at("features", seed, step)), {"size": size, "seed": seed})


def decomposition(objective=MSE, seed=0, n_components=20, model=None, **options):
    components = ComponentModel.from_random(copy.deepcopy(model or trained_toy()), ["*"], n_components, seed)
    return Decomposition(components, objective, seed=seed, **{"fitting_steps": 20, **options})


def fit(module, batches, steps, checkpoint=None, callbacks=(), **options):
    options = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, **options}
    trainer = pl.Trainer(
        max_steps=steps, logger=False, enable_checkpointing=False, enable_model_summary=False, callbacks=[*callbacks], **options
    )
    trainer.fit(module, datamodule=batches, ckpt_path=checkpoint, weights_only=True)
    return module


def trained_values(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters() if parameter.requires_grad}


def same(one, other):
    one, other = trained_values(one), trained_values(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("use_delta", [True, False])
def test_a_step_is_adam_on_the_published_losses(use_delta):
    """Forward passes, masks, losses and optimiser once more, in float64, with nothing of the module but its start."""
    objective = Objective("mse", 0.02, 2.0, faithfulness=0.7, stochastic=1.3, layerwise=0.6, use_delta=use_delta)
    module = decomposition(objective, n_components=4, model=copy.deepcopy(trained_toy()).double(), fitting_steps=0)
    toy, x = copy.deepcopy(trained_toy()).double(), sparse_features(16, 5, torch.Generator().manual_seed(5)).double()
    before = {name: value.requires_grad_() for name, value in trained_values(module).items()}
    W = toy.linear1.weight.detach()
    b = toy.linear2.bias.detach()
    weights, V, U, g, upper = [W.T, W], [], [], [], []
    for place, path in enumerate(("linear1", "linear2")):
        V.append(before[f"components.model.{path}.V"])
        U.append(before[f"components.model.{path}.U"])
        w_in, b_in, w_out, b_out = (
            before[f"ci_function._of_maps.{place}.{name}"] for name in ("weight_in", "bias_in", "weight_out", "bias_out")
        )
        inner = (x if place == 0 else x @ W.T) @ V[place]
        raw = (nn.functional.gelu(inner[:, :, None] * w_in + b_in) * w_out).sum(2) + b_out
        g.append(lower_leaky_hard_sigmoid(raw))
        upper.append(upper_leaky_hard_sigmoid(raw))
    generator = generator_at("masks", 0, 0)

    def masked(names):
        masks = {i: g[i] + (1 - g[i]) * torch.rand(16, 4, generator=generator, dtype=torch.float64) for i in names}
        deltas = {i: torch.rand(16, generator=generator, dtype=torch.float64) for i in names} if use_delta else {}
        hidden = x
        for i in (0, 1):
            W_prime = torch.einsum("bc,ic,co->bio", masks[i], V[i], U[i]) if i in names else weights[i].expand(16, -1, -1)
            if i in names and use_delta:
                W_prime = W_prime + deltas[i][:, None, None] * (weights[i] - V[i] @ U[i])
            hidden = torch.einsum("bi,bio->bo", hidden, W_prime)
        return (((hidden + b).relu() - (x @ W.T @ W + b).relu()) ** 2).mean()

    both, one, two = masked([0, 1]), masked([0]), masked([1])
    unfaithful = sum(((weights[i] - V[i] @ U[i]) ** 2).sum() for i in (0, 1)) / 20
    minimality = sum((values**2).sum(1).mean() for values in upper)
    loss = 0.02 * minimality + 0.7 * unfaithful + 1.3 * both + 0.6 * (one + two) / 2
    optimizer = torch.optim.Adam(before.values(), lr=1e-3)
    loss.backward()
    optimizer.step()
    fit(module, StepBatches(lambda step: x, {}), 1)
    for name, value in trained_values(module).items():
        torch.testing.assert_close(value, before[name].detach(), rtol=0, atol=1e-6)  # Adam divides gradients by their own size


class Crash(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 17:
            raise RuntimeError("killed")


def test_resumed_training_goes_on_bit_for_bit_and_refuses_what_is_not_its_own(tmp_path):
    whole = fit(decomposition(), toy_batches(), 25)
    checkpoint = tmp_path / "of a new folder" / "checkpoint.ckpt"
    with pytest.raises(RuntimeError, match="killed"):
        fit(decomposition(), toy_batches(), 25, callbacks=[StepCheckpoint(checkpoint, 5), Crash()])
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["global_step"] == 15 and not any("original" in name for name in saved["state_dict"])
    assert [file.name for file in checkpoint.parent.iterdir()] == ["checkpoint.ckpt"]
    resumed = fit(decomposition(), toy_batches(), 25, checkpoint)
    assert same(resumed, whole)
    other_toy = train_toy_superposition(5, 2, seed=1, batch_size=8, steps=1)
    for message, module, batches, steps in (
        (r"its minimality is 0\.003, and here 0\.1", decomposition(Objective("mse", 0.1, 1.0)), toy_batches(), 25),
        (r"its seed is 0, and here 3", decomposition(seed=3), toy_batches(), 25),
        (r"its model is \w+, and here", decomposition(model=other_toy), toy_batches(), 25),
        (r"its max_steps is 25, and here 30", decomposition(), toy_batches(), 30),
        (r"other batches: its size is 64, and here 32", decomposition(), toy_batches(32), 25),
    ):
        with pytest.raises(IdentityError, match=message):
            fit(module, batches, steps, checkpoint)


def test_a_seed_repeats_and_another_differs():
    one, again, other = (fit(decomposition(seed=seed), toy_batches(), 3) for seed in (0, 0, 1))
    assert same(one, again) and not same(one, other)


def test_a_short_training_finds_the_features_of_a_toy_model():
    module = fit(decomposition(n_components=10, learning_rate=0.02, fitting_steps=200), toy_batches(128), 600)
    toy, linear1 = trained_toy(), module.components.maps["linear1"]
    x = sparse_features(4096, 5, torch.Generator().manual_seed(9))
    importances = causal_importances(module.components, module.ci_function, x)["linear1"]
    found = recovery(toy.linear1.weight.detach().T, linear1.V.detach(), linear1.U.detach(), (importances > CLEARLY_ALIVE).any(0))
    assert found.mean_max_cosine_similarity > 0.98 and abs(found.mean_length_ratio - 1) < 0.05
    assert (importances > CLEARLY_ALIVE).sum(1).float().mean() < 0.4  # a quarter of a feature is there on average


def test_recovery_is_perfect_for_the_columns_themselves_and_looks_at_what_is_alive_only():
    columns = torch.randn(5, 2)
    V = torch.cat([torch.eye(5), torch.ones(5, 1)], dim=1)  # a component for each feature, and one that spoils all
    found = recovery(columns, V, torch.cat([0.9 * columns, torch.ones(1, 2)]), torch.tensor([True] * 5 + [False]))
    assert found.mean_max_cosine_similarity == pytest.approx(1) and found.mean_length_ratio == pytest.approx(0.9)
    without_first = recovery(columns, V, torch.cat([columns, torch.ones(1, 2)]), torch.tensor([False] + [True] * 5))
    by_hand = torch.nn.functional.cosine_similarity(columns[0].double(), torch.ones(2).double(), dim=0)
    assert without_first.mean_max_cosine_similarity == pytest.approx((4 + max(0, float(by_hand))) / 5)
    with pytest.raises(InvalidInputError, match="no component is alive"):
        recovery(columns, V, torch.ones(6, 2), torch.zeros(6, dtype=torch.bool))


def test_the_toy_model_is_its_formula_and_the_identity_changes_nothing():
    plain, with_identity = trained_toy(), trained_toy(hidden_identity=True)
    x = torch.rand(3, 4, 5)
    W, b = plain.linear1.weight, plain.linear2.bias
    torch.testing.assert_close(plain(x), (x @ W.T @ W + b).relu())
    assert torch.equal(plain(x), with_identity(x)) and isinstance(with_identity.identity, nn.Linear)
    assert list(ComponentModel.from_svd(copy.deepcopy(with_identity), ["*"]).maps) == ["linear1", "identity", "linear2"]
    lengths = W.norm(dim=0)
    assert lengths.min() > 0.8  # all five features in two dimensions: superposition
    features = sparse_features(20_000, 3, torch.Generator().manual_seed(0))
    assert (features > 0).float().mean() == pytest.approx(0.05, abs=0.003)
    assert features[features > 0].mean() == pytest.approx(0.5, abs=0.02)
    for options in ({"n_hidden": 5}, {"n_hidden": 0}, {"batch_size": 0}, {"steps": 0}):
        with pytest.raises(InvalidInputError, match="has more features than dimensions"):
            train_toy_superposition(**{"n_features": 5, "n_hidden": 2, "seed": 0, **options})


def test_a_language_model_is_decomposed_saved_and_read_back(tmp_path):
    model = language_model("gpt2", dtype=torch.float32)
    model.train()  # dropout would make the target another one in each forward pass
    module = decomposition(Objective("kl", 1e-3, 2.0), n_components=6, model=model)
    fit(module, StepBatches(lambda step: IDS.roll(step, 1), {}), 3)
    assert not module.components.training
    importances = causal_importances(module.components, module.ci_function, IDS)
    assert list(importances) == list(module.components.maps) and len(importances) == 13
    assert all(g.shape == (2, 6, 6) and g.min() >= 0 and g.max() <= 1 for g in importances.values())
    alone = causal_importances(module.components, module.ci_function, IDS[1:])
    assert all(torch.allclose(g[0], importances[path][1], atol=1e-5) for path, g in alone.items())
    path = write_ci_function(tmp_path, module.ci_function, module.components)
    again = read_ci_function(path, module.components)
    assert all(torch.equal(g, importances[path]) for path, g in causal_importances(module.components, again, IDS).items())
    with pytest.raises(InvalidInputError, match="belongs to components"):
        read_ci_function(tmp_path, decomposition(n_components=6, model=model).components)
    path.write_bytes(path.read_bytes()[:-1] + b"\x00\x01")
    with pytest.raises(CorruptShardError):
        read_ci_function(path, module.components)


def test_what_cannot_be_trained_is_refused():
    for message, options in (
        ("compared by mse or kl, got 'l1'", {"kind": "l1"}),
        ("weights of losses must be 0 or more", {"minimality": -1.0}),
        ("p above 0", {"p": 0.0}),
        ("one of stochastic and layerwise above 0", {"stochastic": 0.0, "layerwise": 0.0}),
        ("without deltas nothing makes components sum to the weights", {"use_delta": False}),
    ):
        with pytest.raises(InvalidInputError, match=message):
            Objective(**{"kind": "mse", "minimality": 1e-3, "p": 1.0, **options})
    for options in ({"learning_rate": 0.0}, {"fitting_steps": -1}, {"seed": -1}):
        with pytest.raises(InvalidInputError, match="learning_rate must be above 0, fitting_steps and seed 0 or more"):
            decomposition(**options)
    with pytest.raises(InvalidInputError, match=r"trained in float32 or float64, these are torch\.bfloat16"):
        decomposition(model=ToySuperposition(torch.ones(2, 5), torch.ones(5)).bfloat16())
    with pytest.raises(InvalidInputError, match="give the trainer max_steps"):
        fit(decomposition(), toy_batches(), -1, max_epochs=1)
    with pytest.raises(InvalidInputError, match="saved every 1 or more steps, got 0"):
        StepCheckpoint(None, 0)
