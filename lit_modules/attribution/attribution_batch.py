"""Prompts with their sets of causal importances as the rows of one forward pass, with what of the model these use."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from exactivations.datamodules.ci_prompts import CiPrompt
from exactivations.lit_modules.attribution.component_cut import causal_model
from exactivations.lit_modules.decomposition.component_linear import ComponentLinear
from exactivations.lit_modules.decomposition.component_model import ComponentModel

Alive = Mapping[str, Tensor]
"""By layer which components are alive: bool [rows, L, C], or of one row [L, C]."""


@dataclass(frozen=True)
class AttributionBatch:
    """P prompts of one length with R sets in all, on the model's device.

    Attributes:
        prompts: As given.
        ids: int64 [P, L].
        rows: int64 [R, L]: the prompt of each set.
        rows_of: For each prompt its sets' rows.
        maps: The model's maps with only those components that any set uses at all: the others change nothing.
        all_importances: By map the sets' causal importances, float32 [R, L, C], on the host.
        importances: Those of the components in `maps`.
        masks: The same in the model's dtype.
    """

    prompts: Sequence[CiPrompt]
    ids: Tensor
    rows: Tensor
    rows_of: list[list[int]]
    maps: dict[str, ComponentLinear]
    all_importances: dict[str, Tensor]
    importances: dict[str, Tensor]
    masks: dict[str, Tensor]

    @classmethod
    def of(cls, prompts: Sequence[CiPrompt], components: ComponentModel) -> Self:
        """Puts prompts of one length, whose sets fit the model, onto its device."""
        model = causal_model(components)
        ids = torch.stack([prompt.token_ids for prompt in prompts]).to(model.device, copy=True)
        n_sets = torch.tensor([len(prompt.sets.names) for prompt in prompts])
        rows_of = [part.tolist() for part in torch.arange(int(n_sets.sum())).split(n_sets.tolist())]  # type: ignore[no-untyped-call]
        everything, importances, maps = {}, {}, {}
        for path, linear in components.maps.items():
            everything[path] = torch.cat([prompt.sets.values[path] for prompt in prompts])
            used = everything[path].flatten(0, 1).any(0)
            used[0] = True  # a map has one component at least; where its importances are 0, it does nothing
            maps[path] = ComponentLinear(linear.original, linear.V[:, used], linear.U[used])
            importances[path] = everything[path][..., used].to(model.device)
        masks = {path: values.to(model.dtype) for path, values in importances.items()}
        rows = ids.repeat_interleave(n_sets.to(ids.device), 0)
        return cls(prompts, ids, rows, rows_of, maps, everything, importances, masks)

    def any_set(self, by_layer: Alive) -> Alive:
        """Returns for each prompt what is alive in any of its sets, [P, L, C]."""
        return {layer: torch.stack([of[rows].any(0) for rows in self.rows_of]) for layer, of in by_layer.items()}
