"""Attributions of all rows of one cut forward pass: many gradients at a time, and of what is alive only.

Rows never meet, and positions only where attention is. So a gradient of a sum over rows gives each row its own, and where no path
leads over positions, a gradient of a sum over positions gives each position its own: one gradient serves a component at every place
of the batch, and at each place another component, whichever are alive there. Only for targets with paths over positions (the map
after attention) each place has gradients of its own.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from exactivations.lit_modules.attribution.attribution_paths import Paths
from exactivations.lit_modules.attribution.component_cut import CutPass, many_gradients

MIB = 1 << 20


@dataclass(frozen=True)
class PairValues:
    """Attributions of one pair of layers.

    Attributes:
        source, target: The layers.
        over_positions: Whether the source reaches later positions.
        rows: For each row float32 [E], of the edges between what is alive in it, in the order of `edge_places`; on the host.
    """

    source: str
    target: str
    over_positions: bool
    rows: tuple[Tensor, ...]


@dataclass(frozen=True)
class Packed:
    """What is alive, without what is not: [..., K], where K is the most that is alive at any place.

    Attributes:
        index: int64 [..., K], ascending; 0 where there are fewer.
        is_there: bool [..., K].
    """

    index: Int64[Tensor, "... k"]
    is_there: Bool[Tensor, "... k"]

    @classmethod
    def of(cls, alive: Bool[Tensor, "... c"]) -> "Packed":
        """Packs along the last dimension."""
        count = alive.sum(-1)
        is_there = torch.arange(int(count.max()), device=alive.device) < count[..., None]
        index = torch.zeros(is_there.shape, dtype=torch.int64, device=alive.device)
        index[is_there] = alive.nonzero()[:, -1]  # both run through the places in the same order
        return cls(index, is_there)


@dataclass(frozen=True)
class Writers:
    """What a layer's alive components write, times what a gradient is multiplied by.

    Attributes:
        written: [R, L, J, d], where J is the most that is alive at any place.
        is_there: bool [R, L, J].
    """

    written: Float[Tensor, "r l j d"]
    is_there: Bool[Tensor, "r l j"]

    @classmethod
    def of(cls, components: Float[Tensor, "c d"], scale: Float[Tensor, "r l c"], alive: Bool[Tensor, "r l c"]) -> "Writers":
        """Takes a map's U, and for each component mask times inner activation."""
        packed = Packed.of(alive)
        return cls(components[packed.index] * scale.gather(-1, packed.index)[..., None], packed.is_there)

    @classmethod
    def of_embedding(cls, embedding: Float[Tensor, "r l d"]) -> "Writers":
        """Takes the token embeddings: one pseudo-component, always alive."""
        return cls(embedding[:, :, None], torch.ones(*embedding.shape[:2], 1, dtype=torch.bool, device=embedding.device))


def attribute_rows(
    passed: CutPass,
    paths: Paths,
    writers: Mapping[str, Writers],
    reads: Float[Tensor, "c d"] | None,
    alive: Bool[Tensor, "r l c"],
    memory_mib: float,
) -> list[PairValues]:
    """Attributes one target's alive components to those of its sources.

    Args:
        passed: A cut forward pass of R rows.
        paths: The target and its sources.
        writers: By layer, of all sources.
        reads: What each of the target's components reads of the end: a map's V, transposed. None: a feature of its own, as logits.
        alive: Which of these are alive.
        memory_mib: About what gradients computed at a time may take, with the attributions that are made of them.

    Returns:
        A pair for each source.
    """
    end, starts = passed.ends[paths.target], [passed.starts[source] for source in paths.sources]
    slots = _slots(alive, paths.over_positions)
    edges = {source: _Edges.between(writers[source].is_there, slots.reached(over)) for source, over in paths.sources.items()}
    for part in _chunks(slots.n, _bytes_of_a_gradient(passed, paths, writers), memory_mib):
        gradients = many_gradients(end, starts, slots.part(part).directions(end, reads))
        for source, gradient in zip(paths.sources, gradients, strict=True):
            edges[source].write(writers[source].written @ gradient.permute(1, 2, 3, 0), part)
    return [PairValues(source, paths.target, over, edges.pop(source).of_rows()) for source, over in paths.sources.items()]


