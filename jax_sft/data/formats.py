"""Rows to items that can be tokenized. A new format is a function here, its columns in `_needed`
and its name in FORMATS.

Every format takes (row, config.source) and raises ValueError naming the field that is wrong.
Nothing is converted: a number where text belongs is an error.
"""

import dataclasses
import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    **{"system": "system", "human": "user", "user": "user"},
    **{"gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "model": "assistant"},
    **{"tool": "tool", "observation": "tool", "function_response": "tool"},
    "function_call": "assistant",
}
THINKING = ("reasoning_content", "reasoning", "thinking")  # one thing, three names in use
NOT_SUPPORTED = {
    "function_call": "is out of date: write it as tool_calls, a list of calls",
    "prefix": "is not supported: complete the message, or leave the row out",
    "audio": "is not supported: only text can be trained",
    "refusal": "is not supported: make it the content, or leave the row out",
}
NOT_TRAINED = -100  # the label of a token that does not train
MAX_WEIGHT = 3.4e38  # float32 ends there
MAX_DEPTH = 64  # of objects in tools, arguments and further fields; Python stops at some hundreds

Row = Mapping[str, Any]
Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them: `role` is one of ROLES, `content` a string.

    An assistant's message may have `tool_calls`, a list of {"type": "function", "function":
    {"name": str, "arguments": dict}}; `reasoning_content`; and `train` (bool) or `weight` (float).
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None


