"""The truth that stored activations are held against: one sample alone, in the whole model, with no batch, padding or shard.

A residual state is taken where the *next* module receives it, not where the extractor reads it, and poolings follow their
definitions in float64. So a fault in reading, batching, pooling, writing or indexing cannot be on both sides.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from exactivations.lit_modules.models.hook_points import HookPoint, dissect
from exactivations.lit_modules.models.language_model import evaluating
from exactivations.store.errors import InvalidInputError
from exactivations.store.pooling_names import TOKENS, half_life_of

FLOAT32_TOLERANCE = 1e-4
ROUNDING_FACTOR = 4.0
WIDTH_WITH_OUTLIERS = 16  # below that a hundredth of the dimensions is too much of a row
MOST_TOLERATED = 0.5
"""However much rounding does: beyond this error a row could be another sample's, and takes the proof in float32."""

TOLERANCE_IN_WORDS = (
    "float32: 1e-4 of a row's norm, a hundred times what another order of summation does. Half precision: the sample's batch, "
    "computed again, must give the stored rows, and in float32 the sample alone to 1e-4; what is left for the dtype is four times "
    "what rounding did to this very row (the sample alone in float32 against itself in the lower precision), at least four times "
    "what rounding a single number can do, and at most half of the norm"
)


@dataclass(frozen=True)
class Comparison:
    """One sample's rows of one activation, held against the truth.

    Attributes:
        name: "<hook point>/<pooling>".
        sample_index: The sample.
        error: The worst row's error, see `row_errors`; infinite if anything is not finite.
        cosine: The lowest cosine of a stored row and its true one.
        rounding: What rounding alone does: the relative difference of the truth in the compute dtype and in float32.
        tolerance: The largest error that is allowed.
        worst_row: The row with this error: for "tokens" the position in the sample, else 0.
        n_rows: How many rows were compared, and n_beyond: how many of them are further off than allowed.
        is_near_tie: Whether a larger error was traced to a router that chose other experts, since rounding tipped the choice.
    """

    name: str
    sample_index: int
    error: float
    cosine: float
    rounding: float
    tolerance: float
    worst_row: int = 0
    n_rows: int = 1
    n_beyond: int = 0
    is_near_tie: bool = False

    @property
    def agrees(self) -> bool:
        """Whether the stored rows are the true ones, up to rounding."""
        within = math.isfinite(self.error) and self.error <= self.tolerance  # where the truth overflows, so does the tolerance
        return within or self.is_near_tie


class GroundTruth:
    """Computes samples alone.

    Args:
        model: The model's body, on any device; it is left as it was.
        hook_points: What is read.
        arguments: What the forward pass is called with besides the ids.
    """

    def __init__(self, model: PreTrainedModel, hook_points: list[HookPoint], arguments: dict[str, Any]) -> None:
        self.model, self._hook_points, self._arguments = model, hook_points, arguments
        self._anatomy = dissect(model)

    @torch.no_grad()
    def states(
        self, input_ids: Tensor, dtype: torch.dtype | None = None, hook_points: list[str] | None = None
    ) -> dict[str, Tensor]:
        """Returns the state [L, D] at each hook point for one sample's ids [L], on the host in the compute dtype.

        Args:
            input_ids: int64 [L].
            dtype: Compute in this dtype; None is the model's own. A higher one than the weights' is exact.
            hook_points: Only these; None is all.

        Raises:
            InvalidInputError: If the forward pass does not reach a hook point.
        """
        found: dict[str, Tensor] = {}

        def keep(name: str, state: Any) -> None:
            state = _first(state)
            if isinstance(state, Tensor) and state.ndim == 3:
                found[name] = state[0].detach().to("cpu", copy=True)  # on the device all of them together could be too many

        points = [point for point in self._hook_points if hook_points is None or point.name in hook_points]
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(computing_in(self.model, dtype or self.model.dtype))
            for point in points:
                self._watch(point, keep, stack)
            out = self.model(input_ids=input_ids[None].to(self.model.device), **self._arguments)
        for point in points:
            # What the model hands out is its final norm's output, unless it is projected to another width after that.
            if point.name == "final_norm" and out[0][0].shape == found[point.name].shape:
                keep(point.name, out[0])
        missing = [point.name for point in points if point.name not in found]
        if missing:
            raise InvalidInputError(f"computing one sample alone did not reach {', '.join(missing)}")
        return found

    def _watch(self, point: HookPoint, keep: Callable[[str, Any], None], stack: ExitStack) -> None:
        """Watches where a hook point's state arrives."""
        kind, _, layer = point.name.partition(".")
        receiver = self._receivers.get(int(layer)) if kind == "resid_post" else None
        path = f"{self._anatomy.blocks}.{layer}" if kind == "resid_post" else point.path
        if point.reads_input and kind != "embed":
            stack.enter_context(_receiving(self.model.get_submodule(point.path), lambda state: keep(point.name, state)))
            return
        if receiver is not None or point.reads_input:
            handle = self.model.get_submodule(receiver or point.path).register_forward_pre_hook(
                lambda _, args, kwargs: keep(point.name, _input(args, kwargs)), with_kwargs=True
            )
        else:
            handle = self.model.get_submodule(path).register_forward_hook(lambda _, __, output: keep(point.name, output))
        stack.callback(handle.remove)

    @cached_property
    @torch.no_grad()
    def _receivers(self) -> dict[int, str]:
        """Returns, for each block, the module that receives just what it puts out: the next block, or the final norm.

        Some models change the state in between, or norm it in a module that is not found: these blocks are not in it, and their
        own output is what counts. Looked at once, over four tokens.
        """
        blocks, n = self._anatomy.blocks, self._anatomy.n_blocks
        if blocks is None:
            return {}
        after = {i: f"{blocks}.{i + 1}" for i in range(n - 1)}
        if self._anatomy.final_norm is not None:
            after[n - 1] = self._anatomy.final_norm
        put_out: dict[int, Any] = {}
        same: dict[int, bool] = {}

        def note(block: int, received: Any) -> None:
            state = put_out.get(block)
            same[block] = isinstance(received, Tensor) and isinstance(state, Tensor) and torch.equal(state, received)

        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            for i in range(n):
                handle = self.model.get_submodule(f"{blocks}.{i}").register_forward_hook(
                    lambda _, __, output, i=i: put_out.update({i: _first(output)})
                )
                stack.callback(handle.remove)
            for i, path in after.items():
                handle = self.model.get_submodule(path).register_forward_pre_hook(
                    lambda _, args, kwargs, i=i: note(i, _input(args, kwargs)), with_kwargs=True
                )
                stack.callback(handle.remove)
            self.model(input_ids=torch.arange(4, device=self.model.device)[None], **self._arguments)
        return {i: path for i, path in after.items() if same.get(i, False)}


