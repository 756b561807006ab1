"""Attributions between components for sets of causal importances, in memory and as safetensors + JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from exactivations.store.described_file import read_described, write_described
from exactivations.store.errors import InvalidInputError

WTE, OUTPUT = "wte", "output"
KIND, FORMAT_VERSION, COMMAND = "attributions", 1, "attribute"


@dataclass(frozen=True)
class PairAttribution:
    """What components of one layer contribute to those of another, for one set of causal importances.

    The attribution of a source component to a target component is d target / d source * source, where target is what the target
    component reads off (x @ V, or a logit) and source what the source component read off; only direct paths count, and none through
    another component. It is 0 where either is not alive.

    Attributes:
        source: Path of a map, or "wte": the token embedding, one pseudo-component.
        target: Path of a map, or "output": the logits, whose components are token ids.
        values: float32 [E], one for each edge; see `edges`.
        is_kv_to_o_pair: Whether the source reaches later positions: keys or values of a block and the map after its attention; in a
            model whose attention has maps that are not decomposed, other pairs too. Edges are then between positions
            s_in <= s_out, and else at s_in = s_out.
        alive_mask_in: bool [L, C], which components are alive at which positions.
        alive_mask_out: Likewise of the target's; for "output" [L, V].
        original_alive_mask_in: bool [L, C], which components the model's own causal importances have alive, where they are known;
            those of the set where they are not.
        original_alive_mask_out: Likewise; for "output" by the untouched model's probabilities.
    """

    source: str
    target: str
    values: Float[Tensor, " e"]
    is_kv_to_o_pair: bool
    alive_mask_in: Bool[Tensor, "l c_in"]
    alive_mask_out: Bool[Tensor, "l c_out"]
    original_alive_mask_in: Bool[Tensor, "l c_in"]
    original_alive_mask_out: Bool[Tensor, "l c_out"]

    @classmethod
    def between(
        cls,
        source: str,
        target: str,
        values: Float[Tensor, " e"],
        is_kv_to_o_pair: bool,
        alive: Mapping[str, Bool[Tensor, "l c"]],
        original_alive: Mapping[str, Bool[Tensor, "l c"]],
    ) -> Self:
        """Returns the pair, with what is alive of its two layers; the original is that of the set where it is unknown."""
        original = [original_alive.get(layer, alive[layer]) for layer in (source, target)]
        return cls(source, target, values, is_kv_to_o_pair, alive[source], alive[target], *original)

    @property
    def trimmed_c_in_idxs(self) -> tuple[int, ...]:
        """Numbers of the source's components that are alive at any position, ascending."""
        return _trimmed(self.alive_mask_in)

    @property
    def trimmed_c_out_idxs(self) -> tuple[int, ...]:
        """Likewise of the target's."""
        return _trimmed(self.alive_mask_out)

    def edges(self) -> tuple[Int[Tensor, "e 4"], Float[Tensor, " e"]]:
        """Returns s_in, c_in, s_out, c_out of every edge, with components as the model numbers them, ascending; and the values.

        An edge is between a component that is alive at its position and one that is alive at its own. Its value may be 0.
        """
        return edge_places(self.alive_mask_in, self.alive_mask_out, self.is_kv_to_o_pair), self.values

    @property
    def attribution(self) -> Float[Tensor, "s_in c_in s_out c_out"]:
        """The document's dense array, made anew: by trimmed indices, 0 where there is no edge."""
        length = len(self.alive_mask_in)
        dense = torch.zeros(length, len(self.trimmed_c_in_idxs), length, len(self.trimmed_c_out_idxs))
        (s_in, c_in, s_out, c_out), values = self.edges()[0].T, self.values
        place_in, place_out = (alive.any(0).cumsum(0) - 1 for alive in (self.alive_mask_in, self.alive_mask_out))
        dense[s_in, place_in[c_in], s_out, place_out[c_out]] = values
        return dense


