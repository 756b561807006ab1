"""Which parts of a Python source text are strings, comments and code, by the standard library's `tokenize`."""

import io
import tokenize
from itertools import accumulate

from exactivations.datamodules.span_labels import Span
from exactivations.store.errors import InvalidInputError, shown

STRING, COMMENT, CODE = "string", "comment", "code"
BLANKS = " \t\f"  # between words; Python 3.11 calls them errors before a character that it does not know


def python_spans(text: str) -> list[Span]:
    """Returns spans that cover the text, in order: "string", "comment", and "code" for all else, blanks included.

    Only words are looked at, so that a text can have them that is no valid program. Prefix and quotes are part of a string, and so
    is all of an f-string with the expressions in its braces: Python 3.11 takes an f-string for one word, and later versions, which
    take it apart, give the same labels so.

    Raises:
        InvalidInputError: If the text ends inside a string or bracket, is indented inconsistently, or has what Python has no word
            for, with the line; without whose text it is, which is not known here.
    """
    lines = list(io.StringIO(text))
    start_of_line = [0, *accumulate(map(len, lines))]
    spans: list[Span] = []
    end = 0
    for kind, words in _strings_and_comments(lines):
        places = [(start_of_line[line - 1] + column) for word in words for line, column in (word.start, word.end)]
        for word, start, stop in zip(words, places[::2], places[1::2], strict=True):
            if _unix(text[start:stop]) != _unix(word.string):  # Python 3.12.1 misplaces ends after non-ASCII characters
                raise InvalidInputError(
                    f"cannot be labelled: this Python places {shown(word.string)} of line {word.start[0]} where "
                    f"{shown(text[start:stop])} is; take another version of Python"
                )
        spans += [Span(end, places[0], CODE), Span(places[0], places[-1], kind)]
        end = places[-1]
    spans.append(Span(end, len(text), CODE))
    return [span for span in spans if span.start < span.stop]


def _strings_and_comments(lines: list[str]) -> list[tuple[str, list[tokenize.TokenInfo]]]:
    """Returns the kind of each, and the words that it is of: two of an f-string that is taken apart, its beginning and its end."""
    found: list[tuple[str, list[tokenize.TokenInfo]]] = []
    opened: list[tokenize.TokenInfo] = []  # one f-string can be inside another
    try:
        for word in tokenize.generate_tokens(iter(lines).__next__):
            name = tokenize.tok_name[word.type]  # by name: Python 3.11 has no FSTRING_START
            if name == "ERRORTOKEN" and word.string.strip(BLANKS):
                raise InvalidInputError(f"is no Python: line {word.start[0]} has {word.string!r} where no word can begin")
            if name in ("FSTRING_START", "TSTRING_START"):
                opened.append(word)
            elif name in ("FSTRING_END", "TSTRING_END"):
                start = opened.pop()
                if not opened:
                    found.append((STRING, [start, word]))
            elif name in ("STRING", "COMMENT") and not opened:
                found.append((STRING if name == "STRING" else COMMENT, [word]))
    except tokenize.TokenError as error:
        reason, (line, _) = error.args
        raise InvalidInputError(f"is no Python: {reason}, line {line}") from error
    except SyntaxError as error:
        raise InvalidInputError(f"is no Python: {error.msg}, line {error.lineno}") from error
    return found


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n")
