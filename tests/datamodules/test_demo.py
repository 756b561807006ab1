"""The demo dataset: labels that are facts, checked on sources written for it and on the library itself."""

import ast
import os
import subprocess
import sys
import textwrap

import datasets
import pytest

import exactivations.datamodules.demo as demo_module
from exactivations.datamodules.demo import HELD_OUT, LABELS, demo_functions, functions_of, library_sources, read_source
from exactivations.datamodules.sources import load_source


def rows_of(source: str, module: str = "module") -> dict[str, dict]:
    return {row["name"]: row for row in functions_of(textwrap.dedent(source), module)}


def label(source: str, name: str, function: str = "f") -> bool:
    return rows_of(source)[function][name]


def test_a_row_says_what_the_function_is():
    rows = rows_of('def f(x):\n    """Doc."""\n    return x\n', module="json.decoder")
    assert rows == {
        "f": {
            "text": 'def f(x):\n    """Doc."""\n    return x',
            "name": "f", "module": "json.decoder", "held_out": True, "n_lines": 3,
            "has_docstring": True, "is_method": False, "is_generator": False, "raises": False, "calls_dangerous": False,
        }
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('"""Doc."""', True),
        ("'doc'; return 1", True),
        ("return 'no doc'", False),
        ("x = 1\n    'too late'", False),
        ("f'{1} no doc'", False),
        ("b'no doc'", False),
        ("# a comment\n    pass", False),
    ],
)
def test_has_docstring(body, expected):
    assert label(f"def f():\n    {body}\n", "has_docstring") is expected


def test_methods_of_any_kind_are_methods_and_functions_in_methods_are_not_rows():
    rows = rows_of("""
        def f(): pass
        class A:
            def g(self): pass
            @staticmethod
            def h():
                def inner(): pass
                class Inner:
                    def i(self): pass
            class B:
                async def j(self): pass
        if True:
            def k(): pass
            class C:
                if True:
                    def m(self): pass
    """)
    methods = {"A.g": True, "A.h": True, "A.B.j": True, "C.m": True, "f": False, "k": False}
    assert {name: row["is_method"] for name, row in rows.items()} == methods


def test_functions_are_found_in_every_block_of_a_module_in_the_order_of_the_file():
    rows = rows_of("""
        try:
            def a(): pass
        except ImportError:
            def b(): pass
        else:
            def c(): pass
        finally:
            def d(): pass
        for x in y:
            def e(): pass
        else:
            def f(): pass
        while x:
            def g(): pass
        with x:
            def h(): pass
        match x:
            case 1:
                def i(): pass
        if x:
            pass
        elif y:
            def j(): pass
        try:
            pass
        except* OSError:
            def k(): pass
    """)
    assert "".join(rows) == "abcdefghijk"


@pytest.mark.parametrize(
    ("body", "raises", "generator"),
    [
        ("raise ValueError", True, False),
        ("yield 1", False, True),
        ("yield from x", False, True),
        ("x = yield", False, True),
        ("if x:\n        for y in x:\n            raise", True, False),
        ("def inner():\n        raise ValueError\n        yield", False, False),
        ("class Inner:\n        def g(self): raise ValueError", False, False),
        ("return lambda: (yield)", False, False),
        ("return (x for x in y)", False, False),
        ("def inner(): pass\n    raise", True, False),
        ("with a:\n        yield\n    raise", True, True),
    ],
)
def test_raises_and_is_generator_are_about_the_function_itself(body, raises, generator):
    source = f"def f():\n    {body}\n"
    assert (label(source, "raises"), label(source, "is_generator")) == (raises, generator)


def test_an_async_function_counts_like_any_other():
    rows = rows_of("""
        async def f():
            '''Doc.'''
            async for x in y:
                yield x
            raise ValueError
    """)
    assert [rows["f"][name] for name in LABELS] == [True, False, True, True, False]
    assert rows["f"]["text"].startswith("async def f():")


