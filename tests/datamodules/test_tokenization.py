"""Tokens of each sample against the tokenizer alone, and what identifies them."""

import datasets
import numpy as np
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from exactivations.datamodules.tokenization import TextOptions, TokenTable, encode_alone, tokenize, tokenizer_hash
from exactivations.store.errors import InvalidInputError
from exactivations.store.token_hash import hash_of_ids
from tests.datamodules.conftest import MARKING_TEMPLATE, PLAIN_TEMPLATE, WORDS, make_word_tokenizer

CLS, SEP, UNK = 2, 3, 1


def table_of(texts, tokenizer, processes=None, **options) -> TokenTable:
    dataset = datasets.Dataset.from_dict({"text": texts})
    return tokenize(dataset, np.arange(len(texts)), tokenizer, TextOptions(**options), processes)


def table_of_chats(chats, tokenizer, **options) -> TokenTable:
    dataset = datasets.Dataset.from_list([{"messages": chat} for chat in chats])
    return tokenize(dataset, np.arange(len(chats)), tokenizer, TextOptions(messages_column="messages", **options))


def rows_of(table: TokenTable) -> list[tuple[list[int], list[bool]]]:
    rows = []
    for position in range(len(table)):
        ids, mask = table.gather(np.array([position]))
        rows.append((ids.tolist(), mask.tolist()))
    return rows


def ids_of(table: TokenTable) -> list[list[int]]:
    return [ids for ids, _ in rows_of(table)]


def masks_of(table: TokenTable) -> list[list[bool]]:
    return [mask for _, mask in rows_of(table)]


TEXTS = ["a b c", "j", "the cat", "a {text} {0} %s {", "  spaced  out  ", "naïve — ünïcode 🙂", "a " * 40, "x\ny\x00z", "<b>"]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", ["word_tokenizer", "byte_tokenizer"])
def test_each_samples_ids_are_what_the_tokenizer_gives_for_its_text_alone(name, special, request):
    tokenizer = request.getfixturevalue(name)
    table = table_of(TEXTS, tokenizer, add_special_tokens=special)
    alone = [tokenizer(text, add_special_tokens=special)["input_ids"] for text in TEXTS]
    assert ids_of(table) == alone
    assert table.n_tokens.tolist() == list(map(len, alone))
    assert table.largest_id == max(map(max, alone))
    assert not table.truncated.any()


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30), min_size=1, max_size=8))
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_at_all_gets_the_ids_that_it_has_alone(texts, byte_tokenizer):
    assert ids_of(table_of(texts, byte_tokenizer)) == [byte_tokenizer(text)["input_ids"] for text in texts]


def test_padding_and_truncation_that_a_tokenizer_file_asks_for_do_not_happen():
    tokenizer = make_word_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=10)
    assert ids_of(table_of(["a b c d e f", "a"], tokenizer)) == [[CLS, 5, 6, 7, 8, 9, 10, SEP], [CLS, 5, SEP]]


def test_a_template_is_put_around_each_text_and_nothing_else_in_either_is_interpreted(byte_tokenizer):
    template = "{0} {name} {{x}} {text} %s \\n {"
    table = table_of(TEXTS, byte_tokenizer, template=template)
    assert [byte_tokenizer.decode(ids) for ids in ids_of(table)] == ["{0} {name} {{x}} " + text + " %s \\n {" for text in TEXTS]


@pytest.mark.parametrize("template", ["no place", "{text} and {text}", ""])
def test_a_template_without_exactly_one_place_for_the_text_is_refused(template):
    with pytest.raises(InvalidInputError, match="exactly once"):
        TextOptions(template=template)


