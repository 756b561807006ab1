"""Chat templates with variables of their own, and with today's date, against what transformers renders by itself."""

from datetime import date

import datasets
import numpy as np
import pytest

from exactivations.datamodules.chat_template import template_for, variables_of, without_today
from exactivations.datamodules.text import TextDataModule
from exactivations.datamodules.tokenization import TextOptions, encode_alone, tokenize
from exactivations.store.errors import InvalidInputError
from tests.datamodules.conftest import MARKING_TEMPLATE

CHAT = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]
ASKS = "{% for m in messages %}[CLS]{{ m['content'] }}[SEP]{% endfor %}"
THINKING = (  # like Qwen3's
    ASKS
    + "{%- if add_generation_prompt %}assistant :{%- if enable_thinking is defined and enable_thinking is false %} e f{%- endif %}"
    "{%- endif %}"
)
DATED = (  # like Llama-3's
    "{%- if tools is not none %}{{ tools[0]['name'] }}\n{%- endif %}\n{%- if not date_string is defined %}\n"
    "    {%- if strftime_now is defined %}\n        {%- set date_string = strftime_now('%Y') %}\n    {%- else %}\n"
    "        {%- set date_string = 'g' %}\n    {%- endif %}\n{%- endif %}\nuser : {{ date_string }} " + ASKS
)
ONLY_TODAY = "{% macro head() %}{{ strftime_now('%d') }} {% endmacro %}{{ head() }}" + ASKS
LATER_ONLY = "{% if messages | length > 1 %}{{ strftime_now('%d') }} {% endif %}" + ASKS


def options(**further):
    return TextOptions(messages_column="messages", **further)


def table_of(chats, tokenizer, **further):
    rows = datasets.Dataset.from_list([{"messages": chat} for chat in chats])
    return tokenize(rows, np.arange(len(chats)), tokenizer, options(**further))


def ids_of(tokenizer, **further):
    return table_of([CHAT], tokenizer, **further).gather(np.array([0]))[0].tolist()


@pytest.mark.parametrize("thinking", [True, False])
def test_variables_of_a_template_are_those_that_transformers_is_given(word_tokenizer, thinking):
    word_tokenizer.chat_template = THINKING
    expected = word_tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, enable_thinking=thinking)["input_ids"]
    got = {"add_generation_prompt": True, "chat_template_kwargs": {"enable_thinking": thinking}}
    assert ids_of(word_tokenizer, **got) == expected == encode_alone(CHAT, word_tokenizer, options(**got)).input_ids.tolist()
    assert ("e" in word_tokenizer.decode(expected)) is not thinking


def test_tools_are_given_and_choose_their_own_template(word_tokenizer):
    tools = [{"name": "j", "description": "h"}]
    word_tokenizer.chat_template = {"default": ASKS, "tool_use": "{{ tools[0].name }} " + ASKS}
    expected = word_tokenizer.apply_chat_template(CHAT, tools=tools)["input_ids"]
    assert ids_of(word_tokenizer, chat_template_kwargs={"tools": tools}) == expected
    assert ids_of(word_tokenizer) == word_tokenizer.apply_chat_template(CHAT)["input_ids"] == expected[1:]


def test_a_variable_that_the_template_does_not_read_is_refused_with_those_that_it_reads(word_tokenizer):
    word_tokenizer.chat_template = THINKING
    given = {"chat_template_kwargs": {"enable_thinkin": False}}
    for use in (lambda: ids_of(word_tokenizer, **given), lambda: encode_alone(CHAT, word_tokenizer, options(**given))):
        with pytest.raises(InvalidInputError, match=r"does not read enable_thinkin of .*; it reads enable_thinking$"):
            use()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tools": [len]}, "must be what JSON can hold"),
        ({"x": float("nan")}, "must be what JSON can hold"),
        ({"x": (1, 2)}, "must be what JSON keeps as it is"),
        ({1: 2}, "must be what JSON keeps as it is"),
        ({"add_generation_prompt": True, "truncation": True}, "cannot hold add_generation_prompt, truncation"),
        ({"strftime_now": "1"}, "cannot hold strftime_now"),
    ],
)
def test_what_is_not_plain_data_or_no_variable_is_refused(given, message):
    with pytest.raises(InvalidInputError, match=message):
        options(chat_template_kwargs=given)


