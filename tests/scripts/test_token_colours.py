"""Texts with scores as colours: the text comes out as it went in, every score is seen, and neither page nor terminal obeys it."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from exactivations.scripts.token_colours import (
    DIVERGING,
    OF_CLASSES,
    Piece,
    ScoredText,
    pieces_of,
    terminal_depth,
    token_ansi,
    token_html,
)
from exactivations.store.errors import InvalidInputError

PARTS = [
    "<", ">", "&", '"', "'", "&amp;", "&#10;", "</pre>", "<script>x</script>", "\t", "\r\n", "\r", "\n", "  ", "😀", "é", "日本",
]  # fmt: skip
HOSTILE = st.lists(
    st.sampled_from(PARTS) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5)
).map("".join)
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained("datamodules/demo_model")


class Page(HTMLParser):
    """What a page says: the text of each pre, the tokens with their attributes, and all that could run or be loaded."""

    def __init__(self, page):
        super().__init__()
        self.texts, self.tokens, self.headings, self.tags, self.open = [], [], [], [], []
        self.feed(page.replace("\r\n", "\n").replace("\r", "\n"))  # as browsers do before they read on
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.open += [] if tag in ("meta", "br") else [tag]
        if tag == "pre":
            self.texts.append("")
        if "pre" in self.open and dict(attributes).get("class", "").startswith("token"):
            self.tokens.append(dict(attributes))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "pre" in self.open:
            assert self.open[-1] == "span"  # a newline right behind <pre> would be lost
            self.texts[-1] += data
        elif self.open and self.open[-1] == "h2":
            self.headings.append(data)


def scored(text, offsets, n_classes=2, index=3):
    """A sample with another probability for each token; every fifth token is not scored."""
    rows = [[(at % 97 + 1) / 100 / (n_classes - 1)] * (n_classes - 1) for at in range(len(offsets))]
    return ScoredText(
        index, pieces_of(text, offsets), [None if at % 5 == 4 else [*row, 1 - sum(row)] for at, row in enumerate(rows)]
    )


@settings(deadline=None, max_examples=150)
@given(text=HOSTILE, n_classes=st.integers(2, 4))
def test_pages_hold_the_text_exactly_and_a_span_for_each_scored_token(tokenizer, text, n_classes):
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    sample = scored(text, offsets, n_classes)
    assert "".join(piece.text for piece in sample.pieces) == text
    assert [piece.token for piece in sample.pieces if piece.token is not None] == list(range(len(offsets)))
    page = Page(token_html([sample, sample], text, [f"class {text}"] * n_classes))
    assert page.texts == [text, text] and page.headings == ["sample 3", "sample 3"]
    assert {*page.tags} <= {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "br", "span", "pre"}
    rows = [(at, row) for at, row in enumerate(sample.probabilities) if row is not None]
    pieces = {piece.token: piece.text for piece in sample.pieces}
    assert [token["title"].split("\n")[0] for token in page.tokens[: len(rows)]] == [f"token {at} {pieces[at]!r}" for at, _ in rows]
    assert all(f" {row[0]:.3f}\n" in token["title"] for (_, row), token in zip(rows, page.tokens, strict=False))


@settings(deadline=None, max_examples=100)
@given(text=HOSTILE, depth=st.sampled_from(["256", "full"]))
def test_a_terminal_shows_the_text_and_obeys_nothing_in_it(tokenizer, text, depth):
    sample = scored(text, tokenizer(text, return_offsets_mapping=True)["offset_mapping"])
    told = token_ansi([sample], "title", ["a", "b"], depth=depth).partition("== sample 3 ==\n")[2]
    plain = ESCAPE.sub("", told)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", plain)
    body = re.sub(r"\n\([\d,]+ scored tokens have no character.*\)$", "", plain)
    expected = "".join(f"\\x{ord(c):02x}" if "\x7f" < c <= "\x9f" else c for c in text)
    expected = expected.translate({**{code: 0x2400 + code for code in range(32) if code not in (9, 10)}, 0x7F: 0x2421})
    assert re.sub(r" *\n", "\n", body) == re.sub(r" *\n", "\n", expected)
    assert all("\n" not in painted for painted in re.findall(r"\x1b\[38[^m]*m(.*?)\x1b\[0m", told, flags=re.DOTALL))


def test_pieces_of_bytes_special_tokens_and_gaps():
    text = "[a] 😀é  b, cut off"
    offsets = [(0, 0), (0, 3), (3, 5), (4, 5), (4, 5), (5, 6), (8, 9), (0, 0)]
    pieces = pieces_of(text, offsets)
    assert pieces == [
        Piece("", 0), Piece("[a]", 1), Piece(" 😀", 2), Piece("", 3), Piece("", 4), Piece("é", 5), Piece("  ", None), Piece("b", 6),
        Piece("", 7), Piece(", cut off", None),
    ]  # fmt: skip
    assert pieces_of("abcd", [(0, 3), (1, 2), (3, 4)]) == [Piece("abc", 0), Piece("", 1), Piece("d", 2)]
    assert pieces_of("", []) == [] and pieces_of("a", []) == [Piece("a", None)]


@pytest.mark.parametrize("offsets", [[(0, 4)], [(0, 2), (3, 2)], [(1, 2), (0, 1)], [(-1, 2)]])
def test_offsets_of_another_text_are_refused(offsets):
    with pytest.raises(InvalidInputError, match=f"token {len(offsets) - 1} has offsets"):
        pieces_of("abc", offsets)


@given(text=st.text(st.sampled_from("ab \t\né😀"), max_size=12))
def test_a_tokenizer_that_drops_blanks_gives_the_text_back_too(text):
    words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces = pieces_of(text, words.encode(text).offsets)
    assert "".join(piece.text for piece in pieces) == text
    assert all(piece.text.isspace() == (piece.token is None) for piece in pieces)


def test_nul_which_html_cannot_hold_is_shown():
    assert Page(token_html([ScoredText(0, [Piece("a\0b", 0)], [[0.5, 0.5]])], "title", ["a", "b"])).texts == ["a\u2400b"]


def backgrounds(classes, rows):
    sample = ScoredText(None, [Piece("x", at) for at in range(len(rows))], rows)
    styles = [token["style"] for token in Page(token_html([sample], "title", classes)).tokens]
    return [tuple(bytes.fromhex(style.removeprefix("background:#"))) for style in styles]


def test_of_two_classes_the_colour_diverges_from_white_at_a_half():
    colours = backgrounds(["no", "yes"], [[1 - p, p] for p in (0.0, 0.2, 0.5, 0.8, 1.0)])
    assert (colours[0], colours[2], colours[4]) == (DIVERGING[0], (255, 255, 255), DIVERGING[1])
    assert colours[1][2] > colours[1][0] and colours[3][0] > colours[3][2]  # blue, red


def test_of_more_classes_the_likeliest_gives_the_colour_and_its_probability_how_strong_it_is():
    full, weak = backgrounds(["a", "b", "c"], [[0.0, 1.0, 0.0], [0.2, 0.2, 0.6]])
    assert full == OF_CLASSES[1]
    assert weak == tuple(round(255 + (value - 255) * 0.6) for value in OF_CLASSES[2])


def test_black_text_is_legible_on_every_colour():
    """WCAG's contrast of black on the colour, at least 4.5."""

    def luminance(colour):
        shares = [v / 255 / 12.92 if v / 255 <= 0.03928 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in colour]
        return sum(share * weight for share, weight in zip(shares, (0.2126, 0.7152, 0.0722), strict=True))

    assert min((luminance(colour) + 0.05) / 0.05 for colour in [*DIVERGING, *OF_CLASSES]) > 4.5


