"""Data files to messages and examples: what is wrong with a file or row is said, never skipped."""

import json
import os

import datasets
import pytest

from jax_sft import config, tiny
from jax_sft.data import chat, formats
from jax_sft.data.prepare import prepare

ROWS = [{"prompt": f"ask {n}", "response": f"answer {n}"} for n in range(3)]
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def write(tmp_path):
    """Write a data file and describe it; rows are written one per line."""

    def write(content, name: str = "data.jsonl", **options):
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        if isinstance(content, str):
            content = content.encode()
        (tmp_path / name).write_bytes(content)
        return config.source(str(tmp_path / name), **options)

    return write


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return chat.load_tokenizer(folder)


def conversations(source) -> list:
    rows = formats.read_rows(source)
    to_messages = formats.FORMATS[formats.choose(source, rows.column_names)]
    return [to_messages(row, source) for row in rows]


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS)),
        ("a.jsonl", "\n".join(json.dumps(row) for row in ROWS)),
        ("a.jsonl", "\r\n".join(json.dumps(row) for row in ROWS)),
        ("a.jsonl", "\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS)),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=2)),
    ],
)
def test_json_and_jsonl_give_the_same_rows(write, name, content):
    assert list(formats.read_rows(write(content, name))) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.csv", "prompt,response\n", "must be .json or .jsonl"),
        ("a.jsonl", json.dumps(ROWS[0]) + "\nhello\n", "cannot be read: .*row 1"),
        ("a.jsonl", json.dumps(ROWS[0]) + '\n{"prompt": "cut\n', "cannot be read"),
        ("a.json", '[{"prompt": "a"}, 3]', "cannot be read"),
        ("a.json", '[{"prompt": "a"},', "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(write, name, content, message):
    with pytest.raises(ValueError, match=rf"{name}' {message}"):
        formats.read_rows(write(content, name))


@pytest.mark.parametrize("content", [" \n", "[]", "{}", b'{"prompt": "\xe9", "response": "b"}\n'])
def test_a_file_without_rows_or_not_utf8_is_named(write, content):
    with pytest.raises(ValueError, match="a.json"):
        formats.read_rows(write(content, "a.json"))


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match="'/nowhere/a.jsonl' does not exist"):
        formats.read_rows(config.source("/nowhere/a.jsonl"))


def test_limit_reads_the_first_rows(write):
    assert list(formats.read_rows(write(ROWS, limit=2))) == ROWS[:2]
    assert list(formats.read_rows(write(ROWS, limit=9))) == ROWS


def test_a_changed_file_with_the_same_time_is_read_anew(write):
    source = write([{"prompt": "a", "response": "old"}])
    stat = os.stat(source.path)
    assert formats.read_rows(source)[0]["response"] == "old"
    write([{"prompt": "a", "response": "new"}])
    os.utime(source.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as `cp -p`, rsync and tar do
    assert formats.read_rows(source)[0]["response"] == "new"


@pytest.mark.parametrize("answer", ["2024-01-01", "2024-01-01T10:00:00Z"])
def test_answers_that_look_like_dates_stay_text(write, answer):
    (messages, _), *_ = conversations(write([{"prompt": "When?", "response": answer}] * 2))
    assert messages[1]["content"] == answer


CALLS = [{"type": "function", "function": {"name": "f", "arguments": {"day": "2024-01-01"}}}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"a": {"type": "string"}}}}


@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": TURNS}, {"messages": [*TURNS, *TURNS]}],
        [{"messages": [TURNS[0], {"role": "assistant", "content": "", "tool_calls": CALLS}]}] * 2,
        [{"messages": TURNS, "tools": [TOOL]}, {"messages": TURNS, "tools": [TOOL | {"x": 1}]}],
        [
            {"messages": TURNS, "tools": [{"function": {"name": "f", "parameters": {key: {}}}}]}
            for key in "ab"
        ],
    ],
)
def test_messages_and_tools_come_back_as_written(write, rows):
    # Columns have one type for all rows: no row may get the fields of another as null.
    found = conversations(write(rows))
    assert found == [(row["messages"], row.get("tools")) for row in rows]


# ---- formats -------------------------------------------------------------------------------------


