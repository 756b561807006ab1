"""What the probes of each layer are worth on test, beside controls, baselines and shuffled labels, as a PNG."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from exactivations.scripts.png import png_path, write_png
from exactivations.scripts.probe_report import LEVEL, metric_name

if TYPE_CHECKING:
    from exactivations.lit_modules.probes.group_bootstrap import Interval
    from exactivations.lit_modules.probes.probe_results import ProbeResults, VectorResult

CHANCE = {"auroc": (0.5, "chance"), "r2": (0.0, "R² of the labels' mean")}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe and Ito: told apart by the colour-blind
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # one more than colours, so that no pair of both repeats before 42 series
OF_CONTROLS = ((0, (4, 2)), (0, (1.5, 1.5)), (0, (4, 1.5, 1, 1.5)))
OF_BASELINES = ((0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (9, 2)))
OF_ENSEMBLES = ("*", "P", "X", "d")
ENSEMBLES = "ensembles"
WIDTH, HEIGHT = 7.0, 4.2  # inches, without the legend: half a page of A4
LOWEST_R2 = -1.0  # R² has no lower bound, and one untrained layer at -30 would flatten all others
LONGEST_TICK = 24
LETTERS_A_LINE = 88  # of a title of 10 pt, and of a legend of 8 pt
INCHES_A_LETTER = 0.068  # of 8 pt

Legend = list[tuple[Artist, str]]


class Place(NamedTuple):
    """Where a vector of activations stands.

    Attributes:
        control: Which other model it is of; "" for the model itself.
        series: What it shares a line or a colour with: "resid_post/mean", "module:transformer.h.*.mlp/mean".
        column: Its layer, or what its own tick says.
    """

    control: str
    series: str
    column: int | str


def place_of(vector: "VectorResult") -> Place:
    """Returns where a probe or control stands.

    A module whose path holds one number is of that layer. `embed` and `final_norm` are states of the residual stream: they have
    ticks of their own, and share a colour with resid_post.
    """
    control, _, name = vector.name.partition(": ") if vector.role == "control" else ("", "", vector.name)
    hook_point, slash, pooling = name.partition("/")
    parts = hook_point.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdecimal()]
    if len(numbers) == 1:
        layer = int(parts[numbers[0]])
        parts[numbers[0]] = "*"
        return Place(control, re.sub(r"^(\w+)\.\*$", r"\1", ".".join(parts)) + slash + pooling, layer)
    kind = "resid_post" if hook_point in ("embed", "final_norm") else hook_point
    return Place(control, kind + slash + pooling, hook_point)


def layers_plot(results: "ProbeResults", path: str | Path) -> None:
    """Draws `layers_figure` into a PNG. The same results give the same bytes; a file that is there is replaced.

    Raises:
        InvalidInputError: If the path does not end in .png.
        StoreError: If the file cannot be written.
    """
    path, figure = png_path(path), layers_figure(results)
    write_png(figure, path)


def layers_figure(results: "ProbeResults") -> Figure:
    """Returns the headline metric on test by layer, with its interval.

    One line for each kind of hook point and pooling; a vector without a layer is a point on a tick of its own: `embed` before the
    layers, `final_norm`, other modules and ensembles behind them. Controls are dashed, in the colour of their series; baselines are
    horizontal. A grey band spans all intervals of shuffled labels. A ring marks the vector that validation chose. An R² of less
    than -1 is a triangle on the lower edge.
    """
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=200)
    ax = figure.subplots()
    columns, all_series = _Columns(results), _series(results)
    legend: Legend = []
    for number, one in enumerate(all_series):
        legend += _draw_series(ax, one, columns, (number - (len(all_series) - 1) / 2) * min(0.16, 0.6 / len(all_series)))
    legend += _draw_ensembles(ax, results, columns)
    best = next(vector for vector in results.vectors if vector.name == results.best)
    style: dict[str, Any] = {"color": "none", "markeredgecolor": "black", "markeredgewidth": 1.6, "markersize": 11}
    (ring,) = ax.plot([columns.x[best.name]], [best.test.estimate], "o", zorder=5, **style)
    legend.append((ring, f"chosen on validation: {best.name}"))
    legend += _draw_levels(ax, results) + _limit(ax, results, columns)
    columns.label(ax)
    ax.set_ylabel(f"{metric_name(results.headline)} on test", fontsize=9)
    ax.set_title(_title(results), fontsize=10, parse_math=False)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.92", linewidth=0.6, zorder=0)
    _add_legend(figure, legend)
    return figure


@dataclass
class _Series:
    """The vectors of one line, their place in its order, and how they are drawn."""

    title: str
    on_line: "list[VectorResult]"
    alone: "list[VectorResult]"
    line: Any
    style: dict[str, Any]


def _series(results: "ProbeResults") -> list[_Series]:
    """Returns the model's own series, then those of controls."""
    found: dict[tuple[str, str], list[tuple[Place, VectorResult]]] = {}
    for vector in results.of_role("probe") + results.of_role("control"):
        place = place_of(vector)
        found.setdefault((place.control, place.series), []).append((place, vector))
    colours = {name: number for number, name in enumerate(dict.fromkeys(name for _, name in found))}
    controls = [control for control in dict.fromkeys(control for control, _ in found) if control]
    series = []
    for (control, name), members in found.items():
        numbered = sorted(
            ((place.column, vector) for place, vector in members if isinstance(place.column, int)), key=lambda pair: pair[0]
        )
        on_line = [vector for _, vector in numbered] if len(numbered) > 1 else []
        colour = COLOURS[colours[name] % len(COLOURS)]
        style = {"color": colour, "marker": MARKERS[colours[name] % len(MARKERS)], "markersize": 4.5}
        style["markerfacecolor"] = "white" if control else colour
        line = OF_CONTROLS[controls.index(control) % len(OF_CONTROLS)] if control else "-"
        if not numbered:  # nothing of resid_post is there: it goes by what is
            name = ", ".join(str(place.column) for place, _ in members) + "".join(name.partition("/")[1:])
        alone = [vector for _, vector in members if vector not in on_line]
        series.append(_Series(f"{control}: {name}" if control else name, on_line, alone, line, style))
    return series


