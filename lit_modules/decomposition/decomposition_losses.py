"""What a stochastic parameter decomposition minimises, and the random masks it is tried with.

Source: arXiv 2506.20790; the formulas here are those of its method section and pseudocode.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Divergence = Literal["mse", "kl"]


def faithfulness(deltas: Iterable[Float[Tensor, "d_in d_out"]]) -> Float[Tensor, ""]:
    """Returns the mean squared difference, over all weights of all decomposed maps, to the sum of their components.

    Args:
        deltas: Of each map, its weight minus the sum of its components.
    """
    deltas = list(deltas)
    return torch.stack([delta.square().sum() for delta in deltas]).sum() / sum(delta.numel() for delta in deltas)


def importance_minimality(importances: Mapping[str, Float[Tensor, "*leading c"]], p: float) -> Float[Tensor, ""]:
    """Returns the sum over all maps and components of importance ** p, as a mean over the leading dimensions.

    Args:
        importances: By map, upper leaky, and so never below 0.
        p: Above 0.
    """
    # For p < 1 the slope at 0 is infinite, and 0 times it (of the clip) not a number.
    return torch.stack([(g + 1e-12).pow(p).sum(-1).mean() for g in importances.values()]).sum()


def divergence(outputs: Tensor, target: Tensor, kind: Divergence) -> Float[Tensor, ""]:
    """Returns how far outputs are from the target model's.

    Args:
        outputs: Of the model with masked components, [..., outputs].
        target: Of the model itself, of the same shape.
        kind: "mse", the mean squared difference; or "kl", the mean over positions of KL(target || outputs) in nats, both given as
            logits.
    """
    if kind == "mse":
        return functional.mse_loss(outputs, target)
    of_target, of_outputs = target.log_softmax(-1).flatten(0, -2), outputs.log_softmax(-1).flatten(0, -2)
    return functional.kl_div(of_outputs, of_target, reduction="batchmean", log_target=True)


def sampled_masks(
    importances: Mapping[str, Float[Tensor, "*leading c"]], generator: torch.Generator
) -> dict[str, Float[Tensor, "*leading c"]]:
    """Returns masks g + (1 - g) r with r drawn evenly from [0, 1): what matters stays, and the rest is there by chance.

    Args:
        importances: g by map, lower leaky. Masks carry their gradient.
        generator: On the same device.
    """
    masks = {}
    for path, g in importances.items():
        r = torch.rand(g.shape, generator=generator, device=g.device, dtype=g.dtype)
        masks[path] = g + (1 - g) * r
    return masks


def sampled_delta_masks(
    importances: Mapping[str, Float[Tensor, "*leading c"]], generator: torch.Generator
) -> dict[str, Float[Tensor, "*leading"]]:
    """Returns a mask drawn evenly from [0, 1) for each map's delta, as for a component of importance 0."""
    return {path: torch.rand(g.shape[:-1], generator=generator, device=g.device, dtype=g.dtype) for path, g in importances.items()}
