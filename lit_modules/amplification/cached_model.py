"""A causal language model that reads on from where it was: its keys and values are kept; rows can be chosen, and others join."""

import copy
import inspect
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from exactivations.lit_modules.models.language_model import body_of, evaluating, has_head, refuse_rounded_buffers
from exactivations.lit_modules.models.model_facts import length_dependent_rope
from exactivations.store.errors import InvalidInputError


class CachedModel:
    """A causal language model and the keys and values of what it has read so far. The model itself is not changed.

    Args:
        model: A model with its head, to which `check_generator` says nothing.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._cache = DynamicCache(config=model.config)
        self._mask: Tensor | None = None

    @torch.no_grad()
    def read(self, input_ids: Int64[Tensor, "b n"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b v"]:
        """Reads tokens after those read before, and returns the logits of the next one: float32, or float64 of a float64 model.

        Args:
            input_ids: int64 [B, n] on the model's device.
            mask: bool [B, n], False for padding on the left, with the first tokens only: later ones are all real. Positions are
                counted from each row's first real token, as `generate` does.

        Raises:
            InvalidInputError: If the model did not keep the keys and values of these tokens.
        """
        n_before = self._cache.get_seq_length()
        arguments: dict[str, Any] = dict(self._last_only)
        if mask is not None or self._mask is not None:
            arguments |= self._masked(torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask)
        with evaluating(self.model):
            logits: Tensor = self.model(input_ids=input_ids, past_key_values=self._cache, use_cache=True, **arguments).logits
        if self._cache.get_seq_length() != n_before + input_ids.shape[1]:
            raise InvalidInputError(
                f"{type(self.model).__name__} read {input_ids.shape[1]} tokens after {n_before}, and its cache holds "
                f"{self._cache.get_seq_length()}: a model that keeps no keys and values cannot be amplified"
            )
        return logits[:, -1].to(torch.promote_types(logits.dtype, torch.float32))

    def fork(self, rows: Int64[Tensor, " b"]) -> "CachedModel":
        """Returns another one that goes on with these rows, while this one stays as it is; see `select`."""
        other = copy.copy(self)
        other._cache = copy.copy(self._cache)
        other._cache.layers = [
            copy.copy(layer) for layer in self._cache.layers
        ]  # a layer replaces its tensors, and never writes them
        other.select(rows)
        return other

    def select(self, rows: Int64[Tensor, " b"]) -> None:
        """Goes on with these rows, in this order: fewer of them, or some several times. Copies what is kept.

        Raises:
            InvalidInputError: If the model keeps states of which this is not known to be right (linear attention, say).
        """
        _ = self._layers
        self._cache.batch_select_indices(rows)
        if self._mask is not None:
            self._mask = self._mask[rows]
            self._drop_common_padding()

    def join(self, other: "CachedModel") -> None:
        """Goes on with the rows of another one too, behind its own; those that have read less are padded on the left.

        The other one, of the same model, stays as it is. Copies what is kept.

        Raises:
            InvalidInputError: As `select` does.
        """
        masks = [part._whole_mask() for part in (self, other)]
        n_read = max(mask.shape[1] for mask in masks)
        for mine, theirs in zip(self._layers, other._layers, strict=True):
            mine.keys, mine.values = _stacked(mine.keys, theirs.keys), _stacked(mine.values, theirs.values)
            if isinstance(mine, DynamicSlidingWindowLayer):
                mine.cumulative_length = n_read
        self._mask = torch.cat([functional.pad(mask, (n_read - mask.shape[1], 0)) for mask in masks])
        self._drop_common_padding()

    @property
    def _layers(self) -> list[DynamicLayer]:
        """The layers' keys and values, if that is all that they keep."""
        layers = [layer for layer in self._cache.layers if isinstance(layer, DynamicLayer)]
        for layer in self._cache.layers:
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise InvalidInputError(
                    f"{type(self.model).__name__} has layers that keep a {type(layer).__name__}, expected keys and values of "
                    "attention, full or in a sliding window: rows of other states cannot be chosen safely"
                )
        return layers

    def _whole_mask(self) -> Tensor:
        """Returns which of the tokens read are real, bool [B, n]."""
        if self._mask is not None:
            return self._mask
        keys = _there(self._layers[0].keys)
        return torch.ones(len(keys), self._cache.get_seq_length(), dtype=torch.bool, device=keys.device)

    def _drop_common_padding(self) -> None:
        """Forgets leading tokens that are padding in all rows, and the mask if nothing else is padded. Waits for the device."""
        assert self._mask is not None
        n_padding = int(self._mask.any(dim=0).long().argmax())
        self._mask = self._mask[:, n_padding:]
        for layer in self._layers if n_padding else ():
            keys, values = _there(layer.keys), _there(layer.values)
            n_kept = min(keys.shape[2], self._mask.shape[1])  # a window keeps its last tokens only
            layer.keys, layer.values = keys[:, :, -n_kept:].contiguous(), values[:, :, -n_kept:].contiguous()
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length -= n_padding
        if self._mask.all():
            self._mask = None

    def _masked(self, mask: Tensor) -> dict[str, Tensor]:
        self._mask = mask if self._mask is None else torch.cat([self._mask, mask], dim=1)
        arguments = {"attention_mask": self._mask.long()}
        if self._takes_positions:
            positions = (self._mask.long().cumsum(dim=1) - 1).clamp_min(0)
            arguments["position_ids"] = positions[:, -mask.shape[1] :]
        return arguments


def check_generator(model: PreTrainedModel) -> None:
    """Refuses a model that cannot generate token by token with a cache.

    Raises:
        InvalidInputError: If it has no head, keeps no keys and values, or its buffers were rounded.
    """
    body = body_of(model)
    if not has_head(model) or model.config.is_encoder_decoder:
        raise InvalidInputError(
            f"{type(model).__name__} is no causal language model with its head: load it with AutoModelForCausalLM.from_pretrained"
        )
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise InvalidInputError(f"{type(model).__name__} takes no past_key_values: a model without that cache cannot be amplified")
    refuse_rounded_buffers(body, values_change=bool(length_dependent_rope(body)))


def _stacked(*parts: Tensor | None) -> Tensor:
    """Returns keys or values [B, H, n, D] of all parts, the shorter ones with zeros, which nothing attends to, on the left."""
    there = [_there(part) for part in parts]
    length = max(part.shape[2] for part in there)
    return torch.cat([functional.pad(part, (0, 0, length - part.shape[2], 0)) for part in there])


def _there(states: Tensor | None) -> Tensor:
    assert states is not None, "nothing has been read yet"
    return states


def checked_left_padding(attention_mask: Tensor) -> Bool[Tensor, "b n"]:
    """Returns a prompt's attention mask as bool.

    Raises:
        InvalidInputError: If padding is anywhere but on the left, where what is generated follows the prompt at once.
    """
    mask = attention_mask.bool()
    if mask.ndim != 2 or not mask[:, -1].all() or (mask[:, :-1] & ~mask[:, 1:]).any():
        raise InvalidInputError(
            f"attention_mask, {list(mask.shape)}, must be [B, L] with all padding on the left (0, then 1): "
            "set tokenizer.padding_side = 'left'"
        )
    return mask
