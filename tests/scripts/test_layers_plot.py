"""The picture of the layers: what is drawn are the results' values, in the right columns; the same results give the same bytes."""

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from PIL import Image

from exactivations.lit_modules.probes.group_bootstrap import Interval
from exactivations.lit_modules.probes.probe_results import VectorResult
from exactivations.scripts.layers_plot import layers_figure, layers_plot, place_of
from exactivations.store.errors import InvalidInputError, StoreError
from tests.scripts.probe_results import LAYERS, results_of

LONG = [f"module:model.language_model.layers.{layer}.self_attention.dense/exp_decay:0.067" for layer in range(3)]
ALL = ["embed/mean", *LAYERS, "final_norm/mean", "final_norm/last", "module:transformer.wte/mean", *LONG]


def lines_of(figure):
    return {line.get_label(): line for line in figure.axes[0].lines if not line.get_label().startswith("_")}


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("shift", [0.0, -0.7])
def test_lines_and_bands_are_the_results_values_by_layer(shift):
    shuffled_order = [LAYERS[at] for at in (2, 0, 1, 5, 3, 4)]
    results = results_of(shuffled_order, shift=shift, classes=("a", "b") if not shift else ())
    figure = layers_figure(results)
    tests = {vector.name: vector.test for vector in results.vectors}
    lines = lines_of(figure)
    assert set(lines) == {f"{key}resid_post/{pooling}" for key in ("", "untrained: ") for pooling in ("mean", "last")}
    bands = [band for band in figure.axes[0].collections if isinstance(band, PolyCollection)]
    corners = {tuple(np.round(corner, 12)) for band in bands for corner in band.get_paths()[0].vertices}
    for title, line in lines.items():
        key, pooling = title[: title.find("resid_post")], title[title.find("/") :]
        expected = [tests[f"{key}resid_post.{layer}{pooling}"] for layer in (0, 1, 2)]
        assert line.get_xdata().tolist() == [0, 1, 2]
        assert line.get_ydata().tolist() == [test.estimate for test in expected]
        assert {(x, round(y, 12)) for x, test in enumerate(expected) for y in (test.low, test.high)} <= corners
        assert line.is_dashed() == bool(key)
        assert line.get_color() == lines[f"resid_post{pooling}"].get_color()
    assert lines["resid_post/mean"].get_color() != lines["resid_post/last"].get_color()


def test_every_vector_is_drawn_once_in_its_column_and_baselines_across():
    results = results_of(ALL)
    figure = layers_figure(results)
    ax = figure.axes[0]
    ticks = {label.get_text(): tick for tick, label in zip(ax.get_xticks(), ax.get_xticklabels(), strict=True)}
    assert list(ticks) == ["embed", "0", "1", "2", "final\nnorm", "transformer.wte", "ensembles"]
    assert list(ticks.values()) == sorted(ticks.values())
    marked = [
        (x, y) for line in ax.lines if line.get_marker() not in ("None", "_", "") and to_hex(line.get_color(), True) != "#00000000"
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    ]  # fmt: skip
    names = {"embed": "embed", "final\nnorm": "final_norm", "transformer.wte": "module:transformer.wte", "ensembles": "ensemble"}
    points = [vector for vector in results.vectors if vector.role != "baseline"]
    assert len(marked) == len(points)
    for vector in points:
        (x,) = [x for x, y in marked if y == vector.test.estimate]
        nearest = min(ticks, key=lambda text: abs(ticks[text] - x))
        hook_point = vector.name.removeprefix("untrained: ").partition("/")[0]
        assert names.get(nearest, f".{nearest}") in hook_point, vector.name
    levels = {line.get_ydata()[0] for line in ax.lines if list(line.get_xdata()) == [0, 1] and len(set(line.get_ydata())) == 1}
    assert levels == {0.5, *(vector.test.estimate for vector in results.of_role("baseline"))}


def test_the_ring_marks_what_validation_chose():
    results = results_of(best="resid_post.1/last")
    figure = layers_figure(results)
    (ring,) = [line for line in figure.axes[0].lines if line.get_markersize() == 11]
    (test,) = [vector.test for vector in results.vectors if vector.name == results.best]
    assert (ring.get_xdata().tolist(), ring.get_ydata().tolist()) == ([1], [test.estimate])
    assert "chosen on validation: resid_post.1/last" in legend_of(figure)


