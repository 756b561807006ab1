"""probes.safetensors: chosen probes with all that is needed to score other texts by them, and to refuse another model's."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from exactivations.datamodules.activations import ActivationDataModule
from exactivations.datamodules.examples import ActivationSource
from exactivations.lit_modules.extraction.run_description import versions
from exactivations.lit_modules.probes.layer_ensembles import AVERAGE, STACKED, average_of, stacked_scores
from exactivations.lit_modules.probes.linear_probes import LinearProbes
from exactivations.lit_modules.probes.probe_evaluation import probe_names
from exactivations.lit_modules.probes.probe_heads import probe_of_state, scores_of
from exactivations.lit_modules.probes.probe_metrics import threshold_at_fpr
from exactivations.lit_modules.probes.probe_results import LENGTH, MAX_FPR, ProbeResults
from exactivations.lit_modules.probes.probe_scores import probabilities
from exactivations.lit_modules.probes.probe_sweep import ProbeSweep
from exactivations.lit_modules.probes.saved_file import Saved, write_saved
from exactivations.lit_modules.probes.seen_samples import SEEN, SEEN_GROUPS, SeenSamples, group_hashes, token_hashes
from exactivations.store.described_file import read_described
from exactivations.store.errors import InvalidInputError
from exactivations.store.means_file import at_points, origin_of, refuse_another_origin
from exactivations.store.run_folder import RunInfo

KIND = "probes"
PROBES_FILE = f"{KIND}.safetensors"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class SavedProbes(Saved):
    """Probes of one label, one for each vector.

    Attributes:
        path: The file they are in.
        content: What is known of them; also in probes.json. `vectors` says of each vector its hook point, pooling, strength,
            validation value and threshold; `best` is the one that validation chose.
        tensors: By vector and parameter; of the length baseline, too, if it was trained.
        seen: What they were trained, chosen, or their thresholds fixed on.
    """

    tensors: dict[str, dict[str, Tensor]]
    seen: SeenSamples

    @property
    def scored_per_token(self) -> bool:
        """Whether there is a score for each token, and not for each sample."""
        return bool(self.content["unit"] == "token")

    def vectors_of(self, name: str) -> list[str]:
        """Returns the vectors whose activations a probe or an ensemble needs.

        Raises:
            InvalidInputError: If there is none of that name.
        """
        if name in self.content["vectors"]:
            return [name]
        if name in (AVERAGE, STACKED) and self.content["ensemble_of"]:
            return list(self.content["ensemble_of"])
        known = [*self.content["vectors"], *([AVERAGE, STACKED] if self.content["ensemble_of"] else [])]
        raise InvalidInputError(f"{self.path} has no probe {name!r}; it has {', '.join(known)}")

    def threshold_of(self, name: str) -> float | None:
        """Returns the score (log-odds) above which a sample is called positive; None if there is none."""
        value = self.content["vectors"].get(name, {}).get("threshold")
        return None if value is None else float(value)

    def refuse_another(self, source: ActivationSource, info: RunInfo, name: str) -> None:
        """Refuses stored activations that are not of this model, tokenizer, hook point and pooling.

        Args:
            source: A store.
            info: Its description.
            name: The vector or ensemble that is to be applied to it.

        Raises:
            InvalidInputError: If the source lacks a vector that `name` needs.
            IdentityError: If model, tokenizer or dtype are others; every field that differs is named.
        """
        vectors = self.vectors_of(name)
        absent = [vector for vector in vectors if vector not in source.per_token]
        if absent:
            raise InvalidInputError(
                f"{source.title} has no {absent[0]}, which {name} of {self.path} reads ({len(absent)} of {len(vectors)} are "
                f"absent); it has {', '.join(source.per_token)}: extract the same hook points and poolings"
            )
        points = [self.content["vectors"][vector]["hook_point"] for vector in vectors]
        refuse_another_origin(
            at_points(self.identity, points), origin_of(info.present_identity, points), source.title, str(self.path)
        )

    def length_scores(self, rows: Float[Tensor, "n 2"]) -> Float[Tensor, "n k"] | None:
        """Returns the scores of the length baseline, of what `length_rows` gives; None if it was not trained."""
        return self._scores_of(LENGTH, rows, None) if LENGTH in self.tensors else None

    def scores(self, name: str, rows: Mapping[str, Float[Tensor, "n d"]], n_tokens: Tensor | None = None) -> Float[Tensor, "n k"]:
        """Returns scores float32 of samples or tokens: logits (of two classes: of the second), or values.

        Args:
            name: A vector or an ensemble.
            rows: Of each of `vectors_of(name)`.
            n_tokens: int64 [n], of an attention probe: how many rows each sample has, those of its content tokens.
        """
        each = [self._scores_of(vector, rows[vector], n_tokens) for vector in self.vectors_of(name)]
        if name == AVERAGE:
            return average_of(stacked_scores(each), len(each))
        if name == STACKED:
            return scores_of(probe_of_state("linear", self.tensors[STACKED]), stacked_scores(each), None)[0, 0]
        return each[0]

    def direction(self, name: str, of_class: str | None = None) -> Float[Tensor, " d"]:
        """Returns the direction in which a linear probe's score rises fastest, in the space of the states, of length 1, float32.

        The probe's weights are of standardised rows: here they are divided by the scale. Of more than two classes a class's weights
        are taken less their mean over classes, which changes no probability.

        Args:
            name: A vector, "<hook point>/<pooling>"; the direction is one at that hook point, but for poolings that are not linear.
            of_class: Towards which class; None of two classes, for the second, and of values, for larger ones.

        Raises:
            InvalidInputError: If there is no such probe or class, the probe is an ensemble or not linear, or has no direction.
        """
        if self.vectors_of(name) != [name] or "query" in self.tensors[name] or "hidden_weight" in self.tensors[name]:
            raise InvalidInputError(
                f"{name} of {self.path} is no single linear probe and has no one direction: name a vector of a linear kind"
            )
        weight = self.tensors[name]["weight"].double() / self.tensors[name]["scale"].double()
        if of_class is not None and of_class not in self.classes:
            raise InvalidInputError(
                f"{self.path} has no class {of_class!r}; it has {', '.join(self.classes) or 'values, no classes'}"
            )
        if len(weight) > 1 and of_class is None:
            raise InvalidInputError(f"{name} of {self.path} has a direction for each class, say which: {', '.join(self.classes)}")
        if len(weight) > 1:
            direction = weight[self.classes.index(str(of_class))] - weight.mean(dim=0)
        else:
            direction = -weight[0] if of_class is not None and of_class == self.classes[0] else weight[0]
        if not direction.any():
            raise InvalidInputError(f"the weights of {name} of {self.path} are all zero: it has no direction")
        unit: Tensor = direction / direction.norm()
        return unit.float()

    def probabilities(self, name: str, rows: Mapping[str, Tensor], n_tokens: Tensor | None = None) -> Tensor:
        """Returns float64 [n] of the second of two classes, [n, K] of more, or values [n]; see `scores`."""
        return probabilities(self.scores(name, rows, n_tokens), len(self.classes))

    def _scores_of(self, vector: str, rows: Tensor, n_tokens: Tensor | None) -> Tensor:
        form = self.content["form"]
        return scores_of(probe_of_state(form["kind"], self.tensors[vector], form["activation"]), rows, n_tokens)[0, 0]


def save_probes(
    folder: str | Path,
    sweep: ProbeSweep,
    data: ActivationDataModule,
    results: ProbeResults,
    info: RunInfo,
    stacking: LinearProbes | None,
    negatives: ActivationSource | None = None,
) -> None:
    """Writes probes.safetensors, the same as probes.json for people, and split.json.

    Args:
        folder: Where; it is made.
        sweep: After `trainer.fit` and `trainer.test`.
        data: What it was trained on.
        results: What was found.
        info: The description of the run that the activations are from: `store.info`, or `run_info(…)` for live ones.
        stacking: The stacking probe of all vectors, if there are several; see `ensembles`.
        negatives: Benign samples that the threshold was fixed on, if there were any: they count as seen.
    """
    names = probe_names(data)
    state = sweep.state()
    kept = [*names, *([LENGTH] if LENGTH in data.names else [])]
    tensors = {f"{name}//{key}": value for name in kept for key, value in state[name].items()}
    samples = np.sort(np.concatenate([data.split.train, data.split.validation]))
    benign = np.empty((0, 16), dtype=np.uint8) if negatives is None else token_hashes(negatives, np.arange(len(negatives)))
    tensors[SEEN] = torch.from_numpy(np.concatenate([token_hashes(data.source, samples), benign]))
    if data.group is not None:
        tensors[SEEN_GROUPS] = torch.from_numpy(group_hashes([data.groups[place] for place in samples.tolist()]))
    if stacking is not None:
        tensors |= {f"{STACKED}//{key}": value for key, value in _parameters(stacking).items()}
    points = {name: name.rpartition("/") for name in names}
    content = {
        "probe": sweep.kind,
        "form": asdict(sweep.form),
        "label": data.label,
        "classes": data.classes,
        "unit": data.unit,
        "over_tokens": data.over_tokens,
        "best": results.best,
        "vectors": {
            name: {
                "hook_point": points[name][0],
                "pooling": points[name][2],
                **asdict(sweep.settings[int(sweep.validated[name].chosen[0])]),
                f"validation_{results.headline}": float(sweep.validated[name].values[0].max()),
                "threshold": _threshold(sweep, data, results, name),
                "threshold_fixed_on": results.threshold.fixed_on if results.threshold and name == results.best else "validation",
            }
            for name in names
        },
        "ensemble_of": names if stacking is not None else [],
        "threshold_max_fpr": MAX_FPR,
        "split": {"group_column": data.group, "shares": list(data.split.shares), "seed": data.seed, "how": data.how_split},
        "identity": origin_of(info.present_identity, [where[0] for where in points.values()]),
        "about": info.about,
        "run": {"title": data.source.title, "fingerprint": info.fingerprint, "dataset": info.identity["dataset"]},
        "versions": versions(),
    }
    write_saved(folder, KIND, FORMAT_VERSION, content, tensors, data)


def load_probes(path: str | Path) -> SavedProbes:
    """Reads probes, and every byte of them against its checksum.

    Raises:
        StoreError: If there are none, or they are of another version.
        CorruptShardError: If the file is damaged.
    """
    path, tensors, content = read_described(path, KIND, FORMAT_VERSION, "probe")
    by_vector: dict[str, dict[str, Tensor]] = {}
    tokens, groups = tensors.pop(SEEN), tensors.pop(SEEN_GROUPS, None)
    seen = SeenSamples(str(path), tokens.numpy(), None if groups is None else groups.numpy(), content["split"]["group_column"])
    for key, value in tensors.items():
        name, _, parameter = key.rpartition("//")
        by_vector.setdefault(name, {})[parameter] = value
    return SavedProbes(path, content, by_vector, seen)


def _threshold(sweep: ProbeSweep, data: ActivationDataModule, results: ProbeResults, name: str) -> float | None:
    if results.threshold is None:
        return None
    if name == results.best:
        return results.threshold.value
    return threshold_at_fpr(sweep.validated[name].scores[0, :, 0], data.targets("validation")[0], MAX_FPR)


def _parameters(probes: LinearProbes) -> dict[str, Tensor]:
    """Returns those of the first variant and strength, in the form of `ExactProbeSweep.state`."""
    return {"mean": probes.mean, "scale": probes.scale, "weight": probes.weight[0, 0], "bias": probes.bias[0, 0]}
