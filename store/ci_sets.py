"""Sets of causal importances for one prompt, and the JSON file they come in.

    {"prompt": "They walked hand in", "ci_sets": {"seed_0": {"layer": [seq][C], …}, "seed_1": {…}}}

A causal importance in [0, 1] says of a component at a position how much the model needs it there.
"""

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from exactivations.store.errors import InvalidInputError, StoreError, shown
from exactivations.store.shard import write_text_atomically


@dataclass(frozen=True)
class CiSets:
    """N sets of causal importances, of the same components at the same positions of one prompt.

    Attributes:
        prompt: The text, Unicode without lone surrogates.
        names: The sets' names, N of them; plain file names, since what is written of a set is called as the set.
        values: By layer (the path of a decomposed map) float32 [N, L, C], in [0, 1]; L is the same for all.

    Raises:
        InvalidInputError: If that does not hold, naming set, layer and position.
    """

    prompt: str
    names: tuple[str, ...]
    values: Mapping[str, Float[Tensor, "n l c"]]

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) != len(self.names):
            raise InvalidInputError(f"sets need names, each another one, got {list(self.names)}")
        for name in self.names:
            if name in ("", ".", "..") or name.endswith(".safetensors") or any(map(_is_no_part_of_a_file_name, name)):
                raise InvalidInputError(
                    f"set {name!r}: what is written of a set is called as the set, so its name must be a file name: not empty, '.' "
                    "or '..', without / and \\, control characters and lone surrogates, and not ending in .safetensors; rename it"
                )
        if any(unicodedata.category(character) == "Cs" for character in self.prompt):
            raise InvalidInputError(f"the prompt {shown(self.prompt)} has a lone surrogate, which is half a character: take it out")
        if not self.values:
            raise InvalidInputError(f"set {self.names[0]!r} has no layers: give the causal importances of at least one")
        first = next(iter(self.values))
        for layer, values in self.values.items():
            if values.ndim != 3 or len(values) != len(self.names) or 0 in values.shape:
                raise InvalidInputError(
                    f"layer {layer!r} has causal importances of shape {list(values.shape)}, expected [{len(self.names)} sets, "
                    "positions, components], none of them empty"
                )
            if values.shape[1] != self.n_positions:
                raise InvalidInputError(
                    f"set {self.names[0]!r}: layer {layer!r} has {values.shape[1]} positions, layer {first!r} {self.n_positions}"
                )
            wrong = (~((values >= 0) & (values <= 1))).nonzero()  # so that NaN is wrong
            if len(wrong):
                n, position, component = wrong[0].tolist()
                raise _not_an_importance(
                    f"set {self.names[n]!r}, layer {layer!r}", position, component, float(values[n, position, component])
                )

    @property
    def n_positions(self) -> int:
        """L."""
        return next(iter(self.values.values())).shape[1]

    def alive(self, threshold: float) -> dict[str, Bool[Tensor, "n l c"]]:
        """Returns by layer which components are alive at which positions: those of a causal importance of at least this."""
        return {layer: values >= threshold for layer, values in self.values.items()}

    def one(self, name: str) -> Self:
        """Returns one of the sets.

        Raises:
            InvalidInputError: If there is none of this name.
        """
        n = self.index(name)
        return type(self)(self.prompt, (name,), {layer: values[n : n + 1] for layer, values in self.values.items()})

    def index(self, name: str) -> int:
        """Returns the place of a set.

        Raises:
            InvalidInputError: If there is none of this name.
        """
        if name not in self.names:
            raise InvalidInputError(f"there is no set {name!r}, only {', '.join(map(repr, self.names))}")
        return self.names.index(name)


def write_ci_sets(path: str | Path, sets: CiSets) -> None:
    """Writes the JSON file; every float32 is read back as it was.

    Raises:
        StoreError: If it cannot be written.
    """
    content = {
        "prompt": sets.prompt,
        "ci_sets": {
            name: {layer: values[n].tolist() for layer, values in sets.values.items()} for n, name in enumerate(sets.names)
        },
    }
    try:
        write_text_atomically(Path(path), json.dumps(content) + "\n")
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error}; see that its folder is there and has room") from error


def read_ci_sets(path: str | Path) -> CiSets:
    """Reads the JSON file.

    Raises:
        InvalidInputError: If it cannot be read, is laid out otherwise, or its sets differ in layers or shapes or hold what is no
            number in [0, 1]; the message names the file, and where it concerns one, set, layer and position.
    """
    try:
        content = json.loads(Path(path).read_text(), object_pairs_hook=_without_doubles)
        return _sets_of(content)
    except InvalidInputError as error:
        raise InvalidInputError(f"{path}: {error}") from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, no Unicode, or a number of too many digits
        raise InvalidInputError(f"{path} cannot be read as JSON: {error}") from error


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise InvalidInputError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice: name each thing once")
    return found


def _sets_of(content: Any) -> CiSets:
    sets = content.get("ci_sets") if isinstance(content, dict) else None
    if not isinstance(sets, dict) or not isinstance(content.get("prompt"), str):
        raise InvalidInputError('expected {"prompt": text, "ci_sets": {set name: {layer: [positions][components]}}}')
    if not sets:
        raise InvalidInputError("ci_sets is empty: give at least one set")
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, layers in sets.items():
        if not isinstance(layers, dict):
            raise InvalidInputError(f"set {name!r}: expected {{layer: [positions][components]}}, got {shown(layers)}")
        tensors[name] = {layer: _tensor_of(rows, f"set {name!r}, layer {layer!r}") for layer, rows in layers.items()}
    first, of_first = next(iter(tensors.items()))
    for name, layers in tensors.items():
        if layers.keys() != of_first.keys():
            layer = sorted(layers.keys() ^ of_first.keys())[0]
            has, lacks = (name, first) if layer in layers else (first, name)
            raise InvalidInputError(f"set {has!r} has layer {layer!r}, set {lacks!r} has not: all sets need the same layers")
        for layer, values in layers.items():
            if values.shape != of_first[layer].shape:
                raise InvalidInputError(
                    f"set {name!r}, layer {layer!r}: {values.shape[0]} positions of {values.shape[1]} components, in set {first!r} "
                    f"{of_first[layer].shape[0]} of {of_first[layer].shape[1]}: all sets need the same shapes"
                )
    return CiSets(
        content["prompt"], tuple(tensors), {layer: torch.stack([of[layer] for of in tensors.values()]) for layer in of_first}
    )


def _tensor_of(rows: Any, where: str) -> Tensor:
    """Returns the numbers of one set in one layer, float32 [L, C]; out of range they stay."""
    if not isinstance(rows, list) or not rows:
        raise InvalidInputError(f"{where}: expected a list of positions, got {shown(rows)}")
    for position, row in enumerate(rows):
        if not isinstance(row, list) or not row:
            raise InvalidInputError(f"{where}, position {position}: expected a list of components, got {shown(row)}")
        if len(row) != len(rows[0]):
            raise InvalidInputError(f"{where}, position {position}: {len(row)} components, position 0 has {len(rows[0])}")
        for component, value in enumerate(row):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise _not_an_importance(where, position, component, value)
    return torch.tensor(rows, dtype=torch.float32)


def _is_no_part_of_a_file_name(character: str) -> bool:
    return character in "/\\" or unicodedata.category(character) in ("Cc", "Cs")


def _not_an_importance(where: str, position: int, component: int, value: object) -> InvalidInputError:
    return InvalidInputError(
        f"{where}, position {position}: component {component} has the causal importance {shown(value)}, expected a number in [0, 1]"
    )