@pytest.mark.parametrize(
    ("side", "special", "expected"),
    [
        ("right", True, [CLS, 5, 6, SEP]),
        ("left", True, [CLS, 9, 10, SEP]),
        ("right", False, [5, 6, 7, 8]),
        ("left", False, [7, 8, 9, 10]),
    ],
)
def test_truncation_cuts_the_side_asked_for_and_keeps_the_special_tokens(word_tokenizer, side, special, expected):
    texts = ["a b c d e f", "a b", "a b c d"]
    table = table_of(texts, word_tokenizer, max_length=4, truncation_side=side, add_special_tokens=special)
    whole = [word_tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]
    assert ids_of(table)[0] == expected
    assert ids_of(table)[1] == whole[1]
    assert table.truncated.tolist() == [len(ids) > 4 for ids in whole]
    assert table.n_tokens.tolist() == [min(4, len(ids)) for ids in whole]


def test_the_callers_tokenizer_keeps_its_own_side_of_truncation(word_tokenizer):
    word_tokenizer.truncation_side = "right"
    table_of(["a b c d e f"], word_tokenizer, max_length=4, truncation_side="left")
    assert word_tokenizer.truncation_side == "right"


@pytest.mark.parametrize("max_length", [1, 2])
def test_a_maximum_that_leaves_no_room_beside_the_special_tokens_is_refused(word_tokenizer, max_length):
    with pytest.raises(InvalidInputError, match=f"max_length {max_length} leaves no room .* 2 special tokens"):
        table_of(["a b c"], word_tokenizer, max_length=max_length)
    assert ids_of(table_of(["a b c"], word_tokenizer, max_length=max_length, add_special_tokens=False)) == [[5, 6, 7][:max_length]]


def test_content_is_all_but_special_tokens_and_unknown_words_are_content(word_tokenizer):
    table = table_of(["a zzz b [MASK] c"], word_tokenizer)
    assert rows_of(table) == [([CLS, 5, UNK, 6, 4, 7, SEP], [False, True, True, True, False, True, False])]


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_the_first_tokens_of_each_sample_are_no_content_where_that_is_asked_for(byte_tokenizer, word_tokenizer, skip):
    texts = ["the cat sat", "the end of the tale", "on the mat"]
    for tokenizer in (byte_tokenizer, word_tokenizer):
        whole, table = table_of(texts, tokenizer), table_of(texts, tokenizer, skip_first=skip)
        assert ids_of(table) == ids_of(whole) == [tokenizer(text)["input_ids"] for text in texts]
        expected = [[counts and place >= skip for place, counts in enumerate(mask)] for mask in masks_of(whole)]
        assert masks_of(table) == expected
        assert (table.content_hash == whole.content_hash) == (expected == masks_of(whole))
        assert encode_alone(texts[0], tokenizer, TextOptions(skip_first=skip)).token_mask.tolist() == expected[0]


def test_a_sample_of_which_nothing_is_left_is_empty(word_tokenizer):
    with pytest.raises(
        InvalidInputError, match=r"sample 1 is empty: none of its 3 tokens .*'content' and skip_first=2.*--on-empty"
    ):
        table_of(["a b", "a", "c d"], word_tokenizer, skip_first=2)
    table = table_of(["a b", "a", "c d"], word_tokenizer, skip_first=2, on_empty="skip")
    assert table.skipped == [1] and masks_of(table) == [[False, False, True, False]] * 2


def test_an_option_that_came_later_is_in_the_identity_only_where_it_is_given():
    assert "skip_first" not in TextOptions().identity()
    for options in (TextOptions(), TextOptions(skip_first=1, max_length=9)):
        assert TextOptions.of_identity({**options.identity(), "model": "another field"}) == options
    assert TextOptions(skip_first=1).identity() != TextOptions().identity()


def test_all_counts_every_token(word_tokenizer):
    assert masks_of(table_of(["a b"], word_tokenizer, token_mask="all")) == [[True] * 4]


def test_an_unknown_token_that_is_padding_too_is_content_and_one_that_is_bos_is_not(word_tokenizer, byte_tokenizer):
    word_tokenizer.pad_token = "[UNK]"
    assert masks_of(table_of(["a zzz"], word_tokenizer)) == [[False, True, True, False]]
    assert masks_of(table_of(["a<|end|>b"], byte_tokenizer)) == [[True, False, True]]