def test_decorators_belong_to_the_text():
    source = "x = 1\n\n@first\n@second(\n    1,\n)\ndef f():\n    pass\n\ny = 2\n"
    row = rows_of(source)["f"]
    assert row["text"] == "@first\n@second(\n    1,\n)\ndef f():\n    pass"
    assert row["n_lines"] == 6


def test_a_form_feed_or_another_odd_line_end_does_not_shift_lines():
    source = 'x = 1\n\x0c\ndef f():\n    """a\x0cb\x1cc\u2028d\x85e"""\n\x0c\ndef g():\n    return "last"\n'
    rows = {row["name"]: row["text"] for row in functions_of(source, "module")}
    assert rows == {"f": 'def f():\n    """a\x0cb\x1cc\u2028d\x85e"""', "g": 'def g():\n    return "last"'}


def test_a_method_is_dedented_even_if_a_string_or_comment_in_it_is_not():
    source = 'class A:\n    def f(self):\n# left\n        x = """\nleft\n"""\n\n        return x\n'
    text = next(functions_of(source, "module"))["text"]
    assert text == 'def f(self):\n# left\n    x = """\nleft\n"""\n\n    return x'


@pytest.mark.parametrize(
    ("head", "call", "dangerous"),
    [
        ("", "eval('1')", True),
        ("", "exec(x)", True),
        ("", "compile(x)", True),
        ("", "print(eval(x))", True),
        ("import builtins", "builtins.exec(x)", True),
        ("import re", "re.compile(x)", False),
        ("from re import compile", "compile(x)", False),
        ("def compile(x): pass", "compile(x)", False),
        ("class compile: pass", "compile(x)", False),
        ("exec = print", "exec(x)", False),
        ("class A:\n    def eval(self): pass", "eval(x)", True),
        ("class A:\n    compile = 1", "compile(x)", True),
        ("", "self.eval(x)", False),
        ("", "x.compile(y)", False),
        ("", "eval", False),
        ("import os", "os.system(x)", True),
        ("import os", "os.getcwd()", False),
        ("import os.path", "os.system(x)", True),
        ("import os as o", "o.system(x)", True),
        ("from os import system", "system(x)", True),
        ("from os import system as s", "s(x)", True),
        ("from platform import system", "system()", False),
        ("", "os.system(x)", False),
        ("import subprocess", "subprocess.run(x)", True),
        ("from subprocess import Popen", "Popen(x)", True),
        ("from subprocess import Popen", "x.Popen(y)", False),
        ("import pickle", "pickle.load(x)", True),
        ("import pickle as p", "p.loads(x)", True),
        ("import pickle", "pickle.dumps(x)", False),
        ("from pickle import loads as l", "l(x)", True),
        ("from json import loads", "loads(x)", False),
        ("from .pickle import loads", "loads(x)", False),
        ("import marshal", "marshal.loads(x)", True),
        ("import ctypes", "ctypes.CDLL(x)", True),
        ("import ctypes.util", "ctypes.util.find_library(x)", True),
        ("from ctypes import util as u", "u.find_library(x)", True),
        ("from ctypes import CDLL", "CDLL(x)", True),
    ],
)
def test_calls_dangerous(head, call, dangerous):
    assert label(f"{head}\ndef f(x, y):\n    return {call}\n", "calls_dangerous") is dangerous


@pytest.mark.parametrize(
    "source",
    ["def f(eval):\n    eval(1)\n", "def f():\n    exec = print\n    exec(1)\n", "def f(*, compile=None):\n    compile(1)\n"],
)
def test_a_name_of_the_functions_own_is_no_builtin(source):
    assert label(source, "calls_dangerous") is False


def test_an_import_inside_a_function_is_seen_and_so_is_a_call_in_a_function_inside():
    assert label("def f():\n    import os\n    return lambda: os.system('x')\n", "calls_dangerous") is True


