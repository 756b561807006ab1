"""Attribution graphs as one interactive page of HTML, which needs nothing else: no network, no other file."""

import base64
import hashlib
import html
import json
from pathlib import Path
from typing import Any

import numpy as np

from exactivations.scripts.attribution_edges import AttributionGraph, Floats
from exactivations.scripts.attribution_layout import place, shown_token
from exactivations.store.attributions import OUTPUT
from exactivations.store.errors import StoreError
from exactivations.store.shard import write_text_atomically

SCRIPT = Path(__file__).with_suffix(".js")
DIGITS = 4  # of places and probabilities
STYLE = """
html, body { height: 100%; margin: 0 }
body { display: flex; flex-direction: column; font: 14px/1.4 system-ui, sans-serif; color: #000; background: #fff }
header { padding: 0.6em 1em; border-bottom: 1px solid #ccc }
h1 { font-size: 1.05em; margin: 0 0 0.4em } h1 span { font-weight: normal; white-space: pre-wrap }
header > div { display: flex; flex-wrap: wrap; gap: 0.3em 1.6em; align-items: center }
#threshold { width: 18em; vertical-align: middle } #zoom { width: 8em; vertical-align: middle }
#shown { font-variant-numeric: tabular-nums; min-width: 24em }
#legend { margin-top: 0.3em; min-height: 1.4em }
#legend i { display: inline-block; width: 1.3em; height: 0.25em; margin: 0 0.4em 0.25em 0 }
#view { flex: 1; overflow: auto; position: relative; min-height: 0 }
#canvas { position: sticky; left: 0; top: 0; display: block }
#tip { position: fixed; background: #fff; border: 1px solid #555; padding: 0.4em 0.6em; max-width: 44em; white-space: pre-wrap;
       overflow-wrap: anywhere; font-size: 12.5px; pointer-events: none; box-shadow: 0 2px 6px #0003 }
"""
BODY = """<header>
<h1>{title} <span>{prompt}</span></h1>
<div>
<label>set <select id="set"></select></label>
<label>threshold <input id="threshold" type="range" min="0" max="1" step="any"></label>
<span id="shown"></span>
<label>width <input id="zoom" type="range" min="1" max="40" step="any"></label>
</div>
<div id="legend"></div>
</header>
<div id="view"><div id="room"><canvas id="canvas"></canvas></div></div>
<div id="tip" hidden></div>
<noscript>This page draws with JavaScript.</noscript>
"""


def write_page(graph: AttributionGraph, path: Path, threshold: float, most: int) -> None:
    """Writes `page_html`; a file that is there is replaced.

    Raises:
        StoreError: If it cannot be written.
    """
    page = page_html(graph, threshold, most)
    try:
        write_text_atomically(path, page)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error}; see that its folder is there and has room") from error


def page_html(graph: AttributionGraph, threshold: float, most: int) -> str:
    """Returns the page: one set at a time or all compared, by a threshold that is slid; pointing tells names and numbers.

    Texts of the model are data of the page, never its markup, and its policy lets no script run but its own.

    Args:
        graph: Of all sets.
        threshold: Where the slider stands at first.
        most: So many edges of a set, the strongest, are in the page at most.

    Raises:
        InvalidInputError: If most is below 1.
    """
    script, data = SCRIPT.read_text(encoding="utf-8"), json_for_html(page_data(graph, threshold, most))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    title = html.escape(f"Attributions of {graph.attributions.model}")
    prompt = html.escape("".join(map(shown_token, graph.attributions.tokens)))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{allowed}'\">\n<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"{BODY.format(title=title, prompt=prompt)}"
        f'<script type="application/json" id="data">{data}</script>\n<script>{script}</script>\n</body>\n</html>\n'
    )


def page_data(graph: AttributionGraph, threshold: float, most: int) -> dict[str, Any]:
    """Returns what the page draws, as JSON would hold it."""
    attributions, layout = graph.attributions, place(graph)
    least = graph.threshold_for(most)
    number = {layer: at for at, layer in enumerate(graph.layers)}
    sets = []
    for at, (name, edges) in enumerate(zip(attributions.set_names, graph.edges, strict=True)):
        n = edges.n_of(least)
        alive = np.flatnonzero(graph.alive[at])
        outputs = alive[graph.layer[alive] == number[OUTPUT]]
        found = attributions.output_probabilities[at][graph.position[outputs], graph.component[outputs]]
        sets.append(
            {
                "name": name, "fault": attributions.faults.get(name), "n_edges": len(edges.value), "alive": alive.tolist(),
                "ghost": np.flatnonzero(graph.ghost[at]).tolist(),
                "probability": dict(zip(map(str, outputs.tolist()), np.round(found.tolist(), DIGITS).tolist(), strict=True)),
                "source": edges.source[:n].tolist(), "target": edges.target[:n].tolist(), "value": _shortest(edges.value[:n]),
            }
        )  # fmt: skip
    (first,) = _shortest(np.array([threshold], np.float32))
    sizes = [abs(value) for one in sets for value in (one["value"][:1] + one["value"][-1:])] or [1.0]
    return {
        "tokens": [shown_token(token) for token in attributions.tokens],
        "output_tokens": {str(token): shown_token(text) for token, text in attributions.output_tokens.items()},
        "layers": graph.layers, "output": number[OUTPUT],
        "rows": [{"label": row.label, "layers": [number[layer] for layer in row.layers]} for row in layout.rows],
        "borders": np.round(layout.borders, DIGITS).tolist(),
        "nodes": {
            "layer": graph.layer.tolist(), "position": graph.position.tolist(), "component": graph.component.tolist(),
            "x": np.round(layout.x, DIGITS).tolist(),
        },
        "sizes": {"least": min(sizes), "most": max(sizes), "first": min(max(first, min(sizes)), max(sizes))},
        "sets": sets,
    }  # fmt: skip


def json_for_html(data: Any) -> str:
    """Returns JSON that can stand in a script element: nothing in it can end the element, or begin another or a comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII only
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _shortest(values: Floats) -> list[float]:
    """Returns float32 values as the shortest decimals that are read back as the same float32."""
    return [float(str(value)) for value in values]
