"""Where the nodes of attribution graphs are drawn: tokens across, layers up, queries, keys and values of a block in one row."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import numpy.typing as npt

from exactivations.scripts.attribution_edges import AttributionGraph, Ints
from exactivations.store.attributions import OUTPUT, WTE

OF_QKV = re.compile(r"(?:^|_)(?:q|k|v|query|key|value)(?=_|$)")
LEAST = 2.0  # the width of a token's column that has hardly a node, in slots
BETWEEN_TOKENS = 1.0
BETWEEN_LAYERS = 0.7  # of one row
SYMBOLS = {
    " ": "\N{OPEN BOX}",
    "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}",
    "\r": "\N{SYMBOL FOR CARRIAGE RETURN}",
    "\t": "\N{RIGHTWARDS ARROW}",
}


@dataclass(frozen=True)
class Row:
    """A row of the picture.

    Attributes:
        label: What stands beside it: what of the paths is the same for all maps is left out.
        layers: Their names: one, or queries, keys and values of a block.
    """

    label: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """The places of all nodes; one slot is the room of one node.

    Attributes:
        rows: From the lowest to the highest.
        row: int64 [n], of each node.
        x: float64 [n], in slots from the left.
        borders: float64 [L + 1], where columns of tokens begin and end, in slots.
    """

    rows: tuple[Row, ...]
    row: Ints
    x: npt.NDArray[np.float64]
    borders: npt.NDArray[np.float64]

    @property
    def middles(self) -> npt.NDArray[np.float64]:
        """The middle of each token's column, float64 [L]."""
        return (self.borders[:-1] + self.borders[1:]) / 2


def place(graph: AttributionGraph) -> Layout:
    """Places the nodes that are alive or a ghost in any set, so that a node is at one place in the pictures of all.

    In a row, the nodes of a token stand side by side around the middle of its column, sorted by layer and component. A column is as
    wide as its fullest row.
    """
    rows = rows_of(graph.layers)
    row_of_layer = np.array([number for layer in graph.layers for number, row in enumerate(rows) if layer in row.layers])
    row = row_of_layer[graph.layer]
    n_tokens = len(graph.attributions.tokens)
    x, widths = np.zeros(len(row)), np.full(n_tokens, LEAST)
    cells = [np.flatnonzero((row == r) & (graph.position == p)) for r in range(len(rows)) for p in range(n_tokens)]
    for nodes in filter(len, cells):
        gaps = np.diff(graph.layer[nodes], prepend=graph.layer[nodes[0]]) != 0
        x[nodes] = np.arange(len(nodes)) + BETWEEN_LAYERS * np.cumsum(gaps)
        x[nodes] -= x[nodes[-1]] / 2  # nodes are sorted
        position = graph.position[nodes[0]]
        widths[position] = max(widths[position], 2 * x[nodes[-1]] + 1)
    borders = np.concatenate([[0.0], np.cumsum(widths + BETWEEN_TOKENS)])
    return Layout(rows, row, x + ((borders[:-1] + borders[1:]) / 2)[graph.position], borders)


def rows_of(layers: Sequence[str]) -> tuple[Row, ...]:
    """Returns the rows, from the lowest to the highest: each layer has its own, but queries, keys and values of a block share one.

    Args:
        layers: Their names, in the order of the model.
    """
    maps = [layer.split(".") for layer in layers if layer not in (WTE, OUTPUT)]
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(*(path[:-1] for path in maps), strict=False))
    shared = len(list(same)) if len(maps) > 1 else 0
    groups: dict[tuple[str, ...], list[str]] = {}
    for layer in layers:
        *parent, name = layer.split(".")
        own = len(OF_QKV.findall(name)) != 1  # a fused map names all three
        groups.setdefault((*parent, name) if own else (*parent, "", "qkv"), []).append(layer)
    return tuple(Row(_label(group, shared), tuple(group)) for group in groups.values())


def _label(layers: Sequence[str], shared: int) -> str:
    if layers[0] in (WTE, OUTPUT):
        return layers[0]
    parts = layers[0].split(".")
    return ".".join([*parts[shared:-1], " ".join(layer.rpartition(".")[2] for layer in layers)])


def shown_token(token: str) -> str:
    """Returns a token on one line: blanks and line ends as symbols, and control characters as escapes."""
    return "".join(SYMBOLS.get(c, c if c.isprintable() else c.encode("unicode_escape").decode()) for c in token) or "\N{EMPTY SET}"
