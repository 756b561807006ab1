"""Attributions of several CI sets as graphs over the same nodes: which nodes and edges there are, and which of them sets share."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from exactivations.store.attributions import Attributions, PairAttribution
from exactivations.store.errors import InvalidInputError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Edges:
    """The edges of one set, the strongest first.

    Attributes:
        source: int64 [E], numbers of nodes.
        target: int64 [E].
        value: float32 [E], attributions, signed; none is 0.
    """

    source: Ints
    target: Ints
    value: Floats

    def n_of(self, threshold: float) -> int:
        """Returns how many of them, the first ones, have a size of at least this."""
        return int(np.searchsorted(-np.abs(self.value), -np.float32(threshold), side="right"))


@dataclass(frozen=True)
class SharedEdges:
    """All edges that are in some set, at one threshold.

    Attributes:
        source: int64 [K], numbers of nodes.
        target: int64 [K].
        value: float32 [N, K]; 0 where the edge is not in the set.
    """

    source: Ints
    target: Ints
    value: Floats

    @property
    def n_sets(self) -> Ints:
        """How many sets have each edge, int64 [K]."""
        n_sets: Ints = (self.value != 0).sum(axis=0)
        return n_sets

    @property
    def in_all(self) -> Bools:
        """Whether every set has the edge, bool [K]."""
        in_all: Bools = self.n_sets == len(self.value)
        return in_all

    def only_in(self, number: int) -> Bools:
        """Whether the set with this number has the edge, and no other has; bool [K]."""
        only: Bools = (self.value[number] != 0) & (self.n_sets == 1)
        return only


@dataclass(frozen=True)
class AttributionGraph:
    """The graphs of all sets, with one numbering of nodes.

    Attributes:
        attributions: What they are made of.
        layers: In the order of the model: wte, then maps, then output.
        layer: int64 [n], of each node that is alive or a ghost in some set its layer's number. Nodes are sorted by it,
        position: int64 [n], then by this,
        component: int64 [n], then by this.
        alive: bool [N, n], whether the set has the node.
        ghost: bool [N, n], whether the model's own causal importances have it, and the set has not.
        edges: Of each set, [N].
    """

    attributions: Attributions
    layers: tuple[str, ...]
    layer: Ints
    position: Ints
    component: Ints
    alive: Bools
    ghost: Bools
    edges: tuple[Edges, ...]

    def threshold_for(self, most: int) -> float:
        """Returns the smallest size of an edge with which no set shows more edges than this; 0 if none has more.

        Raises:
            InvalidInputError: If most is below 1.
        """
        if most < 1:
            raise InvalidInputError(f"the most edges to show must be at least 1, got {most}")
        sizes = [np.abs(edges.value) for edges in self.edges]
        too_many = [of_set[most] for of_set in sizes if len(of_set) > most]
        if not too_many:
            return 0.0
        stronger = np.concatenate([of_set[of_set > max(too_many)] for of_set in sizes])  # of equals, all are shown or none
        return float(stronger.min() if len(stronger) else np.nextafter(max(too_many), np.float32(np.inf)))

    def shared(self, threshold: float) -> SharedEdges:
        """Returns the edges of at least this size in some set, and what each set has of them."""
        n = max(len(self.layer), 1)
        first = [edges.n_of(threshold) for edges in self.edges]
        ends = [edges.source[:k] * n + edges.target[:k] for edges, k in zip(self.edges, first, strict=True)]
        union = np.unique(np.concatenate(ends))
        value = np.zeros((len(ends), len(union)), np.float32)
        for row, of_set, edges in zip(value, ends, self.edges, strict=True):
            row[np.searchsorted(union, of_set)] = edges.value[: len(of_set)]
        return SharedEdges(union // n, union % n, value)


def graph_of(attributions: Attributions) -> AttributionGraph:
    """Numbers the nodes of all sets, and sorts each set's edges, without those whose attribution is 0.

    Raises:
        InvalidInputError: If an attribution is not finite; its set and pair are named.
    """
    layers = tuple(next(iter(attributions.alive.values())))
    keys = _Keys(attributions, layers)
    alive = [keys.of_masks(of_set) for of_set in attributions.alive.values()]
    own = keys.of_masks(attributions.original_alive)
    nodes = np.unique(np.concatenate([*alive, own]))
    is_alive = np.stack([np.isin(nodes, of_set) for of_set in alive])
    edges = []
    for name, pairs in attributions.by_set.items():
        parts = [keys.of_edges(name, pair) for pair in pairs]
        source, target = np.concatenate([np.empty((2, 0), np.int64), *(ends for ends, _ in parts)], axis=1)
        value = np.concatenate([np.empty(0, np.float32), *(values for _, values in parts)])
        order = np.argsort(-np.abs(value), kind="stable")
        edges.append(Edges(np.searchsorted(nodes, source[order]), np.searchsorted(nodes, target[order]), value[order]))
    return AttributionGraph(attributions, layers, *keys.apart(nodes), is_alive, np.isin(nodes, own) & ~is_alive, tuple(edges))


class _Keys:
    """Nodes as single numbers, which sort by layer, position and component."""

    def __init__(self, attributions: Attributions, layers: tuple[str, ...]) -> None:
        self._layers, self._length = {layer: number for number, layer in enumerate(layers)}, len(attributions.tokens)
        self._width = max(mask.shape[1] for of_set in attributions.alive.values() for mask in of_set.values())

    def of(self, layer: str, position: Tensor, component: Tensor) -> Ints:
        keys: Ints = ((self._layers[layer] * self._length + position) * self._width + component).numpy()
        return keys

    def of_masks(self, alive: Mapping[str, Tensor]) -> Ints:
        return np.concatenate([np.empty(0, np.int64), *(self.of(layer, *mask.nonzero().T) for layer, mask in alive.items())])

    def of_edges(self, name: str, pair: PairAttribution) -> tuple[Ints, Floats]:
        """Returns sources and targets [2, E], and values [E]."""
        where, values = pair.edges()
        if not values.isfinite().all():
            raise InvalidInputError(
                f"set {name!r}: the attributions from {pair.source} to {pair.target} are not all finite: make them anew, with the "
                "model in float32"
            )
        s_in, c_in, s_out, c_out = where[values != 0].T
        return np.stack([self.of(pair.source, s_in, c_in), self.of(pair.target, s_out, c_out)]), values[values != 0].numpy()

    def apart(self, keys: Ints) -> tuple[Ints, Ints, Ints]:
        """Returns layers, positions and components."""
        return keys // self._width // self._length, keys // self._width % self._length, keys % self._width
