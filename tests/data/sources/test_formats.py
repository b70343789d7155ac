"""Rows to items: each format against hand-made items; what is wrong with a row is named."""

import datetime
import decimal
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_sft.data.sources import formats
from jax_sft.data.sources.formats import Conversation, Text, Tokens
from jax_sft.data.sources.messages import ROLES, SHAREGPT_ROLES, THINKING
from tests import inputs

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
TURNS = [USER, ANSWER]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"day": "2024-01-01"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"a": {"type": "string"}}}}


def source(**options):
    return inputs.source("data.jsonl", **options)


def item(row: dict, **options) -> formats.Item:
    """The item of a row, in the format that its columns tell."""
    chosen = source(**options)
    return formats.FORMATS[formats.choose(chosen, [row])[0]](row, chosen)


def conversation(row: dict, **options) -> Conversation:
    found = item(row, **options)
    assert isinstance(found, Conversation)
    return found


def messages(*turns) -> list[dict]:
    return conversation({"messages": list(turns)}).messages


def refused(row: dict, **options) -> str:
    with pytest.raises(ValueError) as raised:
        item(row, **options)
    return str(raised.value)


# ---- which format --------------------------------------------------------------------------------

COLUMNS = {
    "messages": ["messages"],
    "sharegpt": ["conversations"],
    "prompt_response": ["prompt", "response"],
    "prompt_completion": ["prompt", "completion"],
    "tokens": ["ids", "mask"],
    "text": ["text"],
}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["tools", "messages"], ("messages", "column 'messages'")),
        (["conversations", "id"], ("sharegpt", "column 'conversations'")),
        (["response", "prompt"], ("prompt_response", "columns 'prompt' and 'response'")),
        (["completion", "prompt"], ("prompt_completion", "columns 'prompt' and 'completion'")),
        (["ids", "mask"], ("tokens", "columns 'ids' and 'mask'")),
        (["input_ids", "labels"], ("tokens", "columns 'input_ids' and 'labels'")),
        (["ids", "mask", "input_ids", "labels"], ("tokens", "columns 'ids' and 'mask'")),
        (["text", "url"], ("text", "column 'text'")),
        (["text", "input_ids", "mask"], ("text", "column 'text'")),
    ],
)
def test_the_format_follows_from_the_columns(columns, expected):
    assert formats.choose(source(), [dict.fromkeys(columns)]) == expected
    # A column is there if any of the rows has it.
    assert formats.choose(source(), [{}, *({column: None} for column in columns)]) == expected


def test_of_several_formats_that_fit_the_first_of_the_list_is_taken():
    names = list(formats.FORMATS)
    assert names == list(COLUMNS)
    for number, name in enumerate(names):
        columns = [column for later in names[number:][::-1] for column in COLUMNS[later]]
        assert formats.choose(source(), [dict.fromkeys(columns)])[0] == name
        every = [column for later in COLUMNS.values() for column in later]
        chosen = formats.choose(source(format=name), [dict.fromkeys(every)])
        assert chosen[0] == name and chosen[1].startswith("source.format, column")


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"question": "", "answer": ""},
            {},
            r"^source.path = 'data.jsonl' has the columns \['question', 'answer'\], but format "
            r"'messages' needs 'messages'; 'sharegpt' needs 'conversations'; 'prompt_response' "
            r"needs 'prompt' and 'response'; 'prompt_completion' needs 'prompt' and 'completion'; "
            r"'tokens' needs 'ids' and 'mask' or 'input_ids' and 'labels'; 'text' needs 'text'. "
            r"Say what its columns are called: messages_key, conversations_key, prompt_key, "
            r"response_key, completion_key, text_key$",
        ),
        ({"text": ""}, {"format": "messages"}, "but format 'messages' needs 'messages'. Say"),
        ({"messages": ""}, {"messages_key": "turns"}, "format 'messages' needs 'turns'; "),
        ({"text": ""}, {"format": "xml"}, r"source.format = 'xml' is not one of \['messages', "),
        ({"prompt": "", "response": ""}, {"query_key": "input"}, "not source.query_key = 'input'"),
        ({"prompt": "", "response": ""}, {"system_key": "sys"}, "not source.system_key = 'sys'"),
        ({"messages": "", "q": ""}, {"query_key": "q"}, "'messages' does not use source.query_key"),
        ({"text": "", "s": ""}, {"system_key": "s"}, "'text' does not use source.system_key"),
        ({}, {}, r"has the columns \[\], but"),
    ],
)
def test_columns_that_fit_no_format_are_named(row, options, message):
    with pytest.raises(ValueError, match=message):
        formats.choose(source(**options), [row])


