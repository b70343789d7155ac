"""Convert rows to items that can be tokenized.

Called by `worker`. Every format accepts (row, settings.Source) and raises ValueError naming the
invalid field. Values are not converted: a number where text belongs is an error. To add a format,
write its function here, add its columns to `_needed` and its name to FORMATS.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax_sft.data.sources.messages import (
    BRIEF,
    MAX_WEIGHT,
    NOTHING,
    VISIBLE,
    Message,
    parsed,
    shown,
    to_message,
    to_tools,
    turn_to_message,
)
from jax_sft.settings import Source

NOT_TRAINED = -100  # label of an untrained token

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages in the form that chat templates accept; tools are None if there are none.

    `role` is one of messages.ROLES and `content` is a string. An assistant message may have
    `tool_calls`, a list of {"type": "function", "function": {"name": str, "arguments": dict}};
    `reasoning_content`; and `train` (bool) or `weight` (float).
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None


@dataclasses.dataclass(frozen=True)
class Text:
    """Text tokenized without a chat template. The completion is trained, the prompt is not."""

    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token ids, not shifted, and the loss weight of each (0 = not trained)."""

    ids: list[int]
    weights: list[float]


Item = Conversation | Text | Tokens


# ---- formats -------------------------------------------------------------------------------------


def messages(row: Row, source: Source) -> Conversation:
    """Read a column of OpenAI messages, with an optional column of tools.

    Null fields are left out. Unknown fields are kept, since a template may use them. An assistant
    message without tool calls or visible text is refused unless it has `train: false` or weight 0.
    """
    key = source.messages_key
    turns = [to_message(message, f"{key}[{n}]") for n, message in enumerate(_messages(row, key))]
    system = _system(row, source.system_key)
    return Conversation(_joined(system, turns, key), _tools(row, source.tools_key))


def sharegpt(row: Row, source: Source) -> Conversation:
    """Read a column of {from, value} turns, with an optional column of tools.

    The system message may have its own column: source.system_key, by default "system" if that
    column exists. The value of "function_call" is JSON: one tool call or a list of them.
    """
    key = source.conversations_key
    turns = [
        turn_to_message(turn, f"{key}[{n}]", key) for n, turn in enumerate(_messages(row, key))
    ]
    system = _system(row, source.system_key or "system")
    return Conversation(_joined(system, turns, key), _tools(row, source.tools_key))


def prompt_response(row: Row, source: Source) -> Conversation:
    """Read a user message (prompt, newline, query) and the assistant's response.

    The query and the system message are optional.
    """
    prompt = _text(row, source.prompt_key)
    if source.query_key and (query := _text(row, source.query_key, optional=True)):
        prompt += "\n" + query
    answer = {"role": "assistant", "content": _trained(row, source.response_key)}
    turns = [{"role": "user", "content": prompt}, answer]
    return Conversation(_system(row, source.system_key) + turns, _tools(row, source.tools_key))


def prompt_completion(row: Row, source: Source) -> Conversation | Text:
    """Read two strings, tokenized without a template, or two lists of messages.

    The first list is history: an assistant message in it is trained only if it sets `train` or
    `weight` itself.
    """
    keys = (source.prompt_key, source.completion_key)
    prompt, completion = (row.get(key) for key in keys)
    tools = _tools(row, source.tools_key)
    if isinstance(prompt, str) and isinstance(completion, str):
        if tools:
            raise ValueError(f"field {source.tools_key!r} needs prompt and completion of messages")
        return Text(prompt, _trained(row, source.completion_key))
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise ValueError(
            f"fields {keys[0]!r} and {keys[1]!r} must be two strings or two lists of messages, not "
            f"{shown(prompt)} and {shown(completion)}"
        )
    turns = [
        to_message(message, f"{key}[{number}]", trains=key == source.completion_key)
        for key in keys
        for number, message in enumerate(_messages(row, key))
    ]
    return Conversation(turns, tools)


