"""Nothing that is not finite gets into a store, and the message finds the one value among all."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exactivations.callbacks.activation_writer import WriterThread
from exactivations.callbacks.host_copy import HostCopy
from exactivations.datamodules.plan import PlanOptions, plan
from exactivations.store.batches import ActivationBatch, ActivationSpec, Place
from exactivations.store.errors import NotFiniteError
from exactivations.store.finite import refuse_not_finite
from exactivations.store.run_folder import RunFolder
from exactivations.store.shard import verify_shard

from .stores import run_info

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS, MEAN = "resid_post.1/tokens", "final_norm/mean"
lengths = st.lists(st.integers(1, 5), min_size=1, max_size=5)


def batch_of(index, lengths, dtype=torch.float32, width=3, fill=1.0, place=None):
    """A ragged batch with both kinds of rows, all of one value."""
    total = sum(lengths)
    activations = {TOKENS: torch.full((total, width), fill).to(dtype), MEAN: torch.full((len(lengths), width), fill).to(dtype)}
    flat = torch.zeros(total, dtype=torch.int64), torch.ones(total, dtype=torch.bool)
    return ActivationBatch(torch.tensor(index), torch.tensor(lengths), *flat, activations, place)


@given(
    data=st.data(), lengths=lengths, dtype=st.sampled_from(DTYPES), width=st.integers(1, 4), name=st.sampled_from([TOKENS, MEAN]),
    value=st.sampled_from(["inf", "-inf", "nan"]), fill=st.sampled_from([0.0, -3.0, 6e4]),
)  # fmt: skip
def test_one_value_anywhere_is_refused_by_its_sample_token_and_dimension(data, lengths, dtype, width, name, value, fill):
    index = data.draw(st.lists(st.integers(0, 10**6), min_size=len(lengths), max_size=len(lengths), unique=True))
    batch = batch_of(index, lengths, dtype, width, fill)
    refuse_not_finite(batch)
    places = [(row, token) for row, n in enumerate(lengths) for token in range(n)]  # of a flat row: whose it is, and which token
    row = data.draw(st.integers(0, len(batch.activations[name]) - 1))
    dimension = data.draw(st.integers(0, width - 1))
    batch.activations[name][row, dimension] = float(value)
    sample, token = places[row] if name == TOKENS else (row, None)
    where = f" at token {token}" if name == TOKENS else ""
    with pytest.raises(NotFiniteError) as error:
        refuse_not_finite(batch)
    message = (
        f"sample {index[sample]}: {name} is {value}{where}, dimension {dimension} (1 of the row's {width} values are not finite)"
    )
    assert str(error.value).startswith(message)
    assert ("--dtype bfloat16" in str(error.value)) == (dtype == torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_of_both_signs_do_not_cancel_out(dtype):
    batch = batch_of([4, 9], [2, 2], dtype)
    batch.activations[TOKENS][3] = torch.tensor([torch.inf, -torch.inf, 1.0])
    with pytest.raises(NotFiniteError, match=re.escape("sample 9: resid_post.1/tokens is inf at token 1, dimension 0 (2 of")):
        refuse_not_finite(batch)


@given(lengths=lengths, dtype=st.sampled_from(DTYPES), sign=st.sampled_from([-1.0, 1.0]), width=st.integers(1, 40))
def test_large_finite_values_whose_sum_overflows_are_not_refused(lengths, dtype, sign, width):
    refuse_not_finite(batch_of(range(len(lengths)), lengths, dtype, width, sign * torch.finfo(dtype).max))


def test_a_value_that_is_not_finite_is_found_among_values_whose_sum_overflows():
    batch = batch_of([7], [4], fill=torch.finfo(torch.float32).max)
    batch.activations[TOKENS][2, 1] = torch.nan
    with pytest.raises(NotFiniteError, match=r"sample 7: .* is nan at token 2, dimension 1"):
        refuse_not_finite(batch)


@pytest.mark.parametrize("name", [TOKENS, MEAN])
def test_in_a_run_nothing_of_its_shard_is_published_and_what_was_before_stays(tmp_path, name):
    n_tokens = [4] * 8
    the_plan = plan(n_tokens, PlanOptions(token_budget=8, shard_tokens=16))  # two shards of two batches of two samples
    assert (the_plan.n_shards, the_plan.n_batches) == (2, 4)
    specs = {key: ActivationSpec(key == TOKENS, 3, torch.float32) for key in (TOKENS, MEAN)}
    folder = RunFolder(tmp_path)
    folder.shard_folder.mkdir()
    thread = WriterThread(folder, run_info(2, n_tokens), the_plan, specs)
    for number in range(4):
        batch = batch_of(the_plan.batch(number).tolist(), [4, 4], place=Place(*the_plan.place(number)))
        if number == 3:
            batch.activations[name][-1, 2] = torch.inf
        thread.put(HostCopy(batch, wait=lambda: None, release=lambda: None))
    with pytest.raises(NotFiniteError, match=f"sample {the_plan.batch(3)[-1]}: {name} is inf.*Nothing of its shard is published"):
        thread.finish()
    assert sorted(path.name for path in folder.shard_folder.iterdir()) == ["00000.safetensors"]
    verify_shard(folder.shard_path(0))
    assert np.isin(the_plan.batch(3), the_plan.order[the_plan.sample_start[1] :]).all()
