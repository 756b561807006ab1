"""Logit diff amplification: after + alpha * (after - before), as a logits processor for Hugging Face's `generate`.

What changed from one model (before) to the other (after) is made larger (alpha above 0) or taken back (-1 is the before model), so
that what fine-tuning made a little likelier becomes likely: Goodfire's model diff amplification; a contrast of two models' logits
as in Liu et al. 2021, "DExperts", and Li et al. 2023, "Contrastive Decoding".
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from exactivations.lit_modules.amplification.cached_model import CachedModel, check_generator, checked_left_padding
from exactivations.lit_modules.amplification.model_pair import (
    check_common,
    is_shared,
    padded_to,
    refuse_unshared,
    restricted,
    vocabulary_width,
)
from exactivations.store.errors import InvalidInputError


def logit_difference(
    *, before: Float[Tensor, "b v"], after: Float[Tensor, "b v"], alpha: Float[Tensor, " b"]
) -> Float[Tensor, "b v"]:
    """Returns after + alpha * (after - before), to the bit `after` for alpha 0 and `before` for alpha -1.

    Args:
        before: [B, V], float32 or float64: half precision would round the difference away.
        after: [B, V], likewise.
        alpha: [B], finite.

    Returns:
        [B, V]. -inf where `after` is -inf (what another processor forbade stays forbidden), and, unless alpha is 0, where `before`
        is.
    """
    assert torch.finfo(after.dtype).bits >= 32 and torch.finfo(before.dtype).bits >= 32
    alpha = alpha.to(after.dtype)[:, None]
    difference = after - before
    # Both lines are the same function; each is exact at one end.
    out = torch.where(alpha < -0.5, before + (1 + alpha) * difference, after + alpha * difference)
    out = out.masked_fill((after == -math.inf) | (before == -math.inf), -math.inf)
    return torch.where(alpha == 0, after, out)


class LogitDifferenceProcessor(LogitsProcessor):
    """Amplifies what the generating model (after) has over another one (before), in any `generate` without beams.

    `after.generate(**prompts, logits_processor=[LogitDifferenceProcessor(before, 2.0)])`. The before model reads every token once:
    it keeps its own keys and values, and when `generate` is called again, it starts anew. Temperature, top-k and top-p follow after
    the amplification; `num_beams` must be 1, since beam search compares sums of log-probabilities, which these are not.

    Args:
        before: The causal language model to amplify against, on the device of the generating one. Best in its dtype too: rounding
            of one model only is amplified like any other difference.
        alpha: One number, or one for each row that is generated (`num_return_sequences` repeats every prompt's row). While all are
            0 the before model does not run.
        attention_mask: [B, L], that of a prompt with padding on the left. Needed for such a prompt, since `generate` does not show
            its mask to a processor; the processor then serves this prompt only.
        common: bool [C], True for ids that mean the same token in both vocabularies (see `tokenizer_compatibility`); all others get
            -inf, whatever alpha. None for equal vocabularies.

    Raises:
        InvalidInputError: If the before model cannot generate, or alpha is not finite; when called, for a vocabulary, device,
            prompt or number of rows that does not fit.
    """

    def __init__(
        self,
        before: PreTrainedModel,
        alpha: float | Sequence[float] | Tensor,
        *,
        attention_mask: Tensor | None = None,
        common: Bool[Tensor, " c"] | None = None,
    ) -> None:
        check_generator(before)
        self._before = before
        self._alpha = torch.as_tensor(alpha, dtype=torch.float64).cpu()
        if self._alpha.ndim > 1 or not self._alpha.isfinite().all():
            raise InvalidInputError(f"alpha must be one finite number, or one for each row, got {self._alpha.tolist()}")
        self._mask = None if attention_mask is None else checked_left_padding(attention_mask)
        self._common = common
        self._model: CachedModel | None = None
        self._read: Tensor | None = None
        self._prompt: Tensor | None = None

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Returns the amplified scores, float32 [B, V]; see the class."""
        if scores.device != self._before.device:
            raise InvalidInputError(
                f"the generating model's logits are on {scores.device}, the before model is on {self._before.device}: move one"
            )
        alpha = self._alpha.expand(len(input_ids)) if self._alpha.ndim == 0 else self._alpha
        if len(alpha) != len(input_ids):
            raise InvalidInputError(
                f"alpha has {len(alpha)} values, {len(input_ids)} rows are generated: give one for each row "
                "(num_return_sequences=n repeats each prompt n times: alpha.repeat_interleave(n))"
            )
        check_common(self._common, before_width=vocabulary_width(self._before), after_width=scores.shape[1])
        after = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if (alpha != 0).any():
            before = restricted(self._next(input_ids), self._common)
            out = logit_difference(before=before, after=restricted(after, self._common), alpha=alpha.to(after.device))
        else:
            out = restricted(after, self._common)
        return cast(torch.FloatTensor, padded_to(out, scores.shape[1]))

    def _next(self, input_ids: Tensor) -> Tensor:
        """Returns the before model's logits of the next token, after reading what it has not read yet."""
        if self._model is None or not _continues(input_ids, self._read):
            mask = self._mask_of(input_ids)
            if self._common is not None:
                real = input_ids if mask is None else input_ids.masked_fill(~mask, int(self._common.nonzero()[0]))
                refuse_unshared(real, self._common, torch.arange(len(input_ids)))
            self._model, self._prompt, n_read = CachedModel(self._before), input_ids, 0
        else:
            assert self._read is not None
            mask, n_read = None, self._read.shape[1]
        self._read = input_ids
        return self._model.read(self._readable(input_ids[:, n_read:]), mask)

    def _readable(self, input_ids: Tensor) -> Tensor:
        # What is not shared can only be padding here: before a prompt, or what generate puts after a row that has ended.
        return input_ids if self._common is None else input_ids.masked_fill(~is_shared(input_ids, self._common), 0)

    def _mask_of(self, prompt: Tensor) -> Tensor | None:
        if self._mask is None:
            self._refuse_padding(prompt)
            return None
        if self._mask.shape != prompt.shape:
            raise InvalidInputError(
                f"attention_mask is {list(self._mask.shape)}, the prompt in generate is {list(prompt.shape)}: expected "
                "the mask of this prompt (num_return_sequences=n repeats each row n times: "
                "attention_mask.repeat_interleave(n, dim=0))"
            )
        if self._prompt is not None and not torch.equal(self._prompt, prompt):
            raise InvalidInputError(
                "generate was called with another prompt than before, and the attention_mask belongs to the first one: make a "
                "processor for each padded prompt"
            )
        return None if self._mask.all() else self._mask.to(prompt.device)

    def _refuse_padding(self, prompt: Tensor) -> None:
        config = self._before.generation_config
        ids = {*_as_list(getattr(config, "pad_token_id", None)), *_as_list(getattr(config, "eos_token_id", None))}
        padded = [row for row, token in enumerate(prompt[:, 0].tolist()) if token in ids]
        if padded:
            raise InvalidInputError(
                f"row {padded[0]} of the prompt begins with token {int(prompt[padded[0], 0])}, which the before model pads or "
                "ends with: pass the prompt's attention_mask (all ones if this token is none of padding)"
            )


def _continues(input_ids: Tensor, read: Tensor | None) -> bool:
    """Whether these are the tokens that were read, and more."""
    if read is None or len(read) != len(input_ids) or read.shape[1] >= input_ids.shape[1]:
        return False
    return torch.equal(input_ids[:, : read.shape[1]], read)


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
