"""What a decomposition is worth: how much of the model its components are, how few are needed, and what the output then is."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from exactivations.datamodules.step_batches import generator_at
from exactivations.lit_modules.decomposition.causal_importance import CausalImportanceFunction, hard_sigmoid
from exactivations.lit_modules.decomposition.component_model import ComponentModel
from exactivations.lit_modules.decomposition.decomposition import CLEARLY_ALIVE, raw_importances
from exactivations.lit_modules.decomposition.decomposition_losses import Divergence, divergence, sampled_masks
from exactivations.lit_modules.models.language_model import outputs_of
from exactivations.store.errors import InvalidInputError

Masks = dict[str, Float[Tensor, "*leading c"]]


@dataclass(frozen=True)
class DecompositionFigures:
    """Figures of a decomposition, on batches it was not trained on. Deltas take no part.

    Attributes:
        missing: By map, what the components lack of the weight; see `missing_of`.
        alive: By map, how many components are alive (importance above 0.1) at a position, on average: L0.
        ever_alive: By map, bool [C], which are alive anywhere.
        all_components: Divergence of the output with all components of all maps.
        by_importance: With each component times its importance.
        by_chance: With masks drawn between importance and 1.
        none: With no component, so nothing of the maps but biases: what the others are to be held against.
    """

    missing: dict[str, float]
    alive: dict[str, float]
    ever_alive: dict[str, Bool[Tensor, " c"]]
    all_components: float
    by_importance: float
    by_chance: float
    none: float


@torch.no_grad()
def evaluate(
    components: ComponentModel, ci_function: CausalImportanceFunction, batches: Iterable[Tensor], kind: Divergence, *, seed: int = 0
) -> DecompositionFigures:
    """Measures a decomposition.

    Args:
        components: The model and its components.
        ci_function: What was trained with them.
        batches: On the same device; token ids [B, L], or features [B, F] of a toy model.
        kind: How outputs are compared.
        seed: Of the masks that are drawn.

    Raises:
        InvalidInputError: If there is no batch.
    """
    generator = generator_at("evaluation masks", seed, device=next(components.parameters()).device)
    alive = {path: _Mean() for path in components.maps}
    ever = {path: torch.zeros(n, dtype=torch.bool) for path, n in ci_function.n_components.items()}
    ways: dict[str, Callable[[Masks], Masks]] = {
        "all_components": lambda importances: {path: torch.ones_like(g) for path, g in importances.items()},
        "by_importance": lambda importances: importances,
        "by_chance": lambda importances: sampled_masks(importances, generator),
        "none": lambda importances: {path: torch.zeros_like(g) for path, g in importances.items()},
    }
    found = {way: _Mean() for way in ways}
    for batch in batches:
        target, raw = raw_importances(components, ci_function, batch)
        importances = {path: hard_sigmoid(values) for path, values in raw.items()}
        for path, g in importances.items():
            at_position = g > CLEARLY_ALIVE
            alive[path].add(at_position.sum(-1).float().mean(), target)
            ever[path] |= at_position.flatten(0, -2).any(0).cpu()
        for way, masks_of in ways.items():
            with components.masked(masks_of(importances)):
                found[way].add(divergence(outputs_of(components.model, batch), target, kind), target)
    return DecompositionFigures(
        missing_of(components),
        {path: mean.value for path, mean in alive.items()},
        ever,
        **{way: mean.value for way, mean in found.items()},
    )


@torch.no_grad()
def missing_of(components: ComponentModel) -> dict[str, float]:
    """Returns by map what the components lack of the weight: |delta|^2 / |weight|^2."""
    return {path: float(of_map.delta().square().sum() / of_map.weight.square().sum()) for path, of_map in components.maps.items()}


@torch.no_grad()
def largest_only(components: ComponentModel, n_kept: Mapping[str, int], batches: Iterable[Tensor], kind: Divergence) -> float:
    """Returns the divergence of the output if each map keeps, at each position, the components that write the longest vectors.

    It is what any set of components can do without a causal-importance function, such as that of an SVD.

    Args:
        components: The model and its components.
        n_kept: How many are kept, by map.
        batches: As for `evaluate`.
        kind: How outputs are compared.

    Raises:
        InvalidInputError: If there is no batch.
    """
    found = _Mean()
    for batch in batches:
        with components.inner_activations() as inner:
            target = outputs_of(components.model, batch)
        masks = {}
        for path, activations in inner.items():
            length = activations.abs() * components.maps[path].U.norm(dim=1)
            kept = length.topk(min(n_kept[path], length.shape[-1]), dim=-1).indices
            masks[path] = torch.zeros_like(activations).scatter_(-1, kept, 1.0)
        with components.masked(masks):
            found.add(divergence(outputs_of(components.model, batch), target, kind), target)
    return found.value


class _Mean:
    """A mean over the positions of all batches, of means over those of each."""

    def __init__(self) -> None:
        self._sum, self._n = 0.0, 0

    def add(self, mean: Tensor, target: Tensor) -> None:
        n = target.shape[:-1].numel()
        self._sum, self._n = self._sum + n * float(mean), self._n + n

    @property
    def value(self) -> float:
        if not self._n:
            raise InvalidInputError("there is no batch to measure on: give at least one")
        return self._sum / self._n