def test_a_column_of_system_messages_that_is_not_used_is_said():
    hint = "; column 'system' is not used: source.system_key is not set"
    row = {"prompt": "a", "response": "b", "messages": TURNS, "system": "s"}
    for name in ("messages", "prompt_response"):
        assert formats.choose(source(format=name), [row])[1].endswith(hint)
        assert "used" not in formats.choose(source(format=name, system_key="system"), [row])[1]


def test_an_error_is_short_whatever_the_columns_are():
    row = {f"{n}" * 100_000: n for n in range(1000)}
    with pytest.raises(ValueError) as raised:
        formats.choose(source(), [row])
    assert len(str(raised.value)) < 3000


# ---- prompt_response -----------------------------------------------------------------------------


def test_prompt_query_response_and_system_make_three_messages():
    keys = {"prompt_key": "instruction", "query_key": "input", "response_key": "output"}
    full = {"instruction": "Add.", "input": "1 2", "output": "3", "sys": "Be brief."}
    user = {"role": "user", "content": "Add.\n1 2"}
    answer = {"role": "assistant", "content": "3"}
    found = conversation(full, system_key="sys", **keys)
    assert found == Conversation([SYSTEM, user, answer], None)
    plain = conversation(full | {"input": "", "sys": None}, system_key="sys", **keys)
    assert plain == Conversation([{"role": "user", "content": "Add."}, answer], None)
    with_tools = conversation(full | {"tools": [TOOL]}, **keys)
    assert with_tools == Conversation([user, answer], [TOOL])


@pytest.mark.parametrize("value", ["", None, 3, True, float("nan"), ["a"], {"a": 1}])
@pytest.mark.parametrize("key", ["prompt", "response", "query", "sys"])
def test_a_field_that_is_no_text_is_named(key, value):
    row = {"prompt": "a", "query": "b", "response": "c", "sys": "d"}
    options = {"query_key": "query", "system_key": "sys"}
    if key in ("query", "sys") and value in ("", None):
        assert len(conversation(row | {key: value}, **options).messages) == 3 - (key == "sys")
    else:
        found = refused(row | {key: value}, **options)
        assert found == f"field {key!r} must be a non-empty string, not {value!r}"
    if key in ("prompt", "response"):
        del row[key]
        formats.choose(source(**options), [row, {key: "x"}])  # by all rows: no error
        with pytest.raises(ValueError, match=f"field '{key}' must be a non-empty string, not None"):
            formats.prompt_response(row, source(**options))


# ---- messages ------------------------------------------------------------------------------------


def test_messages_and_tools_come_back_as_written():
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": " a\n", "name": "Eve"},
        {"role": "assistant", "content": "", "tool_calls": [CALL | {"id": "1"}], "train": False},
        {"role": "tool", "content": "", "tool_call_id": "1", "name": "f"},
        {"role": "assistant", "content": "b", "reasoning_content": "c", "weight": 0.5},
    ]
    before = json.dumps(turns)
    found = conversation({"messages": turns, "tools": [TOOL, {"name": "bare"}]})
    assert found == Conversation([SYSTEM, *turns[1:]], [TOOL, {"name": "bare"}])
    assert json.dumps(turns) == before  # nothing is changed in place


def test_fields_that_are_null_or_say_nothing_are_left_out():
    nothing = dict.fromkeys(
        ["tool_calls", "function_call", "audio", "refusal", "name", "train", "weight", "thinking"]
    )
    assert messages(USER | nothing, ANSWER | nothing) == TURNS
    nothing = {"tool_calls": [], "prefix": False, "refusal": "", "audio": {}, "function_call": {}}
    assert messages(USER | nothing, ANSWER | nothing) == TURNS
    nothing = {"train": False, "reasoning_content": ""}
    assert messages(SYSTEM | nothing, USER | nothing, ANSWER) == [SYSTEM, *TURNS]


