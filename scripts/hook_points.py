"""`exactivations hook-points`: what can be read from a model."""

from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from exactivations.lit_modules.hook_points import HookPoint


def hook_points(model: str, *, revision: str | None = None, modules: bool = False, trust_remote_code: bool = False) -> None:
    """Lists the hook points of a model with their shapes, and says what was not found. Needs no weights.

    Args:
        model: "demo" (embedded), a Hugging Face hub id, or a local path.
        revision: Branch, tag or commit of a hub model.
        modules: List all modules too, for use as module:<path>.
        trust_remote_code: Whether code from the model's repository may run.
    """
    from exactivations.lit_modules.hook_points import dissect, resolve_hook_points
    from exactivations.lit_modules.language_model import ModelOptions, load_skeleton, max_positions

    skeleton = load_skeleton(model, ModelOptions(revision=revision, trust_remote_code=trust_remote_code))
    anatomy, positions = dissect(skeleton), max_positions(skeleton)
    limit = f"{positions:,} positions" if positions else "no limit of positions"
    print(f"{model}: {type(skeleton).__name__}, {anatomy.n_blocks} blocks at {anatomy.blocks or '?'}, {limit}")
    points = resolve_hook_points(skeleton, anatomy.names()) if anatomy.blocks else []
    shapes = shapes_without_weights(skeleton, points)
    for point in points:
        where = f"input of {point.path}" if point.reads_input else point.path
        print(f"  {point.name:<16} {shapes.get(point.name, '?'):<14} {where} ({type(skeleton.get_submodule(point.path)).__name__})")
    if len(shapes) < len(points):
        print("  ?: the shape depends on values (experts, say), so it cannot be told without weights; extract measures it")
    for note in anatomy.notes:
        print(f"  not found: {note}")
    if modules:
        for path, module in skeleton.named_modules():
            if path:
                print(f"  module:{path} ({type(module).__name__})")


def shapes_without_weights(skeleton: "PreTrainedModel", points: "list[HookPoint]") -> dict[str, str]:
    """Returns shapes by hook point name, from a forward pass without values; those that it does not reach are left out."""
    import torch
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

    from exactivations.lit_modules.hook_points import reading
    from exactivations.lit_modules.language_model import forward_arguments

    shapes: dict[str, str] = {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def note(name: str, state: torch.Tensor) -> None:
        shapes[name] = f"[B, L, {state.shape[-1]}]"

    unknowable = (DataDependentOutputException, DynamicOutputShapeException)  # the caller tells which shapes are missing
    with suppress(*unknowable), torch.no_grad(), mode, reading(skeleton, points, note):
        skeleton(input_ids=torch.zeros(1, 4, dtype=torch.int64, device="meta"), **forward_arguments(skeleton))
    return shapes