CHATS = [
    [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}],
    [{"role": "assistant", "content": "e"}],
]
CHAT_IDS = [[CLS, 15, 17, 5, 6, SEP, CLS, 16, 17, 7, 8, SEP], [CLS, 16, 17, 9, SEP]]


def test_messages_become_what_the_chat_template_says(word_tokenizer):
    word_tokenizer.chat_template = PLAIN_TEMPLATE
    table = table_of_chats(CHATS, word_tokenizer)
    assert ids_of(table) == CHAT_IDS
    assert masks_of(table) == [[token not in (CLS, SEP) for token in ids] for ids in CHAT_IDS]
    assert masks_of(table_of_chats(CHATS, word_tokenizer, token_mask="all")) == [[True] * 12, [True] * 5]


def test_the_assistants_tokens_are_those_in_generation_blocks(word_tokenizer):
    word_tokenizer.chat_template = MARKING_TEMPLATE
    table = table_of_chats(CHATS, word_tokenizer, token_mask="assistant")
    assert ids_of(table) == CHAT_IDS
    assert [np.flatnonzero(mask).tolist() for mask in masks_of(table)] == [[9, 10], [3]]


def test_a_generation_prompt_is_added_when_asked_for(word_tokenizer):
    word_tokenizer.chat_template = MARKING_TEMPLATE
    table = table_of_chats(CHATS, word_tokenizer, add_generation_prompt=True)
    assert ids_of(table) == [[*ids, CLS, 16, 17] for ids in CHAT_IDS]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prompted", [True, False])
def test_a_conversation_that_would_be_cut_is_refused_by_its_index_with_a_length_that_does(word_tokenizer, side, prompted):
    word_tokenizer.chat_template = MARKING_TEMPLATE
    options = {"add_generation_prompt": prompted, "truncation_side": side}
    whole = [word_tokenizer.apply_chat_template(chat, add_generation_prompt=prompted)["input_ids"] for chat in CHATS]
    lengths = list(map(len, whole))
    assert lengths == [15, 8] if prompted else [12, 5]
    told = f"sample 0 is a conversation of {lengths[0]} tokens, max_length is {lengths[0] - 1}. A conversation is not cut: "
    told += f".* Pass --max-length {lengths[0]} or more, or leave long conversations out"
    with pytest.raises(InvalidInputError, match=told) as error:
        table_of_chats(CHATS, word_tokenizer, max_length=lengths[0] - 1, **options)
    assert "sample 1" not in str(error.value)
    with pytest.raises(InvalidInputError, match=f"^is a conversation of {lengths[0]} tokens, .* --max-length {lengths[0]} or more"):
        encode_alone(CHATS[0], word_tokenizer, TextOptions(messages_column="m", max_length=7, **options))
    with pytest.raises(InvalidInputError, match="sample 1 is a conversation of"):  # not taken for an empty one
        table_of_chats([[], CHATS[0]], word_tokenizer, max_length=7, on_empty="skip", **options)
    table = table_of_chats(CHATS, word_tokenizer, max_length=lengths[0], **options)
    assert ids_of(table) == whole
    assert not table.truncated.any()


def test_a_conversation_without_an_assistant_counts_as_empty(word_tokenizer):
    word_tokenizer.chat_template = MARKING_TEMPLATE
    chats = [*CHATS, [{"role": "user", "content": "a"}]]
    with pytest.raises(InvalidInputError, match="sample 2 is empty: none of its 5 tokens counts with token_mask='assistant'"):
        table_of_chats(chats, word_tokenizer, token_mask="assistant")
    table = table_of_chats(chats, word_tokenizer, token_mask="assistant", on_empty="skip")
    assert (ids_of(table), table.skipped) == (CHAT_IDS, [2])