@contextmanager
def _receiving(module: nn.Module, keep: Callable[[Any], None]) -> Iterator[None]:
    """Gives the first argument of a module's forward function to `keep`: what it computes with, after all hooks, and by no hook."""
    own, forward = vars(module).get("forward"), module.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        keep(next(iter(inspect.signature(forward).bind(*args, **kwargs).arguments.values())))
        return forward(*args, **kwargs)

    module.forward = watched
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states")


@contextmanager
def computing_in(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Lets a model compute in another dtype inside the `with` block; its weights are exactly the old ones after it.

    A higher precision than the model's own is computed without TF32 or other short cuts.

    The blocks are converted one at a time, while they run, so that a model fits in float32 where it fits in half precision.
    Buffers that a model keeps in float32 (rotary frequencies) stay in float32. Flash attention knows no float32: there "sdpa"
    takes its place.
    """
    if dtype == model.dtype:
        yield
        return
    if getattr(model, "hf_quantizer", None) is not None:
        raise InvalidInputError(
            f"{type(model).__name__} is quantised: it cannot be computed in {str(dtype).removeprefix('torch.')}, and so rounding "
            "cannot be told from error. Verify nothing (--verify-samples 0), or take a model that is not quantised"
        )
    blocks_path = dissect(model).blocks
    blocks = list(model.get_submodule(blocks_path).children()) if blocks_path else []
    in_blocks = {id(t) for block in blocks for t in block.parameters()}
    outside = [t for t in _weights(model) if id(t) not in in_blocks]
    held: Held = {}
    handles = []
    short_cuts = torch.get_float32_matmul_precision()
    attention = getattr(model.config, "_attn_implementation", None)
    try:
        if dtype in (torch.float32, torch.float64):
            torch.set_float32_matmul_precision("highest")
            if "flash" in str(attention):
                model.set_attn_implementation("sdpa")
        _convert(outside, dtype, held)
        for block in blocks:
            weights = _weights(block)
            handles.append(block.register_forward_pre_hook(lambda *_, w=weights: _convert(w, dtype, held)))
            handles.append(block.register_forward_hook(lambda *_, w=weights: _restore(w, held), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        _restore([tensor for tensor, _ in held.values()], held)
        torch.set_float32_matmul_precision(short_cuts)
        if attention is not None and getattr(model.config, "_attn_implementation", None) != attention:
            model.set_attn_implementation(attention)


def _weights(module: nn.Module) -> list[Tensor]:
    """Returns all floating parameters, and the buffers that are in half precision (which were made with them)."""
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point() and buffer.dtype != torch.float32]
    return [parameter for parameter in module.parameters() if parameter.is_floating_point()] + buffers


Held = dict[int, tuple[Tensor, Tensor]]  # by identity: a converted weight, and what it held before


def _convert(tensors: list[Tensor], dtype: torch.dtype, held: Held) -> None:
    for tensor in tensors:
        if tensor.dtype != dtype and id(tensor) not in held:
            held[id(tensor)] = tensor, tensor.data
            tensor.data = tensor.data.to(dtype)


def _restore(tensors: list[Tensor], held: Held) -> None:
    for tensor in tensors:
        if id(tensor) in held:
            tensor.data = held.pop(id(tensor))[1]


def pool_by_definition(states: Float[Tensor, "l d"], mask: Bool[Tensor, " l"], pooling: str) -> Float[Tensor, "n d"]:
    """Returns one sample's pooled row [1, D] (or all rows for "tokens") in float64, straight from the definition.

    There is no row [0, D] for a position that the sample does not have.
    """
    if pooling == TOKENS:
        return states.double()
    counted = states.double()[mask]
    n = len(counted)
    if pooling in ("last", "first"):
        return counted[-1:] if pooling == "last" else counted[:1]
    if pooling.startswith("position:"):
        k = int(pooling.removeprefix("position:"))
        return counted[[i for i in range(n) if i == k or i - n == k]]
    if pooling == "max":
        return counted.max(dim=0, keepdim=True).values
    if pooling == "mean":
        return counted.mean(dim=0, keepdim=True)
    half_life = half_life_of(pooling) * n
    weights = torch.tensor([math.exp(-math.log(2) * (n - 1 - i) / half_life) for i in range(n)], dtype=torch.float64)
    return (weights / weights.sum())[None] @ counted


def tolerance_for(dtypes: list[torch.dtype], rounding: float) -> float:
    """Returns the largest relative error that rounding can explain; see TOLERANCE_IN_WORDS.

    Args:
        dtypes: All dtypes that the values went through: computed, stored, and that of the truth.
        rounding: What rounding did to the row itself.
    """
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    rounding = rounding if math.isfinite(rounding) else 0.0  # an overflow explains no finite value
    if coarsest <= torch.finfo(torch.float32).eps:
        return FLOAT32_TOLERANCE
    return min(ROUNDING_FACTOR * max(rounding, coarsest / 2), MOST_TOLERATED)


def compare(
    name: str,
    sample_index: int,
    stored: Float[Tensor, "n d"],
    true: Float[Tensor, "n d"],
    coarse: Float[Tensor, "n d"],
    fine: Float[Tensor, "n d"],
    dtypes: list[torch.dtype],
) -> Comparison:
    """Holds rows [n, D] against the truth.

    Args:
        name: "<hook point>/<pooling>".
        sample_index: The sample.
        stored: What the store holds.
        true: The sample alone.
        coarse: The sample alone in the coarsest dtype that is involved, and `fine`, in float32: their difference is rounding.
        fine: See `coarse`.
        dtypes: All dtypes that the values went through.
    """
    assert stored.shape == true.shape == coarse.shape == fine.shape, f"{name}: {stored.shape}, {true.shape}"
    stored = stored.double()
    errors = row_errors(stored, true)
    cosine = nn.functional.cosine_similarity(stored, true, dim=1, eps=1e-300).min().item()
    # Each row's own rounding, since rows differ in it and a fault in a quiet one must not hide behind a loud one; but not less than
    # half of the sample's rows suffered, since one row can be lucky.
    rounding = row_errors(coarse, fine)
    rounding = rounding.maximum(rounding.median())
    allowed = torch.tensor([tolerance_for(dtypes, r) for r in rounding.tolist()], dtype=torch.float64)
    worst = int((errors / allowed).argmax())
    return Comparison(
        name, sample_index, errors[worst].item(), cosine, rounding[worst].item(), allowed[worst].item(), worst,
        n_rows=len(errors), n_beyond=int((~(errors <= allowed)).sum()),
    )  # fmt: skip


def row_errors(found: Float[Tensor, "n d"], true: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Returns each row's relative error, and that of the row without its largest hundredth of dimensions if that is larger.

    A few dimensions can hold nearly all of a row's norm. Whatever went wrong in the others would be nothing beside them.
    """
    errors = relative_error(found, true)
    width = true.shape[1]
    if width < WIDTH_WITH_OUTLIERS:
        return errors
    largest = true.abs().nan_to_num(nan=math.inf).topk(-(-width // 100), dim=1).indices
    rest = torch.ones_like(true).scatter(1, largest, 0.0)
    return errors.maximum(relative_error(found * rest, true * rest))


def relative_error(found: Float[Tensor, "n d"], true: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Returns norm(found - true) / norm(true) of each row; 0 for two rows of zeros, infinite where anything is not finite."""
    difference, norm = (found - true).norm(dim=1), true.norm(dim=1)
    error = torch.where(difference == 0, 0.0, difference / norm)
    return torch.where(torch.isfinite(difference) & torch.isfinite(norm), error, torch.inf)
