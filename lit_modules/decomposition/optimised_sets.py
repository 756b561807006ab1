"""How causal importances are optimised for one prompt, and what is told of the sets that come of it."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from exactivations.store.errors import InvalidInputError

Masks = Literal["stochastic", "ci"]


@dataclass(frozen=True)
class CiOptions:
    """How causal importances are optimised; the defaults are those of goodfire-ai/spd.

    Attributes:
        steps: Of AdamW.
        learning_rate: Constant; there is no weight decay.
        coefficient: Of importance minimality in the loss, beside the cross-entropy's 1.
        p: The power of importance minimality.
        masks: "stochastic": the model must predict the target with g + (1 - g) r, whatever part r of the rest is there; "ci": with
            the causal importances themselves as masks, which takes fewer components, and says less of those that are left out.
    """

    steps: int = 2000
    learning_rate: float = 1e-2
    coefficient: float = 0.1
    p: float = 0.3
    masks: Masks = "stochastic"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InvalidInputError(f"steps must be at least 1, got {self.steps}")
        for name in ("learning_rate", "coefficient", "p"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidInputError(f"{name} must be a finite number above 0, got {getattr(self, name)}")
        if self.masks not in get_args(Masks):
            raise InvalidInputError(f"masks must be {' or '.join(get_args(Masks))}, got {self.masks!r}")


@dataclass(frozen=True)
class OptimisedSet:
    """What came of one seed.

    Attributes:
        seed: Of its starting values and masks.
        loss: Cross-entropy (nats) + coefficient * importance minimality; over stochastic masks a mean of 32 draws.
        minimality: The sum over maps and components of importance ** p, as a mean over positions.
        probability: Of the target with the causal importances as masks and no delta, as attributions are computed.
        stochastic_probability: With stochastic masks, the mean of 32 draws.
        alive: By map, how many pairs of position and component have an importance of at least 1e-6.
    """

    seed: int
    loss: float
    minimality: float
    probability: float
    stochastic_probability: float
    alive: dict[str, int]
