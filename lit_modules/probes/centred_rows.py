"""Rows about their mean, in blocks and in the precision that is asked for; the rows themselves stay as and where they are."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

KEPT = 1 << 22  # numbers: copies of so many are nothing beside what else is there


class CentredRows:
    """Rows less their mean, each with a one at its end (for a bias), [n, d + 1].

    Attributes:
        mean: float64 [d].
        radius: Norm of the longest row about the mean.
        axes: float32 [d + 1, d + 1], the rows' principal axes as columns; the last is the one's.
        variance: float32 [d + 1], along the axes; the last is 1.

    Args:
        rows: float32 or float64, finite.
        share: Weight of each row in mean and variance, of sum 1.
        block: Rows to be read at a time. Of few rows all blocks are kept, in each precision.
    """

    def __init__(self, rows: Float[Tensor, "n d"], share: Float64[Tensor, " n"], block: int) -> None:
        self._rows, self._block = rows, block
        self._kept: dict[torch.dtype, list[tuple[slice, Tensor]]] = {}
        self._sampled: tuple[int, Tensor, Tensor] | None = None
        self.width = rows.shape[1] + 1
        self.mean = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
        for piece in self._pieces():
            self.mean += share[piece] @ rows[piece].double()
        # Axes and radius serve only where three digits would do.
        gram, self.radius = self.mean.new_zeros(self.width, self.width), 0.0
        for piece, centred in self.blocks(torch.float32):
            gram += (centred.mT * share[piece].float()) @ centred
            self.radius = max(self.radius, float(centred[:, :-1].norm(dim=1).max()))
        variance, axes = torch.linalg.eigh(gram[:-1, :-1].float())
        self.axes = torch.eye(self.width, device=rows.device)
        self.axes[:-1, :-1] = axes
        self.variance = torch.cat([variance.clamp(min=0), variance.new_ones(1)])

    def __len__(self) -> int:
        return len(self._rows)

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Float[Tensor, "block width"]]]:
        """Yields each block of rows and which ones these are."""
        if len(self) * self.width > KEPT:
            yield from ((piece, self._centred(self._rows[piece], dtype)) for piece in self._pieces())
            return
        if not self._kept:
            whole = [(piece, self._centred(self._rows[piece], torch.float64)) for piece in self._pieces()]
            self._kept = {torch.float64: whole, torch.float32: [(piece, block.float()) for piece, block in whole]}
        yield from self._kept[dtype]

    def sample(self, size: int) -> tuple[Int64[Tensor, " m"], Float32[Tensor, "m width"]]:
        """Returns at most so many rows, evenly spaced, in the coordinates of the principal axes, and which ones these are.

        They are kept, for calls with the same size.
        """
        if self._sampled is None or self._sampled[0] != size:
            every = -(-len(self) // size)
            which = torch.arange(0, len(self), every, device=self._rows.device)
            if every == 1:
                rows = torch.cat([block for _, block in self.blocks(torch.float32)])
            else:
                rows = self._centred(self._rows[which], torch.float32)
            self._sampled = size, which, rows @ self.axes
        return self._sampled[1:]

    def _pieces(self) -> Iterator[slice]:
        return (slice(start, start + self._block) for start in range(0, len(self), self._block))

    def _centred(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        wider = torch.promote_types(rows.dtype, dtype)  # rounded first, rows far from zero would lose what tells them apart
        block = torch.empty(len(rows), self.width, dtype=dtype, device=rows.device)
        block[:, -1] = 1
        torch.sub(rows.to(wider), self.mean.to(wider), out=block[:, :-1])
        return block
