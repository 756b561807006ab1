"""Batches by step: the same whenever they are asked for, all of them once in an epoch, held-out ones never."""

import pytest
import torch

from exactivations.datamodules.plan import PlanOptions
from exactivations.datamodules.step_batches import ShuffledText, generator_at
from exactivations.datamodules.text import TextDataModule
from exactivations.datamodules.tokenization import TextOptions
from exactivations.store.errors import InvalidInputError


@pytest.fixture(scope="module")
def data():
    texts = [f"def f{i}(x): return {'x + ' * (i % 5)}{i}" for i in range(40)]
    module = TextDataModule(texts, "demo", plan_options=PlanOptions(token_budget=40), text=TextOptions(max_length=12))
    module.setup()
    return module


def rows(batches):
    return sorted(tuple(row) for batch in batches for row in batch.tolist())


def test_an_epoch_has_every_batch_once_but_those_held_out(data):
    text = ShuffledText(data, seed=3, n_held_out=2)
    n = data.plan.n_batches - 2
    assert n > 3
    every = rows([data.batch_with(i).input_ids[data.batch_with(i).sample_index == i] for i in range(40)])
    for epoch in (0, 1):
        steps = [text(step) for step in range(epoch * n, (epoch + 1) * n)]
        assert rows([*steps, *text.held_out()]) == every
        assert all(batch.numel() <= 40 for batch in steps)
    assert [text(step).tolist() for step in range(n)] != [text(step).tolist() for step in range(n, 2 * n)]
    assert len(text.held_out()) == 2


def test_a_step_depends_on_its_number_and_the_seed_alone(data):
    one, again, other = ShuffledText(data, 3, 1), ShuffledText(data, 3, 1), ShuffledText(data, 4, 1)
    assert torch.equal(again(17), one(17))
    assert [one(step).tolist() for step in range(5)] != [other(step).tolist() for step in range(5)]
    assert one.identity == again.identity != other.identity


def test_generators_are_told_apart_by_what_and_where():
    drawn = [
        float(torch.rand((), generator=generator_at(*where))) for where in (("a", 0, 1), ("a", 0, 1), ("a", 1, 0), ("b", 0, 1))
    ]
    assert drawn[0] == drawn[1] and len({*drawn}) == 3


def test_what_leaves_nothing_to_train_on_is_refused(data):
    for n in (0, data.plan.n_batches):
        with pytest.raises(InvalidInputError, match=f"{n} batches were to be held out, and the dataset makes"):
            ShuffledText(data, 0, n)
    padded = TextDataModule(["a b", "a"], "demo", plan_options=PlanOptions(padding="tail"))
    with pytest.raises(InvalidInputError, match="batches without padding"):
        ShuffledText(padded, 0, 1)