def edge_places(alive_in: Bool[Tensor, "l c_in"], alive_out: Bool[Tensor, "l c_out"], over_positions: bool) -> Int[Tensor, "e 4"]:
    """Returns s_in, c_in, s_out, c_out of all edges between what is alive, in the order in which values are kept: ascending.

    Args:
        alive_in: Of the source.
        alive_out: Of the target.
        over_positions: Whether edges are from each position to itself and all that follow, or to itself only.
    """
    nodes_in, nodes_out = alive_in.nonzero(), alive_out.nonzero()
    # For each source the targets that it reaches lie together, since they are in the order of positions.
    n_out, all_out = alive_out.sum(1), len(nodes_out)
    before = n_out.cumsum(0) - n_out
    n_reached = (all_out - before if over_positions else n_out)[nodes_in[:, 0]]
    i = torch.arange(len(nodes_in)).repeat_interleave(n_reached)
    first_edge = n_reached.cumsum(0) - n_reached
    o = before[nodes_in[i, 0]] + torch.arange(len(i)) - first_edge[i]
    return torch.cat([nodes_in[i], nodes_out[o]], dim=1)


def _trimmed(alive: Bool[Tensor, "l c"]) -> tuple[int, ...]:
    return tuple(alive.any(0).nonzero()[:, 0].tolist())


@dataclass(frozen=True)
class Made:
    """How attributions were made.

    Attributes:
        model: What the model is called.
        ci_threshold: Components of at least this causal importance are alive.
        output_threshold: Token ids of at least this probability are alive.
        unmasked: Whether the forward pass was that of the untouched model, with all components and what they lack, and not that of
            the components times their causal importances.
        own: Name of the set that is the model's own.
    """

    model: str
    ci_threshold: float
    output_threshold: float
    unmasked: bool
    own: str | None = None


@dataclass(frozen=True)
class Prediction:
    """What is predicted after a prompt's last token: by the untouched model, and by the model with a set's components.

    Attributes:
        token: The id that the untouched model predicts first.
        text: Its text.
        probability: Its probability in the untouched model.
        of_set: Its probability in the model with components times the set's causal importances.
        top: The id that this pass predicts first.
        top_text: Its text.
        top_probability: Its probability in this pass.
    """

    token: int
    text: str
    probability: float
    of_set: float
    top: int
    top_text: str
    top_probability: float

    def fault(self, output_threshold: float) -> str | None:
        """Returns in words why the set does not explain what the model predicts; None if its pass predicts the same, as a node."""
        found = []
        if self.top != self.token:
            found.append(f"its pass predicts {self.top_text!r} ({self.top_probability:.3f})")
        if self.of_set < output_threshold:
            found.append(f"{self.text!r} is below the output threshold of {output_threshold:g} and no node")
        if not found:
            return None
        return (
            f"it does not explain the model's prediction {self.text!r} (probability {self.probability:.3f} in the model, "
            f"{self.of_set:.3f} with the set's components): {', and '.join(found)}"
        )


@dataclass(frozen=True)
class Attributions:
    """Attributions of one prompt, for N sets of causal importances.

    Attributes:
        made: How.
        prompt: The text.
        tokens: Its tokens as text.
        token_ids: Their ids, L of them.
        by_set: By name of the set, its pairs, in the order of the targets in the model. Pairs without anything alive at one of
            their ends are left out, so that the list is empty if nothing is alive.
        output_probabilities: float32 [N, L, V], of the model with components times causal importances.
        alive: By name of the set and layer ("wte" first, then the maps in the model's order, "output" last), bool [L, C].
        original_alive: By layer, bool [L, C]: what the model's own causal importances have alive. Of "output" always, and of the
            maps if they are known.
        output_tokens: The text of each token id that is alive in a set or in the untouched model.
        predictions: By name of the set, what is predicted after the last token; of files of before it was recorded, nothing.
    """

    made: Made
    prompt: str
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    by_set: Mapping[str, Sequence[PairAttribution]]
    output_probabilities: Float[Tensor, "n l v"]
    alive: Mapping[str, Mapping[str, Bool[Tensor, "l c"]]]
    original_alive: Mapping[str, Bool[Tensor, "l c"]]
    output_tokens: Mapping[int, str]
    predictions: Mapping[str, Prediction] = field(default_factory=dict)

    @property
    def faults(self) -> dict[str, str]:
        """By name of those sets that do not explain what the model predicts: why, in words."""
        found = {name: prediction.fault(self.made.output_threshold) for name, prediction in self.predictions.items()}
        return {name: fault for name, fault in found.items() if fault is not None}

    @property
    def model(self) -> str:
        """What the model is called."""
        return self.made.model

    @property
    def set_names(self) -> tuple[str, ...]:
        """The sets' names, in the order of output_probabilities."""
        return tuple(self.by_set)

    def one(self, name: str) -> Self:
        """Returns those of one set.

        Raises:
            InvalidInputError: If there is none of this name.
        """
        if name not in self.by_set:
            raise InvalidInputError(f"there is no set {name!r}, only {', '.join(map(repr, self.set_names))}")
        n = self.set_names.index(name)
        return replace(
            self,
            by_set={name: self.by_set[name]},
            alive={name: self.alive[name]},
            output_probabilities=self.output_probabilities[n : n + 1],
            predictions={of: prediction for of, prediction in self.predictions.items() if of == name},
        )


