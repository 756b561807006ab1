"""Attribution graphs as PNG: one of each CI set, and one that compares the sets."""

import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font
from matplotlib.lines import Line2D
from matplotlib.path import Path

from exactivations.scripts.attribution_edges import AttributionGraph, Bools, Floats, Ints
from exactivations.scripts.attribution_layout import Layout, place, shown_token
from exactivations.scripts.png import png_path, write_png
from exactivations.store.attributions import OUTPUT
from exactivations.store.errors import InvalidInputError

POSITIVE, NEGATIVE = "#0072B2", "#D55E00"  # of Okabe and Ito, told apart by the colour-blind
OF_SETS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#8A6D00", "#7F3C8D")
IN_ALL, IN_SOME = "#000000", "#B0B0B0"
MARKERS = ("o", "s", "^")  # of the layers that share a row
SLOT, ROW = 0.115, 0.52  # inches, of a node's room and of a row's height
LEAST_WIDTH, MOST_WIDTH = 7.0, 26.0  # inches, without the labels of rows
LONGEST_TOKEN = 16
LETTER = 0.07  # inches, of 7 and 8 pt
DPI = 100
CURVE = [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]


def graph_figure(graph: AttributionGraph, name: str, threshold: float, layout: Layout | None = None) -> Figure:
    """Draws one set: edges blue where attributions are positive, orange where they are negative, the stronger the more opaque.

    Filled nodes are alive; rings are ghosts: alive by the model's own causal importances (or, of the outputs, by the untouched
    model's probabilities), and not in the set. Outputs have their token and its probability.

    Args:
        graph: Of all sets.
        name: Of the set.
        threshold: Edges of at least this size are drawn; how many that are of how many is in the title.
        layout: Of the graph, if it was made before.

    Raises:
        InvalidInputError: If there is no such set.
    """
    names = graph.attributions.set_names
    if name not in names:
        raise InvalidInputError(f"there is no set {name!r}, only {', '.join(map(repr, names))}")
    number, layout = names.index(name), layout or place(graph)
    edges = graph.edges[number]
    n = edges.n_of(threshold)
    note = "; NOTE: not the model's own prediction" if name in graph.attributions.faults else ""
    picture = _Picture(graph, layout, f"{name}: {_counted(n, len(edges.value), threshold)}{note}")
    strength = _strength(edges.value[:n])
    colours = np.where((edges.value[:n] > 0)[:, None], to_rgba(POSITIVE), to_rgba(NEGATIVE))
    picture.draw_edges(edges.source[:n], edges.target[:n], colours, strength)
    touched = np.zeros(len(graph.layer), bool)
    touched[edges.source[:n]] = touched[edges.target[:n]] = True
    picture.draw_nodes(graph.alive[number], touched)
    picture.draw_ghosts(graph.ghost[number])
    picture.label_outputs(graph.alive[number], graph.attributions.output_probabilities[number].numpy())
    return picture.finished(
        [
            (Line2D([], [], color=POSITIVE, linewidth=2), "positive attribution"),
            (Line2D([], [], color=NEGATIVE, linewidth=2), "negative"),
            (_dot("0.15", 5), "alive, with an edge shown"),
            (_dot("0.65", 3), "alive"),
            (_dot("none", 5), f"ghost: alive in the model itself, not in the set ({int(graph.ghost[number].sum()):,})"),
        ]
    )


def comparison_figure(graph: AttributionGraph, threshold: float, layout: Layout | None = None) -> Figure:
    """Draws all sets at once: black edges are in every set, coloured ones in a single set, grey ones in some.

    An edge is in a set if its attribution there has at least the size of the threshold. Opacity goes by the largest of its sizes.

    Args:
        graph: Of all sets.
        threshold: See above; the title counts the edges.
        layout: Of the graph, if it was made before.

    Raises:
        InvalidInputError: If there are fewer than two sets, or more than eight: colours that can be told apart.
    """
    names = graph.attributions.set_names
    if not 2 <= len(names) <= len(OF_SETS):
        raise InvalidInputError(f"a picture compares 2 to {len(OF_SETS)} sets, there are {len(names)}: {', '.join(names)}")
    shared, layout = graph.shared(threshold), layout or place(graph)
    n = len(shared.source)
    picture = _Picture(graph, layout, f"{len(names)} sets compared: {n:,} edges with |attribution| ≥ {threshold:.3g} in some set")
    kinds: list[tuple[str, str, Bools]] = [(IN_ALL, f"in all {len(names)} sets", shared.in_all)]
    kinds += [(OF_SETS[at], f"only in {name}", shared.only_in(at)) for at, name in enumerate(names)]
    some = ~np.any([has for _, _, has in kinds], axis=0)
    if len(names) > 2:
        kinds.append((IN_SOME, "in some", some))
    colours = np.zeros((n, 4))
    for colour, _, has in kinds:
        colours[has] = to_rgba(colour)
    picture.draw_edges(shared.source, shared.target, colours, _strength(np.abs(shared.value).max(0, initial=0)))
    touched = np.zeros(len(graph.layer), bool)
    touched[shared.source] = touched[shared.target] = True
    alive: Bools = np.asarray(graph.alive.any(axis=0))
    picture.draw_nodes(alive, touched)
    picture.label_outputs(alive, None)
    return picture.finished(
        [(Line2D([], [], color=colour, linewidth=2), f"{what}: {int(has.sum()):,} of {n:,}") for colour, what, has in kinds]
    )


