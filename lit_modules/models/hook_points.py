"""Hook points: their names, where they are in a model of any architecture, reading and changing them during a forward pass.

Names: `embed` (the state that enters block 0), `resid_post.3` (block 3's output, before any final norm), `attn_out.3` and
`mlp_out.3` (what these two modules of block 3 put out, before the block does anything else with it), `final_norm` (after the
norm that follows the last block), and `module:<dotted path>` for the output of any module. Read where they go in: `attn_z.3` (what
the heads of block 3 give, side by side, before the attention's output projection), `mlp_act.3` (the neurons: what the MLP's last
linear map receives), and `input:<dotted path>` for the first argument of any module.

There is no table of architectures. The blocks are the one `nn.ModuleList` that has as many entries as the configuration has
layers; the rest is found beside and inside them by class and attribute names. What cannot be found is said, not guessed.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from exactivations.store.errors import InvalidInputError

STREAM_KINDS = ("embed", "resid_post", "attn_out", "mlp_out", "final_norm")
"""Of states as wide as the residual stream: what it holds, or what becomes a part of it."""
BLOCK_KINDS = ("resid_post", "attn_out", "mlp_out", "attn_z", "mlp_act")
ATTENTION_ENDS = r"o_proj|out_proj|c_proj|dense|wo|o|out_lin|proj|out|proj_out|linear_out"
MLP_ENDS = r"down_proj|c_proj|dense_4h_to_h|dense|fc2|fc_2|fc_out|w2|wo|lin2|linear2|out_proj|proj_out|proj|output"
BLOCKS_LEFT = "exactivations_blocks_left"
"""Attribute of a model that was cut: its configuration still tells of all blocks, and stays as it is, since it is hashed."""


@dataclass(frozen=True)
class HookPoint:
    """A named place in a model.

    Attributes:
        name: As the user writes it.
        path: Dotted path of the module that is hooked.
        reads_input: Whether the module's input is read (for `embed`, `attn_z`, `mlp_act` and `input:`) and not its output.
    """

    name: str
    path: str
    reads_input: bool = False


@dataclass(frozen=True)
class Anatomy:
    """What was found in a model.

    Attributes:
        blocks: Dotted path of the list of blocks; None if there is not exactly one.
        n_blocks: How many there are.
        attention, mlp: For each block the path inside it of the modules behind attn_out and mlp_out; None if it has none.
        attention_end, mlp_end: For each block the path inside it of the linear maps that receive attn_z and mlp_act.
        final_norm: Dotted path; None if not found.
        notes: What was not found, and why, in words.
        remarks: What was found and is otherwise than in most models, in words.
    """

    blocks: str | None
    n_blocks: int
    attention: tuple[str | None, ...]
    mlp: tuple[str | None, ...]
    attention_end: tuple[str | None, ...]
    mlp_end: tuple[str | None, ...]
    final_norm: str | None
    notes: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """Returns the names of all hook points that were found, in the order of the forward pass."""
        if self.blocks is None:
            return []
        in_blocks = []
        for i in range(self.n_blocks):
            in_blocks += [f"{kind}.{i}" for kind, paths in self.inside.items() if paths[i] is not None]
            in_blocks += [f"resid_post.{i}"]
        return ["embed", *in_blocks, *(["final_norm"] if self.final_norm else [])]

    @property
    def inside(self) -> dict[str, tuple[str | None, ...]]:
        """For each kind of hook point inside blocks the path in each of them, in the order of the forward pass."""
        return {"attn_z": self.attention_end, "attn_out": self.attention, "mlp_act": self.mlp_end, "mlp_out": self.mlp}

    def names_before_the_head(self) -> set[str]:
        """Returns the hook points behind which only the final norm and the head come."""
        return {"final_norm", f"resid_post.{self.n_blocks - 1}"} & set(self.names())


def dissect(model: PreTrainedModel) -> Anatomy:
    """Finds blocks, attention, MLP and final norm of a model without a head."""
    n_layers = getattr(model, BLOCKS_LEFT, getattr(model.config.get_text_config(), "num_hidden_layers", None))
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers and len(m)]
    lists = [(path, m) for path, m in lists if not any(path.startswith(f"{outer}.") for outer, _ in lists)]
    if len(lists) != 1:
        found = f"there are {len(lists)}: {', '.join(path for path, _ in lists)}" if lists else "there is none"
        note = (
            f"blocks: looked for one list of {n_layers} modules (the configuration's number of layers), {found}; use module:<path>"
        )
        return Anatomy(None, 0, (), (), (), (), None, (note,))
    path, blocks = lists[0]
    attention, mlp = tuple(map(_attention_in, blocks)), tuple(map(_mlp_in, blocks))
    width = getattr(model.config.get_text_config(), "hidden_size", None)
    attention_end = tuple(_attention_end_in(block, width) for block in blocks)
    mlp_end = tuple(_mlp_end_in(block, width) for block in blocks)
    final_norm = _final_norm_beside(model, path)
    leaves_out = "that leaves the residual out"
    ends = f"named as such and {width} wide"
    notes = [
        *_notes("attn_out", f"attention module in {{}} {leaves_out}", attention, blocks),
        *_notes("mlp_out", f"MLP module in {{}} {leaves_out}", mlp, blocks),
        *_notes("attn_z", f"single output projection of an attention in {{}}, {ends}", attention_end, blocks, "input"),
        *_notes("mlp_act", f"single last linear map of an MLP in {{}}, {ends}", mlp_end, blocks, "input"),
    ]
    if final_norm is None:
        notes.append("final_norm: no single norm stands beside the blocks")
    return Anatomy(path, len(blocks), attention, mlp, attention_end, mlp_end, final_norm, tuple(notes), _remarks(blocks))


def _remarks(blocks: nn.ModuleList) -> tuple[str, ...]:
    """Says where the states of a block are not those before it plus what attention and MLP put out, since norms stand between.

    Told by names: a norm after the MLP stands in Gemma-2 and 3, OLMo-2 and GLM-4 (Llama's `post_attention_layernorm` alone is one
    before its MLP); BERT and its kin norm the sum, beside the `dense` of their `output`.
    """
    remarks = []
    for kind, block in {type(block).__name__: block for block in blocks}.items():
        norms = [name for name, module in block.named_modules() if re.search(r"(?i)norm", type(module).__name__)]
        behind = [name for name in norms if re.fullmatch(r"post_\w*norm", name)]
        of_sum = [name for name in norms if re.fullmatch(r"(?i)(\w+\.)?output\.layer_?norm|(sa|output)_layer_norm", name)]
        if any(re.match(r"post_(feed_?forward|ffn?|mlp|moe)", name) for name in behind):
            remarks.append(
                f"attn_out, mlp_out: are read before the norms that {kind} puts on them ({', '.join(behind)}): the state before "
                "the block + attn_out + mlp_out is not resid_post; read what is added by module:<path> of these norms"
            )
        elif of_sum:
            remarks.append(
                f"attn_out, mlp_out: {kind} norms each sum with the residual ({', '.join(of_sum)}): the state before the block + "
                "attn_out + mlp_out is not resid_post"
            )
    return tuple(remarks)


def _notes(kind: str, what: str, found: tuple[str | None, ...], blocks: nn.ModuleList, instead: str = "module") -> list[str]:
    """Says in which blocks a module was not found."""
    without = [i for i, path in enumerate(found) if path is None]
    if not without:
        return []
    where = "" if len(without) == len(found) else f" (layers {', '.join(map(str, without))})"
    return [f"{kind}: no {what.format(type(blocks[without[0]]).__name__ + where)}; use {instead}:<path>"]


def _children_named(block: nn.Module, names: str, classes: str) -> list[str]:
    """Returns paths of the children whose attribute or class name matches, attribute names first."""
    children = list(block.named_children())
    by_name = [name for name, _ in children if re.fullmatch(names, name)]
    return by_name or [name for name, child in children if re.search(classes, type(child).__name__)]


def _attention_in(block: nn.Module) -> str | None:
    found = _children_named(block, r"attn|attention|self_attn|self_attention", r"(?i)attention$")
    return _without_residual(block, found[0], f"{found[0]}.output") if len(found) == 1 else None


def _mlp_in(block: nn.Module) -> str | None:
    found = _children_named(
        block, r"mlp|ffn|feed_forward|feedforward|block_sparse_moe|moe", r"(?i)(mlp|moe|ffn|feedforward|sparsemoeblock)$"
    )
    return _without_residual(block, found[0] if len(found) == 1 else None, "output")


def _attention_end_in(block: nn.Module, width: int | None) -> str | None:
    """Returns the path of the attention's output projection: the one map of that width in the attention which is named as such."""
    found = _children_named(block, r"attn|attention|self_attn|self_attention", r"(?i)attention$")
    if len(found) != 1:
        return None
    ends = [
        f"{found[0]}.{path}"
        for path, module in block.get_submodule(found[0]).named_modules()
        if re.fullmatch(ATTENTION_ENDS, path.rpartition(".")[2]) and linear_widths(module)[1] == width
    ]
    return ends[0] if len(ends) == 1 else None


