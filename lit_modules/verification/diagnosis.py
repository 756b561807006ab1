"""What wrong rows look like: the row of a neighbour, of another hook point, of another token. A hint, never a verdict."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from exactivations.datamodules.text import TextDataModule
from exactivations.datamodules.tokenization import EncodedSample
from exactivations.lit_modules.models.ground_truth import GroundTruth, pool_by_definition, relative_error
from exactivations.lit_modules.models.hook_points import STREAM_KINDS, dissect, resolve_hook_points
from exactivations.store.activation_store import Sample
from exactivations.store.pooling_names import TOKENS, position_of

ALIKE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Relative error below which a row is taken for another one: rounding, and far from any two different samples."""

MOST_NEIGHBOURS = 12


def explain(
    model: PreTrainedModel,
    arguments: dict[str, Any],
    data: TextDataModule,
    encoded: EncodedSample,
    stored: Sample,
    name: str,
) -> str | None:
    """Says what the stored rows of a sample that failed look like instead, or None if they look like nothing known.

    Args:
        model: The model's body.
        arguments: What its forward pass is called with besides the ids.
        data: The texts.
        encoded: The sample as its text gives it.
        stored: What the store holds of it.
        name: The activation that failed.
    """
    hook_point, _, pooling = name.rpartition("/")
    rows = stored.activations[name].double()
    rows = rows if pooling == TOKENS else rows[None]
    alike = ALIKE[max(model.dtype, stored.activations[name].dtype, key=lambda dtype: torch.finfo(dtype).eps)]
    kind = hook_point.partition(".")[0]
    alike_kinds = [name for name in dissect(model).names() if name.partition(".")[0] in (kind, *STREAM_KINDS)]
    points = list(dict.fromkeys([hook_point, *alike_kinds]))
    truth = GroundTruth(model, resolve_hook_points(model, points), arguments)
    own = truth.states(encoded.input_ids)
    for point in points:
        if point != hook_point and _matches(rows, pool_by_definition(own[point], encoded.token_mask, pooling), alike):
            return f"it looks like {point} of the same sample"
    position = _position_like(rows, own[hook_point].double(), pooling, alike)
    if position:
        return position
    for neighbour, relation in _neighbours(data, stored.sample_index):
        other = data.encode_alone(neighbour)
        states = truth.states(other.input_ids)[hook_point]
        if _matches(rows, pool_by_definition(states, other.token_mask, pooling), alike):
            return f"it looks like sample {neighbour}, {relation}"
    return None


def _matches(rows: Tensor, true: Tensor, alike: float) -> bool:
    return rows.shape == true.shape and bool((relative_error(rows, true) <= alike).all())


def _position_like(rows: Tensor, states: Tensor, pooling: str, alike: float) -> str | None:
    """Recognises rows of other tokens of the same sample."""
    if pooling == TOKENS:
        for shift in (1, -1):
            if len(rows) > 2 and _matches(rows[1:-1], states.roll(shift, dims=0)[1:-1], alike):
                return f"its rows are shifted: row t holds token {'t - 1' if shift == 1 else 't + 1'}"
        return None
    errors = relative_error(rows.expand_as(states), states)
    if position_of(pooling) is not None and errors.min() <= alike:
        return f"it looks like token {int(errors.argmin())} of {len(states)} of the same sample"
    return None


def _neighbours(data: TextDataModule, sample_index: int) -> Iterator[tuple[int, str]]:
    """Yields samples with which a row may have been mixed up: beside it in the dataset, in its shard, and in its batch."""
    tokens, plan = data.tokens, data.plan
    position = int(np.searchsorted(tokens.sample_index, sample_index))
    place = int(np.flatnonzero(plan.order == position)[0])
    found: dict[int, str] = {}
    for step in (1, -1):
        if 0 <= position + step < len(tokens):
            found.setdefault(position + step, f"the {'next' if step == 1 else 'one before'} in the dataset")
        if 0 <= place + step < len(plan.order) and plan.shard_of_sample[plan.order[place + step]] == plan.shard_of_sample[position]:
            found.setdefault(int(plan.order[place + step]), f"the {'next' if step == 1 else 'previous'} row in its shard")
    for other in plan.batch(int(plan.batch_of_sample[position]))[:MOST_NEIGHBOURS].tolist():
        if other != position:
            found.setdefault(other, "a row of the same batch")
    for other, relation in found.items():
        yield int(tokens.sample_index[other]), relation
