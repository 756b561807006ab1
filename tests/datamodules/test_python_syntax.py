"""Strings and comments are where Python's own parser has them; what is no Python is refused with its line."""

import ast
import io
import sysconfig
import tokenize
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exactivations.datamodules.demo import functions_of, read_source
from exactivations.datamodules.python_syntax import python_spans
from exactivations.store.errors import InvalidInputError


def parts(text):
    return [(text[start:stop].strip(), label) for start, stop, label in python_spans(text) if text[start:stop].strip()]


def assert_covered(text):
    """Spans follow each other without a gap, so that every character has one label."""
    spans = python_spans(text)
    assert "".join(text[start:stop] for start, stop, _ in spans) == text
    assert all(start < stop for start, stop, _ in spans)


CASES = [
    ("x = 1", "c:x = 1"),
    ("", ""),
    ("é = 'ü'  # ö\ny", "c:é =|s:'ü'|#:# ö|c:y"),
    ("rb'#' 'a' # '#'", "s:rb'#'|s:'a'|#:# '#'"),
    ("f'a{b!r:>{w}}{{' f'''\n{x}\n''' #", "s:f'a{b!r:>{w}}{{'|s:f'''\n{x}\n'''|#:#"),
    ("f'{a + \"b\"} # no' # yes", "s:f'{a + \"b\"} # no'|#:# yes"),
    ("def f():\n  '''doc\nno indent'''\n# c\n  return", "c:def f():|s:'''doc\nno indent'''|#:# c|c:return"),
    ("x = '𐐷' \\\n  + 'b'\r\n# c\r\n", "c:x =|s:'𐐷'|c:\\\n  +|s:'b'|#:# c"),
    ("    x = 1 # indented from the start\n    y\n", "c:x = 1|#:# indented from the start|c:y"),
    ("a\x0c='b'", "c:a\x0c=|s:'b'"),
]


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_strings_comments_and_all_else(text, expected):
    assert_covered(text)
    names = {"code": "c", "string": "s", "comment": "#"}
    assert "|".join(f"{names[label]}:{part}" for part, label in parts(text)) == expected


def test_strings_are_those_of_the_syntax_tree_and_comments_what_is_left_of_it_after_parsing():
    """On functions cut out of the standard library, the demo's texts: by `ast`, which knows nothing of `tokenize`."""
    library = Path(sysconfig.get_path("stdlib"))
    n_strings = n_comments = 0
    for name in ("argparse", "tarfile", "textwrap", "typing", "inspect"):
        for row in functions_of(read_source(library / f"{name}.py"), name):
            text = str(row["text"])
            assert_covered(text)
            found = [(text[start:stop], label) for start, stop, label in python_spans(text)]
            strings = [part for part, label in found if label == "string"]
            values = [ast.literal_eval(part) for part in strings if "f" not in part.partition(part[-1])[0].lower()]
            nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
            whole = "".join(sorted("".join(node.value for node in nodes if isinstance(node.value, str))))
            if len(values) == len(strings):  # adjacent strings are one constant: the same characters in all
                assert "".join(sorted("".join(value for value in values if isinstance(value, str)))) == whole
            n_strings += len(strings)
            comments = [part for part, label in found if label == "comment"]
            assert all(part.startswith("#") and "\n" not in part for part in comments)
            without = "".join(part for part, label in found if label != "comment")
            assert ast.dump(ast.parse(without)) == ast.dump(ast.parse(text))
            assert not any("#" in part for part, label in found if label == "code")
            n_comments += len(comments)
    assert n_strings > 1000 and n_comments > 300


PIECES = ["x", " ", "\n", "'a'", '"""b\n#c"""', "# d\n", "(", ")", "f'{x}'", "\\\n", "é", "'", '"', "\t", "\r\n", "$", "1"]


@settings(max_examples=300, deadline=None)
@given(text=st.lists(st.sampled_from(PIECES), max_size=14).map("".join) | st.text(max_size=30))
def test_any_text_is_covered_or_refused(text):
    try:
        spans = python_spans(text)
    except InvalidInputError as error:
        assert "\n" not in str(error)
        return
    assert "".join(text[start:stop] for start, stop, _ in spans) == text
    for start, stop, label in spans:
        assert label != "comment" or text[start] == "#"
        assert label != "string" or text[stop - 1] in "'\""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ny = 'abc", r"is no Python: .*line 2"),
        ("x\n'''abc\n\n", r"is no Python: .*line 2"),
        ("f(1,\n2", r"is no Python: .*line"),
        ("if x:\n    y\n  z", r"is no Python: unindent does not match.*line 3"),
        ("a = €", r"is no Python: "),
    ],
)
def test_what_is_no_python_is_refused_with_its_line(text, message):
    with pytest.raises(InvalidInputError, match=message):
        python_spans(text)


def test_f_strings_that_later_versions_take_apart_are_one_string(monkeypatch):
    """As Python 3.12 and later give them: played on any version."""
    text = "x = f'a{f\"{b}\"}' # c"
    names = ("FSTRING_START", "FSTRING_END", "COMMENT", "OP", "STRING")
    kinds = {number: name for number, name in enumerate(names, 1000)}
    number_of = {name: number for number, name in kinds.items()}

    def word(name, start, stop):
        return SimpleNamespace(type=number_of[name], string=text[start:stop], start=(1, start), end=(1, stop))

    words = [
        word("OP", 2, 3), word("FSTRING_START", 4, 6), word("OP", 7, 8), word("FSTRING_START", 8, 10), word("FSTRING_END", 13, 14),
        word("FSTRING_END", 15, 16), word("COMMENT", 17, 20),
    ]  # fmt: skip
    monkeypatch.setattr(tokenize, "tok_name", kinds)
    monkeypatch.setattr(tokenize, "generate_tokens", lambda _: iter(words))
    assert parts(text) == [("x =", "code"), ("f'a{f\"{b}\"}'", "string"), ("# c", "comment")]
    words[-1].end = (1, 19)
    with pytest.raises(InvalidInputError, match="this Python places '# c' of line 1 where '# ' is"):
        python_spans(text)


def test_the_tokenizer_reads_lines_as_this_file_counts_them():
    text = "a\x0bb\x0c\x1c\u2028c\n'd'"
    assert list(io.StringIO(text)) == ["a\x0bb\x0c\x1c\u2028c\n", "'d'"]
