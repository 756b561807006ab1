"""The types that travel: tokens on their way into a model, in batches and steps, and activations on their way out of it.

All carry the identity of their rows. Nothing downstream infers it from a position, a batch size or a counter.
Dimension letters, here and everywhere: B samples in a batch, L padded length, T tokens over a ragged batch, D model width.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from exactivations.store.errors import InvalidInputError


@dataclass(frozen=True)
class Place:
    """Where a batch's rows lie in the plan: which shard, and from which row and which token on inside it."""

    shard: int
    first_row: int
    first_token: int


@dataclass(frozen=True)
class TokenBatch:
    """Whole samples, of equal length unless `is_padded` (and then padded on the right).

    Attributes:
        sample_index: int64 [B], always on the host: the samples' positions in the dataset as given.
        input_ids: int64 [B, L].
        n_tokens: int64 [B], always on the host: real tokens of each row.
        token_mask: bool [B, L], True for tokens that poolings count; False for special tokens and padding.
        place: Where these rows belong in the plan; None for a batch that belongs to none.
        host: This batch as it was before it moved to a device, so that nothing has to be copied back.
    """

    sample_index: Tensor
    input_ids: Tensor
    n_tokens: Tensor
    token_mask: Tensor
    place: Place | None = None
    host: "TokenBatch | None" = field(default=None, repr=False)

    @classmethod
    def of(cls, input_ids: Tensor, *, token_mask: Tensor | Literal["all"]) -> "TokenBatch":
        """Makes a batch of samples 0 to B-1 from ids [B, L] of equal length.

        Which of them count has to be said: a tokenizer may have added special tokens, which a data module leaves out by default.
        `TextDataModule.batch_of` makes the batch of a text by the options of the data.

        Args:
            input_ids: int64 [B, L].
            token_mask: bool [B, L], as in `TokenBatch`; "all" counts every token, special ones too.

        Raises:
            InvalidInputError: If the mask is not one value for each token.
        """
        if input_ids.ndim != 2:
            raise InvalidInputError(f"input_ids must be [B, L], got shape {list(input_ids.shape)}")
        n, length = input_ids.shape
        if isinstance(token_mask, str):
            if token_mask != "all":
                raise InvalidInputError(f"token_mask must be a bool tensor [B, L] or 'all', got {token_mask!r}")
            token_mask = torch.ones(n, length, dtype=torch.bool)
        elif token_mask.dtype != torch.bool or token_mask.shape != input_ids.shape:
            raise InvalidInputError(
                f"token_mask must be bool {[n, length]}, one value for each token, got {token_mask.dtype} {list(token_mask.shape)}"
            )
        return cls(torch.arange(n), input_ids.cpu(), torch.full((n,), length), token_mask.cpu())

    @property
    def is_padded(self) -> bool:
        """Whether any row is shorter than the batch is wide. Looks at the host only, so it never waits for a device."""
        return bool((self.n_tokens != self.input_ids.shape[1]).any())

    @property
    def on_host(self) -> "TokenBatch":
        """This batch with all its tensors on the host, without a copy from the device."""
        return self.host or self

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "TokenBatch":
        """Returns the batch with ids and mask on the device; identity and lengths stay on the host."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=non_blocking),
            token_mask=self.token_mask.to(device, non_blocking=non_blocking),
            host=self.on_host,
        )


@dataclass(frozen=True)
class TokenStep:
    """Consecutive batches that travel together, so that what a Trainer does for each step is not done for each small batch.

    Attributes:
        sample_index: int64 [B] on the host, all batches' rows one after the other.
        n_tokens: int64 [B] on the host.
        input_ids: int64 [T]: the real tokens of all rows, one row after the other.
        token_mask: bool [T], always on the host, as in `TokenBatch`.
        shapes: (rows, width, real tokens) of each batch.
        place: Where the first row belongs in the plan, the others follow it; None if they belong to none.
        host: This step as it was before it moved to a device.
    """

    sample_index: Tensor
    n_tokens: Tensor
    input_ids: Tensor
    token_mask: Tensor
    shapes: tuple[tuple[int, int, int], ...]
    place: Place | None = None
    host: "TokenStep | None" = field(default=None, repr=False)

    @classmethod
    def of(cls, batch: TokenBatch) -> "TokenStep":
        """Makes a step of one batch."""
        host = batch.on_host
        real = real_positions(host.n_tokens, host.input_ids.shape[1]) if host.is_padded else slice(None)
        ids, mask = host.input_ids.flatten()[real], host.token_mask.flatten()[real]
        return cls(host.sample_index, host.n_tokens, ids, mask, ((*host.input_ids.shape, len(ids)),), host.place)

    @property
    def on_host(self) -> "TokenStep":
        """This step with all its tensors on the host, without a copy from the device."""
        return self.host or self

    @property
    def computed_tokens(self) -> int:
        """Tokens that a model computes, padding included."""
        return sum(rows * width for rows, width, _ in self.shapes)

    def batches(self) -> Iterator[TokenBatch]:
        """Yields the batches, as views of the step's tokens where they are not padded."""
        hosts = self.host.batches() if self.host is not None else None
        row = token = 0
        for rows, width, n_real in self.shapes:
            n_tokens, tokens = self.n_tokens[row : row + rows], slice(token, token + n_real)
            real = None if n_real == rows * width else real_positions(n_tokens, width)
            place = None
            if self.place is not None:
                place = Place(self.place.shard, self.place.first_row + row, self.place.first_token + token)
            yield TokenBatch(
                sample_index=self.sample_index[row : row + rows],
                input_ids=padded(
                    self.input_ids[tokens], rows, width, real if real is None else to_device(real, self.input_ids.device)
                ),
                n_tokens=n_tokens,
                token_mask=padded(self.token_mask[tokens], rows, width, real),
                place=place,
                host=next(hosts) if hosts is not None else None,
            )
            row, token = row + rows, tokens.stop

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "TokenStep":
        """Returns the step with the ids on the device; all else stays on the host."""
        return replace(self, input_ids=self.input_ids.to(device, non_blocking=non_blocking), host=self.on_host)

    def pin_memory(self) -> "TokenStep":
        """Returns the step with the ids in pinned memory (called by the DataLoader's pin_memory)."""
        return replace(self, input_ids=self.input_ids.pin_memory())