def test_content_may_be_a_list_of_text_parts():
    parts = [{"type": "text", "text": "a\n"}, {"type": "text", "text": " b", "image_url": None}]
    user, answer, tool = messages(
        {"role": "user", "content": parts},
        {"role": "assistant", "content": parts[:1]},
        {"role": "tool", "content": []},
    )
    assert [user["content"], answer["content"], tool["content"]] == ["a\n b", "a\n", ""]


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"function": CALL["function"]},
        CALL["function"],
        {"type": None, **CALL["function"]},
        {"type": "function", **CALL["function"]},
        {"function": {"name": "f", "arguments": '{"day": "2024-01-01"}'}},
        {"name": "f", "arguments": ' {"day": "2024-01-01"}\n'},
    ],
)
def test_every_form_of_a_tool_call_is_brought_into_one(call):
    for content in ("", None, "I call."):
        turn = {"role": "assistant", "content": content, "tool_calls": [call, call | {"id": "1"}]}
        expected = {"role": "assistant", "content": content or ""}
        found = messages(USER, turn)
        assert found == [USER, expected | {"tool_calls": [CALL, CALL | {"id": "1"}]}]


def test_a_tool_call_without_arguments_has_none():
    for call in ({"name": "f"}, {"function": {"name": "f", "arguments": None}}):
        (found,) = messages(ANSWER | {"tool_calls": [call]})
        assert found["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


def test_arguments_keep_their_types_and_nulls():
    arguments = {"a": None, "b": "1", "c": 1, "d": [True, {"e": None}], "f": 1.0}
    for given_as in (arguments, json.dumps(arguments)):
        call = {"name": "f", "arguments": given_as}
        (found,) = messages(ANSWER | {"tool_calls": [call]})
        assert repr(found["tool_calls"][0]["function"]["arguments"]) == repr(arguments)


@pytest.mark.parametrize("key", THINKING)
def test_thinking_has_one_name(key):
    assert messages(USER, ANSWER | {key: "hm"}) == [USER, ANSWER | {"reasoning_content": "hm"}]
    only = {"role": "assistant", "content": "", key: "hm"}
    assert messages(only) == [{"role": "assistant", "content": "", "reasoning_content": "hm"}]


@pytest.mark.parametrize("tools", [None, "", [], "[]", "null"])
def test_no_tools_are_none(tools):
    assert conversation({"messages": TURNS, "tools": tools}).tools is None


def test_tools_may_be_json_or_have_another_column_or_none():
    row = {"messages": TURNS, "tools": json.dumps([TOOL]), "functions": [{"name": "g"}]}
    assert conversation(row).tools == [TOOL]
    assert conversation(row, tools_key="functions").tools == [{"name": "g"}]
    assert conversation(row | {"tools": "hammer"}, tools_key="").tools is None


def test_messages_may_have_a_column_of_system_messages():
    row = {"messages": TURNS, "sys": "Be brief."}
    assert conversation(row, system_key="sys").messages == [SYSTEM, *TURNS]
    row["messages"] = [SYSTEM, *TURNS]
    assert conversation(row, system_key="sys").messages == [SYSTEM, *TURNS]
    message = r"messages\[0\] and the column of system messages differ"
    with pytest.raises(ValueError, match=message):
        conversation(row | {"sys": "Be long."}, system_key="sys")
    row["system"] = "not asked for"
    assert conversation(row, system_key="sys").messages == [SYSTEM, *TURNS]


def test_train_and_weight_stay_on_answers():
    marks = [{"train": True}, {"train": False}, {"weight": 0}, {"weight": 2}, {"weight": 0.25}]
    found = messages(*(ANSWER | mark for mark in marks))
    assert found == [ANSWER | mark for mark in marks]
    assert [type(one["weight"]) for one in found if "weight" in one] == [float] * 3
    assert messages(USER | {"weight": 0.0}, ANSWER) == TURNS
    assert conversation({"messages": TURNS, "weight": 3, "train": "x"}).messages == TURNS


def test_an_answer_of_nothing_is_history_only():
    empty = {"role": "assistant", "content": ""}
    for mark in ({"train": False}, {"weight": 0}):
        assert messages(USER, empty | mark, *TURNS)[1] == empty | mark
    for role in ("system", "user", "tool"):
        assert messages({"role": role, "content": ""}, ANSWER)[0]["content"] == ""


@pytest.mark.parametrize(
    "blank", [" ", "\n\t", "\u200b", "\ufeff \u2060", "\u3164", "\xa0\u3000", "\0"]
)
def test_an_answer_of_blanks_is_one_of_nothing(blank):
    said = {"role": "assistant", "content": blank}
    match = "has only blanks, so it would train the model to say nothing"
    for name, row in {
        "messages": {"messages": [USER, said]},
        "sharegpt": {"conversations": [{"from": "gpt", "value": blank}]},
        "prompt_response": {"prompt": "a", "response": blank},
        "prompt_completion": {"prompt": "a", "completion": blank},
        "text": {"text": blank},
    }.items():
        with pytest.raises(ValueError, match=match):
            formats.FORMATS[name](row, source())
    thought = said | {"reasoning_content": blank}
    for name, row in {
        "messages": {"messages": [USER, thought]},
        "prompt_completion": {"prompt": [USER], "completion": [said]},
    }.items():
        with pytest.raises(ValueError, match=match):
            formats.FORMATS[name](row, source())
    for fields in ({"train": False}, {"weight": 0}, {"reasoning_content": "because"}):
        formats.FORMATS["messages"]({"messages": [USER, said | fields]}, source())
    for words in ("0", "\u200bא", ".", "👍", "\ufffd", "\u0301"):
        formats.FORMATS["messages"]({"messages": [USER, said | {"content": words}]}, source())


def test_a_number_that_json_does_not_have_is_no_argument():
    call = {"name": "f", "arguments": '{"x": [1e999]}'}
    row = {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}
    with pytest.raises(ValueError, match="a number that JSON does not have: inf"):
        formats.FORMATS["messages"](row, source())


@pytest.mark.parametrize("found", [[], None, "3", {"role": "user"}, 3])
def test_a_column_that_is_no_list_of_messages_is_named(found):
    assert refused({"messages": found}) == (
        f"field 'messages' must be a list of messages, not {3 if found == '3' else found!r}"
    )


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ("a", " must be an object with role and content, not 'a'"),
        ({"role": "robot", "content": "a"}, ".role must be one of ('system', 'user', "),
        ({"role": ["user"], "content": "a"}, ".role must be one of ('system', 'user', "),
        ({"content": "a"}, ".role must be one of ('system', 'user', "),
        (
            {"role": "function", "content": "a"},
            ".role = 'function' is out of date: use role 'tool'",
        ),
        ({"role": "user"}, ".content must be a string, not null"),
        ({"role": "user", "content": None}, ".content must be a string, not null"),
        ({"role": "tool", "content": None}, ".content must be a string, not null"),
        ({"role": "assistant", "content": None}, ".content must be a string, not null"),
        ({"role": "assistant", "content": ""}, " has neither content nor tool_calls"),
        (USER | {"content": 3}, ".content must be a string or a list of text parts, not 3"),
        (USER | {"content": {"type": "text"}}, ".content must be a string or a list of text parts"),
        (USER | {"content": float("nan")}, ".content must be a string or a list of text parts"),
        (USER | {"content": ["a"]}, ".content[0].type must be 'text', not 'a'"),
        (
            USER | {"content": [{"type": "text", "text": "a"}, {"type": "image_url"}]},
            ".content[1].type must be 'text', not 'image_url'",
        ),
        (USER | {"content": [{"text": "a"}]}, ".content[0].type must be 'text', not None"),
        (USER | {"content": [{"type": "text"}]}, ".content[0].text must be a string, not None"),
        (
            USER | {"content": [{"type": "text", "text": "a", "image": "b"}]},
            ".content[0] must hold only text, not 'image' as well",
        ),
        (USER | {"tool_calls": [CALL]}, ".tool_calls: only an assistant's message may have it"),
        (USER | {"thinking": "a"}, ".reasoning_content: only an assistant's message may have it"),
        (USER | {"train": True}, ".train: only an assistant's message may have it"),
        (SYSTEM | {"weight": 0.1}, ".weight: only an assistant's message may have it"),
        (USER | {"train": 0}, ".train must be true or false, not 0"),
        (ANSWER | {"train": 1}, ".train must be true or false, not 1"),
        (ANSWER | {"train": "no"}, ".train must be true or false, not 'no'"),
        (ANSWER | {"weight": True}, ".weight must be a number from 0, not True"),
        (ANSWER | {"weight": "1"}, ".weight must be a number from 0, not '1'"),
        (ANSWER | {"weight": -0.1}, ".weight must be a number from 0, not -0.1"),
        (ANSWER | {"weight": float("nan")}, ".weight must be a number from 0, not nan"),
        (ANSWER | {"weight": float("inf")}, ".weight must be a number from 0, not inf"),
        (ANSWER | {"weight": 10**400}, ".weight must be a number from 0, not 1000"),
        (ANSWER | {"weight": 1, "train": True}, " has train and weight: keep one"),
        (ANSWER | {"function_call": CALL}, ".function_call is out of date: write it as tool_calls"),
        (ANSWER | {"prefix": True}, ".prefix is not supported"),
        (ANSWER | {"audio": {"id": "1"}}, ".audio is not supported"),
        (ANSWER | {"refusal": "No."}, ".refusal is not supported"),
        (ANSWER | {"thinking": ["a"]}, ".thinking must be a string, not ['a']"),
        (
            ANSWER | {"thinking": "a", "reasoning": "a"},
            " has reasoning and thinking: they mean the same, keep one",
        ),
    ],
)
def test_a_malformed_message_is_named(turn, message):
    assert refused({"messages": [*TURNS, turn]}).startswith("messages[2]" + message)


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ("f()", " must be a list of tool calls, not 'f()'"),
        (CALL, " must be a list of tool calls, not {"),
        ([CALL, None], "[1] must be a tool call, not None"),
        ([CALL | {"type": "code"}], "[0].type must be 'function', not 'code'"),
        ([{"function": "f"}], "[0].function must be an object with name and arguments"),
        (
            [{"function": {"arguments": {}}}],
            "[0].function.name must be a non-empty string, not None",
        ),
        ([{"name": 3, "arguments": {}}], "[0].name must be a non-empty string, not 3"),
        ([{"name": "", "arguments": {}}], "[0].name must be a non-empty string, not ''"),
        ([{}], "[0].name must be a non-empty string, not None"),
        ([{"name": "f", "arguments": "{"}], "[0].arguments is not JSON: Expecting property name"),
        ([{"name": "f", "arguments": ""}], "[0].arguments is not JSON: "),
        ([{"name": "f", "arguments": "[1]"}], "[0].arguments must be an object, not [1]"),
        ([{"name": "f", "arguments": [1]}], "[0].arguments must be an object, not [1]"),
        ([{"name": "f", "parameters": {}}], "[0].arguments must be an object, not None"),
        (
            [{"name": "f", "arguments": '{"a": 1, "a": 2}'}],
            "[0].arguments is not JSON: key 'a' occurs",
        ),
        ([{"name": "f", "arguments": "[" * 9999 + "]" * 9999}], "[0].arguments is not JSON: max"),
    ],
)
def test_a_malformed_tool_call_is_named(calls, message):
    turn = {"role": "assistant", "content": "", "tool_calls": calls}
    assert refused({"messages": [USER, turn]}).startswith("messages[1].tool_calls" + message)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("hammer", "field 'tools' is not JSON: Expecting value"),
        ('{"name": "f"}', "field 'tools' must be a list of objects, not {'name': 'f'}"),
        ({"name": "f"}, "field 'tools' must be a list of objects, not {'name': 'f'}"),
        (["f"], "field 'tools' must be a list of objects, not ['f']"),
        (3, "field 'tools' must be a list of objects, not 3"),
    ],
)
def test_malformed_tools_are_named(tools, message):
    assert refused({"messages": TURNS, "tools": tools}).startswith(message)
    assert refused({"prompt": "a", "response": "b", "tools": tools}).startswith(message)


