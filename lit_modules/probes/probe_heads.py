"""Probes that are trained, many at once: what they compute, what they start from, and what they minimise."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor, nn
from torch.nn import functional

from exactivations.datamodules.splits import class_weights
from exactivations.lit_modules.probes.linear_probes import LinearProbes

Kind = Literal["logistic", "linear", "mlp", "attention"]
Activation = Literal["gelu", "relu"]
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"gelu": functional.gelu, "relu": functional.relu}


@dataclass(frozen=True)
class MlpProbes:
    """Probes with one hidden layer, of one vector: V variants of the labels x S settings.

    Attributes:
        mean: float64 [d], of the training rows.
        scale: float64 [d], their standard deviation; 1 where they do not vary.
        hidden_weight: float64 [V, S, H, d], of rows that are standardised so.
        hidden_bias: float64 [V, S, H].
        weight: float64 [V, S, K', H]. K' is 1 for two classes and for values, else K.
        bias: float64 [V, S, K'].
        activation: "gelu" or "relu".
    """

    mean: Float64[Tensor, " d"]
    scale: Float64[Tensor, " d"]
    hidden_weight: Float64[Tensor, "v s h d"]
    hidden_bias: Float64[Tensor, "v s h"]
    weight: Float64[Tensor, "v s k h"]
    bias: Float64[Tensor, "v s k"]
    activation: Activation = "gelu"

    def scores(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "v s n k"]:
        """Returns logits (of two classes: of the second), or predicted values, float32, of rows as they are stored."""
        v, s, h, width = self.hidden_weight.shape
        standard = (rows.double() - self.mean) / self.scale
        flat = standard @ self.hidden_weight.reshape(v * s * h, width).T + self.hidden_bias.flatten()
        hidden = ACTIVATIONS[self.activation](flat).reshape(len(rows), v, s, h)
        return (hidden.permute(1, 2, 0, 3) @ self.weight.mT + self.bias[:, :, None]).float()


@dataclass(frozen=True)
class AttentionProbes:
    """Probes of a weighted mean of a sample's tokens, the weights learned: V variants of the labels x S settings.

    A token weighs as the softmax, over its sample's content tokens, of the product of its row and the query.

    Attributes:
        mean: float64 [d], of the training tokens' rows.
        scale: float64 [d], their standard deviation; 1 where they do not vary.
        query: float64 [V, S, d], of rows that are standardised so.
        weight: float64 [V, S, K', d], of the weighted mean. K' is 1 for two classes and for values, else K.
        bias: float64 [V, S, K'].
    """

    mean: Float64[Tensor, " d"]
    scale: Float64[Tensor, " d"]
    query: Float64[Tensor, "v s d"]
    weight: Float64[Tensor, "v s k d"]
    bias: Float64[Tensor, "v s k"]

    def attention(self, rows: Float[Tensor, "t d"], n_tokens: Int64[Tensor, " n"]) -> Float64[Tensor, "v s t"]:
        """Returns how much each token weighs; those of a sample sum to 1. Rows are as they are stored, sample after sample."""
        return self._attention(self._standard(rows), _owners(n_tokens), len(n_tokens)).T.reshape(*self.query.shape[:2], -1)

    def scores(self, rows: Float[Tensor, "t d"], n_tokens: Int64[Tensor, " n"]) -> Float[Tensor, "v s n k"]:
        """Returns logits (of two classes: of the second), or predicted values, float32, of n samples, each of some tokens."""
        v, s, k, width = self.weight.shape
        standard, owner = self._standard(rows), _owners(n_tokens)
        attention = self._attention(standard, owner, len(n_tokens))
        # The linear head of a mean is the mean of the head: so no vector of each sample and probe, [n, V, S, d], is ever made.
        of_tokens = (standard @ self.weight.reshape(v * s * k, width).T).reshape(len(rows), v * s, k) * attention[..., None]
        pooled = of_tokens.new_zeros(len(n_tokens), v * s, k).index_add(0, owner, of_tokens)
        return (pooled.transpose(0, 1).reshape(v, s, len(n_tokens), k) + self.bias[:, :, None]).float()

    def _standard(self, rows: Tensor) -> Tensor:
        return (rows.double() - self.mean) / self.scale

    def _attention(self, standard: Tensor, owner: Tensor, n: int) -> Tensor:
        """Returns the weight of each token [T, V * S]."""
        logits = standard @ self.query.flatten(0, 1).T
        with torch.no_grad():  # the largest is subtracted against overflow, and does not change the softmax
            largest = logits.new_full((n, logits.shape[1]), -torch.inf)
            largest.scatter_reduce_(0, owner[:, None].expand_as(logits), logits, "amax")
        raised = (logits - largest[owner]).exp()
        return raised / raised.new_zeros(n, logits.shape[1]).index_add(0, owner, raised)[owner]


Probes = LinearProbes | MlpProbes | AttentionProbes


def scores_of(probes: Probes, rows: Tensor, n_tokens: Tensor | None) -> Float[Tensor, "v s n k"]:
    """Returns the scores of any kind of probes; n_tokens are for those of attention, and None for the others."""
    if isinstance(probes, AttentionProbes):
        assert n_tokens is not None
        return probes.scores(rows, n_tokens)
    assert n_tokens is None
    return probes.scores(rows)


def probes_of(kind: Kind, tensors: dict[str, Tensor], activation: Activation = "gelu") -> Probes:
    """Returns probes with these tensors, which are as the attributes of the kind's class."""
    if kind == "mlp":
        return MlpProbes(**tensors, activation=activation)
    return AttentionProbes(**tensors) if kind == "attention" else LinearProbes(**tensors)


def probe_of_state(kind: Kind, state: dict[str, Tensor], activation: Activation = "gelu") -> Probes:
    """Returns the one probe (V and S are 1) that `TrainedProbeSweep.state()` gave for a vector, ready to score rows."""
    alone = {key: tensor if key in ("mean", "scale") else tensor[None, None] for key, tensor in state.items()}
    return probes_of(kind, alone, activation)


class ProbeHead(nn.Module):
    """The parameters of one vector's probes, float64 [V, S, ...] each, and its standardisation.

    Args:
        kind: See `TrainedProbeSweep`.
        width: d, of a row.
        n_outputs: K'.
        n_hidden: H, of an mlp.
        seeds: Of the start of each setting [S].
        n_variants: V, which all start alike.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, kind: Kind, width: int, n_outputs: int, n_hidden: int, seeds: list[int], n_variants: int) -> None:
        super().__init__()
        starts = {seed: _start(kind, width, n_outputs, n_hidden, seed) for seed in set(seeds)}
        stacked = {key: torch.stack([starts[seed][key] for seed in seeds]) for key in starts[seeds[0]]}
        self.trained = nn.ParameterDict({key: values.repeat(n_variants, *[1] * values.ndim) for key, values in stacked.items()})
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(width, dtype=torch.float64))

    @torch.no_grad()
    def standardise(self, mean: Float64[Tensor, " d"], variance: Float64[Tensor, " d"]) -> None:
        """Sets mean and standard deviation; weights of dimensions that do not vary are set to 0, and stay there."""
        varies = variance > (1e-12 * mean) ** 2
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(varies, variance, 1.0).sqrt())
        reads_rows = {"hidden_weight", "query"} if "hidden_weight" in self.trained else {"weight", "query"}
        for key in reads_rows & set(self.trained.keys()):
            self.trained[key].mul_(varies.to(self.mean.device))

    def squares(self) -> Float64[Tensor, "v s"]:
        """Returns the squared norm of each probe's weights, biases left out."""
        weights = [tensor for key, tensor in self.trained.items() if not key.endswith("bias")]
        return torch.stack([tensor.square().flatten(2).sum(dim=2) for tensor in weights]).sum(dim=0)


class ProbeLoss(nn.Module):
    """What probes minimise, see `TrainedProbeSweep`; buffers are on the device of the probes.

    Args:
        labels: [V, n], of all training examples: int64 class numbers, or float64 values.
        n_classes: 0 for values.
        strengths: C of each setting [S].
        balanced: Weigh examples so that all classes weigh the same.
    """

    label_mean: Tensor
    label_scale: Tensor
    class_weight: Tensor
    l2: Tensor

    def __init__(self, labels: Shaped[Tensor, "v n"], n_classes: int, strengths: list[float], *, balanced: bool) -> None:
        super().__init__()
        self.n_classes = n_classes
        mean, scale, weight = torch.zeros(len(labels)), torch.ones(len(labels)), torch.ones(len(labels), max(1, n_classes))
        if not n_classes:
            mean, scale = labels.mean(dim=1), labels.std(dim=1, correction=0)
            scale = torch.where(scale > 0, scale, 1.0)
        if balanced:
            weight = torch.stack([torch.from_numpy(class_weights(row.numpy(), n_classes)) for row in labels])
        l2 = 1 / (torch.tensor(strengths, dtype=torch.float64) * labels.shape[1])
        for key, values in (("label_mean", mean), ("label_scale", scale), ("class_weight", weight), ("l2", l2)):
            self.register_buffer(key, values.double(), persistent=False)

    def forward(self, scores: Float[Tensor, "v s n k"], labels: Shaped[Tensor, "v n"]) -> Float64[Tensor, "v s n"]:
        """Returns the loss of each example."""
        if not self.n_classes:
            error = (scores[..., 0].double() - labels[:, None]) / self.label_scale[:, None, None]
            return error.square() / 2
        expanded = labels[:, None].expand(scores.shape[:3])
        if self.n_classes == 2:
            logits, target = scores[..., 0].double(), expanded.double()
            losses = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        else:
            losses = functional.cross_entropy(scores.double().movedim(3, 1), expanded, reduction="none")
        return losses * self.class_weight.gather(1, labels)[:, None]

    def penalty(self, head: ProbeHead) -> Float64[Tensor, "v s"]:
        """Returns what each probe's weights cost."""
        return head.squares() * self.l2 / 2


def _start(kind: Kind, width: int, n_outputs: int, n_hidden: int, seed: int) -> dict[str, Float64[Tensor, "..."]]:
    """Returns what the training of one probe starts from: uniform in +-1 / sqrt(inputs), as in `torch.nn.Linear`.

    It depends on the shapes and on the seed alone, and not on which other probes there are.
    """
    dice = torch.Generator().manual_seed(seed)

    def draw(n_inputs: int, *shape: int) -> Tensor:
        return (2 * torch.rand(shape, generator=dice, dtype=torch.float64) - 1) / math.sqrt(n_inputs)

    if kind == "mlp":
        first = {"hidden_weight": draw(width, n_hidden, width), "hidden_bias": draw(width, n_hidden)}
        return {**first, "weight": draw(n_hidden, n_outputs, n_hidden), "bias": draw(n_hidden, n_outputs)}
    query = {"query": draw(width, width)} if kind == "attention" else {}
    return {**query, "weight": draw(width, n_outputs, width), "bias": draw(width, n_outputs)}


def _owners(n_tokens: Tensor) -> Tensor:
    """Returns the place of each token's sample, int64 [T]."""
    return torch.repeat_interleave(torch.arange(len(n_tokens), device=n_tokens.device), n_tokens)
