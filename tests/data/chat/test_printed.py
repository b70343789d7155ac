"""Arguments of tool calls in every form that templates print; nothing that is missing passes."""

import json

import pytest

from jax_sft import tiny
from jax_sft.data.chat import encoding
from jax_sft.data.chat.printed import missing_part
from jax_sft.data.sources.formats import Conversation
from tests.data.chat.test_encoding import load, templated  # noqa: F401  # a fixture

ARGUMENTS = {
    "deep": True,
    "wide": False,
    "limit": None,
    "count": 5,
    "ratio": 1.0,
    "huge": 1e22,
    "low": 1e-7,
    "markup": 'a < b & "c" isn\'t d',
    "lines": "one\ntwo\t\\ three",
    "umlaut": "Zürich ∑ \u200b",
    "nested": {"flags": [True, None, {"on": False, "empty": {}}], "names": ["it's", 'x"y', ""]},
}
# Like Qwen3-Coder's: objects and lists as JSON, all else by `string`.
ITEMS = "{% for k, v in c.function.arguments.items() %}<p {{ k }}>{{ VALUE }}</p>{% endfor %}"
CODER = "v | tojson if v is mapping or (v is iterable and v is not string) else v | string"
PRINTED = {
    "coder": ITEMS.replace("VALUE", CODER),
    "python": ITEMS.replace("VALUE", "v"),
    "python as a whole": "{{ c.function.name }} {{ c.function.arguments }}",
    "json": ITEMS.replace("VALUE", "v | tojson"),
    "indented, sorted": "{{ c.function.arguments | dictsort | list }}",
    "indented": "{{ c.function.arguments | tojson(indent=4) }}",
    "sorted": "{{ c.function.arguments | tojson(sort_keys=True, separators=(',', ':')) }}",
    "ascii": "{{ c.function.arguments | tojson(ensure_ascii=True) }}",
    "xml": ITEMS.replace("VALUE", "(v | string).replace('&', '&amp;').replace('<', '&lt;')"),
    "xml of jinja": ITEMS.replace("VALUE", "v | string | e"),
    "json in xml": ITEMS.replace("VALUE", "v | tojson | e"),
    "json in json": "{{ c.function.arguments | tojson | tojson }}",
}
WRONG = {
    "no values": ITEMS.replace("VALUE", "''"),
    "no keys": ITEMS.replace("{{ k }}", "").replace("VALUE", CODER),
    "the first one only": ITEMS.replace("items()", "items() | list)[:1]").replace("in c", "in (c"),
    "all but the last": ITEMS.replace("items()", "items() | list)[:-1]").replace("in c", "in (c"),
    "cut": ITEMS.replace("VALUE", "(v | string)[:4]"),
    "upper": ITEMS.replace("VALUE", "v | string | upper"),
    "never true": ITEMS.replace("VALUE", "false if v is boolean else v"),
    "truth only": ITEMS.replace("VALUE", "('' if v else 'no') if v is boolean else v"),
    "none as nothing": ITEMS.replace("VALUE", "v if v is not none else ''"),
    "whole numbers": ITEMS.replace("VALUE", "(v * 2) if v is number else v"),
    "nested left out": ITEMS.replace("VALUE", "v if v is not mapping else '{}'"),
}


def encoded(templated, calls: str, arguments: dict):  # noqa: F811
    template = tiny.CHAT_TEMPLATE.replace(
        "message['content'] ", "(message['content'] or '') + calls(message) "
    )
    macro = "{% macro calls(m) %}{% for c in m.tool_calls or [] %}<call {{ c.function.name }}>"
    tokenizer = templated(f"{macro}{calls}</call>{{% endfor %}}{{% endmacro %}}{template}")
    call = {"type": "function", "function": {"name": "search", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "find it"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "user", "content": "and then"},
        {"role": "assistant", "content": "done"},
    ]
    return encoding.Encoder(tokenizer, encoding.Options()).encode([Conversation(messages, None)])[0]


@pytest.mark.parametrize("printed", PRINTED)
def test_arguments_train_in_every_form_that_templates_print(templated, printed):  # noqa: F811
    result = encoded(templated, PRINTED[printed], ARGUMENTS)
    assert not isinstance(result, str), result
    assert len(result) == 1


@pytest.mark.parametrize("wrong", WRONG)
def test_arguments_that_are_missing_or_changed_are_refused(templated, wrong):  # noqa: F811
    result = encoded(templated, WRONG[wrong], ARGUMENTS)
    assert isinstance(result, str) and "leaves out part of a message" in result


@pytest.mark.parametrize("value", [True, False, None])
def test_a_value_that_two_arguments_have_must_be_printed_twice(value):
    arguments = {"alpha": value, "beta": value}
    message = {"tool_calls": [{"function": {"name": "search", "arguments": arguments}}]}
    assert missing_part(message, f"search alpha {value} beta {value}") is None
    assert missing_part(message, f"search alpha {value} beta {json.dumps(value)}") is None
    assert missing_part(message, f"search alpha {value} beta") == json.dumps(value)
    assert missing_part(message, f"search {value} beta {value}") == "alpha"


@pytest.mark.parametrize(
    ("value", "text", "is_there"),
    [
        *((1.0, "x: 1", True), (1, "x: 1.0", True), (1e5, "x: 1e5", True), (5, "x: 6", False)),
        *((True, "x: 1", False), (1, "x: True", False), (0.5, "x: 5", False), (None, "x: ", False)),
        *((float("inf"), "x: inf", True), (10**40, f"x: {10**40 + 1}", False)),
    ],
)
def test_numbers_are_compared_by_value_and_literals_by_name(value, text, is_there):
    message = {"tool_calls": [{"name": "x", "arguments": {"x": value}}]}
    assert (missing_part(message, f"x({text})") is None) == is_there