def test_the_assistants_tokens_are_refused_where_the_template_does_not_mark_them(word_tokenizer):
    for template in (PLAIN_TEMPLATE, PLAIN_TEMPLATE + "{# generation #}{{ 'generation' if false }}"):
        word_tokenizer.chat_template = template
        with pytest.raises(InvalidInputError, match="does not mark the assistant's tokens"):
            table_of_chats(CHATS, word_tokenizer, token_mask="assistant")


def test_messages_without_a_chat_template_are_refused(word_tokenizer):
    with pytest.raises(InvalidInputError, match="no chat template"):
        table_of_chats(CHATS, word_tokenizer)


def test_a_conversation_that_does_not_fit_the_template_is_refused_by_index_even_when_empty_ones_are_skipped(word_tokenizer):
    word_tokenizer.chat_template = "{% if messages[0]['role'] == 'user' %}{{ raise_exception('no users') }}{% endif %}assistant"
    with pytest.raises(InvalidInputError, match="sample 0 does not fit the chat template: TemplateError: no users"):
        table_of_chats(CHATS, word_tokenizer, on_empty="skip")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", None, "b"], "sample 1 is empty: it is None"),
        (["a", "", "b"], "sample 1 is empty"),
        (["a", "   ", "b"], "sample 1 is empty: none of its 2 tokens counts"),
        (["a", "[SEP]", "b"], "sample 1 is empty: none of its 3 tokens counts"),
        ([1, 2, 3], "sample 0 is of type int, expected text"),
        ([["a"], ["b"]], "sample 0 is of type list, expected text"),
    ],
)
def test_a_sample_that_is_no_text_is_refused_by_its_index(word_tokenizer, texts, message):
    with pytest.raises(InvalidInputError, match=message):
        table_of(texts, word_tokenizer)


def test_the_index_in_a_message_is_that_in_the_dataset_as_given(word_tokenizer):
    dataset = datasets.Dataset.from_dict({"text": ["a", "b", ""]})
    with pytest.raises(InvalidInputError, match="sample 70 is empty"):
        tokenize(dataset, np.array([5, 6, 70]), word_tokenizer, TextOptions())


def test_many_bad_samples_are_told_by_the_first_five_and_a_count(word_tokenizer):
    with pytest.raises(InvalidInputError, match=r"sample 4 .*; and 7 more.*--on-empty skip") as error:
        table_of([""] * 12 + ["a"], word_tokenizer)
    assert "sample 5 " not in str(error.value)


def test_skipping_records_the_empty_ones_and_leaves_the_indices_of_the_others(word_tokenizer):
    texts = ["a", None, "b", "", "   ", "c d", ""]
    table = table_of(texts, word_tokenizer, on_empty="skip")
    assert table.skipped == [1, 3, 4, 6]
    assert table.sample_index.tolist() == [0, 2, 5]
    assert ids_of(table) == [word_tokenizer(texts[i])["input_ids"] for i in (0, 2, 5)]
    assert table.token_hash.to_pylist() == [hash_of_ids(ids) for ids in ids_of(table)]
    assert len(table) == len(table.n_tokens) == len(table.truncated) == 3


def test_skipping_does_not_hide_what_is_no_text(word_tokenizer):
    with pytest.raises(InvalidInputError, match="sample 0 is of type int") as error:
        table_of([1, 2], word_tokenizer, on_empty="skip")
    assert "--on-empty" not in str(error.value)


def test_nothing_but_empty_texts_is_refused_even_when_they_are_skipped(word_tokenizer):
    with pytest.raises(InvalidInputError, match="all 3 texts are empty"):
        table_of(["", None, " "], word_tokenizer, on_empty="skip")


