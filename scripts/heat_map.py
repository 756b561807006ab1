"""Two matrices of pairwise cosines side by side, as a PNG."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from exactivations.scripts.png import png_path, write_png
from exactivations.store.errors import InvalidInputError
from exactivations.store.similarity import mean_off_diagonal

MOST_LABELS = 30  # more do not fit beside a matrix
LONGEST_LABEL = 28
LETTERS_AN_INCH = 11  # of a title of 11 pt
COLOURS = "RdBu_r"  # white at 0, red above, blue below: even in lightness, and told apart by the colour-blind


def heat_maps(
    before: Tensor, after: Tensor, path: str | Path, *, titles: tuple[str, str], labels: Sequence[str] | None = None
) -> None:
    """Draws two matrices of cosines side by side, on one scale from -1 to 1. The same matrices give the same bytes.

    A file that is there is replaced.

    Args:
        before: Cosines of all pairs, [n, n], of a left-hand picture.
        after: Those of a right-hand one, of the same rows.
        path: The file, which ends in .png.
        titles: What the two are. The mean of the cosines off the diagonal is written below.
        labels: What the n rows are; None: their numbers. With more than 30 rows none are written.

    Raises:
        InvalidInputError: If the matrices are not cosines of the same rows, or labels or path do not fit.
        StoreError: If the file cannot be written.
    """
    path, n = png_path(path), len(before) if before.ndim else 0
    if before.shape != after.shape or (labels is not None and len(labels) != n):
        raise InvalidInputError(
            f"two heat maps are of the same rows: got shapes {list(before.shape)} and {list(after.shape)}"
            + ("" if labels is None else f", and {len(labels)} labels")
        )
    means = [_mean(values, title) for values, title in zip((before, after), titles, strict=True)]
    names = [_shortened(str(label)) for label in (range(n) if labels is None else labels)]
    show = n <= MOST_LABELS
    side = min(max(3.4, 0.26 * n), 7.0) if show else 6.0  # inches; a row of 0.23 in holds a label of 8 pt
    room = 0.075 * max(map(len, names)) if show else 0.2
    figure = Figure(figsize=(2 * side + room + 1.6, side + room + 1.0), dpi=150)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)  # inches
    axes: list[Axes] = list(figure.subplots(1, 2, squeeze=False)[0])
    for number, (ax, values) in enumerate(zip(axes, (before, after), strict=True)):
        title = textwrap.fill(titles[number], int(LETTERS_AN_INCH * side))
        mean = f"{means[number]:+.3f}".replace("-", "\N{MINUS SIGN}")
        image = _draw(ax, values, f"{title}\nmean off the diagonal: {mean}")
        if show:
            ax.set_xticks(range(n), names, rotation=90 if room > 0.3 else 0, fontsize=8, parse_math=False)
            ax.set_yticks(range(n), names if number == 0 else [""] * n, fontsize=8, parse_math=False)
        else:
            ax.set_xticks([])
            ax.set_yticks([])
            ax.set_xlabel(f"{n:,} rows")
    bar = axes[1].inset_axes((1.04, 0.0, 0.05, 1.0))  # as high as the map beside it
    figure.colorbar(image, cax=bar, label="cosine", ticks=[-1, -0.5, 0, 0.5, 1])
    write_png(figure, path)


def _mean(cosines: Tensor, title: str) -> float:
    mean = mean_off_diagonal(cosines)
    if not (cosines.abs() <= 1 + 1e-6).all():  # False for NaN, too; cosines in float32 may pass 1 by a last bit
        raise InvalidInputError(f"{title!r} is no matrix of cosines: it has values that are not from -1 to 1")
    return mean


def _draw(ax: Axes, cosines: Tensor, title: str) -> AxesImage:
    ax.set_title(title, fontsize=11, parse_math=False)
    ax.tick_params(length=0)
    return ax.imshow(cosines.detach().to("cpu", torch.float64).numpy(), cmap=COLOURS, vmin=-1, vmax=1, aspect="equal")


def _shortened(label: str) -> str:
    label = " ".join(label.split())
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"