def write_attributions(path: str | Path, attributions: Attributions) -> Path:
    """Writes attributions.safetensors and attributions.json: what the tensors are is in the JSON.

    Args:
        path: The folder, or the file (*.safetensors).
        attributions: Of one prompt. For a file each set, write `attributions.one(name)`.

    Returns:
        The path of the file.

    Raises:
        StoreError: If it cannot be written.
    """
    tensors = {"output_probabilities": attributions.output_probabilities}
    # Copies, here and below, of what is part of a tensor of several sets or there twice: safetensors does not write such.
    tensors |= {f"original_alive/{layer}": mask.clone() for layer, mask in attributions.original_alive.items()}
    sets: list[dict[str, object]] = []  # a list: what is written keeps no order of names
    for n, (name, of_set) in enumerate(attributions.by_set.items()):
        tensors |= {f"{n}/alive/{layer}": mask for layer, mask in attributions.alive[name].items()}
        tensors |= {f"{n}/{pair.source} -> {pair.target}": pair.values.clone() for pair in of_set}
        pairs = [{"source": p.source, "target": p.target, "is_kv_to_o_pair": p.is_kv_to_o_pair} for p in of_set]
        described: dict[str, object] = {"name": name, "pairs": pairs}
        if name in attributions.predictions:
            described |= {"prediction": asdict(attributions.predictions[name]), "fault": attributions.faults.get(name)}
        sets.append(described)
    content = {
        **asdict(attributions.made),
        "prompt": attributions.prompt,
        "tokens": attributions.tokens,
        "token_ids": attributions.token_ids,
        "output_tokens": {str(token): text for token, text in attributions.output_tokens.items()},
        "layers": list(next(iter(attributions.alive.values()))),
        "sets": sets,
    }
    return write_described(path, KIND, FORMAT_VERSION, content, tensors)


def read_attributions(path: str | Path) -> Attributions:
    """Reads what `write_attributions` wrote, every byte against its checksum.

    Args:
        path: The folder, or the file.

    Raises:
        StoreError: If there is no such file, or it is of another kind or version.
        CorruptShardError: If it is damaged.
    """
    _, tensors, content = read_described(path, KIND, FORMAT_VERSION, COMMAND)
    original = {layer: tensors[key] for layer in content["layers"] if (key := f"original_alive/{layer}") in tensors}
    alive, by_set = {}, {}
    for n, described in enumerate(content["sets"]):
        name = described["name"]
        alive[name] = {layer: tensors[f"{n}/alive/{layer}"] for layer in content["layers"]}
        by_set[name] = [
            PairAttribution.between(
                pair["source"],
                pair["target"],
                tensors[f"{n}/{pair['source']} -> {pair['target']}"],
                pair["is_kv_to_o_pair"],
                alive[name],
                original,
            )
            for pair in described["pairs"]
        ]
    predictions = {of["name"]: Prediction(**of["prediction"]) for of in content["sets"] if "prediction" in of}
    made = Made(*(content[name] for name in ("model", "ci_threshold", "output_threshold", "unmasked", "own")))
    return Attributions(
        made,
        content["prompt"],
        tuple(content["tokens"]),
        tuple(content["token_ids"]),
        by_set,
        tensors["output_probabilities"],
        alive,
        original,
        {int(token): text for token, text in content["output_tokens"].items()},
        predictions,
    )