def test_a_column_that_is_missing_is_refused_with_those_that_there_are(word_tokenizer):
    with pytest.raises(InvalidInputError, match="no column 'body'; it has text"):
        table_of(["a"], word_tokenizer, text_column="body")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"token_mask": "assistant"}, "needs a messages_column"),
        ({"template": "{text}", "messages_column": "m"}, "give one of the two"),
        ({"token_mask": "contents"}, "token_mask must be one of content, assistant, all, got 'contents'"),
        ({"truncation_side": "both"}, "truncation_side must be one of left, right"),
        ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs needs a messages_column"),
        ({"skip_first": -1}, "skip_first must be at least 0"),
        ({"skip_first": 1, "token_mask": "all"}, "with token_mask='all' 0, got 1"),
        ({"on_empty": "ignore"}, "on_empty must be one of error, skip"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(InvalidInputError, match=message):
        TextOptions(**options)


def test_the_token_hash_is_xxh3_of_the_ids_as_little_endian_int32(word_tokenizer):
    table = table_of(TEXTS, word_tokenizer)
    for text, found in zip(TEXTS, table.token_hash.to_pylist(), strict=True):
        ids = word_tokenizer(text)["input_ids"]
        assert found == xxhash.xxh3_128(b"".join(token.to_bytes(4, "little") for token in ids)).hexdigest()


def test_the_content_hash_changes_with_any_token_order_mask_or_index(word_tokenizer):
    texts = ["a b", "c", "d e"]
    skipping = {"on_empty": "skip"}
    tables = [
        table_of(texts, word_tokenizer),
        table_of(["a b", "c", "d f"], word_tokenizer),
        table_of(["a", "b c", "d e"], word_tokenizer),  # the same tokens, cut elsewhere
        table_of(["c", "a b", "d e"], word_tokenizer),
        table_of(["a b", "c"], word_tokenizer),
        table_of(texts, word_tokenizer, add_special_tokens=False),
        table_of(texts, word_tokenizer, token_mask="all"),
        table_of(["", *texts], word_tokenizer, **skipping),
        table_of(["a b", "", "c", "d e"], word_tokenizer, **skipping),
    ]
    assert len({table.content_hash for table in tables}) == len(tables)
    assert table_of(texts, make_word_tokenizer()).content_hash == tables[0].content_hash
    assert table_of([*texts, ""], word_tokenizer, **skipping).content_hash == tables[0].content_hash


def many_texts(n=2345):
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(list("abcdefghij"), rng.integers(1, 9))) for _ in range(n)]


def test_rows_are_found_across_the_chunks_of_the_table(word_tokenizer):
    texts = many_texts()
    texts[1000] = texts[1999] = ""  # at the edges of chunks
    table = table_of(texts, word_tokenizer, on_empty="skip")
    assert table.rows.column("input_ids").num_chunks > 2
    rng = np.random.default_rng(1)
    for positions in [np.array([0, 998, 999, 1000, 1001, 1997, 1998, 2342]), rng.permutation(len(table))[:300]]:
        ids, mask = table.gather(positions)
        assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)
        expected = [word_tokenizer(texts[index])["input_ids"] for index in table.sample_index[positions]]
        assert ids.tolist() == [token for row in expected for token in row]
        assert mask.tolist() == [0 < i < len(row) - 1 for row in expected for i in range(len(row))]


def test_slices_of_a_table_are_read_right(word_tokenizer):
    """Arrow slices share the buffers of the whole, so offsets do not start at 0."""
    texts = many_texts(50)
    whole = table_of(texts, word_tokenizer)
    part = TokenTable(whole.rows.slice(10, 20), np.arange(20), np.arange(20))
    alone = table_of(texts[10:30], word_tokenizer)
    assert rows_of(part) == rows_of(alone)
    assert part.content_hash == alone.content_hash
    assert part.largest_id == alone.largest_id


