"""The page of attributions, without a browser: its data are the graph's, no text gets out of them, and only its script runs."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from exactivations.scripts.attribution_edges import graph_of
from exactivations.scripts.attribution_page import json_for_html, page_data, page_html, write_page
from exactivations.store.errors import InvalidInputError, StoreError
from tests.scripts.attribution_results import EMPTY, attributions_of

HOSTILE = ("</script><script>alert(1)</script>", "<!--<script>", "&lt;\u2028'\"\\\x00")


class Page(HTMLParser):
    """What a browser would make of it: elements with their attributes, and the text of scripts and headings."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self._open = [], {}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open.append(len(self.elements) - 1)

    def handle_endtag(self, tag):
        while self._open and self.elements[self._open.pop()][0] != tag:
            pass

    def handle_data(self, data):
        if self._open:
            self.texts[self._open[-1]] = self.texts.get(self._open[-1], "") + data

    def text_of(self, tag):
        return [self.texts.get(at, "") for at, (name, _) in enumerate(self.elements) if name == tag]


@pytest.mark.parametrize("tokens", [("a", " b", "\n"), HOSTILE])
def test_the_page_holds_the_graph_and_nothing_of_it_becomes_markup(tokens):
    output_tokens = dict(zip((1, 4, 7), tokens, strict=True))
    graph = graph_of(attributions_of(("seed_0", tokens[0]), tokens=tokens, output_tokens=output_tokens))
    page = Page(page_html(graph, 0.5, 1000))
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}]
    assert not [attributes for _, attributes in page.elements if {"src", "href", "onload", "onerror"} & attributes.keys()]
    data, script = page.text_of("script")
    assert json.loads(data) == json.loads(json.dumps(page_data(graph, 0.5, 1000)))
    (policy,) = [attributes["content"] for tag, attributes in page.elements if tag == "meta" and "http-equiv" in attributes]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|fetch\(|https?://", script)
    wanted = set(re.findall(r'find\("(\w+)"\)', script)) | {"data"}
    assert wanted <= {attributes.get("id") for _, attributes in page.elements}


def test_its_numbers_are_the_graphs_to_the_bit():
    attributions = attributions_of(("a", "b", EMPTY), scale=1e-5)
    graph = graph_of(attributions)
    data = json.loads(json_for_html(page_data(graph, 1e-5, 1000)))
    for of_page, edges, alive, ghost, p in zip(
        data["sets"], graph.edges, graph.alive, graph.ghost, attributions.output_probabilities, strict=True
    ):
        assert np.array_equal(np.array(of_page["value"], np.float32), edges.value)
        assert of_page["source"] == edges.source.tolist()
        assert of_page["target"] == edges.target.tolist()
        assert of_page["alive"] == np.flatnonzero(alive).tolist()
        assert of_page["ghost"] == np.flatnonzero(ghost).tolist()
        for node, probability in of_page["probability"].items():
            at = graph.position[int(node)], graph.component[int(node)]
            assert graph.layers[graph.layer[int(node)]] == "output"
            assert probability == pytest.approx(float(p[at]), abs=1e-4)
    assert data["sizes"]["most"] == pytest.approx(max(float(np.abs(edges.value).max(initial=0)) for edges in graph.edges))
    assert data["sizes"]["least"] <= data["sizes"]["first"] <= data["sizes"]["most"]


def test_it_holds_the_strongest_edges_of_one_threshold_and_knows_how_many_there_are():
    graph = graph_of(attributions_of(("a", "b")))
    data = page_data(graph, 0.0, 25)
    assert max(len(of_page["value"]) for of_page in data["sets"]) == 25
    assert [of_page["n_edges"] for of_page in data["sets"]] == [len(edges.value) for edges in graph.edges]
    least = graph.threshold_for(25)
    assert [len(of_page["value"]) for of_page in data["sets"]] == [edges.n_of(least) for edges in graph.edges]
    with pytest.raises(InvalidInputError):
        page_data(graph, 0.0, 0)


def test_a_graph_without_edges_has_a_page(tmp_path):
    graph = graph_of(attributions_of((EMPTY,), own=False))
    write_page(graph, tmp_path / "graph.html", 0.0, 10)
    data = page_data(graph, 0.0, 10)
    assert data["sizes"]["least"] <= data["sizes"]["most"]
    assert data["sets"][0]["value"] == []
    with pytest.raises(StoreError, match="cannot write"):
        write_page(graph, tmp_path / "no" / "graph.html", 0.0, 10)