class _Columns:
    """The horizontal axis: where each column is, and, once drawn, each vector: `x`, by name."""

    def __init__(self, results: "ProbeResults") -> None:
        columns = dict.fromkeys(place_of(vector).column for vector in results.of_role("probe") + results.of_role("control"))
        layers = sorted(column for column in columns if isinstance(column, int))
        others = [column for column in columns if isinstance(column, str)]
        first, last = (layers[0], layers[-1]) if layers else (0, 0)
        self.step = max(1.0, (last - first) / 8)  # a text needs more room than the number of one of many layers
        behind = sorted((column for column in others if column != "embed"), key=lambda column: column != "final_norm")
        behind += [ENSEMBLES] if results.of_role("ensemble") else []
        self.ticks: dict[int | str, float] = {"embed": first - self.step} if "embed" in others else {}
        self.ticks |= {layer: float(layer) for layer in layers}
        start = last + self.step if layers else 0.0
        self.ticks |= {column: start + number * self.step for number, column in enumerate(behind)}
        self.x: dict[str, float] = {}

    def put(self, name: str, column: int | str, aside: float = 0.0) -> float:
        """Returns where to draw a vector, `aside` (in ticks) of its column: points would lie on each other."""
        self.x[name] = self.ticks[column] + aside * self.step
        return self.x[name]

    def label(self, ax: Axes) -> None:
        """Writes the ticks; of many layers not all."""
        layers = [column for column in self.ticks if isinstance(column, int)]
        every = -(-len(layers) // 16)
        columns = [column for column in self.ticks if isinstance(column, str) or layers.index(column) % every == 0]
        texts = [_tick(column) for column in columns]
        low, high = min(self.ticks.values()) - 0.6 * self.step, max(self.ticks.values()) + 0.6 * self.step
        ax.set_xlim(low, high)
        ax.set_xticks([self.ticks[column] for column in columns], texts, parse_math=False)
        ax.set_xlabel("layer" if layers else "hook point", fontsize=9)
        longest = max(len(line) for text in texts for line in text.splitlines())
        if longest > len(ENSEMBLES) and longest * INCHES_A_LETTER > 0.88 * WIDTH * self.step / (high - low):
            for tick, column in zip(ax.get_xticklabels(), columns, strict=True):
                if isinstance(column, str):
                    tick.set(rotation=30, horizontalalignment="right", rotation_mode="anchor")


def _tick(column: int | str) -> str:
    text = " ".join(str(column).removeprefix("module:").split()).replace("final_norm", "final\nnorm")
    return text if len(text) <= LONGEST_TICK else "…" + text[1 - LONGEST_TICK :]  # modules differ at their end


def _draw_series(ax: Axes, series: _Series, columns: _Columns, aside: float) -> Legend:
    handles: list[Artist] = []
    if series.on_line:
        x = [columns.put(vector.name, place_of(vector).column) for vector in series.on_line]
        tests = [vector.test for vector in series.on_line]
        lows, highs = [test.low for test in tests], [test.high for test in tests]
        alpha = 0.1 if place_of(series.on_line[0]).control else 0.2
        ax.fill_between(x, lows, highs, color=series.style["color"], alpha=alpha, linewidth=0, zorder=2)
        handles += ax.plot(
            x, [test.estimate for test in tests], linestyle=series.line, linewidth=1.5, zorder=3, label=series.title, **series.style
        )  # fmt: skip
    for vector in series.alone:
        bar = _draw_point(ax, columns.put(vector.name, place_of(vector).column, aside), vector.test, series.line, series.style)
        handles.append(bar)
    return [(handles[0], series.title)]


def _draw_point(ax: Axes, x: float, test: "Interval", line: Any, style: dict[str, Any]) -> Artist:
    ax.plot([x, x], [test.low, test.high], linestyle=line, linewidth=1.2, color=style["color"], zorder=3)
    ax.plot([x, x], [test.low, test.high], linestyle="none", marker="_", markersize=5, color=style["color"], zorder=3)
    (point,) = ax.plot([x], [test.estimate], linestyle="none", zorder=3, **style)
    return point


def _draw_ensembles(ax: Axes, results: "ProbeResults", columns: _Columns) -> Legend:
    legend: Legend = []
    ensembles = results.of_role("ensemble")
    for number, vector in enumerate(ensembles):
        x = columns.put(vector.name, ENSEMBLES, (number - (len(ensembles) - 1) / 2) * 0.4)
        style = {"color": "black", "marker": OF_ENSEMBLES[number % len(OF_ENSEMBLES)], "markersize": 7}
        legend.append((_draw_point(ax, x, vector.test, "-", style), vector.name))
    return legend


def _draw_levels(ax: Axes, results: "ProbeResults") -> Legend:
    """Draws what has no place on the horizontal axis."""
    legend: Legend = []
    for number, baseline in enumerate(results.of_role("baseline")):
        ax.axhspan(baseline.test.low, baseline.test.high, color="#8A6D00", alpha=0.16, linewidth=0, zorder=1)
        style = OF_BASELINES[number % len(OF_BASELINES)]
        line = ax.axhline(baseline.test.estimate, color="#3D3000", linestyle=style, linewidth=1.4, zorder=2)
        legend.append((line, baseline.name))
    shuffled = [interval for vector in results.vectors for interval in vector.shuffled]
    if shuffled:
        lowest, highest = min(interval.low for interval in shuffled), max(interval.high for interval in shuffled)
        band = ax.axhspan(lowest, highest, facecolor="0.93", edgecolor="0.82", hatch="////", linewidth=0, zorder=0.5)
        legend.append((band, f"shuffled labels (span of {len(shuffled):,} intervals)"))
    value, what = CHANCE[results.headline]
    legend.append((ax.axhline(value, color="0.45", linewidth=0.9, zorder=1), what))
    return legend


def _limit(ax: Axes, results: "ProbeResults", columns: _Columns) -> Legend:
    """Fits the vertical axis to all intervals and chance; an R² too low for the picture is marked on its lower edge."""
    intervals = [interval for vector in results.vectors for interval in (vector.test, *vector.shuffled)]
    chance = CHANCE[results.headline][0]
    low = min(chance, *(interval.low for interval in intervals))
    high = max(chance + 0.05, *(interval.high for interval in intervals))
    low = max(low, LOWEST_R2) if results.headline == "r2" else low
    bottom = low - 0.05 * (high - low)
    ax.set_ylim(bottom, high + 0.07 * (high - low))  # the ring needs room above
    below = [vector for vector in results.vectors if vector.test.estimate < bottom]
    if not below:
        return []
    x = [columns.x[vector.name] for vector in below if vector.name in columns.x]  # a baseline has no place
    (mark,) = ax.plot(x, [bottom] * len(x), linestyle="none", marker="v", color="black", clip_on=False, zorder=6)
    lowest = f"{min(vector.test.estimate for vector in below):.3f}".replace("-", "\N{MINUS SIGN}")
    return [(mark, f"R² below the picture, down to {lowest}")]


def _title(results: "ProbeResults") -> str:
    test = results.parts["test"]
    n = f"{test['examples']:,} {results.unit}s" + (f" of {test['samples']:,} samples" if results.unit == "token" else "")
    groups = f"in {test['groups']:,} groups ({results.group_column})" if results.group_column else "(no groups)"
    lines = (" ".join(results.label.split()), f"test: {n} {groups}; bands and bars are {LEVEL} intervals")
    return "\n".join(textwrap.fill(line, LETTERS_A_LINE) for line in lines)


def _add_legend(figure: Figure, legend: Legend) -> None:
    longest = max(len(text) for _, text in legend)
    n = 1 if longest > 48 else 2
    texts = [textwrap.fill(text, LETTERS_A_LINE) for _, text in legend]
    rows = sum(text.count("\n") + 1 for text in texts) if n == 1 else -(-len(texts) // n)
    figure.set_size_inches(WIDTH, HEIGHT + 0.17 * rows)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)  # inches
    handles = [handle for handle, _ in legend]
    drawn = figure.legend(handles, texts, loc="outside lower center", ncols=n, fontsize=8, frameon=False, handlelength=3)
    for written in drawn.get_texts():
        written.set_parse_math(False)