def test_what_json_does_not_have_is_refused_where_a_template_writes_json():
    for value in (datetime.date(2024, 1, 1), decimal.Decimal("1.5"), b"a"):  # as tables hold
        call = {"function": {"name": "f", "arguments": {"x": [{"y": value}]}}}
        answer = {"role": "assistant", "content": "b", "tool_calls": [call]}
        where = "messages[1].tool_calls[0].function.arguments"
        reason = refused({"messages": [USER, answer]})
        assert reason.startswith(f"{where} has a value that JSON does not have: ")
        assert "JSON does not have" in refused({"messages": [USER], "tools": [{"x": value}]})
        assert messages(USER | {"time": value})  # which no template need read


def test_objects_too_deep_for_a_template_are_named():
    def nested(depth: int) -> dict:
        return json.loads('{"a": ' * depth + "1" + "}" * depth)

    for depth, fits in ((61, True), (62, False), (400, False)):
        call = {"name": "f", "arguments": nested(depth)}
        rows = {
            "messages[0]": {"messages": [ANSWER | {"tool_calls": [call]}]},
            "messages[1]": {"messages": [USER, USER | {"name": [[nested(depth)]]}]},
            "field 'tools'": {"messages": TURNS, "tools": [{"name": "f", "p": [[nested(depth)]]}]},
        }
        for field, row in rows.items():
            if fits:
                item(row)
            else:
                assert refused(row) == f"{field} is nested more than 64 deep"


