"""Causal importances for one prompt: seeds apart, the loss as it is defined, few components that still predict, bad input."""

import copy

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from exactivations.datamodules.named_tokenizer import load_tokenizer
from exactivations.lit_modules.decomposition.ci_optimisation import CiOptimisation
from exactivations.lit_modules.decomposition.component_model import ComponentModel
from exactivations.lit_modules.decomposition.optimised_sets import CiOptions
from exactivations.lit_modules.models.language_model import ModelOptions, load_model
from exactivations.scripts.trainers import trainer_on
from exactivations.store.errors import InvalidInputError
from tests.lit_modules.pairs import language_model

PATTERNS = {"gpt2": "transformer.h.*", "gpt_neox": "gpt_neox.layers.*", "llama": "model.layers.*"}
IDS = torch.tensor([5, 17, 3, 88, 41, 7])


def decomposed(family="llama", dtype=torch.float64, n_components=None):
    return ComponentModel.from_svd(language_model(family, dtype=dtype), [PATTERNS[family]], n_components)


def fitted(components, seeds, options, ids=IDS, **more):
    optimisation = CiOptimisation(components, ids, seeds, options, **more)
    trainer_on("cpu", 1, max_epochs=1, logger=False, enable_progress_bar=False).fit(optimisation)
    return optimisation


@pytest.mark.parametrize("family", PATTERNS)
@pytest.mark.parametrize("masks", ["stochastic", "ci"])
def test_a_seed_gives_what_it_gives_alone(family, masks):
    components, options = decomposed(family, n_components=6), CiOptions(steps=25, masks=masks)
    together = fitted(components, [11, 7, 3], options)
    alone = fitted(components, [7], options)
    again = fitted(components, [7], options)
    other = fitted(components, [3, 7], options)
    for batch, row in ((together, 1), (other, 1)):
        torch.testing.assert_close(batch.before_sigmoid[row], alone.before_sigmoid[0], atol=1e-9, rtol=0)
    assert torch.equal(again.before_sigmoid, alone.before_sigmoid)
    assert (other.before_sigmoid[0] - alone.before_sigmoid[0]).abs().mean() > 0.05
    (one,), (first, _) = alone.optimised, other.optimised
    assert together.optimised[1].alive == one.alive
    assert together.optimised[1].loss == pytest.approx(one.loss, abs=1e-8)
    assert first.seed == 3


def test_the_loss_falls_and_the_target_stays_while_components_go():
    components = decomposed(dtype=torch.float32)
    options = CiOptions(steps=250, learning_rate=0.03, coefficient=0.03)
    before = CiOptimisation(components, IDS, [0, 1], options).judged()
    weights = copy.deepcopy(components.state_dict())
    optimisation = fitted(components, [0, 1], options)
    for start, end in zip(before, optimisation.optimised, strict=True):
        assert end.loss < 0.3 * start.loss
        assert sum(end.alive.values()) < 0.2 * sum(start.alive.values())
        assert end.stochastic_probability > 0.5 * optimisation.own_probability
    assert all(torch.equal(weights[name], tensor) for name, tensor in components.state_dict().items())
    assert all(parameter.grad is None for parameter in components.parameters())


def test_on_the_demo_model_few_components_predict_what_it_predicts():
    whole = load_model("demo", ModelOptions(dtype="float32"), "cpu", wants_head=lambda _: True).whole
    components, tokenizer = ComponentModel.from_svd(whole, ["gpt_neox.layers.*"]), load_tokenizer("demo")
    ids = torch.tensor(tokenizer("def add(left, right):\n    return left +")["input_ids"])
    optimisation = fitted(components, [0], CiOptions(steps=250, masks="ci"), ids)
    (found,) = optimisation.optimised
    assert tokenizer.decode([optimisation.target]) == " right"
    assert found.probability > optimisation.own_probability > 0.7
    assert sum(found.alive.values()) < 0.05 * optimisation.before_sigmoid.shape[1]


@pytest.mark.parametrize("masks", ["stochastic", "ci"])
def test_with_all_components_on_it_is_the_original_model_and_minimality_is_its_formula(masks):
    components = decomposed()
    optimisation = CiOptimisation(components, IDS, [0, 1], CiOptions(masks=masks, p=0.4, coefficient=0.2))
    with torch.no_grad():
        original = components.model(input_ids=IDS[None]).logits[0, -1].softmax(-1)
        optimisation.before_sigmoid.fill_(1.5)  # above 1: on, and by the upper leak a little more than 1
    assert optimisation.own_probability == pytest.approx(float(original.max()))
    n_components = sum(of_map.n_components for of_map in components.maps.values())
    for found in optimisation.judged():
        assert found.probability == pytest.approx(float(original.max()), abs=1e-9)
        assert found.stochastic_probability == pytest.approx(float(original.max()), abs=1e-9)
        assert found.minimality == pytest.approx(n_components * 1.005**0.4)
        assert found.loss == pytest.approx(-np.log(float(original.max())) + 0.2 * found.minimality)
        assert sum(found.alive.values()) == n_components * len(IDS)