def _mlp_end_in(block: nn.Module, width: int | None) -> str | None:
    """Returns the path of the MLP's last linear map. Experts have no such single one."""
    found = _children_named(block, r"mlp|ffn|feed_forward|feedforward", r"(?i)(mlp|ffn|feedforward)$")
    if not found and "output.dense" in dict(block.named_modules()):  # BERT and its kin
        found = ["output"]
    if len(found) != 1:
        return None
    ends = [
        f"{found[0]}.{path}"
        for path, module in block.get_submodule(found[0]).named_children()
        if re.fullmatch(MLP_ENDS, path) and linear_widths(module)[1] == width
    ]
    return ends[0] if len(ends) == 1 else None


def linear_widths(module: nn.Module) -> tuple[int | None, int | None]:
    """Returns what goes into a linear map and what comes out, None where the module is none."""
    into, out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if into is None and type(module).__name__ == "Conv1D":  # GPT-2's, whose weight is [in, out]
        into, out = module.weight.shape  # type: ignore[misc]
    return into, out


def _without_residual(block: nn.Module, plain: str | None, output: str) -> str | None:
    """Returns the path of what is put out before the residual is added to it; None if no module puts out just that.

    BERT and its kin have a module `output` that projects (its `dense`) and then adds the residual. A module that takes the
    residual as an argument (BLOOM, MPT), or normalises its own sum (MPNet), adds it too, and nothing inside it is known to us.
    """
    modules = dict(block.named_modules())
    if f"{output}.dense" in modules and plain in (None, output.partition(".")[0]):
        return f"{output}.dense"
    if plain is None:
        return None
    takes_it = "residual" in inspect.signature(modules[plain].forward).parameters
    normalises = any(re.fullmatch(r"(?i)layer_?norm", name) for name, _ in modules[plain].named_children())
    return None if takes_it or normalises else plain


