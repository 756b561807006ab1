"""How often payload and trigger were seen, against alpha, as a PNG."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from exactivations.lit_modules.amplification.behaviours import Condition, Rate
from exactivations.scripts.png import png_path, write_png

COLOURS = {"payload": "#c0392b", "trigger": "#2471a3"}  # told apart by the colour-blind, and by their markers
MARKERS = {"payload": "o", "trigger": "s"}


def plot_rates(amplified: Sequence[tuple[float, Condition]], standard: Condition, path: str | Path, title: str) -> None:
    """Draws rates with their 95% intervals; the same conditions give the same bytes. A file that is there is replaced.

    The axis is logarithmic down to one completion, and linear below.

    Args:
        amplified: (alpha, its condition).
        standard: Plain generation, drawn apart at the left.
        path: The file, which ends in .png.
        title: What was done.

    Raises:
        StoreError: If the file cannot be written.
    """
    path, amplified = png_path(path), sorted(amplified, key=lambda pair: pair[0])
    figure = Figure(figsize=(7.2, 4.4), dpi=150)
    figure.set_layout_engine("constrained")
    ax, apart = figure.subplots(1, 2, sharey=True, width_ratios=(6, 1))
    one = min(condition.payload.total for _, condition in amplified)
    for place, name in enumerate(("trigger", "payload")):
        style = {"color": COLOURS[name], "marker": MARKERS[name], "capsize": 3, "markersize": 5}
        shift = 0.008 * (1 - 2 * place) * (amplified[-1][0] - amplified[0][0] or 1)
        rates = [getattr(condition, name) for _, condition in amplified]
        ax.errorbar([alpha + shift for alpha, _ in amplified], [r.rate for r in rates], _bars(rates), label=name, **style)
        rate = getattr(standard, name)
        apart.errorbar([0.1 - 0.2 * place], [rate.rate], _bars([rate]), **style)
    ax.set_yscale("symlog", linthresh=1 / one, linscale=0.4)
    ax.set_ylim(0, 1.3)
    ax.set_yticks([tick for tick in (0, 0.0001, 0.001, 0.01, 0.1, 1) if tick == 0 or tick >= 1 / one])
    ax.yaxis.set_major_formatter(lambda rate, _: f"{100 * rate:g}%")
    ax.set_xticks([alpha for alpha, _ in amplified], [f"{alpha:g}" for alpha, _ in amplified])
    ax.set_xlabel("alpha")
    ax.set_ylabel("completions that show it (95% interval)")
    ax.legend(frameon=False)
    ax.set_title(title, fontsize=10, loc="left", parse_math=False)
    apart.set_xticks([0], ["plain\ngenerate"])
    apart.set_xlim(-0.6, 0.6)
    for axes in (ax, apart):
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    write_png(figure, path)


def _bars(rates: Sequence[Rate]) -> list[list[float]]:
    """Returns how far the intervals reach below and above."""
    return [[r.rate - r.low for r in rates], [r.high - r.rate for r in rates]]
