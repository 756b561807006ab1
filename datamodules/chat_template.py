"""A tokenizer's chat template: the arguments that it takes, and a rendering that today's date cannot come into."""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.meta
from jinja2.ext import Extension
from transformers import PreTrainedTokenizerBase

from exactivations.store.errors import InvalidInputError

RENDERED_TODAY = "exactivations: the chat template asks for today's date"
# A macro of the template's own hides the function of this name that transformers gives to every template. What follows begins on a
# line of its own, as it did before: the line break behind a block is removed (trim_blocks).
WITHOUT_TODAY = f'{{% macro strftime_now(format) %}}{{{{ raise_exception("{RENDERED_TODAY}") }}}}{{% endmacro %}}\n'
GIVEN = frozenset({"messages", "add_generation_prompt", "raise_exception", "strftime_now"})
"""What a template reads and transformers gives to it, or this package's own options."""
RESERVED = GIVEN | {
    "conversation", "conversations", "chat_template", "continue_final_message", "tokenize", "sanitize_control_tokens", "padding",
    "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
}  # fmt: skip
"""What is no variable of a template, or has an option of its own."""


def plain_arguments(arguments: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Returns arguments of a chat template as a copy that JSON keeps as it is; None if there are none.

    Raises:
        InvalidInputError: If one is not plain data, or its name is no variable of a template.
    """
    if not arguments:
        return None
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(arguments), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"chat_template_kwargs must be what JSON can hold, since a run's identity does: {error}. Give tools as JSON schemas"
        ) from error
    if plain != arguments:
        raise InvalidInputError(f"chat_template_kwargs must be what JSON keeps as it is: {arguments!r} would become {plain!r}")
    if reserved := sorted(plain.keys() & RESERVED):
        raise InvalidInputError(f"chat_template_kwargs cannot hold {', '.join(reserved)}: these are no variables of a template")
    return plain


def template_for(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None) -> str:
    """Returns the chat template that conversations are rendered with, and refuses arguments that it does not read.

    Raises:
        InvalidInputError: If the tokenizer has no template that could be used, or it does not read an argument.
    """
    name = tokenizer.name_or_path
    try:
        template = tokenizer.get_chat_template(tools=(arguments or {}).get("tools"))
    except ValueError as error:
        raise InvalidInputError(
            f"the tokenizer {name} has no chat template that could be used: use a text column, or another tokenizer"
        ) from error
    if arguments:
        read = variables_of(template)
        if unread := sorted(arguments.keys() - read):
            raise InvalidInputError(
                f"the chat template of {name} does not read {', '.join(unread)} of chat_template_kwargs, so that it would change "
                f"nothing; it reads {', '.join(sorted(read - RESERVED)) or 'no variables but the messages'}"
            )
    return template


def without_today(template: str) -> str:
    """Returns a template that renders the same, but raises RENDERED_TODAY where it would have rendered today's date.

    Transformers gives every template a function `strftime_now`. Tokens that hold the date are others tomorrow, while tokenizer and
    options stay the same.
    """
    return WITHOUT_TODAY + template if "strftime_now" in template else template


def how_to_pin(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None) -> str:
    """Says what to do about a template that asks for today's date."""
    template = template_for(tokenizer, arguments)
    variables = sorted(variables_of(template) - RESERVED - set(tokenizer.special_tokens_map) - set(arguments or {}))
    example = next((name for name in variables if "date" in name), None)
    why = "with today's date in them its tokens would be others tomorrow, while tokenizer and options stay the same"
    if example is None:
        reads = f" (it reads {', '.join(variables)})" if variables else ""
        return f"{why}; the chat template takes no date that could be given instead{reads}: save the tokenizer with one that does"
    pinned = json.dumps({example: "26 Jul 2024"})
    return f"{why}; give the chat template a date, in the form that it has there: --chat-template-kwargs '{pinned}'"


@lru_cache
def variables_of(template: str) -> frozenset[str]:
    """Returns the names that a template reads and does not set itself before.

    Raises:
        InvalidInputError: If it is not a template.
    """
    environment = jinja2.Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"])  # nothing is rendered with it
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(template)))
    except jinja2.TemplateError as error:
        raise InvalidInputError(f"the tokenizer's chat template cannot be read: {type(error).__name__}: {error}") from error


class _Generation(Extension):
    """The blocks {% generation %}, which transformers adds to Jinja: what is in them is as if they were not there."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        body: list[jinja2.nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body
