"""Texts with the probability that a probe gives each token as its colour: as a page of HTML, or for a terminal."""

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from exactivations.store.errors import InvalidInputError, shown

Colour = tuple[int, int, int]
Depth = Literal["none", "256", "full"]

DIVERGING: tuple[Colour, Colour] = ((67, 147, 195), (214, 96, 77))
"""At probability 0 and at 1, with white at 0.5: of ColorBrewer's RdBu, told apart by the colour-blind, black text legible on it."""

OF_CLASSES: tuple[Colour, ...] = (
    (86, 180, 233), (230, 159, 0), (0, 158, 115), (240, 228, 66), (204, 121, 167), (213, 94, 0), (153, 153, 153),
)  # fmt: skip
"""Of Okabe and Ito, told apart by the colour-blind, and grey; not their blue and black, on which black text is hard to read."""

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline: a terminal would obey them
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #000; background: #fff; margin: 2em auto; max-width: 70em; padding: 0 1em }
h1 { font-size: 1.4em } h2 { font-size: 1em; margin: 1.6em 0 0.3em }
pre { font: 13px/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; margin: 0;
      border: 1px solid #ddd; padding: 0.7em }
.legend span { padding: 0.1em 0.5em; margin-right: 0.6em; white-space: pre-wrap }
.token { border-bottom: 1px solid #aaa; box-decoration-break: clone; -webkit-box-decoration-break: clone }
.token:hover { outline: 1px solid #000 }
.break::before { content: "\\21B5"; color: #555 }
.bare { display: inline-block; width: 0.5em; height: 1em; vertical-align: middle; border: 1px solid #777; margin: 0 1px;
        box-sizing: border-box }
"""


class Piece(NamedTuple):
    """A piece of a text, and the number of the token it is of; None between tokens."""

    text: str
    token: int | None


@dataclass(frozen=True)
class ScoredText:
    """A sample's text in pieces, and what a probe says of its tokens.

    Attributes:
        sample_index: Its index in the dataset; None of a text that is of none.
        pieces: Of `pieces_of`; joined, they are the text.
        probabilities: Of each token [T] the probability of each class [K], which sum to 1; None where a token was not scored.
    """

    sample_index: int | None
    pieces: Sequence[Piece]
    probabilities: Sequence[Sequence[float] | None]


def pieces_of(text: str, offsets: Sequence[tuple[int, int]]) -> list[Piece]:
    """Cuts a text into the pieces of its tokens: joined, they are the text again, and every token has one, in order.

    A character that several tokens share (bytes of it, in byte-level BPE) is the first one's, and the others' pieces are empty. So
    are those of tokens without characters (special tokens, with offsets (0, 0)). What lies between, before or behind tokens
    (blanks that the tokenizer drops, what truncation cut off) is in pieces of no token.

    Args:
        text: The text that was tokenized, with the template around it, if there was one.
        offsets: Of each token [T]: its first character, and the one after its last, as a fast tokenizer's offset_mapping says.

    Raises:
        InvalidInputError: If a token's characters are not in the text, or begin before those of the token before it.
    """
    pieces, begun, reached = [], 0, 0
    for number, (start, stop) in enumerate(offsets):
        if start == stop:
            pieces.append(Piece("", number))
            continue
        if not begun <= start < stop <= len(text):
            raise InvalidInputError(
                f"token {number} has offsets {(start, stop)}, expected some from {begun} on (where the token before it begins) up "
                f"to {len(text)} (the end of the text): they are of another text, or not in order"
            )
        if start > reached:
            pieces.append(Piece(text[reached:start], None))
        pieces.append(Piece(text[max(start, reached) : stop], number))
        begun, reached = start, max(reached, stop)
    return pieces + ([Piece(text[reached:], None)] if reached < len(text) else [])


def token_html(samples: Sequence[ScoredText], title: str, classes: Sequence[str]) -> str:
    """Returns a page of HTML that needs nothing else, and runs no scripts.

    The text of a `pre` is the sample's text, but for NUL, which HTML cannot hold: it is shown as U+2400. A token without characters
    of its own is a small box, so that every score is seen. Pointing at a token tells its number, text and probabilities.

    Args:
        samples: What to show.
        title: The heading.
        classes: Their names [K]. Of two, the colour is the second one's probability, from blue over white to red; of more, it says
            which class is the most probable, and its strength how probable.

    Raises:
        InvalidInputError: If there are fewer than two classes or more than seven (colours that can be told apart), or a sample's
            pieces and probabilities do not fit each other or the classes.
    """
    for sample in samples:
        _check(sample, classes)
    bodies = "\n".join(
        f"<h2>{_heading(sample)}</h2>\n<pre>{''.join(_span(*scored, classes) for scored in _scored(sample))}</pre>"
        for sample in samples
    )
    heading, steps = html.escape(_line(title)), _legend(classes)
    legend = "".join(f'<span style="background:{_css(colour)}">{html.escape(text)}</span>' for text, colour in steps)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{heading}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{heading}</h1>\n"
        f'<p class="legend">{html.escape(_meaning(classes))} {legend}<br>No line below: not scored. A small box: a token without '
        "a character of its own (special, or a further byte of one). Point at a token for its numbers.</p>\n"
        f"{bodies}\n</body>\n</html>\n"
    )


def token_ansi(samples: Sequence[ScoredText], title: str, classes: Sequence[str], *, depth: Depth) -> str:
    """Returns the same for a terminal; without colours, a line for each token with its probabilities.

    Control characters but tab and newline are shown as symbols, so that a text cannot command the terminal. A token without
    characters of its own cannot be coloured; how many scored ones there are is said.

    Args:
        samples: What to show.
        title: The heading.
        classes: As in `token_html`.
        depth: What the terminal can do; see `terminal_depth`.

    Raises:
        InvalidInputError: As `token_html`.
    """
    for sample in samples:
        _check(sample, classes)
    lines = [_line(title)]
    if depth != "none":
        lines.append(_meaning(classes) + "".join(" " + _painted(f" {text} ", colour, depth) for text, colour in _legend(classes)))
    for sample in samples:
        lines += ["", f"== {_heading(sample)} =="]
        if depth == "none":
            scored = [(piece, row) for piece, row in _scored(sample) if piece.token is not None]
            lines += [f"{_what(piece)}  {'not scored' if row is None else _numbers(row, classes, '  ')}" for piece, row in scored]
            continue
        lines.append("".join(_on_terminal(piece, row, classes, depth) for piece, row in _scored(sample)))
        n_bare = sum(row is not None and not piece.text for piece, row in _scored(sample))
        lines += [f"({n_bare:,} scored tokens have no character of their own and are not seen here)"] if n_bare else []
    return "\n".join(lines)


def terminal_depth(environment: Mapping[str, str], is_terminal: bool) -> Depth:
    """Returns how many colours to write: none with NO_COLOR (no-color.org), into files, and to terminals that call themselves dumb.

    Args:
        environment: os.environ.
        is_terminal: Of the stream that is written to.
    """
    if environment.get("NO_COLOR") or not is_terminal or environment.get("TERM", "dumb") == "dumb":
        return "none"
    return "full" if environment.get("COLORTERM") in ("truecolor", "24bit") else "256"


def _check(sample: ScoredText, classes: Sequence[str]) -> None:
    what = _heading(sample)
    if not 2 <= len(classes) <= len(OF_CLASSES):
        raise InvalidInputError(f"colours tell 2 to {len(OF_CLASSES)} classes apart, got {len(classes)}: {shown(list(classes))}")
    numbers = [piece.token for piece in sample.pieces if piece.token is not None]
    if numbers != list(range(len(sample.probabilities))):
        raise InvalidInputError(
            f"{what} has pieces of {len(numbers)} tokens and probabilities of {len(sample.probabilities)}: each token, in order, "
            "has one of each"
        )
    for number, row in enumerate(sample.probabilities):
        if row is not None and (len(row) != len(classes) or not all(0 <= p <= 1 for p in row) or abs(sum(row) - 1) > 1e-3):
            raise InvalidInputError(
                f"{what}, token {number} has probabilities {shown(list(row))}, expected {len(classes)} from 0 to 1 that sum to 1, "
                "or None for a token that was not scored"
            )


def _scored(sample: ScoredText) -> Iterator[tuple[Piece, Sequence[float] | None]]:
    for piece in sample.pieces:
        yield piece, None if piece.token is None else sample.probabilities[piece.token]


def _heading(sample: ScoredText) -> str:
    return "text" if sample.sample_index is None else f"sample {sample.sample_index}"


def _span(piece: Piece, row: Sequence[float] | None, classes: Sequence[str]) -> str:
    # Also around what is not scored: a newline right behind <pre> would be lost.
    text = html.escape(piece.text).replace("\r", "&#13;").replace("\0", "\N{SYMBOL FOR NULL}")
    if row is None:
        return f"<span>{text}</span>"
    kind = "token bare" if not piece.text else "token break" if not piece.text.strip("\r\n") else "token"
    about = html.escape(f"{_what(piece)}\n{_numbers(row, classes, chr(10))}").replace("\n", "&#10;")
    return f'<span class="{kind}" style="background:{_css(_colour(row))}" title="{about}">{text}</span>'


def _on_terminal(piece: Piece, row: Sequence[float] | None, classes: Sequence[str], depth: Depth) -> str:
    text = _visible(piece.text)
    if row is None or not text:
        return text
    lines = text.split("\n")  # a colour that is left on at a newline would run to the edge; a blank shows it instead
    painted = [_painted(line + " " * (number < len(lines) - 1), _colour(row), depth) for number, line in enumerate(lines)]
    return "\n".join(painted)


def _painted(text: str, colour: Colour, depth: Depth) -> str:
    if not text:
        return ""
    if depth == "full":
        background = "48;2;" + ";".join(map(str, colour))
    else:  # the colour cube of 6 x 6 x 6
        red, green, blue = (min(range(6), key=lambda step: abs((0, 95, 135, 175, 215, 255)[step] - value)) for value in colour)
        background = f"48;5;{16 + 36 * red + 6 * green + blue}"
    return f"\x1b[38;5;16;{background}m{text}\x1b[0m"  # 16 is black in every theme, as 30 is not


def _colour(row: Sequence[float]) -> Colour:
    if len(row) == 2:
        low, high = DIVERGING
        return _mixed(low, 1 - 2 * row[1]) if row[1] < 0.5 else _mixed(high, 2 * row[1] - 1)
    likeliest = max(range(len(row)), key=row.__getitem__)
    return _mixed(OF_CLASSES[likeliest], row[likeliest])


def _mixed(colour: Colour, share: float) -> Colour:
    """Returns a colour on white of this opacity."""
    red, green, blue = (round(255 + (value - 255) * share) for value in colour)
    return red, green, blue


def _css(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _meaning(classes: Sequence[str]) -> str:
    if len(classes) == 2:
        return f"The probability of {_line(classes[1])}:"
    return "The most probable class, the stronger the more probable:"


def _legend(classes: Sequence[str]) -> list[tuple[str, Colour]]:
    if len(classes) == 2:
        return [(f"{step / 4:g}", _colour([1 - step / 4, step / 4])) for step in range(5)]
    return [(_line(name), colour) for name, colour in zip(classes, OF_CLASSES, strict=False)]


def _what(piece: Piece) -> str:
    return f"token {piece.token} {piece.text!r}"


def _numbers(row: Sequence[float], classes: Sequence[str], between: str) -> str:
    return between.join(f"{_line(name)} {probability:.3f}" for name, probability in zip(classes, row, strict=True))


def _line(text: str) -> str:
    """Returns a name on one line."""
    return _visible(" ".join(text.split()))


def _visible(text: str) -> str:
    """Returns text whose control characters, but tabs and newlines, are symbols."""

    def symbol(match: re.Match[str]) -> str:
        code = ord(match[0])
        return chr(0x2400 + code) if code < 0x20 else "\N{SYMBOL FOR DELETE}" if code == 0x7F else f"\\x{code:02x}"

    return CONTROL.sub(symbol, text)
