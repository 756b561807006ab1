"""Pictures of moderators: AUROC by layer, a confusion matrix, and the curve over samples per class, as PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from exactivations.lit_modules.moderation.prototype_grid import MLPM, by_aggregation, entry_name, mixture_name
from exactivations.scripts.png import write_png

if TYPE_CHECKING:
    from exactivations.lit_modules.moderation.moderation_results import ModerationResults
    from exactivations.lit_modules.moderation.prototype_grid import PrototypeGrid
    from exactivations.lit_modules.moderation.sample_curve import CurvePoint
    from exactivations.lit_modules.probes.probe_results import VectorResult

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe and Ito: told apart by the colour-blind
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ((0, (5, 2)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (9, 2)))
LONGEST_LABEL, MOST_COUNTS = 20, 20  # letters of a class's name; classes of whose cells the counts are written


def grid_plot(results: "ModerationResults", grid: "PrototypeGrid", path: str | Path) -> None:
    """Draws the AUROC on test over hook points: a panel for each aggregation, a line with its intervals for each metric.

    Behind the last hook point stand the mixtures. What prototypes are held against is horizontal, the chosen one is ringed. The
    same results give the same bytes; a file that is there is replaced.

    Raises:
        StoreError: If the file cannot be written.
    """
    table = results.table
    of = {vector.name: vector for vector in table.vectors}
    aggregations = by_aggregation(list(grid.prototypes))
    metrics = list(next(iter(grid.prototypes.values())))
    figure = Figure(figsize=(3.6 * len(aggregations) + 2.4, 4.2), dpi=150)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1, len(aggregations), sharey=True, squeeze=False)[0]
    for ax, (aggregation, vectors) in zip(panels, aggregations.items(), strict=True):
        for number, metric in enumerate(metrics):
            style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
            members = [of[entry_name(vector, metric)] for vector in vectors]
            places = [at + (number - (len(metrics) - 1) / 2) * 0.12 for at in range(len(vectors) + 1)]
            ax.plot(places[:-1], [member.test.estimate for member in members], label=metric, zorder=3, **style)
            mixture = of.get(mixture_name(aggregation, metric))
            members += [mixture] if mixture is not None else []
            for place, member in zip(places, members, strict=False):
                _draw_member(ax, place, member, style, is_best=member.name == table.best)
        for number, (name, vector) in enumerate((n, v) for n, v in of.items() if n not in grid.names):
            ax.axhline(
                vector.test.estimate, color="0.25", linestyle=LINES[number % len(LINES)], linewidth=1.2, label=name, zorder=2
            )
        ax.axhline(0.5, color="0.7", linewidth=0.8, zorder=1)
        points = [vector.rpartition("/")[0] for vector in vectors]
        has_mixtures = mixture_name(aggregation, metrics[0]) in of
        ax.set_xticks(range(len(points) + has_mixtures), [*points, MLPM][: len(points) + has_mixtures], rotation=45, ha="right")
        ax.set_title(aggregation, fontsize=10, parse_math=False)
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"AUROC on test ({table.label})", parse_math=False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    write_png(figure, Path(path))


def _draw_member(ax: Axes, place: float, member: "VectorResult", style: dict[str, Any], *, is_best: bool) -> None:
    ax.plot([place] * 2, [member.test.low, member.test.high], color=style["color"], linewidth=1.2, alpha=0.7)
    ax.plot([place], [member.test.estimate], zorder=3, **style)
    if is_best:
        ax.plot([place], [member.test.estimate], "o", color="none", markeredgecolor="black", markersize=12)


def confusion_plot(counts: Sequence[Sequence[int]], classes: Sequence[str], title: str, path: str | Path) -> None:
    """Draws a confusion matrix: rows are the samples' classes, columns the most probable ones, colours shares of the row.

    The same counts give the same bytes; a file that is there is replaced.

    Raises:
        StoreError: If the file cannot be written.
    """
    matrix = np.array(counts)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = max(3.2, 0.45 * len(matrix) + 1.6)  # inches
    figure = Figure(figsize=(side + 1, side), dpi=150)
    figure.set_layout_engine("constrained")
    ax = figure.subplots()
    image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [" ".join(name.split())[:LONGEST_LABEL] for name in classes]
    ax.set_xticks(range(len(names)), names, rotation=30 if len(names) > 2 else 0, parse_math=False)
    ax.set_yticks(range(len(names)), names, parse_math=False)
    ax.set_xlabel("most probable")
    ax.set_ylabel("label")
    ax.set_title(title, fontsize=9, parse_math=False, wrap=True)
    if len(matrix) <= MOST_COUNTS:
        for row, column in np.ndindex(*matrix.shape):
            shade = "white" if shares[row, column] > 0.5 else "black"
            ax.text(column, row, f"{matrix[row, column]:,}", ha="center", va="center", color=shade)
    figure.colorbar(image, ax=ax, label="share of the label's samples")
    write_png(figure, Path(path))


def curve_plot(points: "Sequence[CurvePoint]", title: str, path: str | Path) -> None:
    """Draws AUROC and F1 over samples per class, a line for each entry, with bands that hold 95 % of the draws.

    All samples are the last column. The same points give the same bytes; a file that is there is replaced.

    Raises:
        StoreError: If the file cannot be written.
    """
    entries = list(dict.fromkeys(point.entry for point in points))
    columns = [point.n_per_class for point in points if point.entry == entries[0]]
    places = {size: at for at, size in enumerate(columns)}
    figure = Figure(figsize=(9, 4), dpi=150)
    figure.set_layout_engine("constrained")
    for ax, metric, name in zip(figure.subplots(1, 2), ("auroc", "f1"), ("AUROC", "F1"), strict=True):
        for number, entry in enumerate(entries):
            mine = [point for point in points if point.entry == entry]
            x = [places[point.n_per_class] for point in mine]
            mean, low, high = (np.array(values) for values in zip(*(getattr(point, metric) for point in mine), strict=True))
            colour = COLOURS[number % len(COLOURS)]
            ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            ax.plot(x, mean, marker=MARKERS[number % len(MARKERS)], color=colour, label=entry)
        texts = [
            "\n".join([f"{size:,}" if size is not None else "all", "/".join(f"{count:,}" for count in point.counts)])
            for size, point in zip(columns, points, strict=False)
        ]
        ax.set_xticks(range(len(columns)), texts)
        ax.set_xlabel("samples per class (and how many there were of each)")
        ax.set_ylabel(f"{name} on test")
        ax.grid(axis="y", color="0.92")
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    write_png(figure, Path(path))