@pytest.fixture(scope="module")
def demo_dataset(tmp_path_factory):
    """The dataset, made once for this file (it takes some seconds)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("demo"))
        return demo_functions()


@pytest.fixture(scope="module")
def demo(demo_dataset):
    return demo_dataset.to_dict()


def test_there_are_thousands_of_functions_none_twice_in_the_order_of_the_modules(demo):
    assert len(demo["text"]) > 2000
    assert len(set(demo["text"])) == len(demo["text"])
    assert demo["module"] == sorted(demo["module"])


def test_every_label_is_true_of_some_and_false_of_some(demo):
    for name in (*LABELS, "held_out"):
        assert 50 < sum(demo[name]) < len(demo[name]) - 50
    assert {module.partition(".")[0] for module, held in zip(demo["module"], demo["held_out"], strict=True) if held} <= HELD_OUT


def test_every_text_is_in_its_modules_source_and_its_labels_hold_for_the_text_alone(demo):
    """The labels again, from the text by itself and with another way to walk it."""
    modules = set(demo["module"])
    sources = {module: stripped(read_source(path)) for module, path in library_sources() if module in modules}
    for row in [dict(zip(demo, values, strict=True)) for values in zip(*demo.values(), strict=True)][::7]:
        assert stripped(row["text"]) in sources[row["module"]]
        (function,) = ast.parse(row["text"]).body
        assert row["name"].rpartition(".")[2] == function.name
        assert row["is_method"] == ("." in row["name"])
        assert row["has_docstring"] == (ast.get_docstring(function) is not None)
        assert row["n_lines"] == row["text"].count("\n") + 1
        collector = OwnStatements()
        for statement in function.body:
            collector.visit(statement)
        assert (row["raises"], row["is_generator"]) == (collector.raises, collector.yields)


def stripped(source: str) -> str:
    return "\n".join(line.strip() for line in source.split("\n"))


class OwnStatements(ast.NodeVisitor):
    raises = yields = False

    def visit_Raise(self, node):
        self.raises = True
        self.generic_visit(node)

    def visit_Yield(self, node):
        self.yields = True
        self.generic_visit(node)

    visit_YieldFrom = visit_Yield

    def skip(self, node):
        pass

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = visit_ClassDef = skip


def test_nothing_comes_from_what_distributions_ship_apart(demo):
    packages = {part for module in demo["module"] for part in module.split(".")}
    assert packages.isdisjoint({"test", "tests", "tkinter", "idlelib", "lib2to3", "ensurepip", "distutils", "site-packages"})


def test_another_process_with_another_hash_seed_makes_the_same_rows(demo):
    """The file is run by itself, since the package brings torch along. Four modules stand for all, so that it is quick."""
    names = ["asyncio.queues", "ctypes.util", "json.decoder", "queue"]
    program = (
        "import runpy; "
        f"demo = runpy.run_path({demo_module.__file__!r}); "
        f"sources = tuple((m, str(p)) for m, p in demo['library_sources']() if m in {names}); "
        "print(ascii(list(demo['_distinct_functions'](sources, ''))))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    output = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout
    here = [tuple(row.values()) for row in ast.literal_eval(output)]
    there = [row for row in zip(*demo.values(), strict=True) if row[list(demo).index("module")] in names]
    assert len(there) > 50
    assert there == [row for row in here if row in set(there)]  # the whole dataset leaves out what an earlier module has too


def test_the_name_demo_stands_for_it_and_splits_apply(demo, demo_dataset, monkeypatch):
    monkeypatch.setattr("exactivations.datamodules.sources.demo_functions", lambda: demo_dataset)
    assert load_source("demo", split="train[:5]")["text"][:] == demo["text"][:5]
    assert load_source("demo") is demo_dataset


def test_it_is_made_once_and_then_found_in_the_cache(demo, demo_dataset, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", demo_dataset.cache_files[0]["filename"].split("/generator/")[0])
    monkeypatch.setattr("exactivations.datamodules.demo.functions_of", lambda *_: pytest.fail("made again"))
    again = demo_functions()
    assert again._fingerprint == demo_dataset._fingerprint
    assert again.to_dict() == demo
