"""What `exactivations decompose` and `decompose-toy` print at the end."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

Figures = Mapping[str, Any]


def tell_model(figures: Figures, folder: Path) -> None:
    """Prints the figures of a decomposed language model beside those of an SVD."""
    trained, svd = figures["trained"], figures["svd"]
    width = max(len("map"), *(len(path) for path in trained["missing"]))
    of_trained = f"{'components':>10} {'alive':>7} {'ever':>6} {'missing':>9}"
    print(f"  {'map':<{width}} {of_trained}  SVD: {'components':>10} {'missing':>9}")
    for path in trained["missing"]:
        n, alive, ever = (trained[name][path] for name in ("n_components", "alive", "ever_alive"))
        of_trained = f"{n:>10} {alive:>7.1f} {ever:>6} {trained['missing'][path]:>9.2g}"
        of_svd = f"{svd['n_components'][path]:>10} {svd['missing'][path]:>9.2g}"
        print(f"  {path:<{width}} {of_trained}       {of_svd}")
    print("alive: components above an importance of 0.1 at a position, on average; ever: at any; missing: |delta|^2 / |weight|^2")
    print(f"  {'KL to the model itself, nats a token':<44} {'trained':>9} {'SVD':>9}")
    for name, title in {
        "all_components": "all components",
        "largest": "as many as are alive, the largest",
        "by_importance": "components times their importance",
        "by_chance": "masks drawn between importance and 1",
        "none": "no components",
    }.items():
        of_svd = f"{svd[name]:>9.4f}" if name in svd else "-".rjust(9)
        print(f"  {title:<44} {trained[name]:>9.4f} {of_svd}")
    print(f"components, causal-importance function and figures are in {folder}")


def tell_toys(features: int, dimensions: int, figures: Sequence[Figures]) -> None:
    """Prints how well the components of each seed are the columns of W, and mean and standard deviation over seeds."""
    maps = list(figures[0]["trained"]["alive"])
    print(f"  {features} features in {dimensions} dimensions; components of linear1 against the columns of W")
    print(f"  {'':<6} {'those that are ever alive':^32}  {'all':^16}")
    of_all = f"{'cosine':>8} {'length':>7}"
    print(f"  {'seed':<6} {'cosine':>8} {'length':>7} {'least':>7} {'most':>7}  {of_all}  alive (ever) in {', '.join(maps)}")
    for of_seed in figures:
        found, by_all, trained = of_seed["recovery"], of_seed["recovery_by_all"], of_seed["trained"]
        alive = ", ".join(f"{trained['alive'][path]:.2f} ({trained['ever_alive'][path]})" for path in maps)
        print(
            f"  {of_seed['options']['seed']:<6} {found['mean_max_cosine_similarity']:>8.4f} {found['mean_length_ratio']:>7.4f} "
            f"{found['least_length_ratio']:>7.4f} {found['largest_length_ratio']:>7.4f}  "
            f"{by_all['mean_max_cosine_similarity']:>8.4f} {by_all['mean_length_ratio']:>7.4f}  {alive}"
        )
    for name, key in {"cosine": "mean_max_cosine_similarity", "length": "mean_length_ratio"}.items():
        values = [of_seed["recovery"][key] for of_seed in figures]
        print(f"  {name}: {mean(values):.4f} ± {pstdev(values):.4f} over {len(values)} seeds")
