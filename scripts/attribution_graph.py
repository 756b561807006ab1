"""`exactivations attribution-graph`: attributions as pictures and as a page to explore."""


def attribution_graph(
    result: str,
    *,
    out: str | None = None,
    threshold: float | None = None,
    edges: int = 300,
    page_edges: int = 20_000,
) -> None:
    """Draws attributions: a picture of each CI set, one that compares two to eight sets, and an interactive page.

    Tokens go across and layers up, from the embedding to the output. Edges are drawn from a threshold on, the same for all sets,
    which every picture tells, with how many edges of how many that are.

    Args:
        result: The folder or file that `exactivations attribute` wrote.
        out: Folder for <set>.png, comparison.png and graph.html; it is made. Default: the result's folder.
        threshold: Draw edges whose attribution has at least this size. Default: as low as --edges allows.
        edges: Without a threshold: draw at most so many edges of a set.
        page_edges: So many edges of a set, the strongest, are in the page for its slider.
    """
    import math
    from pathlib import Path

    from exactivations.scripts.attribution_edges import graph_of
    from exactivations.scripts.attribution_page import write_page
    from exactivations.scripts.attribution_plot import OF_SETS, write_graphs
    from exactivations.scripts.attribution_results import tell_prediction
    from exactivations.store.attributions import read_attributions
    from exactivations.store.errors import InvalidInputError

    if threshold is not None and not 0 <= threshold < math.inf:
        raise InvalidInputError(f"--threshold must be a finite number of at least 0, got {threshold}")
    if page_edges < 1:
        raise InvalidInputError(f"--page-edges must be at least 1, got {page_edges}")
    graph = graph_of(read_attributions(result))
    if threshold is None:
        threshold = graph.threshold_for(edges)
    path = Path(result)
    folder = Path(out) if out is not None else path if path.is_dir() else path.parent
    folder.mkdir(parents=True, exist_ok=True)
    paths = write_graphs(graph, folder, threshold)
    paths.append(folder / "graph.html")
    write_page(graph, paths[-1], threshold, page_edges)
    for name, of_set in zip(graph.attributions.set_names, graph.edges, strict=True):
        n_alive = "no edges" if not len(of_set.value) else f"{of_set.n_of(threshold):,} of {len(of_set.value):,} edges"
        print(f"{name}: {n_alive} with |attribution| >= {threshold:.3g}")
        tell_prediction(graph.attributions, name)
    if len(graph.edges) > 1:
        shared = graph.shared(threshold)
        print(f"of {len(shared.source):,} edges in some set, {int(shared.in_all.sum()):,} are in all {len(graph.edges)}")
    if len(graph.edges) > len(OF_SETS):
        print(
            f"no comparison.png: it compares up to {len(OF_SETS)} sets, by colour, and there are {len(graph.edges)}; see graph.html"
        )
    print("written: " + ", ".join(map(str, paths)))