def write_graphs(graph: AttributionGraph, folder: FilePath, threshold: float) -> list[FilePath]:
    """Writes <set>.png of each set, and comparison.png of two to eight. The same graph gives the same bytes.

    With fewer sets or more a comparison.png that is there already, of other sets, is removed.

    Returns:
        The paths.

    Raises:
        InvalidInputError: If two sets would be written to one file.
        StoreError: If one cannot be written.
    """
    layout, figures = place(graph), {}
    for name in graph.attributions.set_names:
        path = png_path(folder / f"{file_name(name)}.png")
        if path in figures or path.stem == "comparison":
            raise InvalidInputError(f"set {name!r} would be drawn to {path.name}, which is another picture's: rename the set")
        figures[path] = graph_figure(graph, name, threshold, layout)
    comparison = folder / "comparison.png"
    if 2 <= len(graph.edges) <= len(OF_SETS):
        figures[comparison] = comparison_figure(graph, threshold, layout)
    else:
        comparison.unlink(missing_ok=True)
    for path, figure in figures.items():
        write_png(figure, path)
    return list(figures)


def file_name(name: str) -> str:
    """Returns a set's name with letters, digits, points, hyphens and underscores only."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


class _Picture:
    """Axes with a row for each layer and a column for each token."""

    def __init__(self, graph: AttributionGraph, layout: Layout, title: str) -> None:
        self.graph, self.layout = graph, layout
        slots = float(layout.borders[-1])
        self.width = min(max(slots * SLOT, LEAST_WIDTH), MOST_WIDTH)
        self.size = min(1.0, self.width / (slots * SLOT)) ** 2  # of markers, in area
        self.figure = Figure(figsize=(self.width + 2.2, ROW * len(layout.rows) + 3.0), dpi=DPI)
        self.figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
        self.ax: Axes = self.figure.subplots()
        self.ax.set_xlim(0, slots)
        self.ax.set_ylim(-0.6, len(layout.rows) - 0.5)
        prompt = drawable(textwrap.shorten(" ".join(shown_token(t) for t in graph.attributions.tokens), 100, placeholder=" …"))
        self.ax.set_title(
            f"{drawable(title)}\n{drawable(graph.attributions.model)}: {prompt}", fontsize=10, parse_math=False, loc="left"
        )
        self._label_axes()

    def _label_axes(self) -> None:
        ax, layout = self.ax, self.layout
        tokens = [_shortened(shown_token(token)) for token in self.graph.attributions.tokens]
        fits = all(
            len(t) * LETTER < w * self.width / layout.borders[-1] for t, w in zip(tokens, np.diff(layout.borders), strict=True)
        )
        turned: dict[str, Any] = {} if fits else {"rotation": 45, "horizontalalignment": "right", "rotation_mode": "anchor"}
        ax.set_xticks(layout.middles, [f"{t}" for t in tokens], fontsize=8, parse_math=False, **turned)
        ax.set_yticks(range(len(layout.rows)), [row.label for row in layout.rows], fontsize=8, parse_math=False)
        ax.tick_params(length=0)
        for spine in ax.spines.values():
            spine.set_visible(False)
        for left, right in list(zip(layout.borders[:-1], layout.borders[1:], strict=True))[::2]:
            ax.axvspan(left, right, color="0.965", linewidth=0, zorder=0)

    def draw_edges(self, source: Ints, target: Ints, colours: npt.NDArray[np.float64], strength: Floats) -> None:
        """Draws curves that leave and arrive upright, the weakest first; strength [E] is opacity and width."""
        order = np.argsort(strength, kind="stable")
        x, y = self.layout.x, self.layout.row.astype(float)
        x0, y0, x1, y1 = x[source], y[source], x[target], y[target]
        bend = 0.5 * (y1 - y0)
        corners = np.stack([x0, y0, x0, y0 + bend, x1, y1 - bend, x1, y1], axis=1).reshape(-1, 4, 2)[order]
        faded = colours[order].copy()
        faded[:, 3] = 0.12 + 0.88 * strength[order]
        paths = [Path(c, CURVE) for c in corners]
        drawn = PathCollection(paths, facecolors="none", edgecolors=faded, linewidths=0.4 + 1.8 * strength[order], zorder=2)
        self.ax.add_collection(drawn, autolim=False)

    def draw_nodes(self, alive: Bools, touched: Bools) -> None:
        """Draws nodes; those with an edge are larger. Each layer of a row has a marker of its own."""
        within = np.array(
            [row.layers.index(layer) for layer in self.graph.layers for row in self.layout.rows if layer in row.layers]
        )
        for has, colour, size, zorder in ((alive & ~touched, "0.65", 3.0, 3), (alive & touched, "0.15", 11.0, 4)):
            for at in np.unique(within):
                chosen = has & (within[self.graph.layer] == at)
                self._scatter(chosen, size, zorder, MARKERS[at % len(MARKERS)], facecolors=colour, linewidths=0)

    def draw_ghosts(self, ghost: Bools) -> None:
        """Draws rings."""
        self._scatter(ghost, 9.0, 1, "o", facecolors="none", edgecolors="0.6", linewidths=0.6)

    def _scatter(self, chosen: Bools, size: float, zorder: int, marker: str, **style: Any) -> None:
        if chosen.any():
            x, y, size = self.layout.x[chosen], self.layout.row[chosen], size * self.size
            self.ax.scatter(x, y, s=size, zorder=zorder, marker=marker, clip_on=False, **style)

    def label_outputs(self, alive: Bools, probabilities: Floats | None) -> None:
        """Writes tokens, and their probabilities [L, V] if they are given, above the highest row."""
        graph, longest = self.graph, 0
        for node in np.flatnonzero(alive & (graph.layer == graph.layers.index(OUTPUT))):
            position, token = int(graph.position[node]), int(graph.component[node])
            text = _shortened(shown_token(graph.attributions.output_tokens[token]))
            text += "" if probabilities is None else f" {probabilities[position, token]:.0%}"
            longest = max(longest, len(text))
            self.ax.annotate(
                text, (self.layout.x[node], self.layout.row[node]), (0, 5), textcoords="offset points", rotation=90, fontsize=7,
                horizontalalignment="center", verticalalignment="bottom", parse_math=False, annotation_clip=False,
            )  # fmt: skip
        self.ax.set_ylim(-0.6, len(self.layout.rows) - 0.5 + longest * LETTER / ROW)  # room below the title

    def finished(self, legend: Sequence[tuple[Artist, str]]) -> Figure:
        """Adds the legend."""
        self.figure.legend(
            [handle for handle, _ in legend], [drawable(text) for _, text in legend], loc="outside lower center", frameon=False,
            ncols=min(len(legend), max(2, int(self.width / 2.2))), fontsize=8,
        )  # fmt: skip
        return self.figure


def _strength(values: Floats) -> Floats:
    """Returns square roots of sizes, relative to the largest: else a single large one would leave all others faint."""
    sizes: Floats = np.abs(values)
    sizes /= sizes.max(initial=np.finfo(np.float32).tiny)
    return np.sqrt(sizes)


def _counted(n: int, of: int, threshold: float) -> str:
    if not of:
        return "no edges: nothing that is alive is attributed to anything"
    return f"{n:,} of {of:,} edges shown, those with |attribution| ≥ {threshold:.3g}"


def _dot(colour: str, size: float) -> Line2D:
    return Line2D(
        [], [], linestyle="none", marker="o", markersize=size, color=colour, markeredgecolor="0.6" if colour == "none" else colour
    )


def _shortened(token: str) -> str:
    return drawable(token if len(token) <= LONGEST_TOKEN else token[: LONGEST_TOKEN - 1] + "…")


def drawable(text: str) -> str:
    """Returns a text with characters that the font lacks as escapes: they would all be drawn as one and the same box."""
    return "".join(c if _font().get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in text)


@cache
def _font() -> FT2Font:
    return FT2Font(findfont("DejaVu Sans"))