# ---- sharegpt ------------------------------------------------------------------------------------


def test_sharegpt_speakers_become_roles():
    speakers = {
        "system": ["system"],
        "user": ["human", "user"],
        "assistant": ["gpt", "assistant", "chatgpt", "model"],
        "tool": ["tool", "observation", "function_response"],
    }
    for role, names in speakers.items():
        for name in names:
            found = conversation({"conversations": [{"from": name, "value": " x"}]})
            assert found == Conversation([{"role": role, "content": " x"}], None)
    assert {name for names in speakers.values() for name in names} | {"function_call"} == set(
        SHAREGPT_ROLES
    )


def test_a_sharegpt_function_call_becomes_tool_calls():
    one = {"name": "f", "arguments": {"day": "2024-01-01"}}
    turns = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": json.dumps(one), "weight": 0.5},
        {"from": "observation", "value": "x"},
        {"from": "function_call", "value": json.dumps([one, one | {"arguments": json.dumps({})}])},
        {"from": "function_response", "value": "y"},
        {"from": "gpt", "value": "b", "train": False, "id": 7},
    ]
    found = conversation({"conversations": turns, "tools": json.dumps([TOOL])})
    other = {"type": "function", "function": {"name": "f", "arguments": {}}}
    assert found.tools == [TOOL]
    assert found.messages == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL], "weight": 0.5},
        {"role": "tool", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, other]},
        {"role": "tool", "content": "y"},
        ANSWER | {"train": False, "id": 7},
    ]