@dataclasses.dataclass(frozen=True)
class Text:
    """Text tokenized without a chat template; the completion trains, the prompt does not."""

    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens as they are, not shifted, and the loss weight of each: 0 = it does not train."""

    ids: list[int]
    weights: list[float]


Item = Conversation | Text | Tokens


# ---- formats -------------------------------------------------------------------------------------


def messages(row: Row, source) -> Conversation:
    """A column of OpenAI's messages, with an optional column of tools.

    Fields that are null are left out; those that are not known stay: a template may use them. An
    assistant's message of nothing at all is refused unless it has `train: false` or weight 0.
    """
    key = source.messages_key
    found = [_message(one, f"{key}[{n}]") for n, one in enumerate(_messages(row, key))]
    system = _system(row, source.system_key)
    return Conversation(_joined(system, found, key), _tools(row, source.tools_key))


def sharegpt(row: Row, source) -> Conversation:
    """A column of {from, value}, with an optional column of tools.

    The system message may have its own column: source.system_key, or else "system" if there is
    one. The value of "function_call" is JSON: one tool call or a list of them.
    """
    key = source.conversations_key
    found = [_turn(one, f"{key}[{n}]", key) for n, one in enumerate(_messages(row, key))]
    system = _system(row, source.system_key or "system")
    return Conversation(_joined(system, found, key), _tools(row, source.tools_key))


def prompt_response(row: Row, source) -> Conversation:
    """Optional system, then user = prompt (+ newline + query), then assistant = response."""
    prompt = _text(row, source.prompt_key)
    if source.query_key and (query := _text(row, source.query_key, optional=True)):
        prompt += "\n" + query
    answer = {"role": "assistant", "content": _text(row, source.response_key)}
    turns = [{"role": "user", "content": prompt}, answer]
    return Conversation(_system(row, source.system_key) + turns, _tools(row, source.tools_key))


def prompt_completion(row: Row, source) -> Conversation | Text:
    """Two strings, tokenized plainly; or two lists of messages, of which the first is history.

    An assistant's message in the prompt trains only if it says so itself.
    """
    keys = (source.prompt_key, source.completion_key)
    prompt, completion = (row.get(key) for key in keys)
    tools = _tools(row, source.tools_key)
    if isinstance(prompt, str) and isinstance(completion, str):
        if tools:
            raise ValueError(f"field {source.tools_key!r} needs prompt and completion of messages")
        return Text(prompt, _text(row, source.completion_key))
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise ValueError(
            f"fields {keys[0]!r} and {keys[1]!r} must be two strings or two lists of messages, not "
            f"{_shown(prompt)} and {_shown(completion)}"
        )
    found = [
        _message(one, f"{key}[{number}]", trains=key == source.completion_key)
        for key in keys
        for number, one in enumerate(_messages(row, key))
    ]
    return Conversation(found, tools)


def tokens(row: Row, source) -> Tokens:
    """Tokenized rows: `ids` and `mask` (0, 1 or float weights), or `input_ids` and `labels`.

    Neither is shifted: a label is the token at its own place, or -100 where it does not train.
    """
    given = [keys for keys in _needed(source)["tokens"] if row.get(keys[0]) is not None]
    if len(given) != 1:
        raise ValueError("fields 'ids' and 'mask' or 'input_ids' and 'labels' are needed, not both")
    ids_key, marks_key = given[0]
    ids, marks = _list(row, ids_key), _list(row, marks_key)
    if not ids or len(ids) != len(marks):
        raise ValueError(
            f"fields {ids_key!r} and {marks_key!r} must be of the same length, from 1: they are "
            f"{len(ids)} and {len(marks)} long"
        )
    for number, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < 2**31:
            raise ValueError(f"{ids_key}[{number}] must be a token id, not {_shown(token)}")
    if row.get("attention_mask") is not None and _list(row, "attention_mask") != [1] * len(ids):
        raise ValueError("field 'attention_mask' must be all 1: leave out the padding")
    if marks_key == "mask":
        return Tokens(ids, [_weight(mark, f"mask[{number}]") for number, mark in enumerate(marks)])
    for number, (label, token) in enumerate(zip(marks, ids, strict=True)):
        if type(label) is not int or label not in (NOT_TRAINED, token):
            raise ValueError(
                f"labels[{number}] must be {NOT_TRAINED} or input_ids[{number}] = {token}, not "
                f"{_shown(label)}: labels are not shifted here"
            )
    return Tokens(ids, [float(label != NOT_TRAINED) for label in marks])


def text(row: Row, source) -> Text:
    """Plain language modelling: all of it trains."""
    return Text("", _text(row, source.text_key))


FORMATS: dict[str, Callable[[Row, Any], Item]] = {
    "messages": messages,
    "sharegpt": sharegpt,
    "prompt_response": prompt_response,
    "prompt_completion": prompt_completion,
    "tokens": tokens,
    "text": text,
}
# Options of a source that not every format uses.
USES = {
    "query_key": ("prompt_response",),
    "system_key": ("messages", "sharegpt", "prompt_response"),
}


def _needed(source) -> dict[str, list[tuple[str, ...]]]:
    """{format: its sets of columns, of which it needs one}."""
    return {
        "messages": [(source.messages_key,)],
        "sharegpt": [(source.conversations_key,)],
        "prompt_response": [(source.prompt_key, source.response_key)],
        "prompt_completion": [(source.prompt_key, source.completion_key)],
        "tokens": [("ids", "mask"), ("input_ids", "labels")],
        "text": [(source.text_key,)],
    }


def choose(source, rows: Sequence[Row]) -> tuple[str, str]:
    """Return the format of a source, and the reason for it as shown to the user.

    It is the one that the source names; otherwise the first, in the order of FORMATS, whose columns
    are there. A column is there if any of these rows, the first of the source, has it.

    Raises:
        ValueError: no format fits; a column is missing that the format or a *_key option needs; or
            an option is set that the format does not use.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    shown, given = _BRIEF.repr(columns), f"source.path = {source.path!r}"
    if source.format and source.format not in FORMATS:
        raise ValueError(f"source.format = {source.format!r} is not one of {list(FORMATS)}")
    needed = _needed(source)
    fits = {name: [keys for keys in needed[name] if {*keys} <= {*columns}] for name in FORMATS}
    name = source.format or next((name for name in FORMATS if fits[name]), "")
    if not name or not fits[name]:
        ways = "; ".join(
            f"{one!r} needs {' or '.join(' and '.join(map(repr, keys)) for keys in needed[one])}"
            for one in ([name] if name else FORMATS)
        )
        raise ValueError(
            f"{given} has the columns {shown}, but format {ways}. Say what its columns are called: "
            "messages_key, conversations_key, prompt_key, response_key, completion_key, text_key"
        )
    for option, users in USES.items():
        if source[option] and name not in users:
            raise ValueError(f"{given}: format {name!r} does not use source.{option}: leave it out")
        if source[option] and source[option] not in columns:
            raise ValueError(
                f"{given} has the columns {shown}, not source.{option} = {source[option]!r}"
            )
    keys = fits[name][0]
    reason = f"column{'s' * (len(keys) > 1)} {' and '.join(map(repr, keys))}"
    if name in ("messages", "prompt_response") and not source.system_key and "system" in columns:
        reason += "; column 'system' is not used: source.system_key is not set"
    return name, f"source.format, {reason}" if source.format else reason