@dataclass(frozen=True)
class _Edges:
    """The edges of one pair in all rows, in the order of `edge_places`, however few gradients they are computed from at a time.

    Attributes:
        values: float32 [E].
        writes: bool [R, L, J], which of the source's components are there.
        reached: bool [R, L, K], from which positions each gradient's component is reached.
        first: int64 [R, L, J], where the edges of each of the source's components begin.
        rank: int64 [R, L, K], the place of each gradient among those of a source component at that position.
    """

    values: Tensor
    writes: Tensor
    reached: Tensor
    first: Tensor
    rank: Tensor

    @classmethod
    def between(cls, writes: Tensor, reached: Tensor) -> "_Edges":
        n_of_each = writes * reached.sum(-1, keepdim=True)
        end = n_of_each.flatten().cumsum(0).view_as(n_of_each)
        values = torch.zeros(int(n_of_each.sum()), device=writes.device)
        return cls(values, writes, reached, end - n_of_each, reached.cumsum(-1) - 1)

    def write(self, block: Float[Tensor, "r l j k"], part: slice) -> None:
        """Takes the values of some of the gradients, of which only those of edges count."""
        is_edge = self.writes[..., None] & self.reached[:, :, None, part]
        place = self.first[..., None] + self.rank[:, :, None, part]
        self.values[place[is_edge]] = block[is_edge].float()

    def of_rows(self) -> tuple[Tensor, ...]:
        """Returns each row's, on the host."""
        n_edges = (self.writes * self.reached.sum(-1, keepdim=True)).sum((1, 2)).tolist()
        return tuple(self.values.cpu().split(n_edges))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Slots:
    """K gradients that are computed together: in each, at each place of the batch, one component of the target or none.

    Attributes:
        component: int64 [R, L or 1, K], the target's component.
        position: int64 [R or 1, L or 1, K], its position.
        is_there: bool [R, L or 1, K].
        length: L.
    """

    component: Tensor
    position: Tensor
    is_there: Tensor
    length: int

    @property
    def n(self) -> int:
        return self.component.shape[-1]

    def part(self, part: slice) -> "_Slots":
        position = self.position if self.position.shape[-1] == 1 else self.position[..., part]
        return _Slots(self.component[..., part], position, self.is_there[..., part], self.length)

    def reached(self, over_positions: bool) -> Tensor:
        """Returns bool [R, L, K]: from which positions each is reached."""
        s_in = torch.arange(self.length, device=self.position.device)[None, :, None]
        reached = s_in <= self.position if over_positions else s_in == self.position
        return self.is_there & reached

    def directions(self, end: Tensor, reads: Tensor | None) -> Tensor:
        """Returns [K, R, L, d]: what a component reads (reads [C, d]; None: the component's own feature) at its position."""
        out = torch.zeros(self.n, *end.shape, dtype=end.dtype, device=end.device)
        row, place, k = self.is_there.nonzero(as_tuple=True)
        component = self.component[row, place, k]
        position = self.position.expand(self.is_there.shape)[row, place, k]
        if reads is None:
            out[k, row, position, component] = 1
        else:
            out[k, row, position] = reads[component]
        return out


def _slots(alive: Bool[Tensor, "r l c"], over_positions: bool) -> _Slots:
    _, length, n_components = alive.shape
    if over_positions:
        packed = Packed.of(alive.flatten(1))
        index = packed.index[:, None]
        return _Slots(index % n_components, index // n_components, packed.is_there[:, None], length)
    packed = Packed.of(alive)
    return _Slots(packed.index, torch.arange(length, device=alive.device)[None, :, None], packed.is_there, length)


def _bytes_of_a_gradient(passed: CutPass, paths: Paths, writers: Mapping[str, Writers]) -> int:
    """Returns about how much one gradient takes: of the end, of all starts, and of what is between them, as much again.

    Over positions there is attention between them, with a number for each two positions and head; heads are 64 wide or so. Then
    come the values of the edges of one source at a time, with their places, which are twice as long, and again those that count.
    """
    end = passed.ends[paths.target]
    numbers = end.numel() + sum(passed.starts[source].numel() for source in paths.sources)
    numbers += 3 * max(writers[source].is_there.numel() for source in paths.sources)
    attention = 3 * end.shape[:-1].numel() * end.shape[1] * max(1, end.shape[-1] // 64) if paths.over_positions else 0
    return end.element_size() * (2 * numbers + attention)


def _chunks(n: int, bytes_of_one: int, memory_mib: float) -> Iterator[slice]:
    """Yields slices of nearly equal size over n gradients, none over the bound unless it is of one."""
    at_a_time = max(1, int(memory_mib * MIB // bytes_of_one))
    n_chunks = -(-n // at_a_time)
    for chunk in range(n_chunks):
        yield slice(n * chunk // n_chunks, n * (chunk + 1) // n_chunks)