def tokens(row: Row, source: Source) -> Tokens:
    """Read tokenized rows: `ids` and `mask` (0, 1 or float weights), or `input_ids` and `labels`.

    Neither is shifted: a label is the token at its own position, or -100 where it is not trained.
    """
    present = [keys for keys in _needed(source)["tokens"] if row.get(keys[0]) is not None]
    if len(present) != 1:
        raise ValueError("fields 'ids' and 'mask' or 'input_ids' and 'labels' are needed, not both")
    ids_key, marks_key = present[0]
    ids, marks = _list(row, ids_key), _list(row, marks_key)
    if not ids or len(ids) != len(marks):
        raise ValueError(
            f"fields {ids_key!r} and {marks_key!r} must be of the same length, from 1: they are "
            f"{len(ids)} and {len(marks)} long"
        )
    for number, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < 2**31:
            raise ValueError(f"{ids_key}[{number}] must be a token id, not {shown(token)}")
    if row.get("attention_mask") is not None and _list(row, "attention_mask") != [1] * len(ids):
        raise ValueError("field 'attention_mask' must be all 1: leave out the padding")
    if marks_key == "mask":
        return Tokens(ids, [_weight(mark, f"mask[{number}]") for number, mark in enumerate(marks)])
    for number, (label, token) in enumerate(zip(marks, ids, strict=True)):
        if type(label) is not int or label not in (NOT_TRAINED, token):
            raise ValueError(
                f"labels[{number}] must be {NOT_TRAINED} or input_ids[{number}] = {token}, not "
                f"{shown(label)}: labels are not shifted here"
            )
    return Tokens(ids, [float(label != NOT_TRAINED) for label in marks])


def text(row: Row, source: Source) -> Text:
    """Read plain text for language modeling; all of it is trained."""
    return Text("", _trained(row, source.text_key))


# The order is the precedence: `choose` picks the first format whose columns all exist.
FORMATS: dict[str, Callable[[Row, Any], Item]] = {
    "messages": messages,
    "sharegpt": sharegpt,
    "prompt_response": prompt_response,
    "prompt_completion": prompt_completion,
    "tokens": tokens,
    "text": text,
}
# {option of a source that names a column: the formats that use it}.
USES = {
    "prompt_key": ("prompt_response", "prompt_completion"),
    "query_key": ("prompt_response",),
    "response_key": ("prompt_response",),
    "system_key": ("messages", "sharegpt", "prompt_response"),
    "messages_key": ("messages",),
    "conversations_key": ("sharegpt",),
    "tools_key": ("messages", "sharegpt", "prompt_response", "prompt_completion"),
    "completion_key": ("prompt_completion",),
    "text_key": ("text",),
}
OPTIONAL = ("query_key", "system_key")  # not set by default; the others always name a column


def _needed(source: Source) -> dict[str, list[tuple[str, ...]]]:
    """Return {format: its alternative sets of columns}; a format needs all columns of one set."""
    return {
        "messages": [(source.messages_key,)],
        "sharegpt": [(source.conversations_key,)],
        "prompt_response": [(source.prompt_key, source.response_key)],
        "prompt_completion": [(source.prompt_key, source.completion_key)],
        "tokens": [("ids", "mask"), ("input_ids", "labels")],
        "text": [(source.text_key,)],
    }


def columns(source: Source) -> set[str]:
    """Return the columns of a source that some format may read; the others can be skipped."""
    named = {getattr(source, option) for option in USES} | {"system", "attention_mask"}
    return named | {key for sets in _needed(source).values() for keys in sets for key in keys}


