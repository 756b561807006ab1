"""The parts of `exactivations decompose` and `decompose-toy`: what is made, trained, measured and written."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from exactivations.callbacks.step_checkpoint import StepCheckpoint
from exactivations.datamodules.step_batches import ShuffledText, StepBatches, generator_at
from exactivations.datamodules.text import TextDataModule
from exactivations.lit_modules.decomposition.ci_function_file import write_ci_function
from exactivations.lit_modules.decomposition.component_file import write_components
from exactivations.lit_modules.decomposition.component_linear import singular_components, weight_of
from exactivations.lit_modules.decomposition.component_model import ComponentModel, maps_matching
from exactivations.lit_modules.decomposition.decomposition import Decomposition, Objective
from exactivations.lit_modules.decomposition.decomposition_evaluation import evaluate, largest_only, missing_of
from exactivations.lit_modules.decomposition.toy_superposition import recovery, sparse_features, train_toy_superposition
from exactivations.lit_modules.models.language_model import ModelOptions, load_causal_model
from exactivations.scripts.decompose_report import tell_model, tell_toys
from exactivations.scripts.trainers import trainer_on
from exactivations.store.errors import IdentityError, InvalidInputError
from exactivations.store.shard import write_text_atomically

FIGURES_FILE, CHECKPOINT_FILE = "figures.json", "checkpoint.ckpt"
EVALUATION_BATCHES = 16  # of a toy model

Figures = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """How a decomposition is trained; see `decompose`."""

    objective: Objective
    components: int
    steps: int
    learning_rate: float
    hidden: int
    seed: int

    def fit(
        self, model: torch.nn.Module, maps: Sequence[str], batches: StepBatches, machine: "Machine", folder: Path
    ) -> Decomposition:
        """Trains, from the folder's checkpoint on if there is one; the result is on the device of training."""
        if self.steps < 1:
            raise InvalidInputError(f"training takes at least 1 step, got {self.steps}")
        components = ComponentModel.from_random(model, maps, self.components, self.seed)
        decomposition = Decomposition(
            components, self.objective, learning_rate=self.learning_rate, n_hidden=self.hidden, seed=self.seed
        )
        checkpoint = folder / CHECKPOINT_FILE
        trainer = trainer_on(
            machine.accelerator, 1, max_steps=self.steps, logger=False, enable_progress_bar=sys.stderr.isatty(),
            callbacks=[StepCheckpoint(checkpoint, machine.save_every)],
        )  # fmt: skip
        started_before = checkpoint.exists()
        if started_before:
            print(f"going on from {checkpoint}", flush=True)
        trainer.fit(decomposition, datamodule=batches, ckpt_path=checkpoint if started_before else None, weights_only=True)
        return decomposition.to(trainer.strategy.root_device)  # Lightning puts it back on the host


@dataclass(frozen=True)
class Machine:
    """Where training runs, and what becomes of what is there: nothing that decides a result."""

    accelerator: str
    save_every: int
    overwrite: bool


@dataclass(frozen=True)
class Toy:
    """A toy model of superposition, and the size of its batches; see `decompose_toy`."""

    features: int
    dimensions: int
    hidden_identity: bool
    toy_batch_size: int
    toy_steps: int
    batch_size: int


def decompose_model(
    name: str, options: ModelOptions, data: TextDataModule, maps: list[str], held_out: int, training: Training, machine: Machine,
    folder: Path,
) -> None:  # fmt: skip
    """Decomposes a causal language model, and tells how that went."""
    data.setup()
    text = ShuffledText(data, training.seed, held_out)

    def figures() -> Figures:
        batches = StepBatches(text, text.identity)
        decomposition = training.fit(load_causal_model(name, options), maps, batches, machine, folder)
        components, device = decomposition.components, decomposition.device
        write_components(folder, components, {"model": name})
        write_ci_function(folder, decomposition.ci_function, components)
        unseen = [batch.to(device) for batch in text.held_out()]
        found = evaluate(components, decomposition.ci_function, unseen, "kl", seed=training.seed)
        n_kept = {path: max(1, math.ceil(alive)) for path, alive in found.alive.items()}
        singular = _svd(load_causal_model(name, options), maps, training.components).to(device)
        every = {path: of_map.n_components for path, of_map in singular.maps.items()}
        return {
            "trained": {**_plain(asdict(found)), "largest": largest_only(components, n_kept, unseen, "kl")},
            "svd": {
                "n_components": every,
                "missing": missing_of(singular),
                "all_components": largest_only(singular, every, unseen, "kl"),
                "largest": largest_only(singular, n_kept, unseen, "kl"),
            },
        }

    identity = {"model": name, **asdict(options), "maps": maps, **asdict(training), "data": text.identity}
    tell_model(_made(folder, identity, machine.overwrite, figures), folder)