def test_a_sharegpt_system_message_may_have_its_own_column():
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    row = {"conversations": turns, "system": "Be brief.", "other": "Be long."}
    assert conversation(row).messages == [SYSTEM, *TURNS]
    found = conversation(row, system_key="other").messages
    assert found == [{"role": "system", "content": "Be long."}, *TURNS]
    for nothing in ("", None):
        assert conversation(row | {"system": nothing}).messages == TURNS
    assert refused(row | {"system": 3}) == "field 'system' must be a non-empty string, not 3"
    row["conversations"] = [{"from": "system", "value": "Be brief."}, *turns]
    assert conversation(row).messages == [SYSTEM, *TURNS]
    assert refused(row | {"system": "x"}).startswith("conversations[0] and the column of system")


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ("a", " must be an object with from and value, not 'a'"),
        ({"value": "a"}, " must be an object with from and value, not {'value': 'a'}"),
        ({"from": "bing", "value": "a"}, ".from must be one of ['system', 'human', 'user', "),
        ({"from": "gpt"}, ".value must be a string, not null"),
        ({"from": "gpt", "value": None}, ".value must be a string, not null"),
        ({"from": "gpt", "value": ""}, " has neither value nor tool_calls"),
        ({"from": "gpt", "value": 3}, ".value must be a string or a list of text parts, not 3"),
        ({"from": "human", "value": "a", "train": True}, ".train: only an assistant's message"),
        ({"from": "gpt", "value": "a", "weight": -1}, ".weight must be a number from 0, not -1"),
        ({"from": "function_call", "value": "f()"}, ".value is not JSON: Expecting value"),
        ({"from": "function_call", "value": "3"}, ".value[0] must be a tool call, not 3"),
        ({"from": "function_call", "value": None}, ".value[0] must be a tool call, not None"),
        ({"from": "function_call", "value": "{}"}, ".value[0].name must be a non-empty string"),
        ({"from": "function_call", "value": "[]"}, " has neither value nor tool_calls"),
    ],
)
def test_a_malformed_sharegpt_turn_is_named(turn, message):
    turns = [{"from": "human", "value": "a"}, turn]
    assert refused({"conversations": turns}).startswith("conversations[1]" + message)


def test_openai_messages_in_a_sharegpt_column_get_the_remedy():
    row = {"conversations": TURNS}
    remedy = "set format = 'messages' and messages_key = 'conversations'"
    assert refused(row).endswith(remedy)
    found = conversation(row, format="messages", messages_key="conversations")
    assert found.messages == TURNS


# ---- prompt_completion and text ------------------------------------------------------------------


def test_prompt_and_completion_strings_are_plain_text():
    assert item({"prompt": "2 + 2 =", "completion": " 4"}) == Text("2 + 2 =", " 4")
    assert item({"prompt": "", "completion": " 4"}) == Text("", " 4")
    assert item({"q": "a", "a": "b"}, prompt_key="q", completion_key="a") == Text("a", "b")