# ---- messages ------------------------------------------------------------------------------------


def _messages(row: Row, key: str) -> list[Any]:
    found = row.get(key)
    if not isinstance(found, list) or not found:
        raise ValueError(f"field {key!r} must be a list of messages, not {_shown(found)}")
    return found


def _joined(system: list[Message], found: list[Message], key: str) -> list[Message]:
    """Put the system message of its own column first."""
    if not system or found[0] == system[0]:
        return found
    if found[0]["role"] == "system":
        raise ValueError(f"{key}[0] and the column of system messages differ: leave out one")
    return system + found


def _turn(turn: Any, where: str, key: str) -> Message:
    """Bring one {from, value} into the form of Conversation."""
    speaker = turn.get("from") if isinstance(turn, dict) else None
    if not isinstance(speaker, str):
        has_role = isinstance(turn, dict) and "role" in turn
        hint = f": set format = 'messages' and messages_key = {key!r}" if has_role else ""
        raise ValueError(f"{where} must be an object with from and value, not {_shown(turn)}{hint}")
    if speaker not in SHAREGPT_ROLES:
        raise ValueError(f"{where}.from must be one of {[*SHAREGPT_ROLES]}, not {_shown(speaker)}")
    message = {name: part for name, part in turn.items() if name not in ("from", "value")}
    message |= {"role": SHAREGPT_ROLES[speaker], "content": turn.get("value")}
    if speaker == "function_call":
        calls = _parsed(turn.get("value"), f"{where}.value")
        calls = _calls(calls if isinstance(calls, list) else [calls], f"{where}.value")
        message |= {"content": "", "tool_calls": calls}
    return _message(message, where, content="value")


def _message(message: Any, where: str, trains: bool = True, content: str = "content") -> Message:
    """Check one message and bring it into the form of Conversation.

    Args:
        trains: whether an assistant's message trains that does not say.
        content: what the row calls the content.
    """
    if not isinstance(message, dict):
        raise ValueError(f"{where} must be an object with role and content, not {_shown(message)}")
    given = {name: part for name, part in message.items() if part is not None}
    role = given.pop("role", None)
    role = "system" if role == "developer" else role
    if role == "function":
        raise ValueError(f"{where}.role = 'function' is out of date: use role 'tool'")
    if role not in ROLES:
        raise ValueError(f"{where}.role must be one of {ROLES}, not {_shown(role)}")
    for name, remedy in NOT_SUPPORTED.items():
        if given.pop(name, None):
            raise ValueError(f"{where}.{name} {remedy}")
    calls = _calls(given.pop("tool_calls", []), f"{where}.tool_calls")
    if "content" not in given and not calls:
        raise ValueError(f"{where}.{content} must be a string, not null")
    words = _content(given.pop("content", ""), f"{where}.{content}")
    thinking = _thinking(given, where)
    training = _training(given, where)
    _check_depth([given, calls], where)
    found = {"role": role, "content": words} | given | thinking
    if role != "assistant":
        wrong = ["tool_calls"] * bool(calls) + [name for name, part in thinking.items() if part]
        wrong += [name for name, part in training.items() if part]
        if wrong:
            raise ValueError(f"{where}.{wrong[0]}: only an assistant's message may have it")
        return {"role": role, "content": words} | given
    training = training or ({} if trains else {"train": False})
    if not (words or calls or any(thinking.values())) and all(training.values()):
        raise ValueError(
            f"{where} has neither {content} nor tool_calls, so it would train the model to say "
            "nothing: leave it out, or add train: false"
        )
    return found | ({"tool_calls": calls} if calls else {}) | training


