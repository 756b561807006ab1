"""Attributions as commands write and tell them."""

from collections.abc import Sequence
from pathlib import Path

import torch

from exactivations.store.attributions import KIND, OUTPUT, WTE, Attributions
from exactivations.store.errors import InvalidInputError


def folders_of(out: str, files: Sequence[str], *, overwrite: bool) -> dict[str, Path]:
    """Returns the folder for the results of each file of sets: `out` for one file, or else a folder in it called as the file.

    Raises:
        InvalidInputError: If two files are called alike, or there are results and they are not to be replaced.
    """
    stems = [Path(file).stem for file in files]
    doubled = [stem for stem in stems if stems.count(stem) > 1]
    if doubled:
        raise InvalidInputError(f"two files of sets are called {doubled[0]}: their results would have one folder; rename one")
    folders = {file: Path(out) if len(files) == 1 else Path(out) / stem for file, stem in zip(files, stems, strict=True)}
    for folder in folders.values():
        there = sorted(folder.rglob(f"{KIND}.safetensors")) if folder.is_dir() else []
        if there and not overwrite:
            raise InvalidInputError(f"{there[0]} is there already: name another folder, or replace it with --overwrite")
    return folders


def tell_attributions(attributions: Attributions, paths: Sequence[Path], show: int) -> None:
    """Prints where they are, and of each set how much is alive, how many edges there are, and the strongest."""
    print(f"{attributions.prompt!r}, {len(attributions.tokens)} tokens -> {', '.join(map(str, paths))}")
    for name, pairs in attributions.by_set.items():
        n_alive = sum(int(mask.sum()) for layer, mask in attributions.alive[name].items() if layer not in (WTE, OUTPUT))
        edges = [(pair, *pair.edges()) for pair in pairs]
        print(f"  {name}: {n_alive:,} alive components over all positions, {sum(len(v) for _, _, v in edges):,} edges")
        tell_prediction(attributions, name)
        if not edges or not show:
            continue
        values = torch.cat([v for _, _, v in edges])
        where = torch.cat([torch.nn.functional.pad(index, (1, 0), value=n) for n, (_, index, _) in enumerate(edges)])
        for place in values.abs().topk(min(show, len(values))).indices.tolist():
            n, s_in, c_in, s_out, c_out = where[place].tolist()
            pair = pairs[n]
            print(
                f"    {values[place]:+.4f}  {_node(attributions, pair.source, s_in, c_in)} -> "
                f"{_node(attributions, pair.target, s_out, c_out)}"
            )


def tell_prediction(attributions: Attributions, name: str) -> None:
    """Prints what the model predicts, how likely that is with a set, and, if the set does not explain it, why."""
    prediction = attributions.predictions.get(name)
    if prediction is not None:
        print(f"    predicted {prediction.text!r}: {prediction.probability:.3f} in the model, {prediction.of_set:.3f} with the set")
    if name in attributions.faults:
        print(f"    NOTE: {attributions.faults[name]}")


def _node(attributions: Attributions, layer: str, position: int, component: int) -> str:
    at = f"{attributions.tokens[position]!r} (position {position})"
    if layer == WTE:
        return f"token {at}"
    if layer == OUTPUT:
        return f"output {attributions.output_tokens[component]!r} at {at}"
    return f"{layer}:{component} at {at}"
