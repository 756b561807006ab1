"""What means are told as: a line for each vector."""

import numpy as np

from exactivations.store.mean_activations import MIN_COUNT, MeanActivations
from exactivations.store.means_file import path_of


def tell_means(result: str) -> None:
    """Prints what a result holds, and how to read it."""
    means = MeanActivations.load(result, allow_unverified=True)
    file, width = means.file, max(len(name) for name in ["vector", *means.names])
    print(f"{path_of(result)}: means of {means.n_samples:,} samples, {sum(part.n_tokens for part in file.parts):,} tokens")
    print(f"  model     {file.about['model'] or 'held in Python'} ({file.identity['model_class']}, {file.identity['dtype']})")
    for part in file.parts:
        print(f"  part      {part.n_samples:,} samples of {part.dataset}{'' if part.verified else ', NOT VERIFIED'}")
    print(f"  {'vector':<{width}} {'values':>7} {'norm':>9} {'deviation':>9} {'top 1%':>7}")
    for name in means.names:
        mean = means.mean(name).double().numpy()
        squares = np.sort(mean**2)[::-1]
        deviation = f"{float(means.variance(name).double().sum().sqrt()):9.4g}" if means.count(name) > 1 else "-".rjust(9)
        share = squares[: max(1, len(mean) // 100)].sum() / squares.sum() if squares.sum() else 0.0
        print(f"  {name:<{width}} {len(mean):>7,} {np.linalg.norm(mean):9.4g} {deviation} {share:>7.1%}")
    if means.groups:
        counts = ", ".join(f"{group} ({means.count(means.names[0], group):,})" for group in means.groups[:8])
        print(f"  groups by {file.options.group_column}: {counts}{', ...' if len(means.groups) > 8 else ''}")
    if file.options.n_positions:
        _, count = means.by_position(means.places[0])
        reached = int((count > 0).sum())
        thin = int(((count > 0) & (count < MIN_COUNT)).sum())
        print(f"  positions {reached:,} from the end have tokens; {thin:,} of them fewer than {MIN_COUNT}")
    print("norm: of the mean; deviation: root of the summed variances; top 1%: of its squared norm, in a hundredth of its values")
    print(
        "read it with\n    from exactivations.store import MeanActivations\n"
        f'    mean = MeanActivations.load("{result}").mean("{means.names[0]}")'
    )