def _content(content: Any, where: str) -> str:
    """Return a string, or join a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{where} must be a string or a list of text parts, not {_shown(content)}")
    for number, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"{where}[{number}].type must be 'text', not {_shown(kind)}")
        if not isinstance(part.get("text"), str):
            raise ValueError(
                f"{where}[{number}].text must be a string, not {_shown(part.get('text'))}"
            )
        if more := [name for name, value in part.items() if value and name not in ("type", "text")]:
            raise ValueError(
                f"{where}[{number}] must hold only text, not {_shown(more[0])} as well"
            )
    return "".join(part["text"] for part in content)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise ValueError(f"{where} must be a list of tool calls, not {_shown(calls)}")
    return [_call(call, f"{where}[{number}]") for number, call in enumerate(calls)]


def _call(call: Any, where: str) -> dict[str, Any]:
    """Bring a tool call, or the bare {name, arguments}, into the form of Conversation."""
    if not isinstance(call, dict):
        raise ValueError(f"{where} must be a tool call, not {_shown(call)}")
    if call.get("type") not in (None, "function"):
        raise ValueError(f"{where}.type must be 'function', not {_shown(call['type'])}")
    around, function = dict(call), call.get("function")
    if function is None:
        function = {name: around.pop(name) for name in ("name", "arguments") if name in around}
    else:
        where += ".function"
    if not isinstance(function, dict):
        raise ValueError(f"{where} must be an object with name and arguments")
    name, arguments = function.get("name"), _parsed(function.get("arguments"), f"{where}.arguments")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}.name must be a non-empty string, not {_shown(name)}")
    if arguments is None and "parameters" not in call and "parameters" not in function:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError(f"{where}.arguments must be an object, not {_shown(arguments)}")
    around = {name: part for name, part in around.items() if part is not None}
    whole = function | {"name": name, "arguments": arguments}
    return around | {"type": "function", "function": whole}


def _thinking(given: Message, where: str) -> Message:
    """Take what the assistant thought out of `given`; {"reasoning_content": it}, or nothing."""
    found = {name: given.pop(name) for name in THINKING if name in given}
    if not found:
        return {}
    if len(found) > 1:
        raise ValueError(f"{where} has {' and '.join(found)}: they are the same, leave one")
    ((name, thought),) = found.items()
    if not isinstance(thought, str):
        raise ValueError(f"{where}.{name} must be a string, not {_shown(thought)}")
    return {THINKING[0]: thought}


def _training(given: Message, where: str) -> Message:
    """Take `train` or `weight` out of `given`, checked."""
    found = {name: given.pop(name) for name in ("train", "weight") if name in given}
    if len(found) > 1:
        raise ValueError(f"{where} has train and weight: leave one")
    if not isinstance(found.get("train", True), bool):
        raise ValueError(f"{where}.train must be true or false, not {_shown(found['train'])}")
    if "weight" in found:
        weight = found["weight"]
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not 0 <= weight <= MAX_WEIGHT:
            raise ValueError(f"{where}.weight must be a number from 0, not {_shown(weight)}")
        return {"weight": float(weight)}
    return found


# ---- fields --------------------------------------------------------------------------------------


def _text(row: Row, key: str, optional: bool = False) -> str:
    value = row.get(key)
    if isinstance(value, str) and (value or optional):
        return value
    if optional and value is None:
        return ""
    raise ValueError(f"field {key!r} must be a non-empty string, not {_shown(value)}")


def _list(row: Row, key: str) -> list[Any]:
    value = row.get(key)
    if not isinstance(value, list):
        raise ValueError(f"field {key!r} must be a list, not {_shown(value)}")
    return value


def _system(row: Row, key: str) -> list[Message]:
    content = _text(row, key, optional=True) if key else ""
    return [{"role": "system", "content": content}] if content else []


def _tools(row: Row, key: str) -> list[dict[str, Any]] | None:
    tools = _parsed(row.get(key) or None, f"field {key!r}")
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"field {key!r} must be a list of objects, not {_shown(tools)}")
    _check_depth(tools or [], f"field {key!r}")
    return tools or None


def _check_depth(value: dict | list, where: str, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"{where} is nested more than {MAX_DEPTH} deep")
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            _check_depth(inner, where, depth + 1)


def _weight(mark: Any, where: str) -> float:
    if isinstance(mark, int) and mark in (0, 1):  # 2 is no weight: more likely it numbers turns
        return float(mark)
    if isinstance(mark, float) and 0 <= mark <= MAX_WEIGHT:
        return mark
    raise ValueError(f"{where} must be 0, 1 or a float from 0, not {_shown(mark)}")


def _parsed(value: Any, where: str) -> Any:
    """Return what JSON in a string says, or a value that is no string as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxlist, _BRIEF.maxdict, _BRIEF.maxstring = 3, 20, 10, 60


def _shown(value: Any) -> str:
    """A value as in Python, short whatever it is."""
    return f"{_BRIEF.repr(value):.120}"