def test_the_grey_band_spans_all_intervals_of_shuffled_labels():
    results = results_of()
    figure = layers_figure(results)
    shuffled = [interval for vector in results.vectors for interval in vector.shuffled]
    (band,) = [patch for patch in figure.axes[0].patches if patch.get_hatch()]
    assert band.get_y() == min(interval.low for interval in shuffled)
    assert band.get_y() + band.get_height() == pytest.approx(max(interval.high for interval in shuffled))
    assert f"shuffled labels (span of {len(shuffled)} intervals)" in legend_of(figure)
    assert not any("shuffled" in text for text in legend_of(layers_figure(results_of(bare=True, n_shuffles=0))))


def test_one_r2_far_below_is_marked_and_does_not_flatten_the_others():
    far = VectorResult("untrained: resid_post.9/mean", "control", 1.0, -30.0, Interval(-33.3, -40.0, -30.0, 57, 1000, 0))
    results = results_of(classes=())
    figure = layers_figure(results_of(classes=(), vectors=[*results.vectors, far]))
    assert figure.axes[0].get_ylim()[0] > -1.5
    assert "R² below the picture, down to \N{MINUS SIGN}33.300" in legend_of(figure)


@pytest.mark.parametrize(
    "results",
    [
        results_of(["resid_post.3/mean"]), results_of(["final_norm/last"], bare=True, n_shuffles=0), results_of(ALL),
        results_of(LONG, label="whether it raises an exception ($x_1$) " * 6, controls=("the same with random weights" * 2,)),
        results_of([f"resid_post.{layer}/mean" for layer in range(80)], classes=(), shift=-0.6), results_of(["mine", "yours"]),
    ],
)  # fmt: skip
def test_the_legend_covers_no_data_and_everything_is_inside(results):
    figure = layers_figure(results)
    figure.draw_without_rendering()
    ax, page = figure.axes[0], figure.bbox
    legend, plot = figure.legends[0].get_window_extent(), ax.get_tightbbox()
    assert legend.y1 <= plot.y0 and legend.y0 >= page.y0 - 1 and legend.x0 >= page.x0 - 1 and legend.x1 <= page.x1 + 1
    assert plot.x0 >= page.x0 - 1 and plot.x1 <= page.x1 + 1 and plot.y1 <= page.y1 + 1
    assert ax.bbox.height > 0.35 * page.height and ax.bbox.height > 2.4 * figure.dpi
    extents = [label.get_window_extent() for label in ax.get_xticklabels() if not label.get_rotation()]
    assert all(left.x1 < right.x0 for left, right in pairwise(extents))


def test_the_same_results_give_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        layers_plot(results_of(ALL), tmp_path / name)
    first = (tmp_path / "a.png").read_bytes()
    assert first == (tmp_path / "b.png").read_bytes()
    assert b"Software" not in first and b"tEXt" not in first
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG" and image.size[0] == 1400


@pytest.mark.parametrize(
    ("name", "role", "place"),
    [
        ("resid_post.3/exp_decay:0.067", "probe", ("", "resid_post/exp_decay:0.067", 3)),
        ("untrained: attn_out.11/tokens", "control", ("untrained", "attn_out/tokens", 11)),
        ("embed/last", "probe", ("", "resid_post/last", "embed")),
        ("module:transformer.h.0.mlp/mean", "probe", ("", "module:transformer.h.*.mlp/mean", 0)),
        ("module:layers.0.experts.3/mean", "probe", ("", "module:layers.0.experts.3/mean", "module:layers.0.experts.3")),
        ("mine", "probe", ("", "mine", "mine")),
    ],
)
def test_names_tell_where_a_vector_stands(name, role, place):
    assert place_of(VectorResult(name, role, None, None, Interval(0, 0, 0, 5, 1, 0))) == place


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match=r"must end in \.png"):
        layers_plot(results_of(), tmp_path / "x.pdf")
    with pytest.raises(StoreError, match="cannot write"):
        layers_plot(results_of(), tmp_path / "nowhere" / "x.png")
    assert not list(tmp_path.iterdir())
