"""Graphs of attributions: which nodes and edges, where they are drawn, what is counted, ghosts, empty sets; numbers, not pixels."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex

from exactivations.scripts.attribution_edges import AttributionGraph, Edges, graph_of
from exactivations.scripts.attribution_graph import attribution_graph
from exactivations.scripts.attribution_layout import place, rows_of, shown_token
from exactivations.scripts.attribution_page import page_data
from exactivations.scripts.attribution_plot import NEGATIVE, OF_SETS, POSITIVE, comparison_figure, drawable, graph_figure
from exactivations.scripts.main import main
from exactivations.store.attributions import OUTPUT, WTE, Prediction, write_attributions
from exactivations.store.errors import InvalidInputError, StoreError
from tests.scripts.attribution_results import EMPTY, MAPS, TOKENS, attributions_of, edges_by_hand


def named(graph, edges, n=None):
    nodes = [(graph.layers[a], int(b), int(c)) for a, b, c in zip(graph.layer, graph.position, graph.component, strict=True)]
    ends = zip(edges.source[:n].tolist(), edges.target[:n].tolist(), strict=True)
    return [(nodes[source], nodes[target]) for source, target in ends]


def curves(figure):
    """Edges as drawn: (x0, y0, x1, y1), colour."""
    drawn = [c for c in figure.axes[0].collections if isinstance(c, PathCollection) and c.get_zorder() == 2]
    if not drawn:
        return []
    (edges,) = drawn
    colours = [to_hex(colour) for colour in edges.get_edgecolors()]
    corners = [(*path.vertices[0], *path.vertices[-1]) for path in edges.get_paths()]
    return list(zip(corners, colours, strict=True))


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("own", [True, False])
def test_nodes_and_edges_are_those_of_the_dense_tensors(own):
    attributions = attributions_of(own=own)
    graph = graph_of(attributions)
    assert graph.layers == (WTE, *MAPS, OUTPUT)
    for number, name in enumerate(attributions.set_names):
        edges, expected = graph.edges[number], edges_by_hand(attributions, name)
        assert dict(zip(named(graph, edges), edges.value.tolist(), strict=True)) == expected
        assert len(edges.value) == len(expected) > 30
        assert (np.diff(np.abs(edges.value)) <= 0).all()
        nodes = list(zip(graph.layer.tolist(), graph.position.tolist(), graph.component.tolist(), strict=True))
        assert nodes == sorted(set(nodes))
        for node, (layer, position, component) in enumerate(nodes):
            mask = attributions.alive[name][graph.layers[layer]]
            known = attributions.original_alive.get(graph.layers[layer])
            assert graph.alive[number, node] == bool(mask[position, component])
            assert graph.ghost[number, node] == bool(
                known is not None and known[position, component] and not mask[position, component]
            )
    assert graph.ghost.any(), "the output that only the untouched model has is a ghost in any case"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), max_size=12), min_size=1, max_size=3), st.integers(1, 8))
def test_the_threshold_is_the_smallest_that_shows_no_more(sizes, most):
    edges = []
    for of_set in sizes:
        value = np.array(sorted(of_set, reverse=True), np.float32)
        edges.append(Edges(np.arange(len(value)), np.arange(len(value)), value))
    empty = np.empty(0, np.int64)
    graph = AttributionGraph(None, (), empty, empty, empty, np.empty((0, 0), bool), np.empty((0, 0), bool), tuple(edges))
    threshold = graph.threshold_for(most)
    assert all(of_set.n_of(threshold) <= most for of_set in edges)
    assert [of_set.n_of(threshold) for of_set in edges] == [sum(size >= threshold for size in of_set) for of_set in sizes]
    lower = [size for of_set in sizes for size in of_set if size < threshold]
    if lower:
        assert any(of_set.n_of(max(lower)) > most for of_set in edges)


@pytest.mark.parametrize("threshold", [0.0, 0.8, 99.0])
def test_shared_edges_are_those_of_sets_of_pairs(threshold):
    attributions = attributions_of(("a", "b", "c"))
    graph = graph_of(attributions)
    by_hand = [edges_by_hand(attributions, name, threshold) for name in attributions.set_names]
    shared = graph.shared(threshold)
    ends = named(graph, Edges(shared.source, shared.target, shared.value[0]))
    assert set(ends) == set().union(*by_hand)
    assert {end for end, has in zip(ends, shared.in_all, strict=True) if has} == by_hand[0].keys() & by_hand[1].keys() & by_hand[
        2
    ].keys()
    assert {end for end, has in zip(ends, shared.only_in(1), strict=True) if has} == by_hand[1].keys() - by_hand[
        0
    ].keys() - by_hand[2].keys()
    for row, edges in zip(shared.value, by_hand, strict=True):
        assert row.tolist() == pytest.approx([edges.get(end, 0.0) for end in ends])


def test_nodes_stand_in_the_column_of_their_token_and_the_row_of_their_layer():
    graph = graph_of(attributions_of(share=0.9))
    layout = place(graph)
    assert [row.layers for row in layout.rows] == [
        (WTE,), ("m.0.q_proj", "m.0.k_proj", "m.0.v_proj"), ("m.0.o_proj",), ("m.1.up",), (OUTPUT,),
    ]  # fmt: skip
    assert [row.label for row in layout.rows] == ["wte", "0.q_proj k_proj v_proj", "0.o_proj", "1.up", "output"]
    places = set()
    for node, (layer, position) in enumerate(zip(graph.layer, graph.position, strict=True)):
        assert graph.layers[layer] in layout.rows[layout.row[node]].layers
        assert layout.borders[position] < layout.x[node] < layout.borders[position + 1]
        places.add((int(layout.row[node]), round(float(layout.x[node]), 6)))
    assert len(places) == len(graph.layer)
    for row in range(len(layout.rows)):
        in_row = np.flatnonzero(layout.row == row)
        for position in range(len(TOKENS)):
            cell = in_row[graph.position[in_row] == position]
            assert (np.diff(layout.x[cell]) >= 1).all(), "by layer, then component, and none on another"


def test_queries_keys_and_values_of_one_block_share_a_row_and_fused_maps_have_their_own():
    blocks = [f"h.{block}.attention.{name}" for block in (2, 10) for name in ("query", "key", "value", "dense")]
    assert [len(row.layers) for row in rows_of(blocks)] == [3, 1, 3, 1]
    fused = ["gpt_neox.layers.0.attention.query_key_value", "gpt_neox.layers.0.attention.dense", "gpt_neox.layers.0.mlp.kv_mix"]
    assert [row.label for row in rows_of(fused)] == ["attention.query_key_value", "attention.dense", "mlp.kv_mix"]
    assert [row.label for row in rows_of(["a.b.only"])] == ["a.b.only"]


def test_a_picture_draws_the_edges_above_the_threshold_and_says_how_many():
    attributions = attributions_of()
    graph = graph_of(attributions)
    layout, threshold = place(graph), 0.7
    figure = graph_figure(graph, "seed_1", threshold)
    expected, every = edges_by_hand(attributions, "seed_1", threshold), edges_by_hand(attributions, "seed_1")
    assert 0 < len(expected) < len(every)
    places = {
        (graph.layers[layer], int(p), int(c)): (x, float(row))
        for layer, p, c, x, row in zip(graph.layer, graph.position, graph.component, layout.x, layout.row, strict=True)
    }
    wanted = {
        ((*places[source], *places[target]), (POSITIVE if value > 0 else NEGATIVE).lower())
        for (source, target), value in expected.items()
    }
    assert set(curves(figure)) == wanted
    assert f"{len(expected)} of {len(every)} edges shown, those with |attribution| ≥ 0.7" in figure.axes[0].get_title(loc="left")
    assert [text.get_text() for text in figure.axes[0].texts] == ["␣x 50%", "↵ 40%"]
    assert f"not in the set ({int(graph.ghost[1].sum())})" in legend_of(figure)[-1]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["a", "␣b", "↵"]


def test_the_comparison_counts_what_is_shared():
    attributions = attributions_of(("one", "two", "three"))
    graph, threshold = graph_of(attributions), 0.5
    figure = comparison_figure(graph, threshold)
    one, two, three = (edges_by_hand(attributions, name, threshold).keys() for name in attributions.set_names)
    total = len(one | two | three)
    counts = [len(one & two & three), len(one - two - three), len(two - one - three), len(three - one - two)]
    counts.append(total - sum(counts))
    what = ["in all 3 sets", "only in one", "only in two", "only in three", "in some"]
    assert legend_of(figure) == [f"{text}: {count:,} of {total:,}" for text, count in zip(what, counts, strict=True)]
    drawn = [colour for _, colour in curves(figure)]
    assert [drawn.count(colour.lower()) for colour in ("#000000", *OF_SETS[:3])] == counts[:4]


def test_an_empty_set_is_drawn_and_said_to_be_empty():
    graph = graph_of(attributions_of(("seed_0", EMPTY)))
    figure = graph_figure(graph, EMPTY, 0.5)
    assert "no edges: nothing that is alive" in figure.axes[0].get_title(loc="left")
    assert "in all 2 sets: 0 of" in legend_of(comparison_figure(graph, 0.5))[0]
    alone = graph_of(attributions_of((EMPTY,), own=False))
    assert alone.threshold_for(5) == 0
    assert curves(graph_figure(alone, EMPTY, 0.0)) == []


def test_the_command_writes_pictures_and_page_and_tells_counts(tmp_path, capsys):
    attributions = attributions_of(("seed_0", "seed 1/x"))
    write_attributions(tmp_path, attributions)
    main(["attribution-graph", str(tmp_path), "--edges", "20"])
    said = capsys.readouterr().out
    names = {"seed_0.png", "seed_1_x.png", "comparison.png", "graph.html"}
    assert names < {path.name for path in tmp_path.iterdir()}
    before = {name: (tmp_path / name).read_bytes() for name in names}
    shown = [int(n) for n in re.findall(r": (\d+) of \d+ edges with", said)]
    assert max(shown) == 20
    attribution_graph(str(tmp_path / "attributions.safetensors"), out=str(tmp_path / "again"), edges=20)
    assert {name: (tmp_path / "again" / name).read_bytes() for name in names} == before


def test_a_set_that_does_not_explain_the_prediction_is_told_in_print_and_page(tmp_path, capsys):
    predictions = {"seed_0": Prediction(1, " x", 0.9, 0.6, 1, " x", 0.6), "seed_1": Prediction(4, "y", 0.947, 0.068, 1, " x", 0.5)}
    attributions = dataclasses.replace(attributions_of(), predictions=predictions)
    assert [one["fault"] for one in page_data(graph_of(attributions), 0.0, 9)["sets"]] == [None, attributions.faults["seed_1"]]
    write_attributions(tmp_path, attributions)
    main(["attribution-graph", str(tmp_path)])
    said = capsys.readouterr().out
    assert "predicted 'y': 0.947 in the model, 0.068 with the set\n    NOTE: it does not explain the model's prediction 'y'" in said
    assert said.count("NOTE") == 1


@pytest.mark.parametrize("n", [1, 9])
def test_where_no_picture_compares_the_sets_that_is_said_and_none_of_others_is_left(n, tmp_path, capsys):
    write_attributions(tmp_path, attributions_of(tuple(f"s{number}" for number in range(n))))
    (tmp_path / "comparison.png").write_bytes(b"of other sets")
    attribution_graph(str(tmp_path), edges=5)
    assert not (tmp_path / "comparison.png").exists()
    assert ("no comparison.png: it compares up to 8 sets, by colour, and there are 9" in capsys.readouterr().out) == (n == 9)


def test_bad_input_is_refused(tmp_path):
    for options in ({"threshold": -1.0}, {"threshold": float("nan")}, {"page_edges": 0}):
        with pytest.raises(InvalidInputError):
            attribution_graph(str(tmp_path), **options)
    with pytest.raises(StoreError, match="does not exist"):
        attribution_graph(str(tmp_path / "nothing"))
    graph = graph_of(attributions_of())
    with pytest.raises(InvalidInputError, match="no set 'x', only 'seed_0', 'seed_1'"):
        graph_figure(graph, "x", 0.0)
    with pytest.raises(InvalidInputError, match="compares 2 to 8 sets, there are 1"):
        comparison_figure(graph_of(attributions_of(("one",))), 0.0)
    write_attributions(tmp_path, attributions_of(("a b", "a_b")))
    with pytest.raises(InvalidInputError, match="another picture's"):
        attribution_graph(str(tmp_path))
    with pytest.raises(InvalidInputError, match="at least 1"):
        attribution_graph(str(tmp_path), edges=0)
    attributions = attributions_of()
    attributions.by_set["seed_1"][2].values[0] = torch.inf
    with pytest.raises(InvalidInputError, match=r"set 'seed_1': the attributions from wte to m.0.v_proj are not all finite"):
        graph_of(attributions)


def test_tokens_are_shown_on_one_line_in_letters_that_the_font_has():
    assert shown_token(" a\n\t\x00") == "␣a↵→\\x00"
    assert shown_token("") == "∅"
    assert drawable("née 你") == "née \\u4f60"
