"""Where rows that disagree went wrong, found by computing the very batch of the plan again.

It also tells near ties from faults in half precision. A router that chooses experts can tip over by a rounding: a token's state
is then far from what the sample gives alone, though nothing is wrong. The proof: in the run's dtype the batch gives exactly what
is stored (nothing slipped after computing), and in float32, where nothing tips over, exactly what the sample gives alone
(nothing slipped in computing).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from exactivations.datamodules.text import TextDataModule
from exactivations.lit_modules.extraction import ActivationExtractor
from exactivations.lit_modules.ground_truth import FLOAT32_TOLERANCE, ROUNDING_FACTOR, Comparison, computing_in, relative_error
from exactivations.lit_modules.pooling import TOKENS
from exactivations.store.batches import ActivationBatch

UNLUCKY_SHARE = 0.05
"""Rows of a sample that may be further off than four times their rounding by luck alone, where no router can tip over."""


class Origin(StrEnum):
    """Where rows that disagree went wrong."""

    AFTER_COMPUTING = "its batch, computed again, gives other rows: mixed up after computing, or computed by something else"
    IN_COMPUTING = "its batch, computed again, gives these rows, and in float32 wrong ones too: a fault in computing batches"
    IN_ROUNDING = "its batch is right in float32: a kernel of this dtype or attention implementation is at fault"


def origin_of(
    extractor: ActivationExtractor,
    data: TextDataModule,
    sample_index: int,
    stored: dict[str, Tensor],
    in_float32: dict[str, Tensor],
) -> Origin:
    """Computes a sample's planned batch again, and says where its rows went wrong.

    Args:
        extractor: What the store was made with.
        data: The texts, with the plan.
        sample_index: The sample.
        stored: Its stored rows [n, D] that disagree, by "<hook point>/<pooling>".
        in_float32: The same rows of the sample alone in float32, float64 [n, D].
    """
    batch = data.batch_with(sample_index)
    again = _rows(extractor(batch), sample_index)
    if not all(_alike(again[name], rows.double(), torch.finfo(rows.dtype).eps) for name, rows in stored.items()):
        return Origin.AFTER_COMPUTING
    loaded = extractor.load(extractor.device)
    with _giving_float32(extractor), computing_in(loaded.model, torch.float32):
        exact = _rows(extractor(batch), sample_index)
    right = all(_alike(exact[name], in_float32[name], FLOAT32_TOLERANCE) for name in stored)
    return Origin.IN_ROUNDING if right else Origin.IN_COMPUTING


def are_near_ties(model: PreTrainedModel, wrong: list[Comparison]) -> bool:
    """Whether rows whose batch is right in float32 are near ties, and no fault of a kernel.

    Where a router chooses experts, what tips over in one token reaches others through attention, so that there is no limit to how
    many rows are far off. Elsewhere nothing tips over: rows are as far off as their own rounding, however large that is, and only
    a few are further by bad luck.
    """
    return has_experts(model.config.to_dict()) or all(map(_is_luck, wrong))


def _is_luck(comparison: Comparison) -> bool:
    few = comparison.n_beyond <= max(1, UNLUCKY_SHARE * comparison.n_rows)
    return few or comparison.error <= ROUNDING_FACTOR * comparison.rounding


def has_experts(config: Any) -> bool:
    """Whether a configuration tells of more than one expert, however deep."""
    if not isinstance(config, dict):
        return False
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any(isinstance(config.get(name), int) and config[name] > 1 for name in names) or any(map(has_experts, config.values()))


def _alike(found: Tensor, true: Tensor, tolerance: float) -> bool:
    return bool((relative_error(found.double(), true) <= tolerance).all())


def _rows(batch: ActivationBatch, sample_index: int) -> dict[str, Tensor]:
    """Returns one sample's rows [n, D] of a batch, on the host."""
    row = int((batch.sample_index == sample_index).nonzero()[0])
    stop = int(batch.n_tokens[: row + 1].sum())
    tokens = slice(stop - int(batch.n_tokens[row]), stop)
    return {
        name: values[tokens if name.endswith(f"/{TOKENS}") else slice(row, row + 1)].cpu()
        for name, values in batch.activations.items()
    }


@contextmanager
def _giving_float32(extractor: ActivationExtractor) -> Iterator[None]:
    """Lets an extractor give out float32, whatever it stores, inside the `with` block."""
    before = extractor.store_dtype
    extractor.store_dtype = "float32"
    try:
        yield
    finally:
        extractor.store_dtype = before