def choose(source: Source, rows: Sequence[Row]) -> tuple[str, str]:
    """Return the format of a source and the reason that is shown to the user.

    The format is source.format if set, otherwise the first in FORMATS whose columns all exist. A
    column exists if any of `rows`, the first rows of the source, has it.

    Raises:
        ValueError: no format fits; a column is missing that the format or a *_key option needs; or
            an option is set that the format does not use.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    names, given = BRIEF.repr(columns), f"source.path = {source.path!r}"
    if source.format and source.format not in FORMATS:
        raise ValueError(f"source.format = {source.format!r} is not one of {list(FORMATS)}")
    needed = _needed(source)
    fits = {name: [keys for keys in needed[name] if {*keys} <= {*columns}] for name in FORMATS}
    name = source.format or next((name for name in FORMATS if fits[name]), "")
    if not name or not fits[name]:
        ways = "; ".join(
            f"{candidate!r} needs "
            f"{' or '.join(' and '.join(map(repr, keys)) for keys in needed[candidate])}"
            for candidate in ([name] if name else FORMATS)
        )
        raise ValueError(
            f"{given} has the columns {names}, but format {ways}. Say what its columns are called: "
            "messages_key, conversations_key, prompt_key, response_key, completion_key, text_key"
        )
    for option, users in USES.items():
        default = "" if option in OPTIONAL else option.removesuffix("_key")
        if getattr(source, option) in ("", default):
            continue
        if name not in users:
            raise ValueError(f"{given}: format {name!r} does not use source.{option}: leave it out")
        if (column := getattr(source, option)) not in columns:
            raise ValueError(f"{given} has the columns {names}, not source.{option} = {column!r}")
    keys = fits[name][0]
    reason = f"column{'s' * (len(keys) > 1)} {' and '.join(map(repr, keys))}"
    if name in ("messages", "prompt_response") and not source.system_key and "system" in columns:
        reason += "; column 'system' is not used: source.system_key is not set"
    for unused in {"train", "weight"} & {*columns}:
        reason += f"; column {unused!r} is not used: messages have weights, rows have not"
    return name, f"source.format, {reason}" if source.format else reason


# ---- fields --------------------------------------------------------------------------------------


def _text(row: Row, key: str, optional: bool = False) -> str:
    value = row.get(key)
    if isinstance(value, str) and (value or optional):
        return value
    if optional and value is None:
        return ""
    raise ValueError(f"field {key!r} must be a non-empty string, not {shown(value)}")


def _trained(row: Row, key: str) -> str:
    """Return the text of a trained field; refuse one without a visible character."""
    words = _text(row, key)
    if not VISIBLE.search(words):
        raise ValueError(f"field {key!r} has only blanks, {NOTHING}: leave the row out")
    return words


def _list(row: Row, key: str) -> list[Any]:
    value = row.get(key)
    if not isinstance(value, list):
        raise ValueError(f"field {key!r} must be a list, not {shown(value)}")
    return value


def _messages(row: Row, key: str) -> list[Any]:
    value = parsed(row.get(key), f"field {key!r}")  # JSON text in a table such as CSV
    if not isinstance(value, list) or not value:
        raise ValueError(f"field {key!r} must be a list of messages, not {shown(value)}")
    return value


def _system(row: Row, key: str) -> list[Message]:
    content = _text(row, key, optional=True) if key else ""
    return [{"role": "system", "content": content}] if content else []


def _joined(system: list[Message], messages: list[Message], key: str) -> list[Message]:
    """Put the system message that has its own column first."""
    if not system or messages[0] == system[0]:
        return messages
    if messages[0]["role"] == "system":
        raise ValueError(f"{key}[0] and the column of system messages differ: leave out one")
    return system + messages


def _tools(row: Row, key: str) -> list[dict[str, Any]] | None:
    return to_tools(row.get(key), f"field {key!r}")


def _weight(mark: Any, where: str) -> float:
    if isinstance(mark, int) and mark in (0, 1):  # 2 is not a weight: it more likely numbers turns
        return float(mark)
    if isinstance(mark, float) and 0 <= mark <= MAX_WEIGHT:
        return mark
    raise ValueError(f"{where} must be 0, 1 or a float from 0, not {shown(mark)}")
