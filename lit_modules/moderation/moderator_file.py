"""moderator.safetensors: prototypes and mixtures, and all that is needed to apply them and to refuse what is not theirs."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from exactivations.datamodules.activations import ActivationDataModule
from exactivations.datamodules.label_files import column_of
from exactivations.lit_modules.extraction.run_description import versions
from exactivations.lit_modules.moderation.aggregations import Aggregations, template_of
from exactivations.lit_modules.moderation.layer_mixture import LayerMixture
from exactivations.lit_modules.moderation.moderation_results import ModerationResults
from exactivations.lit_modules.moderation.prototype_grid import METRICS, Mixture, PrototypeGrid
from exactivations.lit_modules.moderation.prototype_moderator import PrototypeModerator
from exactivations.lit_modules.moderation.prototypes import Prototypes
from exactivations.lit_modules.probes.probe_results import MAX_FPR
from exactivations.lit_modules.probes.saved_file import Saved, write_saved
from exactivations.lit_modules.probes.seen_samples import SEEN, SEEN_GROUPS, SeenSamples, group_hashes, token_hashes
from exactivations.store.described_file import read_described
from exactivations.store.errors import InvalidInputError
from exactivations.store.means_file import MODEL_ABOUT, at_points, refuse_another_origin
from exactivations.store.run_folder import fingerprint_of

KIND, COMMAND = "moderator", "moderate fit"
MODERATOR_FILE = f"{KIND}.safetensors"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class SavedModerator(Saved):
    """Prototypes and mixtures of one label.

    Attributes:
        path: The file they are in.
        content: What is known of them; also in moderator.json. Its identity is without the template, which is each vector's own.
        grid: The prototypes and mixtures.
        seen: uint8 [n, 16], the token hashes of the samples of train and validation, in each of its runs.
        seen_groups: uint8 [m, 16], hashes of the groups of train and validation; None if it was fitted without groups.
    """

    grid: PrototypeGrid
    seen: list[npt.NDArray[np.uint8]]
    seen_groups: npt.NDArray[np.uint8] | None

    @property
    def name(self) -> str:
        """Its label and its fingerprint."""
        return str(self.content["name"])

    @property
    def best(self) -> str:
        """What validation chose."""
        return str(self.content["best"])

    @property
    def group_column(self) -> str | None:
        """The column of which no value was in two parts; None if every sample went alone."""
        column: str | None = self.content["split"]["group_column"]
        return column

    def threshold_of(self, name: str) -> float | None:
        """Returns the log-odds above which at most 1 % of validation's negatives lie; None of more than two classes."""
        value = self.content["moderators"][name]["threshold"]
        return None if value is None else float(value)

    def seen_samples(self, source: Aggregations) -> SeenSamples:
        """Returns what it was made of or chosen on, of runs with the template of a source: others have other tokens."""
        template = template_of(source.sources[0].info)
        seen = [hashes for run, hashes in zip(self.content["runs"], self.seen, strict=True) if run["template"] == template]
        tokens = np.concatenate([np.empty((0, 16), dtype=np.uint8), *seen])
        return SeenSamples(self.name, tokens, self.seen_groups, self.group_column)

    def refuse_another(self, source: Aggregations, name: str) -> None:
        """Refuses activations that are not of this model, tokenizer and aggregation.

        Raises:
            InvalidInputError: If the source lacks a vector that `name` needs, or has it of another template, or of imported masks
                where the moderator was made of the runs' own, or the other way round.
            IdentityError: If model, tokenizer or dtype are others; every field that differs is named.
        """
        vectors = self.grid.vectors_of(name)
        absent = [vector for vector in vectors if vector not in source.per_token]
        if absent:
            raise InvalidInputError(
                f"{source.title} has no {absent[0]}, which {name} of {self.path} is made of ({len(absent)} of {len(vectors)} are "
                f"absent); it has {', '.join(source.per_token)}: extract the same hook points and aggregation"
            )
        for vector in vectors:
            then, now = self.content["vectors"][vector], source.place_of(vector)
            if then["template"] != now["template"]:
                raise InvalidInputError(
                    f"{vector} in {source.title} is of the template {now['template']!r}, and of {then['template']!r} in {self.path}"
                )
            if (then["masks"] is None) != (now["masks"] is None):
                of_now, of_then = ("the run's own" if place["masks"] is None else "imported" for place in (now, then))
                raise InvalidInputError(
                    f"{vector} in {source.title} is pooled under {of_now} masks, and under {of_then} ones in {self.path}: "
                    + ("import the masks of this run, and name them with --masks" if now["masks"] is None else "leave --masks out")
                )
        points = [self.content["vectors"][vector]["hook_point"] for vector in vectors]
        refuse_another_origin(at_points(self.identity, points), source.origin(vectors), source.title, str(self.path))