def test_the_gradient_is_that_of_the_loss():
    gpt2 = decomposed("gpt2", n_components=4)  # not Llama, whose norms compute in float32
    optimisation = CiOptimisation(gpt2, IDS, [0], CiOptions(masks="ci"))
    values, step = optimisation.before_sigmoid, 1e-6
    optimisation.log = lambda *args, **options: None
    optimisation.backward(optimisation.training_step(torch.tensor(0)))
    gradient = values.grad.clone()
    for place in (0, 57, 200, values.shape[1] - 1):
        with torch.no_grad():
            losses = []
            for sign in (1, -2, 1):
                values[0, place] += sign * step
                losses.append(float(optimisation.training_step(torch.tensor(0))))
        assert float(gradient[0, place]) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-4, abs=1e-7)
    with torch.no_grad():  # what is off gets a hundredth of the gradient, where that would switch it on
        values[:, ::2] = -0.5
    values.grad = None
    optimisation.backward(optimisation.training_step(torch.tensor(0)))
    assert (values.grad[:, ::2] <= 0).all()
    assert (values.grad[:, ::2] < 0).any()
    assert values.grad[:, ::2].abs().max() < 0.1 * values.grad[:, 1::2].abs().max()


def test_only_what_is_alive_by_the_models_own_importances_takes_part():
    components = decomposed(dtype=torch.float32, n_components=5)
    generator = torch.Generator().manual_seed(0)
    own = {path: torch.randn(len(IDS), 5, generator=generator) for path in components.maps}
    start = CiOptimisation(components, IDS, [0, 1], own=own)
    assert all(torch.equal(of_map[1], own[path].clamp(0, 1)) for path, of_map in start.importances().items())
    found = fitted(components, [0, 1], CiOptions(steps=20, learning_rate=0.1), own=own)
    for path, of_map in found.importances().items():
        assert (of_map[:, own[path] <= 0] == 0).all()
    assert found.before_sigmoid.shape[1] == sum(int((of_map > 0).sum()) for of_map in own.values())


def test_where_nothing_is_random_more_than_one_seed_is_refused():
    components = decomposed(dtype=torch.float32, n_components=3)
    own = {path: torch.ones(len(IDS), 3) for path in components.maps}
    with pytest.raises(InvalidInputError, match=r"2 seeds would all give one set: .* nothing is random; give one seed"):
        CiOptimisation(components, IDS, [0, 1], CiOptions(masks="ci"), own=own)
    assert CiOptimisation(components, IDS, [4], CiOptions(masks="ci"), own=own).seeds == (4,)


def test_a_model_in_training_mode_has_no_dropout_in_it_and_stays_in_that_mode():
    components, options = decomposed("gpt2", n_components=3), CiOptions(steps=5)
    expected = fitted(components, [7], options)
    components.model.train()
    assert any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in components.modules())
    found = fitted(components, [11, 7], options)
    assert found.own_probability == pytest.approx(expected.own_probability, abs=1e-12)
    torch.testing.assert_close(found.before_sigmoid[1], expected.before_sigmoid[0], atol=1e-9, rtol=0)
    assert components.model.training


def test_a_model_in_half_precision_is_optimised_in_float32():
    optimisation = fitted(decomposed(dtype=torch.bfloat16, n_components=4), [0], CiOptions(steps=3))
    assert optimisation.before_sigmoid.dtype == torch.float32
    assert np.isfinite(optimisation.optimised[0].loss)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seeds": []}, "each given once"),
        ({"seeds": [1, 1]}, "each given once"),
        ({"seeds": [-1]}, "each given once"),
        ({"input_ids": torch.empty(0, dtype=torch.int64)}, "L at least 1"),
        ({"target": 99}, "0 to 98, got 99"),
        ({"own": {}}, "expected (6, 3)"),
        ({"own": "short"}, r"has (5, 3), expected (6, 3)"),
        ({"own": "dead"}, "nothing is alive"),
        ({"model": "toy"}, "Linear predicts no tokens"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change, told):
    components = decomposed(dtype=torch.float32, n_components=3)
    shapes = {"short": (5, 3), "dead": (6, 3)}
    if isinstance(change.get("own"), str):
        change = {"own": {path: torch.full(shapes[change["own"]], -1.0) for path in components.maps}}
    if "model" in change:
        toy = torch.nn.Sequential(torch.nn.Linear(3, 3))
        change = {"model": ComponentModel.from_svd(toy, ["0"])}
        told = "Sequential predicts no tokens"
    arguments = {"model": components, "input_ids": IDS, "seeds": [0], **change}
    with pytest.raises(InvalidInputError) as error:
        CiOptimisation(**arguments)
    assert told in str(error.value)


@pytest.mark.parametrize(
    "option", [{"steps": 0}, {"p": 0.0}, {"coefficient": float("nan")}, {"learning_rate": -1.0}, {"masks": "all"}]
)
def test_options_out_of_range_are_refused(option):
    with pytest.raises(InvalidInputError, match=next(iter(option))):
        CiOptions(**option)


def test_a_trainer_that_would_mix_seeds_is_refused():
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, gradient_clip_val=1.0, logger=False, enable_checkpointing=False)
    with pytest.raises(InvalidInputError, match="gradient_clip_val"):
        trainer.fit(CiOptimisation(decomposed(n_components=3), IDS, [0, 1]))