def test_identity_does_not_depend_on_how_the_table_was_cut_into_chunks(word_tokenizer, tmp_path, monkeypatch):
    texts = many_texts(1500)
    one = table_of(texts, word_tokenizer)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)  # or the second would find what the first one left
    two = table_of(texts, word_tokenizer, processes=2)
    chunks = [[len(chunk) for chunk in table.rows.column("input_ids").chunks] for table in (one, two)]
    assert chunks[0] != chunks[1]
    assert ids_of(one) == ids_of(two)
    assert one.content_hash == two.content_hash


class CountingTokenizer(PreTrainedTokenizerFast):
    calls = 0

    def __call__(self, *arguments, **options):
        CountingTokenizer.calls += 1
        return super().__call__(*arguments, **options)


def counting_tokenizer(words=WORDS):
    plain = make_word_tokenizer(words)
    return CountingTokenizer(tokenizer_object=plain.backend_tokenizer, **plain.special_tokens_map)


def calls_for(texts, tokenizer, **options) -> int:
    CountingTokenizer.calls = 0
    ids = ids_of(table_of(texts, tokenizer, **options))
    calls = CountingTokenizer.calls
    fresh = make_word_tokenizer(words_of(tokenizer))
    length = options.get("max_length", 100)
    assert ids == [
        fresh(text, truncation=True, max_length=length)["input_ids"] for text in texts
    ]  # found or made anew: the right ones
    return calls


def words_of(tokenizer) -> list[str]:
    return sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)


def test_tokenization_is_done_once_and_again_when_the_data_the_options_or_the_tokenizer_change():
    texts = ["a b c", "d"]
    assert calls_for(texts, counting_tokenizer()) == 1
    assert calls_for(texts, counting_tokenizer()) == 0
    used = counting_tokenizer()
    used(["a b c d"], truncation=True, max_length=3, padding="max_length")
    assert calls_for(texts, used) == 0
    assert calls_for(["a b c", "e"], counting_tokenizer()) == 1
    assert calls_for(["d", "a b c"], counting_tokenizer()) == 1
    assert calls_for(texts, counting_tokenizer(), max_length=3) == 2  # the second call cuts
    assert calls_for(texts, counting_tokenizer([*WORDS[:5], *reversed(WORDS[5:])])) == 1
    assert calls_for(texts, counting_tokenizer()) == 0


def test_the_tokenizers_hash_does_not_change_with_use(byte_tokenizer, word_tokenizer):
    for tokenizer in (byte_tokenizer, word_tokenizer):
        before = tokenizer_hash(tokenizer)
        tokenizer(["a", "a b c d e"], truncation=True, max_length=3)
        tokenizer.backend_tokenizer.enable_padding(length=10)
        table_of(TEXTS, tokenizer, max_length=5, truncation_side="left")
        assert tokenizer_hash(tokenizer) == before


def test_the_tokenizers_hash_is_the_same_after_saving_and_loading(word_tokenizer, tmp_path):
    word_tokenizer.chat_template = PLAIN_TEMPLATE
    word_tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == tokenizer_hash(word_tokenizer)


def test_the_tokenizers_hash_changes_with_vocabulary_special_tokens_splitting_and_chat_template():
    def changed(**attributes):
        tokenizer = make_word_tokenizer()
        for name, value in attributes.items():
            setattr(tokenizer, name, value)
        return tokenizer

    added = make_word_tokenizer()
    added.add_tokens(["zzz"])
    tokenizers = [
        make_word_tokenizer(),
        make_word_tokenizer([*WORDS, "k"]),
        make_word_tokenizer([*WORDS[:5], *reversed(WORDS[5:])]),
        added,
        changed(pad_token="[UNK]"),
        changed(split_special_tokens=True),
        changed(chat_template=PLAIN_TEMPLATE),
    ]
    assert len({tokenizer_hash(tokenizer) for tokenizer in tokenizers}) == len(tokenizers)


def test_long_texts_do_not_lose_anything(byte_tokenizer):
    text = "the cat sat on the mat. " * 5000
    assert byte_tokenizer.decode(ids_of(table_of([text], byte_tokenizer))[0]) == text
