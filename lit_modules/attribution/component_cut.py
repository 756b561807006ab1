"""Forward passes that are cut at every decomposed map, so that gradients see direct paths only; and many gradients at once."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from exactivations.lit_modules.decomposition.component_linear import ComponentLinear, is_plain
from exactivations.lit_modules.decomposition.component_model import ComponentModel
from exactivations.lit_modules.models.language_model import evaluating, outputs_of
from exactivations.store.attributions import OUTPUT, WTE
from exactivations.store.errors import InvalidInputError


@dataclass(frozen=True)
class CutPass:
    """What one cut forward pass of R rows leaves behind: where gradients begin and where they end.

    Attributes:
        ends: By map what it reads, [R, L, d_in], and by "output" the logits, [R, L, V], with the graph from `starts`.
        starts: By map what it writes, [R, L, d_out], and by "wte" the token embeddings, [R, L, D]: leaves, on which gradients end.
        inner: By map what each component reads off, x @ V, [R, L, C], without a graph.
    """

    ends: dict[str, Tensor]
    starts: dict[str, Tensor]
    inner: dict[str, Tensor]


def causal_model(components: ComponentModel) -> PreTrainedModel:
    """Returns the language model inside.

    Raises:
        InvalidInputError: If it is none with a token embedding and a head.
    """
    model = components.model
    if (
        not isinstance(model, PreTrainedModel)
        or not isinstance(model.get_input_embeddings(), nn.Module)
        or model.get_output_embeddings() is None  # type: ignore[no-untyped-call]
    ):
        raise InvalidInputError(f"a {type(model).__name__} is no causal language model with a token embedding and a head")
    return model


def cut_pass(
    components: ComponentModel,
    input_ids: Int64[Tensor, "r l"],
    maps: Mapping[str, ComponentLinear],
    masks: Mapping[str, Float[Tensor, "r l c"]] | None = None,
    output_ids: Int64[Tensor, " a"] | None = None,
) -> CutPass:
    """Runs the model with what every decomposed map writes, and the token embedding, taken out of the graph.

    Args:
        components: The model.
        input_ids: int64 [R, L], on its device.
        maps: All of its maps, each with all of its components or only some, which are then the only ones.
        masks: By map, of these components. None: the maps as they were, which is all their components and what these lack.
        output_ids: Compute the logits of these token ids only. None: all.

    Raises:
        InvalidInputError: If a map does not run, or runs on anything but [R, L, d_in].
    """
    model = causal_model(components)
    found = CutPass({}, {}, {})

    def cut(path: str, linear: ComponentLinear) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            if x.shape[:-1] != input_ids.shape:
                raise InvalidInputError(
                    f"map {path} reads {list(x.shape)} for a batch {list(input_ids.shape)}: only maps that read every position "
                    "in its place ([B, L, d_in]) can be attributed to; leave it out"
                )
            found.ends[path] = x.clone()  # models may go on in place, here and with what is returned
            with torch.no_grad():  # so that nothing of it is kept for gradients, which end here
                found.inner[path] = x @ linear.V
                written = linear.original(x) if masks is None else linear.outward(found.inner[path] * masks[path])
            found.starts[path] = written.detach().requires_grad_()
            return found.starts[path].clone()

        return run

    def cut_embedding(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        found.starts[WTE] = out.detach().requires_grad_()
        return found.starts[WTE].clone()

    handle = model.get_input_embeddings().register_forward_hook(cut_embedding)
    try:
        with torch.enable_grad(), evaluating(model), components.running({p: cut(p, m) for p, m in maps.items()}):
            found.ends[OUTPUT] = logits(model, input_ids, output_ids)
    finally:
        handle.remove()
    missing = [path for path in maps if path not in found.ends]
    if missing:
        raise InvalidInputError(f"map {missing[0]} does not run in a forward pass of {type(model).__name__}: leave it out")
    return found


def logits(model: PreTrainedModel, input_ids: Int64[Tensor, "r l"], output_ids: Int64[Tensor, " a"] | None = None) -> Tensor:
    """Returns the logits [R, L, V], or [R, L, A] of these token ids.

    The head runs whole in either case, but gradients of those of some tokens go through these tokens' weights alone if it is a
    plain linear map.

    Raises:
        InvalidInputError: If the model does something with the head's output for which it must be whole.
    """
    if output_ids is None:
        return outputs_of(model, input_ids)
    head, of_head = model.get_output_embeddings(), list[Tensor]()  # type: ignore[no-untyped-call]
    plain = isinstance(head, nn.Linear) and is_plain(head)

    def restricted(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if plain:
            bias = None if head.bias is None else head.bias[output_ids]
            out = nn.functional.linear(args[0], head.weight[output_ids], bias)
        else:
            out = out[..., output_ids]
        of_head.append(out)
        return out

    handle = head.register_forward_hook(restricted)
    try:
        some = outputs_of(model, input_ids)
    except RuntimeError as error:
        if not of_head:
            raise
        raise InvalidInputError(f"{type(model).__name__} cannot compute the logits of some tokens only: {error}") from error
    finally:
        handle.remove()
    if some.shape != (*input_ids.shape, len(output_ids)):
        raise InvalidInputError(f"{type(model).__name__} gives {list(some.shape)} for the logits of {len(output_ids)} tokens")
    return some


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Has attention computed by plain matrix products inside the `with` block: fused kernels give one gradient at a time."""
    before = model.config._attn_implementation
    if before in (None, "eager"):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def many_gradients(end: Float[Tensor, "..."], starts: Sequence[Tensor], directions: Float[Tensor, "k ..."]) -> tuple[Tensor, ...]:
    """Returns the gradients of K scalars <direction, end> with respect to each start, [K, …]; zeros where there is no path.

    They are computed together, by torch.func.vmap. (`torch.autograd.grad(…, is_grads_batched=True)` has the same meaning, but an
    older machinery that computes normalisations, softmax and GELU one gradient at a time, without a word.) Here too an operation
    that would be computed one at a time is refused, and not done slowly.

    Raises:
        InvalidInputError: If the model has such an operation.
    """

    def gradients(direction: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(end, starts, direction, retain_graph=True, materialize_grads=True)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batching rule.*")
        try:
            found: tuple[Tensor, ...] = torch.func.vmap(gradients)(directions)
        except UserWarning as error:
            raise InvalidInputError(
                f"the model has an operation whose gradients cannot be computed together: {str(error).partition('.')[0]}"
            ) from error
    return found