def test_answers_in_a_prompt_of_messages_are_history():
    empty = {"role": "assistant", "content": ""}
    row = {
        "prompt": [SYSTEM, *TURNS, USER, ANSWER | {"train": True}, ANSWER | {"weight": 1}, empty],
        "completion": [USER, ANSWER, ANSWER | {"train": False}],
        "tools": [TOOL],
    }
    expected = [SYSTEM, USER, ANSWER | {"train": False}, USER, *row["prompt"][4:6]]
    expected += [empty | {"train": False}, *row["completion"]]
    assert item(row) == Conversation(expected, [TOOL])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "completion": ""},
            "field 'completion' must be a non-empty string, not ''",
        ),
        ({"prompt": "a", "completion": [ANSWER]}, "fields 'prompt' and 'completion' must be two "),
        ({"prompt": [USER], "completion": "b"}, "fields 'prompt' and 'completion' must be two "),
        ({"prompt": None, "completion": "b"}, "fields 'prompt' and 'completion' must be two "),
        (
            {"prompt": [], "completion": [ANSWER]},
            "field 'prompt' must be a list of messages, not []",
        ),
        ({"prompt": [USER], "completion": []}, "field 'completion' must be a list of messages"),
        ({"prompt": [USER], "completion": [USER, {}]}, "completion[1].role must be one of"),
        ({"prompt": [{"role": "user"}], "completion": [ANSWER]}, "prompt[0].content must be"),
        ({"prompt": "a", "completion": "b", "tools": [TOOL]}, "field 'tools' needs prompt and"),
    ],
)
def test_a_malformed_prompt_or_completion_is_named(row, message):
    assert refused(row).startswith(message)


def test_text_is_one_piece_that_trains():
    assert item({"text": " a\n"}) == Text("", " a\n")
    assert item({"body": "a"}, text_key="body") == Text("", "a")
    for bad in ("", None, 3, ["a"]):
        assert refused({"text": bad}) == f"field 'text' must be a non-empty string, not {bad!r}"


# ---- tokens --------------------------------------------------------------------------------------


def test_tokens_are_taken_as_they_are():
    expected = Tokens([5, 0, 2**31 - 1], [0.0, 1.0, 1.0])
    assert item({"ids": [5, 0, 2**31 - 1], "mask": [0, 1, 1]}) == expected
    assert item({"ids": [5, 0, 2**31 - 1], "mask": [False, True, True]}) == expected
    assert item({"input_ids": [5, 0, 2**31 - 1], "labels": [-100, 0, 2**31 - 1]}) == expected
    weighted = item({"ids": [1, 2, 3], "mask": [0, 0.25, 2.0]})
    assert weighted == Tokens([1, 2, 3], [0.0, 0.25, 2.0])
    assert isinstance(weighted, Tokens) and [type(w) for w in weighted.weights] == [float] * 3
    nulls = {"ids": None, "mask": None, "attention_mask": [1, 1]}
    assert item({"input_ids": [1, 2], "labels": [1, 2]} | nulls) == Tokens([1, 2], [1.0, 1.0])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"ids": [], "mask": []}, "fields 'ids' and 'mask' must be of the same length, from 1"),
        ({"ids": [1], "mask": [1, 1]}, "fields 'ids' and 'mask' must be of the same length"),
        ({"ids": "12", "mask": [1, 1]}, "field 'ids' must be a list, not '12'"),
        ({"ids": [1], "mask": None}, "field 'mask' must be a list, not None"),
        ({"ids": None, "mask": [1]}, "fields 'ids' and 'mask' or 'input_ids' and 'labels' are"),
        ({"ids": [1, -1], "mask": [0, 1]}, "ids[1] must be a token id, not -1"),
        ({"ids": [2**31], "mask": [1]}, "ids[0] must be a token id, not 2147483648"),
        ({"ids": [1.0], "mask": [1]}, "ids[0] must be a token id, not 1.0"),
        ({"ids": [True], "mask": [1]}, "ids[0] must be a token id, not True"),
        ({"ids": ["1"], "mask": [1]}, "ids[0] must be a token id, not '1'"),
        ({"ids": [[1]], "mask": [1]}, "ids[0] must be a token id, not [1]"),
        ({"ids": [1], "mask": [2]}, "mask[0] must be 0, 1 or a float from 0, not 2"),
        ({"ids": [1], "mask": [-0.5]}, "mask[0] must be 0, 1 or a float from 0, not -0.5"),
        ({"ids": [1], "mask": [float("nan")]}, "mask[0] must be 0, 1 or a float from 0, not nan"),
        ({"ids": [1], "mask": [1e39]}, "mask[0] must be 0, 1 or a float from 0, not 1e+39"),
        ({"ids": [1], "mask": ["1"]}, "mask[0] must be 0, 1 or a float from 0, not '1'"),
        ({"ids": [1], "mask": [None]}, "mask[0] must be 0, 1 or a float from 0, not None"),
        (
            {"input_ids": [5, 6, 7], "labels": [-100, 7, -100]},
            "labels[1] must be -100 or input_ids[1] = 6, not 7: labels are not shifted here",
        ),
        ({"input_ids": [5], "labels": [-1]}, "labels[0] must be -100 or input_ids[0] = 5, not -1"),
        (
            {"input_ids": [5], "labels": [5.0]},
            "labels[0] must be -100 or input_ids[0] = 5, not 5.0",
        ),
        ({"input_ids": [1], "labels": [True]}, "labels[0] must be -100 or input_ids[0] = 1, not T"),
        (
            {"input_ids": [5, 0], "labels": [5, -100], "attention_mask": [1, 0]},
            "field 'attention_mask' must be all 1: leave out the padding",
        ),
        ({"ids": [5], "mask": [1], "attention_mask": [1, 1]}, "field 'attention_mask' must be all"),
        ({"ids": [5], "mask": [1], "attention_mask": 1}, "field 'attention_mask' must be a list"),
        (
            {"ids": [1], "mask": [1], "input_ids": [1], "labels": [1]},
            "fields 'ids' and 'mask' or 'input_ids' and 'labels' are needed, not both",
        ),
    ],
)
def test_malformed_tokens_are_named(row, message):
    assert refused(row).startswith(message)


