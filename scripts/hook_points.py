"""`exactivations hook-points`: what can be read from a model."""


def hook_points(model: str, *, revision: str | None = None, modules: bool = False, trust_remote_code: bool = False) -> None:
    """Lists the hook points of a model with their shapes, and says what was not found. Needs no weights.

    Args:
        model: "demo" (embedded), a Hugging Face hub id, or a local path.
        revision: Branch, tag or commit of a hub model.
        modules: List all modules too, for use as module:<path> and input:<path>.
        trust_remote_code: Whether code from the model's repository may run.
    """
    from exactivations.lit_modules.models.hook_points import dissect, resolve_hook_points, width_of
    from exactivations.lit_modules.models.language_model import ModelOptions, load_skeleton, max_positions

    skeleton = load_skeleton(model, ModelOptions(revision=revision, trust_remote_code=trust_remote_code))
    anatomy, positions = dissect(skeleton), max_positions(skeleton)
    limit = f"{positions:,} positions" if positions else "no limit of positions"
    print(f"{model}: {type(skeleton).__name__}, {anatomy.n_blocks} blocks at {anatomy.blocks or '?'}, {limit}")
    points = resolve_hook_points(skeleton, anatomy.names()) if anatomy.blocks else []
    for point in points:
        shape = f"[B, L, {width_of(skeleton, point)}]"
        where = f"input of {point.path}" if point.reads_input else point.path
        print(f"  {point.name:<16} {shape:<14} {where} ({type(skeleton.get_submodule(point.path)).__name__})")
    for note in anatomy.notes:
        print(f"  not found: {note}")
    for remark in anatomy.remarks:
        print(f"  note: {remark}")
    if modules:
        for path, module in skeleton.named_modules():
            if path:
                print(f"  module:{path} ({type(module).__name__})")
