"""The two types that travel: tokens on their way into a model, activations on their way out of it.

Both carry the identity of their rows. Nothing downstream infers it from a position, a batch size or a counter.
Dimension letters, here and everywhere: B samples in a batch, L padded length, T tokens over a ragged batch, D model width.
"""

from dataclasses import dataclass, field, replace

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
    def of(cls, input_ids: Tensor) -> "TokenBatch":
        """Makes a batch of samples 0 to B-1 from ids [B, L] of equal length, all of them content."""
        if input_ids.ndim != 2:
            raise InvalidInputError(f"input_ids must be [B, L], got shape {list(input_ids.shape)}")
        n, length = input_ids.shape
        mask = torch.ones(n, length, dtype=torch.bool)
        return cls(torch.arange(n), input_ids.cpu(), torch.full((n,), length), mask)

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

    def pin_memory(self) -> "TokenBatch":
        """Returns the batch with ids and mask in pinned memory (called by the DataLoader's pin_memory)."""
        return replace(self, input_ids=self.input_ids.pin_memory(), token_mask=self.token_mask.pin_memory())


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
