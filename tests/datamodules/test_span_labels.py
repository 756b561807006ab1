"""Every token gets the label that its characters have, whatever the tokenizer adds, cuts or splits; other tokens are refused."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exactivations.datamodules.labels import token_labels_of
from exactivations.datamodules.span_labels import Span, label_samples, label_tokens_of, write_token_labels
from exactivations.datamodules.text import TextDataModule
from exactivations.datamodules.tokenization import TextOptions, encode_alone
from exactivations.store.activation_store import ActivationStore
from exactivations.store.errors import InvalidInputError, StoreError
from tests.datamodules.conftest import make_word_tokenizer
from tests.store.mask_folders import POOLED
from tests.store.stores import make_store


def letters(text):
    """A span for each run of one letter, labelled with it."""
    ends = [i + 1 for i in range(len(text)) if i + 1 == len(text) or text[i + 1] != text[i]]
    spans = [Span(start, stop, text[start]) for start, stop in zip([0, *ends], ends, strict=False)]
    return [span for span in spans if span.label.isalpha()]


OPTIONS = [
    TextOptions(), TextOptions(add_special_tokens=False), TextOptions(template="a b {text} c"), TextOptions(max_length=4),
    TextOptions(max_length=4, truncation_side="left"), TextOptions(max_length=5, template="j {text}", truncation_side="left"),
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
@settings(max_examples=25, deadline=None)
@given(words=st.lists(st.sampled_from("bcdefz"), min_size=1, max_size=8), gap=st.sampled_from([" ", "  ", "\n\t"]))
def test_words_have_their_own_label_wherever_the_text_is_cut_and_what_is_around_it(options, words, gap):
    tokenizer = make_word_tokenizer()
    encoded = encode_alone(gap.join(words), tokenizer, options)
    found = label_tokens_of(gap.join(words), letters, tokenizer, options)
    assert found.token_hash == encoded.token_hash
    before, after = (options.template or "{text}").split("{text}")
    whole = [None] * len(before.split()) + words + [None] * len(after.split())
    added = 2 * options.add_special_tokens
    kept = len(whole) if options.max_length is None else min(len(whole), options.max_length - added)
    whole = whole[:kept] if options.truncation_side == "right" else whole[len(whole) - kept :]
    assert found.labels == ([None, *whole, None] if added else whole)
    assert tokenizer.truncation_side == "right"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("aat hec  \nsé𐐷"), min_size=1, max_size=30), data=st.data())
def test_a_token_of_several_labels_has_the_one_of_most_of_its_characters(byte_tokenizer, text, data):
    """By counting bytes: of a byte-level tokenizer each token is so many bytes of the text."""
    labels = data.draw(st.lists(st.sampled_from([None, "x", "y", "z"]), min_size=len(text), max_size=len(text)))
    spans = [Span(i, i + 1, label) for i, label in enumerate(labels) if label is not None]
    found = label_tokens_of(text, lambda _: data.draw(st.permutations(spans)), byte_tokenizer, TextOptions())
    char_at = [i for i, character in enumerate(text) for _ in character.encode()]
    pieces = byte_tokenizer.convert_ids_to_tokens(byte_tokenizer(text)["input_ids"])
    at = 0
    for piece, label in zip(pieces, found.labels, strict=True):
        characters = sorted(set(char_at[at : at + len(piece)]))  # a byte-level piece has one character a byte
        at += len(piece)
        held = [labels[i] for i in characters if labels[i] is not None and not text[i].isspace()]
        assert label == (max(held, key=held.count) if held else None)  # max takes the first of equals
    assert at == len(char_at)


def test_special_tokens_in_the_text_have_no_label(byte_tokenizer):
    found = label_tokens_of("at<|end|>at", lambda text: [Span(0, len(text), "x")], byte_tokenizer, TextOptions())
    assert found.labels == ["x", None, "x"]


def test_spans_that_are_none_of_this_text_are_refused(word_tokenizer):
    for spans in ([Span(0, 2, "x"), Span(1, 3, "y")], [Span(2, 4, "x")], [Span(-1, 1, "x")], [Span(2, 1, "x")]):
        with pytest.raises(InvalidInputError, match=r"has a span .*may not overlap or leave the text"):
            label_tokens_of("a b", lambda _, spans=spans: spans, word_tokenizer, TextOptions())


TEXTS = ["bb z", "a", "c d e f g", "b", "a b", "j"]


def labelled_store(path, texts=TEXTS, options=None, leave_out=(1,)):
    """A pooled store of some of the texts, with the true hashes of their tokens."""
    data = TextDataModule(texts, make_word_tokenizer([*"01", "[CLS]", "[SEP]", "[UNK]", *"abcdefghij", "bb"]), text=options)
    table = data.tokens
    kept = [i for i in range(len(table)) if i not in leave_out]
    hashes = [table.token_hash[i].as_py() for i in kept]
    make_store(path, table.sample_index[kept].tolist(), table.n_tokens[kept].tolist(), names=POOLED, token_hash=hashes)
    return ActivationStore(path), data


def test_labels_of_a_store_are_written_and_read_again_for_its_samples(tmp_path, monkeypatch):
    monkeypatch.setattr("exactivations.datamodules.span_labels.SAMPLES_BLOCK", 2)
    store, data = labelled_store(tmp_path / "run", options=TextOptions(max_length=5))
    counts = write_token_labels(tmp_path / "labels.parquet", "letter", label_samples(store, data, letters))
    assert counts == {None: 10, "b": 3, "z": 1, "c": 1, "d": 1, "e": 1, "a": 1, "j": 1}
    labels = token_labels_of(store, "letter", tmp_path / "labels.parquet")
    names = np.array([*labels.classes, "."])[labels.numbers]
    assert "".join(names) == ".bz." + ".cde." + ".b." + ".ab." + ".j."
    assert labels.start.tolist() == store.token_start.tolist()


def test_other_texts_and_spans_that_cannot_be_told_are_refused_by_sample_and_leave_no_file(tmp_path):
    store, data = labelled_store(tmp_path / "run")

    def refused(message, data=data, spans_of=letters, error=InvalidInputError, out=tmp_path / "labels.parquet"):
        with pytest.raises(error, match=message):
            write_token_labels(out, "letter", label_samples(store, data, spans_of))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]

    def other(*texts, **options):
        return TextDataModule(list(texts), data.tokenizer, **options)

    def unwilling(text):
        raise InvalidInputError(f"is {text}")

    refused(r"sample 2 has token hash \w+ in the dataset, \w+ in .*: it is another dataset", other(*TEXTS[:2], "c d", *TEXTS[3:]))
    refused(r"sample 2 has token hash", other(*TEXTS, text=TextOptions(max_length=5)))
    refused(r"sample 4: the dataset has samples 0 to 3: it is another one", other(*TEXTS[:4]))
    refused(r"sample 0 is bb z", spans_of=unwilling)
    refused(r"sample 0 has a span", spans_of=lambda _: [Span(0, 9, "x")])
    refused(r"is of conversations \(column 'm'\)", other(*TEXTS, text=TextOptions(messages_column="m")))
    refused(r"cannot write .*gone", error=StoreError, out=tmp_path / "gone" / "labels.parquet")


def test_a_tokenizer_that_does_not_tell_offsets_is_refused(word_tokenizer, monkeypatch):
    monkeypatch.setattr(type(word_tokenizer), "is_fast", False)
    with pytest.raises(InvalidInputError, match="only fast tokenizers do"):
        label_tokens_of("a", letters, word_tokenizer, TextOptions())
