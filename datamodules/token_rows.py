"""The type that travels from a TokenStream to what is trained on it."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenRows:
    """Token activations of several hook points: row i of all of them is the same token.

    Attributes:
        rows: By hook point: [B, D] in the dtype they are stored in.
        sample_index: int64 [B], the sample that each token is of.
        position: int64 [B], its position in the sample, special tokens counted.
        input_ids: int32 [B].
    """

    rows: dict[str, Tensor]
    sample_index: Tensor
    position: Tensor
    input_ids: Tensor

    def __len__(self) -> int:
        return len(self.sample_index)

    def __getitem__(self, hook_point: str) -> Tensor:
        """Returns the rows of a hook point, [B, D]."""
        return self.rows[hook_point]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TokenRows":
        """Returns the same on a device."""
        rows = {name: rows.to(device, non_blocking=non_blocking) for name, rows in self.rows.items()}
        others = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.sample_index, self.position, self.input_ids))
        return TokenRows(rows, *others)

    def part(self, first: int, last: int) -> "TokenRows":
        """Returns a copy of rows `first` to before `last`, which keeps nothing of the others alive."""
        rows = {name: rows[first:last].clone() for name, rows in self.rows.items()}
        return TokenRows(rows, *(tensor[first:last].clone() for tensor in (self.sample_index, self.position, self.input_ids)))
