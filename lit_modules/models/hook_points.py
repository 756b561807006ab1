"""Hook points: their names, where they are in a model of any architecture, reading and changing them during a forward pass.

Names: `embed` (the state that enters block 0), `resid_post.3` (block 3's output, before any final norm), `attn_out.3` and
`mlp_out.3` (what these two modules of block 3 put out, before the block does anything else with it), `final_norm` (after the
norm that follows the last block), and `module:<dotted path>` for the output of any module.

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

BLOCK_KINDS = ("resid_post", "attn_out", "mlp_out")
BLOCKS_LEFT = "exactivations_blocks_left"
"""Attribute of a model that was cut: its configuration still tells of all blocks, and stays as it is, since it is hashed."""


@dataclass(frozen=True)
class HookPoint:
    """A named place in a model.

    Attributes:
        name: As the user writes it.
        path: Dotted path of the module that is hooked.
        reads_input: Whether the module's input is read (for `embed`) and not its output.
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
        final_norm: Dotted path; None if not found.
        notes: What was not found, and why, in words.
    """

    blocks: str | None
    n_blocks: int
    attention: tuple[str | None, ...]
    mlp: tuple[str | None, ...]
    final_norm: str | None
    notes: tuple[str, ...]

    def names(self) -> list[str]:
        """Returns the names of all hook points that were found, in the order of the forward pass."""
        if self.blocks is None:
            return []
        in_blocks = []
        for i, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            in_blocks += [f"attn_out.{i}"] if attention else []
            in_blocks += [f"mlp_out.{i}"] if mlp else []
            in_blocks += [f"resid_post.{i}"]
        return ["embed", *in_blocks, *(["final_norm"] if self.final_norm else [])]

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
        return Anatomy(None, 0, (), (), None, (note,))
    path, blocks = lists[0]
    attention, mlp = tuple(map(_attention_in, blocks)), tuple(map(_mlp_in, blocks))
    final_norm = _final_norm_beside(model, path)
    notes = [*_notes("attn_out", "attention", attention, blocks), *_notes("mlp_out", "MLP", mlp, blocks)]
    if final_norm is None:
        notes.append("final_norm: no single norm stands beside the blocks")
    return Anatomy(path, len(blocks), attention, mlp, final_norm, tuple(notes))


def _notes(kind: str, what: str, found: tuple[str | None, ...], blocks: nn.ModuleList) -> list[str]:
    """Says in which blocks a module was not found."""
    without = [i for i, path in enumerate(found) if path is None]
    if not without:
        return []
    where = "" if len(without) == len(found) else f" (layers {', '.join(map(str, without))})"
    return [
        f"{kind}: no {what} module in {type(blocks[without[0]]).__name__}{where} that leaves the residual out; use module:<path>"
    ]


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
    if name.startswith("module:"):
        path = name.removeprefix("module:")
        if path not in dict(model.named_modules()) or not path:
            raise InvalidInputError(
                f"hook point {name}: {type(model).__name__} has no module {path!r}; `exactivations hook-points` lists them"
            )
        return HookPoint(name, path)
    kind, _, layer = name.partition(".")
    if kind not in ("embed", "final_norm", *BLOCK_KINDS) or (kind in BLOCK_KINDS) != layer.isdecimal():
        raise InvalidInputError(
            f"hook point {name!r} is not one of embed, {', '.join(f'{k}.<layer>' for k in BLOCK_KINDS)}, final_norm, module:<path>"
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
    inside = (anatomy.attention if kind == "attn_out" else anatomy.mlp)[int(layer)]
    if inside is None:
        note = next(note for note in anatomy.notes if note.startswith(f"{kind}:"))
        raise InvalidInputError(f"hook point {name} is not in {type(model).__name__}: {note}")
    return HookPoint(name, f"{anatomy.blocks}.{int(layer)}.{inside}")


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
            read(point.name, _state(point, args, kwargs) if point.reads_input else _first_tensor(point, output))
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
        return args, {**kwargs, "hidden_states": self._edited(kwargs.get("hidden_states"))}

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


def _state(point: HookPoint, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    state = args[0] if args else kwargs.get("hidden_states")
    return _first_tensor(point, state)


def _first_tensor(point: HookPoint, output: Any) -> Tensor:
    state = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(state, Tensor):
        raise InvalidInputError(f"hook point {point.name} puts out {type(output).__name__}, expected a tensor [B, L, D]")
    return state
