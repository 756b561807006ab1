"""The context manager in which a model runs with its states changed, and after which it is as it was."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from exactivations.lit_modules.models.hook_points import HookPoint, editing, resolve_hook_points, width_of
from exactivations.lit_modules.models.language_model import body_of
from exactivations.lit_modules.steering.edits import Edit
from exactivations.lit_modules.steering.steered_positions import ForwardPass
from exactivations.store.errors import InvalidInputError


@contextmanager
def steering(model: PreTrainedModel, edits: Sequence[Edit]) -> Iterator[None]:
    """Changes the model's states in every forward pass inside the `with` block: `generate`, a plain call, an extraction.

    What follows a hook point gets the changed states, and whoever reads there does too (hooks, `output_hidden_states`,
    `ActivationExtractor` on this very object). The states are changed at the marked positions alone; at others, and wherever the
    pass came before, every bit is as it would have been. Edits of one hook point are made in the order given, in float32
    (float64 in a float64 model), and rounded once to the dtype of the states. Vectors are taken as they are on entering, without
    gradients; gradients flow through the states.

    Blocks can be nested: the outer one's edits come first. On leaving, also by an exception, nothing is left on the model.

    Which tokens a pass reads is taken from the arguments of the model's own forward: input_ids or inputs_embeds, past_key_values
    and a 2-D attention_mask (none: no token is padding). With a cache, `generate` reads the prompt in one pass and then one token
    in each; what was steered before stays in the keys and values that were made of it.

    Args:
        model: Any Hugging Face model but an encoder-decoder, with or without a head, in any dtype and on any device. `module:`
            paths are those of the model without its head, as in extraction.
        edits: `Add`, `Ablate`, `Replace`.

    Raises:
        InvalidInputError: On entering, if a hook point is not in the model, a vector is of another width or too large for the
            model's dtype. In a forward pass, if which tokens are to be steered cannot be known, the states at a hook point are not
            [B, L, D], a hook point was not reached, was reached twice, or was run by itself.
    """
    edits = list(edits)
    others = [type(edit).__name__ for edit in edits if not isinstance(edit, Edit)]
    if not edits or others:
        raise InvalidInputError(f"steering needs a list of edits (Add, Ablate, Replace), got {', '.join(others) or 'none'}")
    body = body_of(model)
    if model.config.is_encoder_decoder:
        raise InvalidInputError(f"{type(model).__name__} is an encoder-decoder: positions of its two texts are not told apart")
    points = resolve_hook_points(body, list(dict.fromkeys(edit.hook_point for edit in edits)))
    dtype = torch.promote_types(body.dtype, torch.float32)
    prepared = [_Prepared(edit, edit.constant(dtype)) for edit in edits]
    by_name = {point.name: point for point in points}
    for each in prepared:
        _check_fits(body, by_name[each.edit.hook_point], each)
    watch = _Watch(prepared)
    with _watching({id(m): m for m in (model, body)}.values(), watch), editing(body, points, watch.edit):
        yield


@dataclass(frozen=True)
class _Prepared:
    """An edit, and what it needs of its vectors: on the host and, once used, on each device."""

    edit: Edit
    constant: Tensor
    on_device: dict[torch.device, Tensor] = field(default_factory=dict)

    def changed(self, states: Tensor) -> Tensor:
        if states.device not in self.on_device:
            self.on_device[states.device] = self.constant.to(states.device)
        return self.edit.changed(states, self.on_device[states.device])


class _Watch:
    """Knows the forward pass that is under way, and steers in it."""

    def __init__(self, prepared: list[_Prepared]) -> None:
        self._prepared = prepared
        self._names = list(dict.fromkeys(each.edit.hook_point for each in prepared))
        self._outermost: nn.Module | None = None
        self._pass: ForwardPass | None = None
        self._marked: list[Tensor] = []
        self._reached: set[str] = set()

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._outermost is not None:  # the body within the model with its head
            return
        now = ForwardPass.of(module, args, kwargs)
        self._marked = [now.marked(each.edit.positions) for each in self._prepared]
        self._pass, self._outermost, self._reached = now, module, set()

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is not self._outermost:
            return
        self._outermost = self._pass = None
        missed = [name for name in self._names if name not in self._reached]
        if output is not None and missed:  # None: the pass was left by an exception, which says more
            raise InvalidInputError(f"steering: the forward pass did not reach {', '.join(missed)}, so it was not steered there")

    def edit(self, name: str, states: Tensor) -> Tensor:
        now = self._pass
        if now is None:
            raise InvalidInputError(f"steering: {name} was run by itself, outside of a forward pass of the model: call the model")
        if name in self._reached:
            raise InvalidInputError(f"steering: {name} is reached twice in one forward pass: steer a module that runs once")
        self._reached.add(name)
        chosen = [(p, marked) for p, marked in zip(self._prepared, self._marked, strict=True) if p.edit.hook_point == name]
        for prepared, _ in chosen:
            expected = [now.n_rows, now.n_columns, prepared.edit.width]
            if list(states.shape) != expected or not states.is_floating_point():
                raise InvalidInputError(
                    f"steering: {name} has states {states.dtype} {list(states.shape)}, expected floating {expected}, [B, L, D] of "
                    "this pass and the vector: steer another hook point, or take a vector that was read there"
                )
        with torch.autocast(states.device.type, enabled=False):
            new = states.to(chosen[0][0].constant.dtype)
            for prepared, marked in chosen:
                new = torch.where(marked.to(states.device)[..., None], prepared.changed(new), new)
        return new.to(states.dtype)  # exact where nothing was changed


@contextmanager
def _watching(modules: Any, watch: _Watch) -> Iterator[None]:
    handles = []
    try:
        for module in modules:
            handles.append(module.register_forward_pre_hook(watch.begin, with_kwargs=True))
            handles.append(module.register_forward_hook(watch.end, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_fits(body: PreTrainedModel, point: HookPoint, prepared: _Prepared) -> None:
    edit = prepared.edit
    title = f"{type(edit).__name__} at {edit.hook_point}"
    width = width_of(body, point)
    if width is not None and edit.width != width:
        raise InvalidInputError(
            f"{title} is {edit.width} wide, the states of {type(body).__name__} are {width}: another model's vector, or several "
            "poolings concatenated"
        )
    if not prepared.constant.to(body.dtype).isfinite().all():
        raise InvalidInputError(f"{title} is too large for {body.dtype}: it would be inf; lower the coefficient")
