"""What half precision would hide: the very batch of the plan, computed again, in the run's dtype and in a higher one.

In the run's dtype it must give what is stored: nothing slipped after computing. In a precision where rounding is next to nothing
it must give what the sample gives alone: nothing slipped in computing, be it one token in a mean of hundreds. What is left for
the dtype itself is only judged by how far rounding goes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from exactivations.datamodules.text import TextDataModule
from exactivations.lit_modules.extraction.extractor import ActivationExtractor
from exactivations.lit_modules.models.ground_truth import FLOAT32_TOLERANCE, computing_in, row_errors
from exactivations.store.batches import ActivationBatch, TokenBatch
from exactivations.store.pooling_names import TOKENS

LARGEST_SHARE = 4
"""In the higher precision only one in so many rows of the batch is computed: all of them would need more memory than the run."""


@dataclass(frozen=True)
class BatchProof:
    """How a sample's planned batch came out.

    Attributes:
        changed: Activations whose stored rows are not what the batch gives when it is computed again, with how far off they are.
        wrong: Activations that the batch does not give as the sample alone does, in the higher precision, with how far off.
    """

    changed: dict[str, float]
    wrong: dict[str, float]

    @property
    def holds(self) -> bool:
        """Whether nothing slipped."""
        return not self.changed and not self.wrong

    def in_words(self) -> str:
        """Returns where rows went wrong; empty if they did not."""
        if self.changed:
            return "its batch, computed again, gives other rows: mixed up after computing, or computed by something else"
        return (
            "its batch gives these rows, and wrong ones in a higher precision too: a fault in computing batches"
            if self.wrong
            else ""
        )


def higher_than(dtype: torch.dtype) -> torch.dtype:
    """Returns the precision in which rounding to a dtype is next to nothing."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def prove(
    extractor: ActivationExtractor,
    data: TextDataModule,
    sample_index: int,
    stored: dict[str, Tensor],
    alone: dict[str, Tensor],
    *,
    same_machine: bool,
) -> BatchProof:
    """Computes a sample's planned batch again.

    Args:
        extractor: What the store was made with.
        data: The texts, with the plan.
        sample_index: The sample.
        stored: Its stored rows [n, D], by "<hook point>/<pooling>".
        alone: The same rows of the sample alone, float64 [n, D], computed in `higher_than` the run's dtype.
        same_machine: Whether the run was made with these kernels: elsewhere they round otherwise, and `changed` stays empty.
    """
    batch = data.batch_with(sample_index)
    changed: dict[str, float] = {}
    if same_machine:
        again = _rows(extractor(batch), sample_index)
        for name, rows in stored.items():
            error = row_errors(again[name].double(), rows.double()).max().item()
            # Kernels give the same bits again, but for a few that add in no fixed order: far less than the last place of a row.
            if not error <= torch.finfo(rows.dtype).eps / 4:
                changed[name] = error
    model = extractor.load(extractor.device).model
    with _unrounded(extractor), computing_in(model, higher_than(model.dtype)):
        exact = _rows(extractor(_part_with(batch, sample_index)), sample_index)
    errors = {name: row_errors(exact[name].double(), alone[name]).max().item() for name in stored}
    return BatchProof(changed, {name: error for name, error in errors.items() if not error <= FLOAT32_TOLERANCE})


def row_of(batch: TokenBatch | ActivationBatch, sample_index: int) -> int:
    """Returns a sample's row in a batch that holds it."""
    return int((batch.sample_index == sample_index).nonzero()[0])


def _part_with(batch: TokenBatch, sample_index: int) -> TokenBatch:
    """Returns a part of a batch's neighbouring rows with the sample among them, as wide as the batch."""
    n, row = len(batch.sample_index), row_of(batch, sample_index)
    size = min(n, max(2, n // LARGEST_SHARE))
    start = min(max(0, row - size // 2), n - size)
    rows = slice(start, start + size)
    return replace(
        batch, sample_index=batch.sample_index[rows], input_ids=batch.input_ids[rows], n_tokens=batch.n_tokens[rows],
        token_mask=batch.token_mask[rows],
    )  # fmt: skip


def _rows(batch: ActivationBatch, sample_index: int) -> dict[str, Tensor]:
    """Returns one sample's rows [n, D] of a batch, on the host."""
    row = row_of(batch, sample_index)
    stop = int(batch.n_tokens[: row + 1].sum())
    tokens = slice(stop - int(batch.n_tokens[row]), stop)
    return {
        name: values[tokens if name.endswith(f"/{TOKENS}") else slice(row, row + 1)].cpu()
        for name, values in batch.activations.items()
    }


@contextmanager
def _unrounded(extractor: ActivationExtractor) -> Iterator[None]:
    """Lets an extractor give out what it computes, whatever it stores, inside the `with` block."""
    before = extractor.store_dtype
    extractor.store_dtype = None
    try:
        yield
    finally:
        extractor.store_dtype = before