# ---- any value -----------------------------------------------------------------------------------

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "from", "value", "type", "text", "name", "arguments"]
            )
            | st.sampled_from(["tool_calls", "function", "train", "weight", "thinking"]),
            inner
            | st.sampled_from(["user", "assistant", "gpt", "function_call", "text", "function"]),
            max_size=4,
        )
    ),
    max_leaves=8,
)
FIELDS = ["messages", "conversations", "prompt", "response", "completion", "text", "tools", "ids"]


@settings(deadline=None)
@given(
    row=st.dictionaries(st.sampled_from([*FIELDS, "mask", "input_ids", "labels", "system"]), ANY)
)
def test_any_row_makes_an_item_or_a_short_value_error(row):
    for to_item in formats.FORMATS.values():
        try:
            found = to_item(row, source())
        except ValueError as error:
            assert 10 < len(str(error)) < 600
            continue
        if isinstance(found, Conversation):
            for message in found.messages:
                assert message["role"] in ROLES and type(message["content"]) is str
                assert not {*message} & {"prefix", "audio", "refusal", "function_call"}
                assert None not in message.values()
                for call in message.get("tool_calls", ()):
                    assert type(call["function"]["arguments"]) is dict
                if message["role"] != "assistant":
                    assert not {*message} & {"tool_calls", "train", "weight", "reasoning_content"}


def test_messages_in_a_table_may_be_json_text():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    item = formats.messages({"messages": json.dumps(turns)}, source())
    assert item == formats.messages({"messages": turns}, source())
    with pytest.raises(ValueError, match="field 'messages' is not JSON"):
        formats.messages({"messages": "[{"}, source())


OPTIONS = {
    **{"messages_key": "dialog", "completion_key": "output", "text_key": "body"},
    **{"conversations_key": "chat", "query_key": "q"},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_the_format_does_not_use_is_refused(option):
    row = {"prompt": "a", "response": "b"} if option != "query_key" else {"text": "a"}
    source = inputs.source("f", **{option: OPTIONS[option]})
    with pytest.raises(ValueError, match=f"does not use source.{option}: leave it out"):
        formats.choose(source, [row])


def test_the_columns_looked_for_by_default_are_those_of_the_config():
    source = inputs.source("f")
    assert {*formats.USES} == {key for key in vars(source) if key.endswith("_key")}
    for option in formats.USES:
        is_optional = option in formats.OPTIONAL
        assert getattr(source, option) == ("" if is_optional else option.removesuffix("_key"))


def test_a_tools_column_that_is_not_there_is_refused():
    row = {"messages": [], "functions": []}
    with pytest.raises(ValueError, match="not source.tools_key = 'function'"):
        formats.choose(inputs.source("f", tools_key="function"), [row])
    assert formats.choose(inputs.source("f", tools_key="functions"), [row])[0] == "messages"
    assert formats.choose(inputs.source("f", tools_key=""), [row])[0] == "messages"


def test_a_weight_of_a_row_is_not_passed_over_in_silence():
    _, reason = formats.choose(inputs.source("f"), [{"prompt": "a", "response": "b", "weight": 0}])
    assert "column 'weight' is not used" in reason