def _final_norm_beside(model: nn.Module, blocks_path: str) -> str | None:
    parent_path = blocks_path.rpartition(".")[0]
    parent = model.get_submodule(parent_path)
    norms = [name for name, child in parent.named_children() if re.search(r"(?i)norm", type(child).__name__)]
    if len(norms) > 1:  # BLOOM has one on its word embeddings too; that the other one runs last is checked when it is first read
        norms = [name for name in norms if "emb" not in name]
    if len(norms) != 1:
        return None
    return f"{parent_path}.{norms[0]}" if parent_path else norms[0]


def resolve_hook_points(model: PreTrainedModel, names: list[str]) -> list[HookPoint]:
    """Returns where the named hook points are.

    Raises:
        InvalidInputError: If a name is not in this model, is not the name of a hook point, or comes twice.
    """
    if not names:
        raise InvalidInputError("no hook point was named: for example resid_post.3")
    duplicates = {name for name in names if names.count(name) > 1}
    if duplicates:
        raise InvalidInputError(f"hook points named more than once: {', '.join(sorted(duplicates))}")
    anatomy = dissect(model)
    return [_resolve(model, anatomy, name) for name in names]


def _resolve(model: PreTrainedModel, anatomy: Anatomy, name: str) -> HookPoint:
    if name.startswith(("module:", "input:")):
        path = name.partition(":")[2]
        if path not in dict(model.named_modules()) or not path:
            raise InvalidInputError(
                f"hook point {name}: {type(model).__name__} has no module {path!r}; `exactivations hook-points` lists them"
            )
        return HookPoint(name, path, reads_input=name.startswith("input:"))
    kind, _, layer = name.partition(".")
    if kind not in ("embed", "final_norm", *BLOCK_KINDS) or (kind in BLOCK_KINDS) != layer.isdecimal():
        raise InvalidInputError(
            f"hook point {name!r} is not one of embed, {', '.join(f'{k}.<layer>' for k in BLOCK_KINDS)}, final_norm, "
            "module:<path>, input:<path>"
        )
    if anatomy.blocks is None or (kind == "final_norm" and anatomy.final_norm is None):
        raise InvalidInputError(f"hook point {name} is not in {type(model).__name__}: {anatomy.notes[-1]}")
    if kind == "embed":
        return HookPoint(name, f"{anatomy.blocks}.0", reads_input=True)
    if kind == "final_norm":
        return HookPoint(name, str(anatomy.final_norm))
    if int(layer) >= anatomy.n_blocks:
        raise InvalidInputError(
            f"hook point {name}: there is no layer {layer}; {type(model).__name__} has layers 0 to {anatomy.n_blocks - 1}"
        )
    if kind == "resid_post":
        return HookPoint(name, f"{anatomy.blocks}.{int(layer)}")
    inside = anatomy.inside[kind][int(layer)]
    if inside is None:
        note = next(note for note in anatomy.notes if note.startswith(f"{kind}:"))
        raise InvalidInputError(f"hook point {name} is not in {type(model).__name__}: {note}")
    return HookPoint(name, f"{anatomy.blocks}.{int(layer)}.{inside}", reads_input=kind in ("attn_z", "mlp_act"))