def test_terminal_colours_are_the_pages_and_without_colours_numbers_are_told():
    sample = ScoredText(7, [Piece("", 0), Piece("if\n", 1), Piece(" ", None), Piece("x", 2)], [[0.25, 0.75], [0.0, 1.0], None])
    full, cube = (token_ansi([sample], "title", ["no", "yes"], depth=depth) for depth in ("full", "256"))
    red = ";".join(map(str, DIVERGING[1]))
    assert full.endswith(
        f"\x1b[38;5;16;48;2;{red}mif \x1b[0m\n x\n(1 scored tokens have no character of their own and are not seen here)"
    )
    assert "\x1b[38;5;16;48;5;167mif \x1b[0m" in cube  # (215, 95, 95), the nearest of the cube
    assert token_ansi([sample], "title", ["no", "yes"], depth="none").splitlines() == [
        "title", "", "== sample 7 ==", "token 0 ''  no 0.250  yes 0.750", "token 1 'if\\n'  no 0.000  yes 1.000",
        "token 2 'x'  not scored",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "is_terminal", "depth"),
    [
        ({"TERM": "xterm", "COLORTERM": "truecolor"}, True, "full"),
        ({"TERM": "xterm"}, True, "256"),
        ({"TERM": "xterm", "NO_COLOR": ""}, True, "256"),
        ({"TERM": "xterm"}, False, "none"),
        ({"TERM": "xterm", "COLORTERM": "truecolor", "NO_COLOR": "1"}, True, "none"),
        ({"TERM": "dumb"}, True, "none"),
        ({}, True, "none"),
    ],
)
def test_the_environment_says_how_many_colours(environment, is_terminal, depth):
    assert terminal_depth(environment, is_terminal) == depth


@pytest.mark.parametrize("row", [[float("nan"), 0.5], [0.5], [0.7, 0.7], [1.2, -0.2], [0.2, 0.3, 0.5]])
@pytest.mark.parametrize("write", [token_html, lambda *given: token_ansi(*given, depth="none")])
def test_what_are_no_probabilities_is_refused(row, write):
    sample = ScoredText(193, [Piece("a", 0), Piece("b", 1)], [None, row])
    with pytest.raises(InvalidInputError, match=r"sample 193, token 1 has probabilities .* expected 2 from 0 to 1"):
        write([sample], "title", ["a", "b"])
    with pytest.raises(InvalidInputError, match="pieces of 2 tokens and probabilities of 1"):
        write([ScoredText(193, sample.pieces, [None])], "title", ["a", "b"])
    with pytest.raises(InvalidInputError, match="colours tell 2 to 7 classes apart, got 8"):
        write([sample], "title", ["a"] * 8)
