"""Poolings against float64 arithmetic on each row alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jaxtyping import TypeCheckError

from exactivations.lit_modules.extraction.pooling import pool
from exactivations.store.errors import InvalidInputError
from exactivations.store.pooling_names import half_life_of, position_of, tokens_needed


@st.composite
def states_and_masks(draw):
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 5)))
    states = draw(hnp.arrays(np.float32, shape, elements=st.floats(-1e3, 1e3, width=32)))
    mask = draw(hnp.arrays(bool, shape[:2]))
    for row in mask:
        row[draw(st.integers(0, shape[1] - 1))] = True
    return torch.tensor(states), torch.tensor(mask)


def by_definition(row, name):
    row = row.astype(np.float64)
    if name.startswith("exp_decay"):
        half_life = float(name.partition(":")[2]) * len(row)
        weights = 0.5 ** (np.arange(len(row))[::-1] / half_life)
        return (weights[:, None] * row).sum(0) / weights.sum()
    return {"last": row[-1], "first": row[0], "mean": row.mean(0), "max": row.max(0)}[name]


@pytest.mark.parametrize("name", ["last", "first", "mean", "max", "exp_decay:0.067", "exp_decay:0.5", "exp_decay:3"])
@given(data=states_and_masks())
def test_pooling_equals_its_definition_over_the_marked_tokens(name, data):
    states, mask = data
    got = pool(states, mask, name)
    assert got.dtype == torch.float32
    for row in range(len(states)):
        expected = by_definition(states[row][mask[row]].numpy(), name)
        # float32 sums of at most 9 terms up to 1e3: a few units in the last place of the largest term
        np.testing.assert_allclose(got[row].double().numpy(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", ["last", "first", "mean", "max", "exp_decay:0.1", "position:-1"])
def test_a_row_does_not_depend_on_the_rows_beside_it_or_on_what_is_not_marked(name):
    torch.manual_seed(0)
    states, mask = torch.randn(3, 6, 4), torch.rand(3, 6) < 0.5
    mask[:, 2] = True
    alone = torch.stack([pool(states[i : i + 1], mask[i : i + 1], name)[0] for i in range(3)])
    torch.testing.assert_close(pool(states, mask, name), alone)
    changed = torch.where(mask[:, :, None], states, 1e4)
    torch.testing.assert_close(pool(changed, mask, name), alone)


@given(data=states_and_masks(), draw=st.data())
def test_a_position_is_that_of_the_marked_tokens_alone_from_either_end(data, draw):
    states, mask = data
    fewest = int(mask.sum(1).min())
    k = draw.draw(st.integers(-fewest, fewest - 1))
    got = pool(states, mask, f"position:{k}")
    for row in range(len(states)):
        np.testing.assert_array_equal(got[row].double().numpy(), states[row][mask[row]].double().numpy()[k])
    assert tokens_needed(f"position:{k}") <= fewest
    for short in (fewest, -fewest - 1):
        with pytest.raises(InvalidInputError, match=f"row .* has {fewest} tokens that count, the pooling position:{short} needs"):
            pool(states, mask, f"position:{short}")


@pytest.mark.parametrize(("position", "same"), [("position:0", "first"), ("position:-1", "last")])
@given(data=states_and_masks())
def test_first_and_last_are_positions(position, same, data):
    assert torch.equal(pool(*data, position), pool(*data, same))
    assert position_of(position) == position_of(same)


@pytest.mark.parametrize(
    "name", ["position", "position:", "position:-0", "position:01", "position:+1", "position:1.5", "position:x"]
)
def test_a_position_has_one_spelling(name):
    assert position_of(name) is None
    with pytest.raises(InvalidInputError, match=r"is not one of .*position:<k> .*as in position:-2"):
        pool(torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool), name)


def test_half_precision_is_pooled_in_float32():
    states = torch.full((1, 4096, 1), 1.0009765625, dtype=torch.float16)  # a float16 sum would stop at 2048
    assert pool(states, torch.ones(1, 4096, dtype=torch.bool), "mean").item() == pytest.approx(1.0009765625, rel=1e-6)


def test_exp_decay_halves_over_its_half_life():
    states = torch.eye(10)[None]
    weights = pool(states, torch.ones(1, 10, dtype=torch.bool), "exp_decay:0.2")[0]  # half-life: two tokens
    torch.testing.assert_close(weights[:-2] / weights[2:], torch.full((8,), 0.5))
    assert half_life_of("exp_decay:0.067") == 0.067


def test_shapes_that_do_not_belong_together_are_refused():
    with pytest.raises(TypeCheckError):
        pool(torch.zeros(2, 5, 3), torch.ones(2, 4, dtype=torch.bool), "mean")
