"""The toy model of superposition: more sparse features than dimensions, and so a decomposition whose right answer is known."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from exactivations.store.errors import InvalidInputError

FEATURE_PROBABILITY = 0.05
"""How often a feature is there (arXiv 2506.20790)."""


class ToySuperposition(nn.Module):
    """x -> relu(linear2(identity(linear1(x)))): features [..., F] through a bottleneck of [..., D] and back.

    linear1 holds W^T [F, D] and linear2 W: the same numbers in two maps, so that each can be decomposed by itself.

    Args:
        weight: W [D, F].
        bias: [F], of the output.
        hidden_identity: Put an identity map [D, D] in between, to be decomposed as well.
    """

    def __init__(self, weight: Float[Tensor, "d f"], bias: Float[Tensor, " f"], *, hidden_identity: bool = False) -> None:
        super().__init__()
        d, f = weight.shape
        self.linear1 = nn.Linear(f, d, bias=False)
        self.identity = nn.Linear(d, d, bias=False) if hidden_identity else nn.Identity()
        self.linear2 = nn.Linear(d, f)
        with torch.no_grad():
            self.linear1.weight.copy_(weight)
            self.linear2.weight.copy_(weight.T)
            self.linear2.bias.copy_(bias)
            if isinstance(self.identity, nn.Linear):
                nn.init.eye_(self.identity.weight)

    def forward(self, x: Float[Tensor, "*leading f"]) -> Float[Tensor, "*leading f"]:
        """Returns the features that are found again."""
        return functional.relu(self.linear2(self.identity(self.linear1(x))))


def train_toy_superposition(
    n_features: int, n_hidden: int, *, seed: int, batch_size: int = 1024, steps: int = 10_000, hidden_identity: bool = False
) -> ToySuperposition:
    """Trains a toy model to give its sparse features back, both maps tied.

    AdamW with weight decay 0.01 and a constant learning rate of 0.005, mean squared error, `sparse_features` (arXiv 2506.20790,
    which took batches of 1,024 for 5 features in 2 dimensions and of 8,192 for 40 in 10). An identity in between changes nothing.

    Raises:
        InvalidInputError: If there are not more features than dimensions, or a number is below 1.
    """
    if not 1 <= n_hidden < n_features or batch_size < 1 or steps < 1:
        raise InvalidInputError(
            "a toy model of superposition has more features than dimensions, and is trained by at least one step of one sample; "
            f"got {n_features} features, {n_hidden} dimensions, {steps} steps of {batch_size}"
        )
    generator = torch.Generator().manual_seed(seed)
    start = (2 * torch.rand(n_hidden, n_features, generator=generator) - 1) / math.sqrt(n_features)
    weight, bias = nn.Parameter(start), nn.Parameter(torch.zeros(n_features))
    optimizer = torch.optim.AdamW([weight, bias], lr=5e-3, weight_decay=0.01)
    for _ in range(steps):
        x = sparse_features(batch_size, n_features, generator)
        optimizer.zero_grad()
        loss = functional.mse_loss(functional.relu(x @ weight.T @ weight + bias), x)
        torch.autograd.backward(loss)
        optimizer.step()
    return ToySuperposition(weight.detach(), bias.detach(), hidden_identity=hidden_identity)


def sparse_features(n: int, n_features: int, generator: torch.Generator) -> Float[Tensor, "n f"]:
    """Returns samples whose features are each there with a probability of 0.05, and then drawn evenly from [0, 1)."""
    is_there = torch.rand(n, n_features, generator=generator) < FEATURE_PROBABILITY
    return torch.rand(n, n_features, generator=generator) * is_there


@dataclass(frozen=True)
class Recovery:
    """How well components are the columns of a toy model's W, as means over the features (arXiv 2506.20790, table 1).

    Attributes:
        mean_max_cosine_similarity: Of each column of W and that of the component that is most like it. 1 is perfect.
        mean_length_ratio: Length of that component's column over the column's. 1 is perfect; less is shrinkage.
        least_length_ratio: The smallest over the features.
        largest_length_ratio: The largest.
    """

    mean_max_cosine_similarity: float
    mean_length_ratio: float
    least_length_ratio: float
    largest_length_ratio: float


def recovery(
    columns: Float[Tensor, "f d"], v: Float[Tensor, "f c"], u: Float[Tensor, "c d"], alive: Bool[Tensor, " c"]
) -> Recovery:
    """Holds the components of `linear1` against the columns of W, in float64.

    Args:
        columns: W^T: `linear1` as x @ W^T.
        v: V of the components.
        u: U of the components.
        alive: Which components count: those that ever matter. In few dimensions one of the many others, of hardly any length,
            points the right way by chance, and would be taken for the answer.

    Raises:
        InvalidInputError: If none is alive.
    """
    if not alive.any():
        raise InvalidInputError(
            "no component is alive, so none can be held against the model: train for longer, or lower minimality"
        )
    columns, v, u = columns.double(), v[:, alive].double(), u[alive].double()
    of_components = v.T[:, :, None] * u[:, None, :]  # [C, F, D]: row f is what component c makes of feature f
    similarity = functional.cosine_similarity(of_components, columns[None], dim=-1, eps=1e-30)
    best, which = similarity.max(dim=0)
    ratio = of_components[which, torch.arange(len(columns))].norm(dim=-1) / columns.norm(dim=-1)
    return Recovery(float(best.mean()), float(ratio.mean()), float(ratio.min()), float(ratio.max()))
