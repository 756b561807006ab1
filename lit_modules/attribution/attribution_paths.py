"""Which layers have direct paths to which, and whether over positions: found by probing gradients, not by names.

A path that leads through another decomposed map is cut there. What is left are residual streams, norms, nonlinearities and
attention. In a model all of whose attention maps are decomposed, the only paths from one position to later ones are those from keys
and values to the map after the attention of their block. Fused maps (GPT-NeoX's query_key_value, GPT-2's c_attn) write queries
too, which act at their own position, but the same components write keys and values: the whole pair reaches over positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from exactivations.lit_modules.attribution.component_cut import causal_model, cut_pass, eager_attention, many_gradients
from exactivations.lit_modules.decomposition.component_model import ComponentModel
from exactivations.lit_modules.models.language_model import vocabulary_size
from exactivations.store.attributions import OUTPUT
from exactivations.store.errors import InvalidInputError

PROBE_LENGTH = 4


@dataclass(frozen=True)
class Paths:
    """The layers with direct paths to one target.

    Attributes:
        target: Path of a map, or "output".
        sources: By layer (path of a map, or "wte") whether it reaches later positions; False: its own position only.
    """

    target: str
    sources: dict[str, bool]

    @property
    def over_positions(self) -> bool:
        """Whether any source reaches later positions."""
        return any(self.sources.values())


def find_paths(components: ComponentModel) -> list[Paths]:
    """Probes gradients of the untouched model on a few random tokens, from every position of every target to every source.

    A gradient in a random direction is not 0 where there is a path: where it is exactly 0 for all features, there is none. Masks
    play no part, so that what a set switches off cannot hide a path.

    Returns:
        Of each target that has sources, in the order of the model's modules, "output" last.

    Raises:
        InvalidInputError: If the model is not causal, or a map does not run.
    """
    model = causal_model(components)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary_size(model) or 1, (1, PROBE_LENGTH), generator=generator).to(model.device)
    with eager_attention(model):
        passed = cut_pass(components, ids, components.maps)
        found = []
        for target in (*components.maps, OUTPUT):
            end = passed.ends[target]
            directions = torch.zeros(PROBE_LENGTH, *end.shape, dtype=end.dtype)
            places = torch.arange(PROBE_LENGTH)
            directions[places, :, places] = torch.randn(PROBE_LENGTH, 1, end.shape[-1], generator=generator, dtype=end.dtype)
            gradients = many_gradients(end, list(passed.starts.values()), directions.to(end.device))
            sources = {}
            for source, gradient in zip(passed.starts, gradients, strict=True):
                reached = (gradient != 0).any(-1)[:, 0].cpu()  # s_out, s_in
                if not gradient.isfinite().all() or reached.triu(1).any():
                    raise InvalidInputError(_not_causal(type(model).__name__, source, target, gradient))
                if reached.any():
                    sources[source] = bool(reached.tril(-1).any())
            if sources:
                found.append(Paths(target, sources))
    return found


def _not_causal(model: str, source: str, target: str, gradient: Tensor) -> str:
    if not gradient.isfinite().all():
        return f"the gradient from {target} to {source} of {model} is not finite on random tokens: load the model in float32"
    return f"{target} of {model} depends on {source} at later positions: attributions need a causal model"
