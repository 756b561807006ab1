"""Text that is given out bit by bit: its parts make the whole, no character is broken, and a stop sequence is never seen."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from exactivations.datamodules.named_tokenizer import load_tokenizer
from exactivations.lit_modules.amplification.serving_text import BROKEN, GrowingText

TOKENIZER = load_tokenizer("demo")
EOS = TOKENIZER.eos_token_id
MARKS = ["🙂", "é", "ab", "aab", "b\n", "\ufffd", "日本", "x"]
texts = st.lists(st.sampled_from([*MARKS, "a", "\n", " return"]), max_size=12).map("".join)
ids = st.one_of(
    texts.map(lambda text: TOKENIZER(text).input_ids),
    st.lists(st.integers(0, 4095), max_size=20),  # bytes in any order, halves of characters among them
    texts.map(lambda text: [i for byte in text.encode() for i in TOKENIZER.convert_tokens_to_ids([to_token(byte)])]),
    st.lists(st.sampled_from([0x80, 0x97, 0xE6, 0xF0, 0x41, 0xFF]), max_size=60).map(
        lambda found: TOKENIZER.convert_tokens_to_ids([to_token(byte) for byte in found])
    ),
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
    for n in range(len(parts)):  # of many broken bytes those in front are given out as they are
        assert whole.startswith("".join(parts[:n])) and (n > BROKEN or not "".join(parts[:n]).endswith("\ufffd"))


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


class Counting:
    """A tokenizer that counts the ids that it decodes."""

    def __init__(self):
        self.n_decoded = 0

    def decode(self, token_ids, **arguments):
        self.n_decoded += len(token_ids)
        return TOKENIZER.decode(token_ids, **arguments)


@pytest.mark.parametrize("byte", [0x41, 0x80, 0xE6])
def test_a_long_text_is_not_decoded_again_with_each_token_be_it_broken_bytes(byte):
    tokenizer, n_tokens = Counting(), 600
    growing = GrowingText(tokenizer, frozenset())
    for token in TOKENIZER.convert_tokens_to_ids([to_token(byte)]) * n_tokens:
        growing.add(token)
        growing.more()
    assert tokenizer.n_decoded < 200 * n_tokens < n_tokens**2 / 2 + 1e5 and len(growing.offsets) == n_tokens


def test_offsets_are_where_each_token_begins():
    tokens = TOKENIZER("def close(self):\n    return 🙂é 1").input_ids
    growing = GrowingText(TOKENIZER, frozenset(), stop=["self)x"])
    for token in tokens:
        growing.add(token)
        growing.more()
    prefixes = [TOKENIZER.decode(tokens[:n]).rstrip("\ufffd") for n in range(len(tokens))]
    assert growing.offsets == [len(prefix) for prefix in prefixes]


class ByteFallback:
    """As SentencePiece's: a word's space is a mark, the first one is left out, and a run of bytes is text only as a whole."""

    def __init__(self):
        words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "."]
        self.ids = {word: place for place, word in enumerate(words)}
        self.made = Tokenizer(models.BPE(vocab=self.ids, merges=[], unk_token="<unk>", byte_fallback=True))
        self.made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )

    def decode(self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None):
        text = self.made.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text if clean_up_tokenization_spaces is False else text.replace(" .", ".")


def test_characters_of_byte_tokens_side_by_side_and_spaces_are_as_in_the_whole():
    tokenizer = ByteFallback()
    tokens = [tokenizer.ids[word] for word in ["▁a", *(f"<0x{byte:02X}>" for byte in "日本 ".encode()), ".", "▁a", "▁a"]]
    growing, parts = GrowingText(tokenizer, frozenset()), []
    for token in tokens:
        growing.add(token)
        parts.append(growing.more())
    assert "".join([*parts, growing.rest()]) == "a日本 . a a" and parts[3:4] == ["日"]