def test_the_format_follows_from_the_columns_or_is_given(write):
    both = [ROWS[0] | {"messages": TURNS}]
    assert formats.choose(write(ROWS), ["prompt", "response"]) == "prompt_response"
    assert formats.choose(write(both), ["messages", "tools"]) == "messages"
    assert conversations(write(both))[0][0] == TURNS
    chosen = write(both, format="prompt_response")
    assert conversations(chosen)[0][0][0]["content"] == "ask 0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"columns \['question', 'answer'\] do not have .*: set the source's \*_key options"),
        ({"format": "messages"}, r"columns .* do not have \['messages'\]"),
        ({"prompt_key": "question"}, r"columns .* do not have"),
        ({"format": "xml"}, r"format 'xml' is not one of \['prompt_response', 'messages'\]"),
    ],
)
def test_columns_that_fit_no_format_are_named(write, options, message):
    with pytest.raises(ValueError, match=message):
        conversations(write([{"question": "a", "answer": "b"}], **options))


def test_prompt_query_response_and_system_make_three_messages(write):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3", "sys": "Be brief."},
        {"instruction": "Add.", "input": "", "output": "3", "sys": None},
    ]
    keys = {"prompt_key": "instruction", "query_key": "input", "response_key": "output"}
    full, plain = conversations(write(rows, system_key="sys", **keys))
    assert full == (
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Add.\n1 2"},
            {"role": "assistant", "content": "3"},
        ],
        None,
    )
    assert plain[0] == [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "3"},
    ]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"'messages' must be a list of messages, not \[\]"),
        (None, "'messages' must be a list of messages, not None"),
        ([{"role": "robot", "content": "a"}], r"messages\[0\] must be an object whose role is one"),
        ([*TURNS, {"content": "a"}], r"messages\[2\] must be an object whose role is one"),
        ([*TURNS, {"role": "user", "content": ""}], r"messages\[2\] has neither content nor"),
        ([*TURNS, {"role": "user", "content": [1]}], r"messages\[2\].content must be a string"),
    ],
)
def test_a_malformed_message_is_named(messages, message):
    with pytest.raises(ValueError, match=message):
        formats.messages({"messages": messages}, config.source("x"))


# ---- examples ------------------------------------------------------------------------------------


def test_a_bad_row_is_named(write, tokenizer):
    source = write([*ROWS, {"prompt": "ask", "response": 3}, {"prompt": "", "response": "a"}])
    message = r"data\.jsonl \(source 'words'\), row 4: field 'response' must be a non-empty string"
    with pytest.raises(ValueError, match=message):
        prepare({"words": source}, tokenizer, seq_len=64, overlong="drop", progress=False)


def test_a_row_that_the_template_refuses_is_named(write, tokenizer):
    refused = {"messages": TURNS[::-1]}
    source = write([{"messages": TURNS}, refused])
    with pytest.raises(ValueError, match=r"row 2: the conversation starts with an assistant"):
        prepare({"a": source}, tokenizer, seq_len=64, overlong="drop", progress=False)


def test_every_dropped_row_is_counted(write, tokenizer):
    rows = [
        {"messages": TURNS},
        {"messages": [TURNS[0], {"role": "assistant", "content": "b" * 99}]},
        {"messages": TURNS[:1]},
        {"messages": TURNS},
    ]
    source = write(rows)
    examples = prepare({"a": source}, tokenizer, seq_len=64, overlong="drop", progress=False)
    length = len(chat.encode(tokenizer, TURNS))
    assert len(examples) == 2 and examples.lengths.tolist() == [length] * 2
    assert examples.report == {
        "a": {
            **{"path": source.path, "format": "messages", "rows": 4, "kept": 2},
            "dropped": {"overlong": 1, "no_trained_token": 1},
            **{"tokens": 2 * length, "trained_tokens": 4, "longest": length + 98},
        }
    }


def test_an_example_of_exactly_seq_len_is_kept(write, tokenizer):
    length = len(chat.encode(tokenizer, TURNS))
    source = write([{"messages": TURNS}])
    kept = prepare({"a": source}, tokenizer, seq_len=length, overlong="raise", progress=False)
    assert len(kept) == 1
    message = f"row 1: {length} tokens do not fit data.seq_len = {length - 1}: raise it, or set"
    with pytest.raises(ValueError, match=message):
        prepare({"a": source}, tokenizer, seq_len=length - 1, overlong="raise", progress=False)
    with pytest.raises(ValueError, match="no example is left to use"):
        prepare({"a": source}, tokenizer, seq_len=length - 1, overlong="drop", progress=False)


def test_sources_are_read_in_order_of_name_and_row(write, tokenizer):
    sources = {"b": write(ROWS[:1], "b.jsonl"), "a": write(ROWS[1:], "a.jsonl")}
    examples = prepare(sources, tokenizer, seq_len=64, overlong="drop", progress=False)
    texts = [tokenizer.decode(examples[number].tokens) for number in range(3)]
    assert ["ask 1" in texts[0], "ask 2" in texts[1], "ask 0" in texts[2]] == [True] * 3
    assert list(examples.report) == ["a", "b"]
