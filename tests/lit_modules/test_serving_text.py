"""Text that is given out bit by bit: its parts make the whole, no character is broken, and a stop sequence is never seen."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from exactivations.datamodules.named_tokenizer import load_tokenizer
from exactivations.lit_modules.serving_text import GrowingText

TOKENIZER = load_tokenizer("demo")
EOS = TOKENIZER.eos_token_id
MARKS = ["🙂", "é", "ab", "aab", "b\n", "\ufffd", "日本", "x"]
texts = st.lists(st.sampled_from([*MARKS, "a", "\n", " return"]), max_size=12).map("".join)
ids = st.one_of(
    texts.map(lambda text: TOKENIZER(text).input_ids),
    st.lists(st.integers(0, 4095), max_size=20),  # bytes in any order, halves of characters among them
    texts.map(lambda text: [i for byte in text.encode() for i in TOKENIZER.convert_tokens_to_ids([to_token(byte)])]),
)


def to_token(byte):
    """GPT-2's name of a byte, by its published rule: printable ones stand for themselves, the others follow from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in printable else chr(256 + [b for b in range(256) if b not in printable].index(byte))


def parts_of(tokens, eos=frozenset(), stop=()):
    growing, parts = GrowingText(TOKENIZER, eos, stop), []
    for token in tokens:
        growing.add(token)
        parts.append(growing.more())
        if growing.is_stopped:
            return growing, parts
    return growing, [*parts, growing.rest()]


@given(ids)
@settings(max_examples=80, deadline=None)
def test_the_parts_are_the_whole_and_no_character_is_broken(tokens):
    growing, parts = parts_of(tokens)
    whole = TOKENIZER.decode(tokens)
    assert "".join(parts) == whole == growing.text
    for n in range(len(parts)):
        assert whole.startswith("".join(parts[:n])) and not "".join(parts[:n]).endswith("\ufffd")


def test_an_emoji_of_four_tokens_comes_at_once():
    tokens = [TOKENIZER.convert_tokens_to_ids(to_token(byte)) for byte in "🙂!".encode()]
    assert parts_of(tokens)[1] == ["", "", "", "🙂", "!", ""]


@given(ids, st.lists(st.sampled_from(MARKS), min_size=1, max_size=3))
@example(TOKENIZER("aaab").input_ids, ["aab"])
@settings(max_examples=80, deadline=None)
def test_it_ends_before_the_stop_sequence_that_is_complete_first(tokens, stop):
    growing, parts = parts_of(tokens, stop=stop)
    text = "".join(parts)
    expected, is_stopped = TOKENIZER.decode(tokens), False
    prefixes = [TOKENIZER.decode(tokens[:n]).rstrip("\ufffd") for n in range(1, len(tokens) + 1)]
    for known in [*prefixes, expected]:
        places = [known.find(mark) for mark in stop if mark in known]
        if places:
            expected, is_stopped = known[: min(places)], True
            break
    assert text == growing.text == expected
    assert growing.is_stopped == is_stopped and not any(mark in text for mark in stop)


def test_what_is_behind_the_end_of_a_text_is_none_of_it():
    tokens = [*TOKENIZER("return").input_ids, EOS, *TOKENIZER("more").input_ids]
    growing, parts = parts_of(tokens, eos=frozenset({EOS}), stop=["re x"])
    assert "".join(parts) == growing.text == "return" and growing.token_ids == TOKENIZER("return").input_ids