def test_todays_date_is_never_rendered_but_a_given_one_is(word_tokenizer):
    word_tokenizer.chat_template = DATED
    today = word_tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert str(date.today().year) in today  # that is what transformers does
    told = r"sample 0 would be rendered with today's date.*--chat-template-kwargs '{\"date_string\": \"26 Jul 2024\"}'$"
    with pytest.raises(InvalidInputError, match=told):
        ids_of(word_tokenizer)
    with pytest.raises(InvalidInputError, match=r"^would be rendered with today's date.*date_string"):
        encode_alone(CHAT, word_tokenizer, options())
    for given in ({"date_string": "h"}, {"date_string": "h", "tools": [{"name": "j"}]}):
        expected = word_tokenizer.apply_chat_template(CHAT, **given)["input_ids"]
        assert ids_of(word_tokenizer, chat_template_kwargs=given) == expected
        assert "h" in word_tokenizer.decode(expected)


def test_a_template_that_takes_no_date_is_refused_where_it_asks_for_todays_and_only_there(word_tokenizer):
    word_tokenizer.chat_template = ONLY_TODAY
    with pytest.raises(
        InvalidInputError, match=r"sample 0 would be .* takes no date that could be given instead: save the tokenizer"
    ):
        ids_of(word_tokenizer)
    word_tokenizer.chat_template = LATER_ONLY
    with pytest.raises(InvalidInputError, match="sample 1 would be rendered with today's date") as error:
        table_of([CHAT[:1], CHAT], word_tokenizer, on_empty="skip")
    assert "sample 0" not in str(error.value)
    assert len(table_of([CHAT[:1]], word_tokenizer)) == 1


@pytest.mark.parametrize(
    "start", ["", "\n", "\n\n  ", "  {%- if true %} x{% endif %}\n", "{{- ' y' }}\n ", "   {% if true %}\n z{% endif %}"]
)
def test_a_template_that_could_ask_for_the_date_renders_to_the_same_characters(word_tokenizer, start):
    template = start + "{% if false %}{{ strftime_now('%d') }}{% endif %}" + MARKING_TEMPLATE
    guarded = without_today(template)
    assert guarded != template
    for prompted in (True, False):
        expected, got = (
            word_tokenizer.apply_chat_template(CHAT, chat_template=t, add_generation_prompt=prompted, tokenize=False)
            for t in (template, guarded)
        )
        assert got == expected
    marks = [
        word_tokenizer.apply_chat_template(CHAT, chat_template=t, return_assistant_tokens_mask=True, return_dict=True)
        for t in (template, guarded)
    ]
    assert marks[0]["assistant_masks"] == marks[1]["assistant_masks"] and sum(marks[0]["assistant_masks"]) == 2
    assert without_today(MARKING_TEMPLATE) == MARKING_TEMPLATE


def test_the_variables_of_a_template_are_those_it_reads_before_it_sets_them():
    assert variables_of(DATED) == {"messages", "tools", "date_string", "strftime_now"}
    assert variables_of("{% set x = x if x is defined else 1 %}{% set y = 2 %}{{ x + y }}") == {"x"}
    assert "messages" in variables_of(MARKING_TEMPLATE)
    assert variables_of("{% for i in q %}{% if i %}{% continue %}{% endif %}{% endfor %}") == {"q"}
    with pytest.raises(InvalidInputError, match="cannot be read: TemplateSyntaxError"):
        variables_of("{% if %}")


def test_a_template_that_is_not_there_is_refused(word_tokenizer):
    with pytest.raises(InvalidInputError, match="no chat template that could be used"):
        template_for(word_tokenizer, None)


def test_variables_are_part_of_the_identity_and_of_the_caches_key_and_absent_ones_are_not(word_tokenizer):
    word_tokenizer.chat_template = THINKING
    rows = datasets.Dataset.from_list([{"messages": CHAT}])

    def data(**further):
        return TextDataModule(rows, word_tokenizer, text=options(add_generation_prompt=True, **further))

    given = {"enable_thinking": False}
    plain, quiet = data(), data(chat_template_kwargs=given)
    assert plain.tokens.n_tokens.tolist() != quiet.tokens.n_tokens.tolist()  # one cache, two entries
    assert quiet.identity()["chat_template_kwargs"] == given
    assert "chat_template_kwargs" not in plain.identity()  # as in runs of before
    assert data(chat_template_kwargs={}).identity() == plain.identity()
    for module in (plain, quiet):
        assert TextOptions.of_identity(module.identity(), messages_column="messages") == module.text
    given["enable_thinking"] = True
    assert quiet.text.chat_template_kwargs == {"enable_thinking": False}
