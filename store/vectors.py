"""Vectors: what is made of stored activations before it is averaged. Layers may be averaged, poolings concatenated."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from exactivations.store.errors import InvalidInputError
from exactivations.store.moments import FloatArray

RECIPES = {
    "short": ("exp_decay:0.067",),
    "long": ("last", "exp_decay:0.023", "exp_decay:0.067", "exp_decay:0.159"),
}
"""Named sets of poolings, whose vectors are concatenated: d and 4 d values."""


@dataclass(frozen=True)
class Vector:
    """One vector per sample: the mean over hook points of each pooling, the poolings concatenated.

    Attributes:
        hook_points: Averaged in this order, in float64. Mostly there is one.
        pooling: A pooling, or "short" or "long".
    """

    hook_points: tuple[str, ...]
    pooling: str

    @property
    def place(self) -> str:
        """The hook points as one name: "resid_post.25+26+27"."""
        kinds = {name.rpartition(".")[0] for name in self.hook_points}
        if len(self.hook_points) > 1 and len(kinds) == 1 and "" not in kinds:
            return f"{kinds.pop()}.{'+'.join(name.rpartition('.')[2] for name in self.hook_points)}"
        return "+".join(self.hook_points)

    @property
    def name(self) -> str:
        """The name "<place>/<pooling>", as activations are named."""
        return f"{self.place}/{self.pooling}"

    @property
    def poolings(self) -> tuple[str, ...]:
        """What is concatenated."""
        return RECIPES.get(self.pooling, (self.pooling,))

    def rows(self, activations: Mapping[str, Tensor]) -> FloatArray:
        """Returns float64 [n, d] of stored or live activations "<hook point>/<pooling>" [n, D].

        Raises:
            InvalidInputError: If one of them is not there.
        """
        names = [[f"{point}/{pooling}" for point in self.hook_points] for pooling in self.poolings]
        missing = [name for of_pooling in names for name in of_pooling if name not in activations]
        if missing:
            raise InvalidInputError(f"{self.name} is made of {', '.join(missing)}, found are {', '.join(activations) or 'none'}")
        return np.concatenate([mean_over([activations[name] for name in of_pooling]) for of_pooling in names], axis=1)


def mean_over(states: list[Tensor]) -> FloatArray:
    """Returns the mean of tensors [n, d] in float64, added in their order."""
    total: FloatArray = states[0].to(torch.float64).numpy()
    for values in states[1:]:
        total = total + values.to(torch.float64).numpy()
    return total / len(states) if len(states) > 1 else total


def vectors_of(hook_points: list[str], poolings: list[str], *, average: bool = False) -> tuple[Vector, ...]:
    """Returns the vectors of each pooling at each hook point, or with `average` at their mean."""
    places = [tuple(hook_points)] if average else [(name,) for name in hook_points]
    return tuple(Vector(place, pooling) for place in places for pooling in dict.fromkeys(poolings))


def poolings_needed(poolings: list[str]) -> list[str]:
    """Returns the poolings that these are made of, each once."""
    return list(dict.fromkeys(part for name in poolings for part in RECIPES.get(name, (name,))))