def decompose_toys(toy: Toy, trainings: Sequence[Training], machine: Machine, folder: Path) -> None:
    """Decomposes a toy model for each training, and tells how well the components are the columns of W."""
    made = []
    for training in trainings:
        of_seed = folder / f"seed-{training.seed}"

        def figures(training: Training = training, of_seed: Path = of_seed) -> Figures:
            return _decompose_toy(toy, training, machine, of_seed)

        made.append(_made(of_seed, {**asdict(toy), **asdict(training)}, machine.overwrite, figures))
    tell_toys(toy.features, toy.dimensions, made)


def _decompose_toy(toy: Toy, training: Training, machine: Machine, folder: Path) -> Figures:
    print(f"seed {training.seed}: training the toy model", flush=True)
    model = train_toy_superposition(
        toy.features, toy.dimensions, seed=training.seed, batch_size=toy.toy_batch_size, steps=toy.toy_steps,
        hidden_identity=toy.hidden_identity,
    )  # fmt: skip
    columns = weight_of(model.linear1).detach().clone()

    def batch_of(step: int) -> Tensor:
        return sparse_features(toy.batch_size, toy.features, generator_at("features", training.seed, step))

    batches = StepBatches(batch_of, {**asdict(toy), "seed": training.seed})
    decomposition = training.fit(model, ["*"], batches, machine, folder)
    components = decomposition.components
    write_components(folder, components, {"model": f"a toy of {toy.features} features in {toy.dimensions} dimensions"})
    write_ci_function(folder, decomposition.ci_function, components)
    unseen = [batch_of(training.steps + step).to(decomposition.device) for step in range(EVALUATION_BATCHES)]
    found = evaluate(components, decomposition.ci_function, unseen, "mse", seed=training.seed)
    linear1, alive = components.maps["linear1"], found.ever_alive["linear1"]
    v, u = linear1.V.detach().cpu(), linear1.U.detach().cpu()
    return {
        "recovery": asdict(recovery(columns, v, u, alive)),
        "recovery_by_all": asdict(recovery(columns, v, u, torch.ones_like(alive))),
        "trained": _plain(asdict(found)),
    }


def _made(folder: Path, options: dict[str, Any], overwrite: bool, make: Callable[[], Figures]) -> Figures:
    """Returns the figures that are in a folder, or makes and writes them.

    Raises:
        IdentityError: If those in the folder were made otherwise.
    """
    file, checkpoint = folder / FIGURES_FILE, folder / CHECKPOINT_FILE
    if overwrite:
        file.unlink(missing_ok=True)
        checkpoint.unlink(missing_ok=True)
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = {"options": options, **make()}
        write_text_atomically(file, json.dumps(made, indent=1) + "\n")
        checkpoint.unlink(missing_ok=True)
    saved: Figures = json.loads(file.read_text())
    asked = json.loads(json.dumps(options))
    differing = [name for name in asked if saved["options"].get(name) != asked[name]]
    if differing:
        name = differing[0]
        raise IdentityError(
            f"{folder} holds a decomposition with {name} {saved['options'].get(name)}, and {asked[name]} was asked for: name "
            "another folder with --out, or pass --overwrite"
        )
    return saved


def _svd(model: PreTrainedModel, maps: Sequence[str], n_components: int) -> ComponentModel:
    """Returns a model with so many singular components of each map, or all if it has fewer."""
    found = {path: weight_of(linear) for path, linear in maps_matching(model, maps).items()}
    return ComponentModel(
        model, {path: singular_components(weight, min(n_components, *weight.shape)) for path, weight in found.items()}
    )


def _plain(figures: dict[str, Any]) -> Figures:
    """Returns figures with the numbers of components that are ever alive in the place of masks."""
    ever = {path: int(mask.sum()) for path, mask in figures["ever_alive"].items()}
    return {**figures, "ever_alive": ever, "n_components": {path: len(mask) for path, mask in figures["ever_alive"].items()}}