def fingerprint(moderator: PrototypeModerator, data: ActivationDataModule, source: Aggregations) -> str:
    """Returns a hash of all that decides a moderator, and of nothing else: the same run has it again at any time.

    It is of the model, tokenizer and hook points, the runs with their samples, templates and masks, labels, split and folds,
    metrics, the size of a step (None: whole vectors), and the versions of the packages.
    """
    labels = np.concatenate([data.targets(part)[0].numpy() for part in ("train", "validation", "test")])
    hashes = "".join(column_of(source, "token_hash").to_pylist())
    decides = {
        "format_version": FORMAT_VERSION,
        "identity": source.origin(data.names),
        "runs": source.runs,
        "samples": xxhash.xxh3_128((hashes + str(source.sample_index.tolist())).encode()).hexdigest(),
        "label": data.label,
        "classes": data.classes,
        "labels": xxhash.xxh3_128(labels.tobytes()).hexdigest(),
        "split": data.split.to_json(source.sample_index),
        "vectors": {name: source.place_of(name) for name in data.names},
        "metrics": moderator.metrics,
        "n_folds": moderator.n_folds,
        "strengths": list(moderator.strengths),
        "batch_size": data.batch_size,
        "versions": versions(),
    }
    return fingerprint_of(decides)


def save_moderator(
    folder: str | Path, moderator: PrototypeModerator, data: ActivationDataModule, source: Aggregations, results: ModerationResults
) -> SavedModerator:
    """Writes moderator.safetensors, the same as moderator.json for people, and split.json. The same run gives the same bytes."""
    grid, mark = moderator.grid, fingerprint(moderator, data, source)
    tensors: dict[str, Tensor] = {}
    for vector, made in grid.prototypes.items():
        tensors[f"{vector}//means"] = next(iter(made.values())).means
        tensors |= {f"{vector}//{metric}": p.factor for metric, p in made.items() if p.factor is not None}
    for name, mixture in grid.mixtures.items():
        tensors |= {f"{name}//weight": mixture.weights.weight, f"{name}//bias": mixture.weights.bias}
    seen = np.sort(np.concatenate([data.numbers("train"), data.numbers("validation")]))
    for number, one in enumerate(source.sources):
        tensors[f"{SEEN}//{number}"] = torch.from_numpy(token_hashes(one, seen))
    if data.group is not None:
        tensors[SEEN_GROUPS] = torch.from_numpy(group_hashes([*data.groups_of("train"), *data.groups_of("validation")]))
    info = source.sources[0].info
    content = {
        "name": f"{data.label}-{mark[:16]}",
        "fingerprint": mark,
        "label": data.label,
        "classes": data.classes,
        "best": moderator.chosen,
        "vectors": {name: source.place_of(name) for name in grid.prototypes},
        "metrics": moderator.metrics,
        "moderators": {
            name: {"validation_auroc": moderator.validation[name], "threshold": results.thresholds.get(name)} for name in grid.names
        },
        "mixtures": {
            name: {
                "vectors": mixture.vectors,
                "metric": mixture.metric,
                "layer_weights": dict(zip(mixture.vectors, mixture.weights.layer_weights.tolist(), strict=True)),
                "strength": mixture.weights.strength,
                "held_out_losses": [[c, loss] for c, loss in mixture.weights.losses.items()],
            }
            for name, mixture in grid.mixtures.items()
        },
        "n_folds": moderator.n_folds,
        "threshold_max_fpr": MAX_FPR,
        "split": {"group_column": data.group, "shares": list(data.shares), "seed": data.seed},
        "identity": source.origin(data.names),
        "about": {name: info.about.get(name) for name in MODEL_ABOUT},
        "runs": source.runs,
        "versions": versions(),
    }
    write_saved(folder, KIND, FORMAT_VERSION, content, tensors, data)
    return load_moderator(folder)


def load_moderator(path: str | Path) -> SavedModerator:
    """Reads a moderator, and every byte of it against its checksum.

    Raises:
        StoreError: If there is none, or it is of another version.
        CorruptShardError: If the file is damaged.
    """
    path, tensors, content = read_described(path, KIND, FORMAT_VERSION, COMMAND)
    n_classes = len(content["classes"])
    log_priors = torch.full((n_classes,), 1 / n_classes, dtype=torch.float64).log()
    prototypes: dict[str, dict[str, Prototypes]] = {}
    for vector in content["vectors"]:
        prototypes[vector] = {
            metric: Prototypes(tensors[f"{vector}//means"], log_priors, tensors.get(f"{vector}//{metric}"), METRICS[metric])
            for metric in content["metrics"]
        }
    mixtures = {
        name: Mixture(
            known["vectors"], known["metric"],
            LayerMixture(tensors[f"{name}//weight"], tensors[f"{name}//bias"], known["strength"], dict(known["held_out_losses"])),
        )
        for name, known in content["mixtures"].items()
    }  # fmt: skip
    seen = [tensors[f"{SEEN}//{number}"].numpy() for number in range(len(content["runs"]))]
    groups = tensors.get(SEEN_GROUPS)
    return SavedModerator(path, content, PrototypeGrid(prototypes, mixtures), seen, None if groups is None else groups.numpy())
