"""Decomposition: the LightningModule that trains components and their causal importances."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from jaxtyping import Float
from torch import Tensor

from exactivations.datamodules.step_batches import generator_at
from exactivations.lit_modules.decomposition.causal_importance import (
    CausalImportanceFunction,
    lower_leaky_hard_sigmoid,
    upper_leaky_hard_sigmoid,
)
from exactivations.lit_modules.decomposition.component_model import ComponentModel
from exactivations.lit_modules.decomposition.decomposition_losses import (
    Divergence,
    divergence,
    faithfulness,
    importance_minimality,
    sampled_delta_masks,
    sampled_masks,
)
from exactivations.lit_modules.models.language_model import outputs_of
from exactivations.store.errors import IdentityError, InvalidInputError

CLEARLY_ALIVE = 0.1
"""A component counts as alive where its causal importance is above this."""


@dataclass(frozen=True)
class Objective:
    """What is minimised: a weighted sum of losses, see `decomposition_losses`.

    Attributes:
        kind: How outputs are compared: "mse", or "kl" of logits.
        minimality: Weight of importance minimality.
        p: Its exponent.
        faithfulness: Weight of faithfulness. With deltas 0 will do: what is missing is then masked like a component of
            importance 0.
        stochastic: Weight of the reconstruction with the masks of all maps at once.
        layerwise: Weight of its mean over maps, with the masks of one map at a time.
        use_delta: Whether each map also has its weight minus the sum of its components, randomly masked.

    Raises:
        InvalidInputError: If a number is out of range.
    """

    kind: Divergence
    minimality: float
    p: float
    faithfulness: float = 0.0
    stochastic: float = 1.0
    layerwise: float = 1.0
    use_delta: bool = True

    def __post_init__(self) -> None:
        if self.kind not in get_args(Divergence):
            raise InvalidInputError(f"outputs are compared by {' or '.join(get_args(Divergence))}, got {self.kind!r}")
        weights = (self.minimality, self.faithfulness, self.stochastic, self.layerwise)
        if min(weights) < 0 or self.stochastic + self.layerwise == 0 or self.p <= 0:
            raise InvalidInputError(
                "weights of losses must be 0 or more, one of stochastic and layerwise above 0, and p above 0; got minimality "
                f"{self.minimality}, faithfulness {self.faithfulness}, stochastic {self.stochastic}, layerwise {self.layerwise}, "
                f"p {self.p}"
            )
        if not self.use_delta and self.faithfulness == 0:
            raise InvalidInputError(
                "without deltas nothing makes components sum to the weights: give faithfulness a weight above 0"
            )


class Decomposition(pl.LightningModule):
    """Trains components to be few at a time: stochastic parameter decomposition (arXiv 2506.20790).

    Every step takes what the model itself does on a batch, predicts the causal importance of each component at each position, masks
    components at random between its importance and 1, and asks for the same output; importances are asked to be small. Adam, its
    learning rate falling to 0 by half a cosine over the trainer's max_steps. Before that, components are fitted to the weights
    alone (AdamW, learning rate 0.01 and weight decay 0.1, as in the authors' published configurations).

    A step's masks depend on the seed and the step's number alone, so that training that is resumed goes on bit for bit. One device.

    Args:
        components: The model and its components, which are trained in place; the model itself is left alone.
        objective: What is minimised.
        learning_rate: Of Adam, at first.
        n_hidden: Hidden units of each component's causal-importance MLP.
        fitting_steps: Steps of the fit to the weights; 0 leaves it out.
        seed: Of the masks, and of the start of the causal-importance function.

    Raises:
        InvalidInputError: If an option is out of range, or the model is in half precision.
    """

    def __init__(
        self,
        components: ComponentModel,
        objective: Objective,
        *,
        learning_rate: float = 1e-3,
        n_hidden: int = 16,
        fitting_steps: int = 200,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if learning_rate <= 0 or fitting_steps < 0 or seed < 0:
            raise InvalidInputError(
                f"learning_rate must be above 0, fitting_steps and seed 0 or more; got {learning_rate}, {fitting_steps} and {seed}"
            )
        some = next(iter(components.maps.values())).V
        if some.dtype not in (torch.float32, torch.float64):
            raise InvalidInputError(f"components are trained in float32 or float64, these are {some.dtype}: load the model so")
        self.components, self.objective, self.seed = components, objective, seed
        self.learning_rate, self.fitting_steps = learning_rate, fitting_steps
        n_components = {path: of_map.n_components for path, of_map in components.maps.items()}
        self.ci_function = CausalImportanceFunction(n_components, n_hidden, seed=seed).to(some)
        self.strict_loading = False  # checkpoints hold what is trained, and not the model
        self._is_resumed = False

    def setup(self, stage: str) -> None:
        """Refuses what the random masks are not made for."""
        if self.trainer.world_size > 1:
            raise InvalidInputError(f"a decomposition is trained on one device, got {self.trainer.world_size}: use devices=1")

    def on_fit_start(self) -> None:
        """Fits the components to the weights, unless they came with a checkpoint."""
        if self._is_resumed or not self.fitting_steps:
            return
        trained = [parameter for of_map in self.components.maps.values() for parameter in (of_map.V, of_map.U)]
        optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
        for _ in range(self.fitting_steps):
            optimizer.zero_grad()
            torch.autograd.backward(self._faithfulness())
            optimizer.step()
        optimizer.zero_grad()

    def on_train_start(self) -> None:
        """Switches dropout off: the model itself is the measure of everything."""
        self.components.train(False)

    def training_step(self, batch: Tensor, batch_idx: int = 0) -> Tensor:
        """Returns the weighted sum of the losses of a batch."""
        objective, generator = self.objective, generator_at("masks", self.seed, self.global_step, device=self.device)
        target, raw = raw_importances(self.components, self.ci_function, batch)
        lower = {path: lower_leaky_hard_sigmoid(values) for path, values in raw.items()}
        upper = {path: upper_leaky_hard_sigmoid(values) for path, values in raw.items()}
        losses = {
            "minimality": importance_minimality(upper, objective.p),
            "faithfulness": self._faithfulness(),
            "stochastic": self._reconstruction(batch, target, lower, generator),
            "layerwise": torch.stack(
                [self._reconstruction(batch, target, {path: g}, generator) for path, g in lower.items()]
            ).mean(),
        }
        total = torch.stack([getattr(objective, name) * loss for name, loss in losses.items()]).sum()
        alive = {f"L0/{path}": (values > CLEARLY_ALIVE).sum(-1).float().mean() for path, values in raw.items()}
        self.log_dict({**losses, "L0": torch.stack([*alive.values()]).mean()}, prog_bar=True, batch_size=len(batch))
        self.log_dict(alive, batch_size=len(batch))
        return total

    def _faithfulness(self) -> Float[Tensor, ""]:
        return faithfulness(of_map.delta() for of_map in self.components.maps.values())

    def _reconstruction(
        self, batch: Tensor, target: Tensor, importances: Mapping[str, Float[Tensor, "*leading c"]], generator: torch.Generator
    ) -> Float[Tensor, ""]:
        masks = sampled_masks(importances, generator)
        deltas = sampled_delta_masks(importances, generator) if self.objective.use_delta else None
        with self.components.masked(masks, deltas):
            return divergence(outputs_of(self.components.model, batch), target, self.objective.kind)

    def configure_optimizers(self) -> Any:
        """Adam, its rate falling to 0 over all steps."""
        if self.trainer.max_steps < 1:
            raise InvalidInputError("the learning rate falls until training ends: give the trainer max_steps")
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the model out, and adds what is decomposed and how."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in trained}
        checkpoint["decomposition"] = self._identity()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Holds a checkpoint against what is decomposed here.

        Raises:
            IdentityError: If it is of another decomposition.
        """
        for what, mine in self._identity().items():
            found = checkpoint["decomposition"].get(what)
            if found != mine:
                raise IdentityError(f"the checkpoint is of another decomposition: its {what} is {found}, and here {mine}")
        self._is_resumed = True

    def _identity(self) -> dict[str, Any]:
        return {
            **asdict(self.objective), "model": self.components.original_hash, "n_components": self.ci_function.n_components,
            "n_hidden": self.ci_function.n_hidden, "learning_rate": self.learning_rate, "fitting_steps": self.fitting_steps,
            "max_steps": self.trainer.max_steps, "seed": self.seed,
        }  # fmt: skip


def raw_importances(
    components: ComponentModel, ci_function: CausalImportanceFunction, batch: Tensor
) -> tuple[Tensor, dict[str, Float[Tensor, "*leading c"]]]:
    """Returns what the model itself makes of a batch, without gradient, and the causal importances before the sigmoid, with it."""
    with components.inner_activations() as inner:
        target = outputs_of(components.model, batch).detach()
    return target, ci_function(inner)
