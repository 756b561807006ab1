"""CiOptimisation: sets of causal importances for one prompt, several seeds in one batch, each as if it were alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from exactivations.lit_modules.decomposition.causal_importance import (
    hard_sigmoid,
    hard_sigmoid_with_lower_leaky_gradient,
    upper_leaky_hard_sigmoid,
)
from exactivations.lit_modules.decomposition.component_model import ComponentModel
from exactivations.lit_modules.decomposition.decomposition_losses import importance_minimality
from exactivations.lit_modules.decomposition.optimised_sets import CiOptions, OptimisedSet
from exactivations.lit_modules.models.language_model import evaluating, has_head, outputs_of
from exactivations.store.errors import InvalidInputError

ALIVE_AT_ALL = 1e-6
"""A component takes part, and is counted, from this causal importance on: what attributions too take for alive by default."""
LOWEST_START = 0.5
DRAWS = 32  # of the stochastic masks that a finished set is judged by


class CiOptimisation(pl.LightningModule):
    """Causal importances for one prompt: as few components as still make the model predict one token.

    `pl.Trainer(max_epochs=1, …).fit(module)`, then `importances()` and `optimised`. AdamW works on values before the sigmoid,
    [N, …], one row for each seed. Rows never meet: the model's rows do not, each row's masks come from a generator of its own, the
    losses are summed, and AdamW works on each number by itself. What a seed gives does not depend on the seeds beside it, up to the
    last bits of matrix products with more rows.

    The loss of a row is the cross-entropy of the target at the last position, plus coefficient * (sum over maps and components of
    (upper leaky importance) ** p, as a mean over positions). Masks are made of `hard_sigmoid_with_lower_leaky_gradient`.

    Args:
        model: The decomposed model. Its weights are left as they are.
        input_ids: int64 [L], the prompt.
        seeds: One set for each.
        options: How.
        target: Id of the token to predict; None: what the original model holds likeliest.
        own: The model's own causal importances before the sigmoid, [L, C] by map: optimisation starts there, and only with
            components that are alive (hard sigmoid at least 1e-6), where they are; all others stay 0. None: all components
            take part, and start evenly drawn from [0.5, 1).

    Raises:
        InvalidInputError: If there is no seed or one twice, no prompt, or target or own do not fit the model; or if there are
            several seeds for which nothing is random: with own, and the importances themselves as masks.

    Source: goodfire-ai/spd, optim_cis; masks and losses of arXiv 2506.20790.
    """

    def __init__(
        self,
        model: ComponentModel,
        input_ids: Int64[Tensor, " l"],
        seeds: Sequence[int],
        options: CiOptions | None = None,
        *,
        target: int | None = None,
        own: Mapping[str, Float[Tensor, "l c"]] | None = None,
    ) -> None:
        super().__init__()
        if not seeds or len(set(seeds)) != len(seeds) or not all(0 <= seed < 1 << 63 for seed in seeds):
            raise InvalidInputError(f"seeds must be numbers from 0 to 2^63 - 1, each given once, got {list(seeds)}")
        if input_ids.ndim != 1 or not len(input_ids):
            raise InvalidInputError(f"the prompt must be token ids [L] with L at least 1, got {list(input_ids.shape)}")
        self.options, self.seeds = options or CiOptions(), tuple(seeds)
        if not isinstance(model.model, PreTrainedModel) or not has_head(model.model):
            raise InvalidInputError(
                f"{type(model.model).__name__} predicts no tokens: "
                "causal importances are optimised for the next token of a causal language model"
            )
        if own is not None and self.options.masks == "ci" and len(seeds) > 1:
            raise InvalidInputError(
                f"{len(seeds)} seeds would all give one set: it starts from the model's own causal importances, and masks 'ci' are "
                "the importances themselves, so that nothing is random; give one seed, or masks 'stochastic'"
            )
        self._models, self._input_ids = (model, model.model), input_ids  # in a tuple, out of the module tree
        self._shapes = {path: (len(input_ids), of_map.n_components) for path, of_map in model.maps.items()}
        with torch.no_grad():
            logits = self._logits(input_ids[None])[0]
        self.target = int(logits.argmax()) if target is None else target
        if not 0 <= self.target < len(logits):
            raise InvalidInputError(f"the target must be a token id from 0 to {len(logits) - 1}, got {self.target}")
        self.own_probability = float(logits.softmax(-1)[self.target])
        """Of the target, by the original model."""
        flat, self._taking_part = self._start(own)
        starts = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        if own is None:
            drawn = torch.stack([torch.rand(flat.shape, generator=generator, dtype=flat.dtype) for generator in starts])
            flat = LOWEST_START + (1 - LOWEST_START) * drawn
        # Masks have seeds of their own, so that they do not repeat what starting values were made of.
        self._mask_seeds = [int(torch.randint(1 << 62, (), generator=generator)) for generator in starts]
        self.before_sigmoid = nn.Parameter(flat.expand(len(self.seeds), -1)[:, self._taking_part].clone())
        """float [N, components that take part at a position], in the order of the maps, then positions."""
        self.optimised: list[OptimisedSet] = []
        """Filled by a fit, one for each seed."""

    @property
    def model(self) -> ComponentModel:
        """The decomposed model."""
        return self._models[0]

    @property
    def _value_dtype(self) -> torch.dtype:
        """Of the values: steps of AdamW are lost in half precision."""
        return torch.promote_types(self._whole.dtype, torch.float32)

    @property
    def _whole(self) -> PreTrainedModel:
        return self._models[1]

    def _start(self, own: Mapping[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Returns the own values of all maps in one row, and the places of those that take part.

        Raises:
            InvalidInputError: If own is of other maps or shapes, or nothing of it is alive.
        """
        if own is None:
            return torch.zeros(sum(self._sizes), dtype=self._value_dtype), torch.arange(sum(self._sizes))
        found = {path: tuple(values.shape) for path, values in own.items()}
        if found != self._shapes:
            wrong = next(path for path in {**self._shapes, **found} if found.get(path) != self._shapes.get(path))
            raise InvalidInputError(
                f"the model's own causal importances do not fit it: {wrong} has {found.get(wrong)}, expected "
                f"{self._shapes.get(wrong)}"
            )
        flat = torch.cat([own[path].detach().to("cpu", self._value_dtype).flatten() for path in self._shapes])
        alive = (hard_sigmoid(flat) >= ALIVE_AT_ALL).nonzero()[:, 0]
        if not len(alive):
            raise InvalidInputError("nothing is alive in the model's own causal importances: there is nothing to optimise")
        return flat, alive

    def setup(self, stage: str) -> None:
        """Moves the model, and refuses what would let one seed feel another."""
        trainer = self.trainer
        if trainer.gradient_clip_val is not None or trainer.precision != "32-true" or trainer.world_size > 1:
            raise InvalidInputError(
                "seeds are optimised apart, on one device, in the model's dtype: leave the trainer's precision and "
                f"gradient_clip_val as they are by default, and devices at 1; got {trainer.precision}, {trainer.gradient_clip_val} "
                f"and {trainer.world_size}"
            )
        self.model.to(self.device)

    def on_fit_start(self) -> None:
        """Begins the masks of every seed."""
        self._generators = self._mask_generators()

    def _mask_generators(self) -> list[torch.Generator]:
        return [torch.Generator(self.device).manual_seed(seed) for seed in self._mask_seeds]

    def train_dataloader(self) -> DataLoader[int]:
        """Returns the numbers of the steps."""
        return DataLoader(range(self.options.steps), batch_size=None)  # type: ignore[arg-type]  # a range is a map-style dataset

    def training_step(self, batch: Tensor, batch_idx: int = 0) -> Tensor:
        """Returns the sum of all rows' losses."""
        values = self._values()
        generators = self._generators if self.options.masks == "stochastic" else None
        entropy = self._cross_entropy(hard_sigmoid_with_lower_leaky_gradient(values), generators)
        minimality = self._minimality(values)
        self.log("cross-entropy", entropy.detach().mean(), prog_bar=True)
        self.log("minimality", minimality.detach().mean(), prog_bar=True)
        return (entropy + self.options.coefficient * minimality).sum()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Fills the gradient of the values alone: those of the model's weights are nobody's business here."""
        loss.backward(inputs=[self.before_sigmoid])  # type: ignore[no-untyped-call]  # likewise

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, as in goodfire-ai/spd."""
        return torch.optim.AdamW([self.before_sigmoid], lr=self.options.learning_rate, weight_decay=0.0)

    def importances(self) -> dict[str, Float[Tensor, "n l c"]]:
        """Returns the causal importances in [0, 1] as they are now, on the host, by map; row n is of the nth seed."""
        return self._by_map(hard_sigmoid(self._values().detach()).cpu())

    def on_train_end(self) -> None:
        """Judges the sets while the model is where it was run."""
        self.optimised = self.judged()

    @torch.no_grad()
    def judged(self) -> list[OptimisedSet]:
        """Returns what the sets are worth as they are now; masks are drawn anew from the seeds, so that it is always the same."""
        values, options = self._values(), self.options
        g, generators = hard_sigmoid(values), self._mask_generators()
        with_ci = self._cross_entropy(g, None)
        stochastic = torch.stack([self._cross_entropy(g, generators) for _ in range(DRAWS)])
        minimality = self._minimality(values)
        losses = (stochastic.mean(0) if options.masks == "stochastic" else with_ci) + options.coefficient * minimality
        probability, of_stochastic = (-with_ci).exp(), (-stochastic).exp().mean(0)
        alive = {path: (of_map >= ALIVE_AT_ALL).sum((1, 2)) for path, of_map in self._by_map(g).items()}
        return [
            OptimisedSet(
                seed, float(losses[row]), float(minimality[row]), float(probability[row]), float(of_stochastic[row]),
                {path: int(counts[row]) for path, counts in alive.items()},
            )
            for row, seed in enumerate(self.seeds)
        ]  # fmt: skip

    def _values(self) -> Float[Tensor, "n p"]:
        """Returns the values of all maps, in their order, each by positions, then components; 0 where one takes no part."""
        values: Tensor = self.before_sigmoid.new_zeros(len(self.seeds), sum(self._sizes))
        return values.index_copy(1, self._taking_part.to(values.device), self.before_sigmoid)

    @property
    def _sizes(self) -> list[int]:
        return [length * n_components for length, n_components in self._shapes.values()]

    def _by_map(self, flat: Float[Tensor, "n p"]) -> dict[str, Float[Tensor, "n l c"]]:
        parts = zip(self._shapes.items(), torch.split(flat, self._sizes, dim=1), strict=True)
        return {path: part.reshape(len(flat), *shape) for (path, shape), part in parts}

    def _minimality(self, values: Float[Tensor, "n p"]) -> Float[Tensor, " n"]:
        upper = upper_leaky_hard_sigmoid(values)
        return torch.stack([importance_minimality({"": row}, self.options.p) for row in upper]) / len(self._input_ids)

    def _cross_entropy(self, g: Float[Tensor, "n p"], generators: Sequence[torch.Generator] | None) -> Float[Tensor, " n"]:
        """Returns the target's, with stochastic masks of these generators, or without any with g as masks and no delta."""
        n, dtype, deltas = len(g), self._whole.dtype, dict[str, Tensor]()
        if generators is not None:
            shapes = (g.shape[1],), (len(self._shapes), len(self._input_ids))
            drawn = [[torch.rand(shape, generator=one, device=g.device, dtype=g.dtype) for shape in shapes] for one in generators]
            of_components, of_deltas = (torch.stack(rows) for rows in zip(*drawn, strict=True))
            g = g + (1 - g) * of_components
            deltas = dict(zip(self._shapes, of_deltas.to(dtype).unbind(1), strict=True))
        with self.model.masked(self._by_map(g.to(dtype)), deltas):
            logits = self._logits(self._input_ids.to(g.device).expand(n, -1))
        return functional.cross_entropy(logits, torch.full((n,), self.target, device=g.device), reduction="none")

    def _logits(self, input_ids: Int64[Tensor, "n l"]) -> Float[Tensor, "n v"]:
        with evaluating(self._whole):
            return outputs_of(self._whole, input_ids)[:, -1].to(self._value_dtype)