def width_of(model: PreTrainedModel, point: HookPoint) -> int | None:
    """Returns how wide the states at a hook point are, without running the model; None if its structure does not tell."""
    if not point.name.startswith(("module:", "input:", "attn_z.", "mlp_act.")):
        return int(model.config.get_text_config().hidden_size)  # states of the residual stream, or what becomes a part of it
    return linear_widths(model.get_submodule(point.path))[0 if point.reads_input else 1]


def cut_after(model: PreTrainedModel, hook_points: list[HookPoint]) -> int:
    """Drops the blocks after the deepest hook point, and returns how many are left. Changes the model."""
    anatomy = dissect(model)
    if anatomy.blocks is None:
        return 0
    deepest = 0
    for point in hook_points:
        inside = re.match(rf"{re.escape(anatomy.blocks)}\.(\d+)(\.|$)", point.path)
        if inside is None:
            return anatomy.n_blocks  # it may lie behind all blocks
        deepest = max(deepest, int(inside.group(1)))
    parent_path, _, name = anatomy.blocks.rpartition(".")
    blocks = model.get_submodule(anatomy.blocks)
    assert isinstance(blocks, nn.ModuleList)
    setattr(model.get_submodule(parent_path), name, blocks[: deepest + 1])
    setattr(model, BLOCKS_LEFT, deepest + 1)
    return deepest + 1


class _AllRead(Exception):  # not an error: it ends a forward pass whose rest nobody reads
    pass


