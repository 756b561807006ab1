"""What can be found out about a model by running it on a few random tokens, and what its configuration tells besides."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from exactivations.lit_modules.models.ground_truth import computing_in, relative_error
from exactivations.lit_modules.models.hook_points import HookPoint, dissect, reading, resolve_hook_points
from exactivations.lit_modules.models.language_model import evaluating, forward_arguments, max_positions, vocabulary_size
from exactivations.store.errors import ExactivationsError, InvalidInputError

LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}

States = dict[str, Tensor]


class ForwardError(Exception):
    """A forward pass of the model that failed, in the model's own words."""


def read_states(model: PreTrainedModel, hook_points: list[HookPoint], dtype: torch.dtype, **arguments: Tensor) -> States:
    """Returns the states [B, L, D] at each hook point, on the host, of one forward pass in a dtype.

    Args:
        model: The model's body.
        hook_points: What is read.
        dtype: What is computed in.
        arguments: input_ids int64 [B, L], and what else the forward pass is called with.

    Raises:
        ForwardError: If the model fails.
        InvalidInputError: If a hook point is not reached, runs twice, or is not a tensor [B, L, D].
    """
    found: States = {}
    shape = list(arguments["input_ids"].shape)

    def read(name: str, state: Tensor) -> None:
        if name in found:
            raise InvalidInputError(f"hook point {name} runs more than once in one forward pass; only what runs once can be read")
        if state.ndim != 3 or list(state.shape[:2]) != shape:
            raise InvalidInputError(f"hook point {name} has shape {list(state.shape)} for a batch {shape}; expected [B, L, D]")
        found[name] = state.detach().to("cpu", copy=True)

    on_device = {name: value.to(model.device) for name, value in arguments.items()}
    with torch.no_grad(), evaluating(model), computing_in(model, dtype), reading(model, hook_points, read, stop=False) as run:
        try:
            run(**on_device, **forward_arguments(model))
        except (ValueError, IndexError, TypeError, RuntimeError) as error:
            if is_ours_or_the_machines(error):
                raise
            raise ForwardError(f"the forward pass failed: {type(error).__name__}: {one_line(error)}") from error
    missing = [point.name for point in hook_points if point.name not in found]
    if missing:
        raise InvalidInputError(f"the forward pass did not reach {', '.join(missing)}")
    return found


def last_hidden_state(model: PreTrainedModel) -> dict[str, float]:
    """Says which hook point Hugging Face's own `output_hidden_states` ends with: in most models it is no block's output.

    Returns:
        The relative difference of `hidden_states[-1]` from the last block's `resid_post` and, if the model has one, from
        `final_norm`, each as the extractor reads it. Empty if the model gives no hidden states.

    Raises:
        InvalidInputError: If its blocks are not found, or a hook point cannot be read.
    """
    anatomy = dissect(model)
    names = [f"resid_post.{anatomy.n_blocks - 1}", *(["final_norm"] if anatomy.final_norm else [])]
    (ids,) = random_samples(model, [longest_sample(model, 16)], [], torch.Generator().manual_seed(0))
    states = read_states(model, resolve_hook_points(model, names), model.dtype, input_ids=ids[None])
    with torch.no_grad(), evaluating(model):
        out = model(input_ids=ids[None].to(model.device), output_hidden_states=True, **forward_arguments(model))
    hidden = getattr(out, "hidden_states", None)
    if not hidden:
        return {}
    last = hidden[-1][0].cpu().double()
    return {name: _difference(last, states[name][0].double()) for name in names}


def influence_of_later_tokens(model: PreTrainedModel, hook_points: list[HookPoint]) -> tuple[float, str]:
    """Returns how much a change of later tokens changes earlier ones' states, relative to them, in float32, and where it is most.

    Shapes and kernels are the same in both forward passes, so a causal model shows 0, or rounding where experts regroup tokens.

    Raises:
        InvalidInputError: If a hook point cannot be read.
    """
    n = longest_sample(model, 32)
    first, other = random_samples(model, [n, n], [], torch.Generator().manual_seed(0))
    kept = n // 2
    changed = torch.cat([first[:kept], other[kept:]])
    one, two = (read_states(model, hook_points, torch.float32, input_ids=ids[None]) for ids in (first, changed))
    errors = {name: relative_error(two[name][0, :kept].double(), one[name][0, :kept].double()).max().item() for name in one}
    where = max(errors, key=lambda name: errors[name])
    return errors[where], where


def _difference(found: Tensor, true: Tensor) -> float:
    """Returns norm(found - true) / norm(true) over all rows; infinite for another shape."""
    return ((found - true).norm() / true.norm()).item() if found.shape == true.shape else math.inf


def random_samples(model: PreTrainedModel, lengths: list[int], excluded: Iterable[int], generator: torch.Generator) -> list[Tensor]:
    """Returns samples of random ids int64 [L], without those excluded and those the configuration gives a meaning.

    Raises:
        InvalidInputError: If no ids are left, or the model's vocabulary is not known.
    """
    size = vocabulary_size(model) or getattr(model.config.get_text_config(), "vocab_size", None)
    if size is None:
        raise InvalidInputError(f"{type(model).__name__} has no input embedding and no vocab_size: no tokens can be made for it")
    left_out = {*excluded, *_meant_ids(model.config.to_dict())}
    ids = torch.tensor([i for i in range(size) if i not in left_out])
    if len(ids) < 2:
        raise InvalidInputError(f"{type(model).__name__} has {size} token ids, and all but {len(ids)} are special: nothing to try")
    return [ids[torch.randint(len(ids), (n,), generator=generator)] for n in lengths]


def length_dependent_rope(model: PreTrainedModel) -> set[str]:
    """Returns the kinds of rotary embedding, anywhere in the configuration, that turn by angles which depend on the length."""
    return _values_of(model.config.to_dict(), ("rope_type", "type")) & LENGTH_DEPENDENT_ROPE


def _values_of(config: Any, names: tuple[str, ...]) -> set[str]:
    """Returns all words under these names in a configuration, however deep they lie."""
    if not isinstance(config, dict):
        return set()
    found = {value for name, value in config.items() if name in names and isinstance(value, str)}
    return found.union(*(_values_of(value, names) for value in config.values()))


def _meant_ids(config: Any) -> set[int]:
    """Returns all ids that a configuration gives a meaning (eos_token_id, image_token_index, …), however deep they lie."""
    if not isinstance(config, dict):
        return set()
    found: set[int] = set()
    for name, value in config.items():
        values = value if isinstance(value, list) else [value]
        if str(name).endswith(("token_id", "token_ids", "token_index")):  # id2label has numbers for names
            found |= {v for v in values if isinstance(v, int)}
        found |= _meant_ids(value)
    return found


def longest_sample(model: PreTrainedModel, max_length: int) -> int:
    """Returns the length of the longest sample to try: at most max_length, and what the model has positions for."""
    if max_length < 2:
        raise InvalidInputError(f"max_length must be at least 2, got {max_length}: shorter samples have nothing to pad")
    return min(max_length, max_positions(model) or max_length)


def is_ours_or_the_machines(error: Exception) -> bool:
    """Whether a failure says nothing about the case: an error of this package, too little memory, or a device that is lost."""
    return isinstance(error, ExactivationsError | torch.OutOfMemoryError | torch.AcceleratorError)


def one_line(error: Exception) -> str:
    """Returns the first line of an error's message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
