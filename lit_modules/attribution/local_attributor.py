"""LocalAttributor: which components feed which others on one prompt, for many sets of causal importances at once."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import lightning.pytorch as pl
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from exactivations.datamodules.ci_prompts import CiPrompt
from exactivations.lit_modules.attribution.attribution_batch import Alive, AttributionBatch
from exactivations.lit_modules.attribution.attribution_paths import Paths, find_paths
from exactivations.lit_modules.attribution.component_cut import causal_model, cut_pass, eager_attention, logits
from exactivations.lit_modules.attribution.row_attributions import PairValues, Writers, attribute_rows
from exactivations.lit_modules.decomposition.component_model import ComponentModel
from exactivations.lit_modules.models.language_model import evaluating
from exactivations.store.attributions import OUTPUT, WTE, Attributions, Made, PairAttribution, Prediction, edge_places
from exactivations.store.errors import InvalidInputError


@dataclass(frozen=True)
class AttributionOptions:
    """How attributions are made.

    Attributes:
        ci_threshold: Components of at least this causal importance are alive.
        output_threshold: Token ids of at least this probability are alive; probabilities are those of the model with components
            times causal importances.
        unmasked: Take gradients in the untouched model, all of whose components (and what these lack) are there, instead of in the
            model with components times causal importances. One graph then serves all sets of a prompt.
        memory_mib: About what gradients computed at a time may take. Results and the forward pass come on top.
    """

    ci_threshold: float = 1e-6
    output_threshold: float = 0.1
    unmasked: bool = False
    memory_mib: float = 64.0

    def __post_init__(self) -> None:
        for name in ("ci_threshold", "output_threshold"):
            if not 0 < getattr(self, name) <= 1:
                raise InvalidInputError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")
        if not self.memory_mib > 0:
            raise InvalidInputError(f"memory_mib must be above 0, got {self.memory_mib}")


class LocalAttributor(pl.LightningModule):
    """Attributes alive components of every layer to those of the layers with direct paths to it.

    With a Trainer: `trainer.predict(attributor, datamodule=CiPromptDataModule(…), return_predictions=False)` and a callback that
    keeps what `on_predict_batch_end` is given (`AttributionWriter`). Without: `attributor(prompts)`. All prompts of a batch have
    one length; each of their sets is a row of one forward pass, and gradients are taken for all rows together. What a set's
    attributions are depends on no other set, up to the last bits of matrix products with more rows.

    Args:
        components: The decomposed model, a causal language model with its head, in float32 or float64.
        name: What the model is called.
        options: How.
        decode: From a token id to its text.

    Raises:
        InvalidInputError: When called, if sets and model do not fit each other, or the model is not causal.

    Source: goodfire-ai/spd, calc_local_attributions; arXiv 2506.20790.
    """

    def __init__(
        self,
        components: ComponentModel,
        name: str,
        options: AttributionOptions | None = None,
        *,
        decode: Callable[[int], str] = str,
    ) -> None:
        super().__init__()
        self.components = components
        self.options = options or AttributionOptions()
        self._name = name
        self._decode = decode
        if causal_model(components).dtype not in (torch.float32, torch.float64):
            raise InvalidInputError(f"{name} is in {causal_model(components).dtype}: load it in float32, gradients need the digits")

    @cached_property
    def paths(self) -> list[Paths]:
        """Which layers have direct paths to which; probed when first asked for."""
        return find_paths(self.components)

    def setup(self, stage: str) -> None:
        """Refuses a Trainer that would change dtypes."""
        if str(self.trainer.precision) != "32-true":
            raise InvalidInputError(f"Trainer(precision={self.trainer.precision!r}) would round gradients: leave it at '32-true'")

    def predict_step(self, batch: list[CiPrompt], batch_idx: int = 0) -> list[Attributions]:
        """Returns `self(batch)`."""
        out: list[Attributions] = self(batch)
        return out

    def forward(self, prompts: Sequence[CiPrompt]) -> list[Attributions]:
        """Attributes for every set of every prompt, which all have one length: one result for each prompt.

        Warns of sets in which nothing is alive, and of those with which the model does not predict what it predicts without them:
        their attributions explain another output.

        Raises:
            InvalidInputError: If lengths differ, or sets do not fit the model.
        """
        for prompt in prompts:
            self._check_fits(prompt, len(prompts[0].token_ids))
        # Lightning predicts in inference mode, in which there are no gradients and whose tensors may not be kept for any.
        with torch.inference_mode(False), eager_attention(causal_model(self.components)):
            return self._attribute(AttributionBatch.of(prompts, self.components))

    def _check_fits(self, prompt: CiPrompt, length: int) -> None:
        where = f"{prompt.file}: " if prompt.file else ""
        if len(prompt.token_ids) != length:
            raise InvalidInputError(f"{where}{len(prompt.token_ids)} tokens beside {length}: prompts of a batch have one length")
        first, maps = repr(prompt.sets.names[0]), self.components.maps
        for layer, values in prompt.sets.values.items():
            if layer not in maps:
                raise InvalidInputError(f"{where}set {first} has layer {layer!r}, which is none of the maps: {', '.join(maps)}")
            if values.shape[-1] != maps[layer].n_components:
                raise InvalidInputError(
                    f"{where}set {first}, layer {layer!r}, position 0: {values.shape[-1]} components, the map has "
                    f"{maps[layer].n_components}"
                )
        missing = [path for path in maps if path not in prompt.sets.values]
        if missing:
            raise InvalidInputError(f"{where}set {first} lacks layer {missing[0]!r}, a map of the model")

    def _attribute(self, batch: AttributionBatch) -> list[Attributions]:
        threshold = self.options.output_threshold
        paths = self.paths  # before anything else runs: maps that cannot be attributed to are refused there
        probabilities, original = self._probabilities(batch)
        alive = self._alive(batch.importances, probabilities)
        pairs = self._values(batch, paths, batch.any_set(alive) if self.options.unmasked else alive)
        alive = self._alive(batch.all_importances, probabilities.cpu())
        in_any = batch.any_set(alive) if self.options.unmasked else {}
        original_alive, probabilities = (original >= threshold).cpu(), probabilities.float().cpu()
        original_last = original[:, -1].float().cpu()
        made = Made(self._name, self.options.ci_threshold, threshold, self.options.unmasked)
        results = []
        for p, (prompt, rows) in enumerate(zip(batch.prompts, batch.rows_of, strict=True)):
            of_sets = {name: _of_row(alive, row) for name, row in zip(prompt.sets.names, rows, strict=True)}
            of_model = {OUTPUT: original_alive[p]}
            if prompt.own is not None:
                of_model |= {path: of_sets[prompt.own][path] for path in batch.maps}
            if self.options.unmasked:
                values = [_restricted(pair, p, in_any, list(of_sets.values())) for pair in pairs]
            else:
                values = [[pair.rows[row] for row in rows] for pair in pairs]
            by_set = {}
            for (name, of_set), of_pairs in zip(of_sets.items(), zip(*values, strict=True), strict=True):
                by_set[name] = _pairs_of_set(pairs, of_pairs, of_set, of_model)
                _warn_of_nothing(prompt, name, of_set, by_set[name])
            predictions = {
                name: self._prediction(original_last[p], probabilities[row, -1])
                for name, row in zip(prompt.sets.names, rows, strict=True)
            }
            outputs = torch.cat([alive[OUTPUT][rows], original_alive[p : p + 1]]).nonzero()[:, -1].unique().tolist()  # type: ignore[no-untyped-call]
            ids = prompt.token_ids.tolist()
            result = Attributions(
                replace(made, own=prompt.own),
                prompt.sets.prompt,
                tuple(map(self._decode, ids)),
                tuple(ids),
                by_set,
                probabilities[rows],
                of_sets,
                of_model,
                {token: self._decode(token) for token in outputs},
                predictions,
            )
            for name, fault in result.faults.items():
                warnings.warn(f"set {name!r} of {prompt.sets.prompt!r}: {fault}", stacklevel=2)
            results.append(result)
        return results

    def _prediction(self, original: Float[Tensor, " v"], of_set: Float[Tensor, " v"]) -> Prediction:
        """Returns what is predicted, from the probabilities at the last position."""
        token, top = int(original.argmax()), int(of_set.argmax())
        return Prediction(
            token, self._decode(token), original[token].item(), of_set[token].item(),
            top, self._decode(top), of_set[top].item(),
        )  # fmt: skip

    def _alive(self, importances: Mapping[str, Tensor], probabilities: Float[Tensor, "r l v"]) -> Alive:
        """Returns what is alive in each row, layers in the model's order."""
        return {
            WTE: torch.ones(*probabilities.shape[:2], 1, dtype=torch.bool, device=probabilities.device),
            **{path: values >= self.options.ci_threshold for path, values in importances.items()},
            OUTPUT: probabilities >= self.options.output_threshold,
        }

    @torch.no_grad()
    def _probabilities(self, batch: AttributionBatch) -> tuple[Float[Tensor, "r l v"], Float[Tensor, "p l v"]]:
        """Returns those of the rows with their masks, and those of the prompts in the untouched model."""
        model = causal_model(self.components)
        with evaluating(model):
            with self.components.running({path: partial(m.masked, mask=batch.masks[path]) for path, m in batch.maps.items()}):
                of_rows = logits(model, batch.rows).softmax(-1)
            return of_rows, logits(model, batch.ids).softmax(-1)

    def _values(self, batch: AttributionBatch, paths: Sequence[Paths], alive: Alive) -> list[PairValues]:
        """Returns the attributions of all pairs; of the untouched model with a row for each prompt, and else for each set."""
        output_ids = alive[OUTPUT].nonzero()[:, -1].unique()  # type: ignore[no-untyped-call]
        alive = {**alive, OUTPUT: alive[OUTPUT][..., output_ids]}
        if self.options.unmasked:
            passed = cut_pass(self.components, batch.ids, batch.maps, None, output_ids)
            scales = passed.inner
        else:
            passed = cut_pass(self.components, batch.rows, batch.maps, batch.masks, output_ids)
            scales = {path: inner * batch.masks[path] for path, inner in passed.inner.items()}
        maps = batch.maps
        writers = {path: Writers.of(maps[path].U.detach(), scales[path], alive[path]) for path in maps}
        writers[WTE] = Writers.of_embedding(passed.starts[WTE].detach())
        found = []
        for to in tqdm(paths, desc="attributing", unit=" layers", leave=False, disable=not sys.stderr.isatty()):
            reads = None if to.target == OUTPUT else maps[to.target].V.detach().T
            found += attribute_rows(passed, to, writers, reads, alive[to.target], self.options.memory_mib)
        return found