def real_positions(n_tokens: Tensor, width: int) -> Tensor:
    """Returns the places of real tokens in a flattened [B, width] that is padded on the right, row after row."""
    return (torch.arange(width) < n_tokens[:, None]).flatten().nonzero()[:, 0]


def padded(values: Tensor, rows: int, width: int, real: Tensor | None) -> Tensor:
    """Returns values [T] as [rows, width], with 0 or False where rows are shorter; a view if none is.

    Args:
        values: Of real tokens, one row after the other.
        rows: How many.
        width: Of the longest.
        real: Their `real_positions`, on the device of the values; None if no row is shorter.
    """
    if real is None:
        return values.view(rows, width)
    out = values.new_zeros(rows * width)
    out[real] = values
    return out.view(rows, width)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Returns values of the host on the device, without waiting for it: from pageable memory a copy might."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


@dataclass(frozen=True)
class ActivationBatch:
    """Activations of whole samples, with the identity of the batch they came from.

    Attributes:
        sample_index: int64 [B] on the host.
        n_tokens: int64 [B] on the host.
        input_ids: int64 [T] on the host: the real tokens of all rows, one row after the other.
        token_mask: bool [T] on the host.
        activations: By name: "<hook point>/<pooling>" -> [B, D], "<hook point>/tokens" -> [T, D], on any device.
        place: As in `TokenBatch`.
    """

    sample_index: Tensor
    n_tokens: Tensor
    input_ids: Tensor
    token_mask: Tensor
    activations: dict[str, Tensor]
    place: Place | None = None


@dataclass(frozen=True)
class ActivationSpec:
    """What one named activation looks like: one row per token or per sample, how wide, in which dtype."""

    per_token: bool
    width: int
    dtype: torch.dtype
