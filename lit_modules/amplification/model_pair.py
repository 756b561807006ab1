"""The two models whose difference is amplified, and what they must have in common."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from exactivations.lit_modules.amplification.cached_model import check_generator
from exactivations.lit_modules.models.language_model import max_positions
from exactivations.store.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class ModelPair:
    """Two models that fit each other, given by name: swapped, nothing would fail, and every difference would change its sign.

    Attributes:
        before: What the other was made from.
        after: The model that was changed; on the same device and in the same dtype.
        common: bool [C], True for ids that mean the same token in both vocabularies; None for equal ones (equal widths do not show
            that: hold the tokenizers against each other with `tokenizer_compatibility`).

    Raises:
        InvalidInputError: If one of them cannot generate, or they do not fit each other.
    """

    before: PreTrainedModel
    after: PreTrainedModel
    common: Bool[Tensor, " c"] | None = None

    def __post_init__(self) -> None:
        for name in ("before", "after"):
            check_generator(getattr(self, name))
        for what in ("device", "dtype"):
            of_after, of_before = getattr(self.after, what), getattr(self.before, what)
            if of_after != of_before:
                raise InvalidInputError(
                    f"the after model's {what} is {of_after}, the before model's is {of_before}: load both alike (a difference "
                    "that comes from rounding would be amplified too)"
                )
        check_common(self.common, before_width=vocabulary_width(self.before), after_width=vocabulary_width(self.after))

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """What ends a text, by the after model's own generation settings."""
        config = self.after.generation_config
        ids = None if config is None else config.eos_token_id
        return frozenset(() if ids is None else [ids] if isinstance(ids, int) else ids)

    def check_length(self, n_read: int) -> None:
        """Refuses rows that read so many tokens: prompt and completion, but for the last token, which nothing follows.

        Raises:
            InvalidInputError: If a model has fewer positions.
        """
        for name, model in (("before", self.before), ("after", self.after)):
            positions = max_positions(model)
            if positions is not None and n_read > positions:
                raise InvalidInputError(
                    f"prompt and completion are {n_read} tokens (the last one, which is not read, not counted), the {name} model "
                    f"has {positions} positions: lower max_new_tokens, or cut the prompts"
                )

    def check_ids(self, input_ids: Tensor, names: Tensor) -> None:
        """Refuses prompts, int64 [B, L] on the host, that hold an id which the models do not share.

        Args:
            input_ids: The prompts.
            names: int64 [B], what each is called in messages: its sample index.

        Raises:
            InvalidInputError: Naming the first such prompt and token.
        """
        common = torch.ones(vocabulary_width(self.after), dtype=torch.bool) if self.common is None else self.common
        refuse_unshared(input_ids, common, names)


def vocabulary_width(model: PreTrainedModel) -> int:
    """Returns how many logits the model's head gives, padding of the vocabulary included."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers has no annotation there
    if not isinstance(head, nn.Module) or not isinstance(head.weight, Tensor):
        raise InvalidInputError(f"{type(model).__name__} has no output embedding: how many logits it gives is not known")
    return head.weight.shape[0]


def check_common(common: Bool[Tensor, " c"] | None, *, before_width: int, after_width: int) -> None:
    """Refuses vocabularies of which it is not said what they have in common.

    Raises:
        InvalidInputError: If widths differ and `common` is None, or it speaks of ids that one of the models does not have.
    """
    if common is None and after_width != before_width:
        raise InvalidInputError(
            f"the after model gives {after_width} logits, the before model {before_width}: expected equally many, or `common`, "
            "the ids that mean the same token in both (see tokenizer_compatibility)"
        )
    if common is not None and (len(common) > min(after_width, before_width) or not common.any()):
        raise InvalidInputError(
            f"`common` speaks of {len(common)} ids, {int(common.sum())} of them common; the after model has {after_width}, the "
            f"before model {before_width}: expected at most {min(after_width, before_width)}, and one common at least"
        )


def refuse_unshared(input_ids: Tensor, common: Bool[Tensor, " c"], names: Tensor) -> None:
    """Refuses prompts with an id that is not common; see `ModelPair.check_ids`."""
    wrong = (~is_shared(input_ids, common)).nonzero().tolist()
    if wrong:
        row, place = wrong[0]
        raise InvalidInputError(
            f"prompt {int(names[row])} has id {int(input_ids[row, place])} at token {place}, which is none of the "
            f"{int(common.sum())} ids that both models share: leave this prompt out, or tokenize it for the model that knows less"
        )


def is_shared(input_ids: Tensor, common: Bool[Tensor, " c"]) -> Tensor:
    """Returns of each id whether it is common, bool of the ids' shape."""
    inside = (input_ids >= 0) & (input_ids < len(common))
    return inside & common.to(input_ids.device)[input_ids.clamp(0, len(common) - 1)]


def restricted(logits: Float[Tensor, "b v"], common: Bool[Tensor, " c"] | None) -> Float[Tensor, "b c"]:
    """Returns the logits of the ids that both vocabularies have, -inf for those among them that mean different tokens."""
    return logits if common is None else logits[:, : len(common)].masked_fill(~common.to(logits.device), -math.inf)


def padded_to(logits: Float[Tensor, "b c"], width: int) -> Float[Tensor, "b v"]:
    """Returns the logits with -inf behind them, up to a width."""
    return functional.pad(logits, (0, width - logits.shape[1]), value=-math.inf)
