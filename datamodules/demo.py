"""The demo dataset: functions of Python's own standard library, labelled by their syntax tree.

Nothing is shipped or downloaded: the text is read from the running interpreter's library, so it is the same for everybody
on one version of Python and there without a network. The labels are facts about the syntax tree, not opinions.
"""

import ast
import os
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

import datasets
import xxhash

LABELS = ("has_docstring", "is_method", "is_generator", "raises", "calls_dangerous")
"""Columns of the demo dataset that are booleans, true by construction."""

DANGEROUS_BUILTINS = frozenset({"eval", "exec", "compile"})
DANGEROUS_CALLS = frozenset({"os.system", "pickle.load", "pickle.loads", "marshal.load", "marshal.loads"}) | frozenset(
    f"builtins.{name}" for name in DANGEROUS_BUILTINS
)
DANGEROUS_MODULES = ("subprocess.", "ctypes.")

# Linux distributions ship these apart from the interpreter or not at all, and `this` and `antigravity` act when imported.
# Without them the dataset depends on the version of Python only.
NOT_EVERYWHERE = frozenset(
    {"antigravity", "distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "this", "tkinter", "turtle", "turtledemo"}
)

# Held out from the demo model's training (with their tests): what the loss in its model card was measured on.
HELD_OUT = frozenset(
    {"argparse", "calendar", "configparser", "csv", "difflib", "fractions", "heapq", "imaplib", "json", "logging"}
    | {"mailbox", "pprint", "queue", "sched", "shelve", "tarfile", "textwrap", "wsgiref", "xmlrpc", "zipapp"}
)

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def demo_functions() -> datasets.Dataset:
    """Returns every distinct function and method of the standard library as a dataset with one row each.

    Columns: `text` (the source, decorators included, dedented), `name` (qualified), `module` (use it as the group when
    splitting), `held_out` (the demo model never saw this module), `n_lines`, and the booleans in `LABELS`. The order is
    that of the module names, then that of the file; of functions with the same text the first one is kept.
    """
    sources = [(module, str(path)) for module, path in library_sources() if _is_everywhere(module)]
    state = [(module, os.stat(path).st_size, os.stat(path).st_mtime_ns) for module, path in sources]
    key = xxhash.xxh3_128(repr((sys.version, state, Path(__file__).read_text())).encode()).hexdigest()  # names the cached copy
    return datasets.Dataset.from_generator(_distinct_functions, gen_kwargs={"sources": tuple(sources), "key": key})


def _distinct_functions(sources: tuple[tuple[str, str], ...], key: str) -> Iterator[dict[str, str | bool | int]]:
    seen: set[str] = set()
    for module, path in sources:
        for row in functions_of(read_source(Path(path)), module):
            if row["text"] not in seen:
                seen.add(str(row["text"]))
                yield row


def _is_everywhere(module: str) -> bool:
    parts = module.split(".")
    if not {"test", "tests"}.isdisjoint(parts):  # some packages have their tests inside, and distributions leave them out
        return False
    return parts[0] in sys.stdlib_module_names and parts[0] not in NOT_EVERYWHERE


def library_sources() -> Iterator[tuple[str, Path]]:
    """Yields (dotted module name, path) of each source file of the standard library, ordered by name."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if (
            "site-packages" in parts
            or "dist-packages" in parts
            or parts[0].startswith(("_sysconfigdata", "config-", "sitecustomize"))
        ):
            continue
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    yield from sorted(found)


def read_source(path: Path) -> str:
    """Reads a source file in the encoding that it declares itself."""
    with tokenize.open(path) as file:
        return file.read()


def functions_of(source: str, module: str) -> Iterator[dict[str, str | bool | int]]:
    """Yields a row for each function of a module that is not inside another function."""
    tree = ast.parse(source)
    lines = source.split("\n")  # not splitlines(): a form feed inside a line would shift every later line number
    imports = _imported_names(tree)
    defined = _assigned_names(list(_own_nodes(tree)))
    defined |= {node.name for node in tree.body if isinstance(node, FunctionNode | ast.ClassDef)}
    for node, qualified_name, is_method in _outer_functions(tree, prefix="", in_class=False):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        inside, everything = list(_own_nodes(node)), list(ast.walk(node))
        own_names = defined | _assigned_names(everything)
        yield {
            "text": "\n".join(_dedented(line, node.col_offset) for line in lines[first - 1 : node.end_lineno]).rstrip(),
            "name": qualified_name,
            "module": module,
            "held_out": module.partition(".")[0] in HELD_OUT,
            "n_lines": (node.end_lineno or node.lineno) - first + 1,
            "has_docstring": ast.get_docstring(node, clean=False) is not None,
            "is_method": is_method,
            "is_generator": any(isinstance(n, ast.Yield | ast.YieldFrom) for n in inside),
            "raises": any(isinstance(n, ast.Raise) for n in inside),
            "calls_dangerous": any(_is_dangerous(call, imports, own_names) for call in everything if isinstance(call, ast.Call)),
        }


def _dedented(line: str, indent: int) -> str:
    """Takes a function's own indentation away. Lines of strings and comments may have less than that, and stay."""
    return line[indent:] if line[:indent].isspace() else line


def _outer_functions(node: ast.AST, prefix: str, in_class: bool) -> Iterator[tuple[FunctionNode, str, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FunctionNode):
            yield child, prefix + child.name, in_class
        elif isinstance(child, ast.ClassDef):
            yield from _outer_functions(child, f"{prefix}{child.name}.", in_class=True)
        elif isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield from _outer_functions(child, prefix, in_class)


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """Walks a function's body without the functions and classes that are defined inside it."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, FunctionNode | ast.Lambda | ast.ClassDef):
            yield child
            yield from _own_nodes(child)


def _assigned_names(nodes: list[ast.AST]) -> set[str]:
    """Names that are assigned or are parameters: they hide builtins of the same name."""
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return stored | {node.arg for node in nodes if isinstance(node, ast.arg)}


def _imported_names(tree: ast.Module) -> dict[str, str]:
    """Maps each name that the module imports anywhere to the dotted name that it stands for."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = alias.name if alias.asname else alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def _is_dangerous(call: ast.Call, imports: dict[str, str], defined: set[str]) -> bool:
    parts: list[str] = []
    target: ast.expr = call.func
    while isinstance(target, ast.Attribute):
        parts.insert(0, target.attr)
        target = target.value
    if not isinstance(target, ast.Name):
        return False
    if not parts and target.id in DANGEROUS_BUILTINS:
        return target.id not in defined and target.id not in imports
    if target.id not in imports:
        return False
    name = ".".join([imports[target.id], *parts])
    return name in DANGEROUS_CALLS or name.startswith(DANGEROUS_MODULES)