@contextmanager
def reading(
    model: nn.Module, hook_points: list[HookPoint], read: Callable[[str, Tensor], None], *, stop: bool = True
) -> Iterator[Callable[..., None]]:
    """Gives a function that runs the model, as often as it is called, and `read(name, state [B, L, D])` at each hook point.

    With `stop`, a forward pass ends once every hook point was read: what comes after it is not computed. All hooks are
    removed on leaving, whatever happened. `read` gets the model's own tensor: what it wants to keep unchanged it must copy.

    Raises:
        InvalidInputError: By the function, if there is no tensor at a hook point; with `stop`, also if one was not reached.
    """
    names, waiting = [point.name for point in hook_points], set[str]()

    def hook_for(point: HookPoint) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
            read(point.name, _state(point, module, args, kwargs) if point.reads_input else _first_tensor(point, output))
            waiting.discard(point.name)
            if stop and not waiting:
                raise _AllRead

        return hook

    def run(*args: Any, **kwargs: Any) -> None:
        waiting.update(names)
        with suppress(_AllRead):
            model(*args, **kwargs)
        if stop and waiting:
            raise InvalidInputError(f"the forward pass did not reach {', '.join(sorted(waiting))}")

    handles = []
    try:
        for point in hook_points:
            module = model.get_submodule(point.path)
            if point.reads_input:
                handles.append(module.register_forward_pre_hook(hook_for(point), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(hook_for(point), with_kwargs=True))
        yield run
    finally:
        for handle in handles:
            handle.remove()


class _Editor:
    """A hook that puts another state in the place of a module's; a class, by which those of `with` blocks around are known."""

    def __init__(self, point: HookPoint, edit: Callable[[str, Tensor], Tensor]) -> None:
        self._point, self._edit = point, edit

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        """Returns what is to be in the place of (args, kwargs), or of the output, which it leaves as it is."""
        if not self._point.reads_input:
            return self._edited(output[0])
        if args:
            return (self._edited(args[0]), *args[1:]), kwargs
        name = _first_parameter(module)
        return args, {**kwargs, name: self._edited(kwargs.get(name))}

    def _edited(self, value: Any) -> Any:
        state = self._edit(self._point.name, _first_tensor(self._point, value))
        if isinstance(value, Tensor):
            return state
        rest = value[1:]
        return type(value)(state, *rest) if hasattr(value, "_fields") else type(value)([state, *rest])


@contextmanager
def editing(model: nn.Module, hook_points: list[HookPoint], edit: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Puts `edit(name, state [B, L, D])` in the place of the state at each hook point, in every forward pass inside the block.

    What comes after a hook point gets the new state, and so does every other hook there, whenever it was registered; the model's
    own tensor must stay as it is. Of nested blocks the outer one's edit comes first. All hooks are removed on leaving.

    Raises:
        InvalidInputError: During a forward pass, if there is no tensor at a hook point.
    """
    handles = []
    try:
        for point in hook_points:
            module, editor = model.get_submodule(point.path), _Editor(point, edit)
            if point.reads_input:
                handles.append(module.register_forward_pre_hook(editor, prepend=True, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(editor, prepend=True, with_kwargs=True))
            hooks: Any = module._forward_pre_hooks if point.reads_input else module._forward_hooks
            before = [key for key, hook in hooks.items() if isinstance(hook, _Editor) and hook is not editor]
            for key in reversed(before):
                hooks.move_to_end(key, last=False)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first_parameter(module: nn.Module) -> str:
    return next(iter(inspect.signature(module.forward).parameters), "")


def _state(point: HookPoint, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Returns a module's first argument, which may be given by its name."""
    state = args[0] if args else kwargs.get(_first_parameter(module))
    return _first_tensor(point, state)


def _first_tensor(point: HookPoint, output: Any) -> Tensor:
    state = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(state, Tensor):
        does = "receives" if point.reads_input else "puts out"
        raise InvalidInputError(f"hook point {point.name} {does} {type(output).__name__}, expected a tensor [B, L, D]")
    return state