def _of_row(by_layer: Alive, row: int) -> Alive:
    """Returns one row of each tensor."""
    return {layer: values[row] for layer, values in by_layer.items()}


def _pairs_of_set(pairs: Sequence[PairValues], values: Sequence[Tensor], alive: Alive, of_model: Alive) -> list[PairAttribution]:
    """Returns the pairs of one set, of the layers in which it has something alive."""
    there = {layer for layer, of in alive.items() if of.any()}
    return [
        PairAttribution.between(pair.source, pair.target, of_pair, pair.over_positions, alive, of_model)
        for pair, of_pair in zip(pairs, values, strict=True)
        if there >= {pair.source, pair.target}
    ]


def _restricted(pair: PairValues, row: int, in_any: Alive, sets: Sequence[Alive]) -> list[Tensor]:
    """Returns a row's values for each of its sets: those of edges between what is alive in the set."""
    s_in, c_in, s_out, c_out = edge_places(in_any[pair.source][row], in_any[pair.target][row], pair.over_positions).T
    return [pair.rows[row][alive[pair.source][s_in, c_in] & alive[pair.target][s_out, c_out]] for alive in sets]


def _warn_of_nothing(prompt: CiPrompt, name: str, of_set: Alive, pairs: Sequence[PairAttribution]) -> None:
    if not any(alive.any() for layer, alive in of_set.items() if layer not in (WTE, OUTPUT)):
        left = f"only {', '.join(f'{pair.source} -> {pair.target}' for pair in pairs)} is left" if pairs else "its result is empty"
        warnings.warn(f"set {name!r} of {prompt.sets.prompt!r}: no component is alive at any position; {left}", stacklevel=2)
