"""Check the messages and tools of a row and convert them to the form of formats.Conversation.

Called by `formats`. Invalid input raises ValueError, which names the place within the row by
`where`, such as "messages[3]".
"""

import math
import re
import reprlib
from typing import Any

from jax_sft.data.sources.json_rows import DECODER

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    **{"system": "system", "human": "user", "user": "user"},
    **{"gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "model": "assistant"},
    **{"tool": "tool", "observation": "tool", "function_response": "tool"},
    "function_call": "assistant",
}
THINKING = ("reasoning_content", "reasoning", "thinking")  # three names in use for one field
NOT_SUPPORTED = {
    "function_call": "is out of date: write it as tool_calls, a list of calls",
    "prefix": "is not supported: complete the message, or leave the row out",
    "audio": "is not supported: only text can be trained",
    "refusal": "is not supported: make it the content, or leave the row out",
}
# A visible character: neither white space nor a control, format or filler character.
VISIBLE = re.compile(
    r"[^\s\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    r"\u202a-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    r"\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
NOTHING = "so it would train the model to say nothing"
MAX_WEIGHT = 3.4e38  # about the largest float32
MAX_DEPTH = 64  # of tools, arguments and other fields; Python's recursion ends at some hundreds

Message = dict[str, Any]


def to_message(message: Any, where: str, trains: bool = True, content: str = "content") -> Message:
    """Check one message and convert it to the form of Conversation.

    Args:
        trains: whether an assistant message that has neither `train` nor `weight` is trained.
        content: name of the content in the row.
    """
    if not isinstance(message, dict):
        raise ValueError(f"{where} must be an object with role and content, not {shown(message)}")
    given = {name: part for name, part in message.items() if part is not None}
    role = given.pop("role", None)
    role = "system" if role == "developer" else role
    if role == "function":
        raise ValueError(f"{where}.role = 'function' is out of date: use role 'tool'")
    if role not in ROLES:
        is_sharegpt = role is None and "from" in given
        hint = ": set format = 'sharegpt' and conversations_key" if is_sharegpt else ""
        raise ValueError(f"{where}.role must be one of {ROLES}, not {shown(role)}{hint}")
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
    converted = {"role": role, "content": words} | given | thinking
    if role != "assistant":
        wrong = ["tool_calls"] * bool(calls) + [name for name, part in thinking.items() if part]
        wrong += [name for name, part in training.items() if part]
        if wrong:
            raise ValueError(f"{where}.{wrong[0]}: only an assistant's message may have it")
        return {"role": role, "content": words} | given
    training = training or ({} if trains else {"train": False})
    says_something = calls or any(map(VISIBLE.search, (words, *thinking.values())))
    if not says_something and all(training.values()):
        is_blank = words or any(thinking.values())
        problem = "has only blanks" if is_blank else f"has neither {content} nor tool_calls"
        raise ValueError(f"{where} {problem}, {NOTHING}: leave it out, or add train: false")
    return converted | ({"tool_calls": calls} if calls else {}) | training


def turn_to_message(turn: Any, where: str, key: str) -> Message:
    """Convert one {from, value} turn to the form of Conversation."""
    speaker = turn.get("from") if isinstance(turn, dict) else None
    if not isinstance(speaker, str):
        has_role = isinstance(turn, dict) and "role" in turn
        hint = f": set format = 'messages' and messages_key = {key!r}" if has_role else ""
        raise ValueError(f"{where} must be an object with from and value, not {shown(turn)}{hint}")
    if speaker not in SHAREGPT_ROLES:
        raise ValueError(f"{where}.from must be one of {[*SHAREGPT_ROLES]}, not {shown(speaker)}")
    message = {name: part for name, part in turn.items() if name not in ("from", "value")}
    message |= {"role": SHAREGPT_ROLES[speaker], "content": turn.get("value")}
    if speaker == "function_call":
        calls = parsed(turn.get("value"), f"{where}.value")
        calls = _calls(calls if isinstance(calls, list) else [calls], f"{where}.value")
        message |= {"content": "", "tool_calls": calls}
    return to_message(message, where, content="value")


def _content(content: Any, where: str) -> str:
    """Return a string unchanged, or join a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{where} must be a string or a list of text parts, not {shown(content)}")
    for number, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"{where}[{number}].type must be 'text', not {shown(kind)}")
        if not isinstance(part.get("text"), str):
            raise ValueError(
                f"{where}[{number}].text must be a string, not {shown(part.get('text'))}"
            )
        if more := [name for name, value in part.items() if value and name not in ("type", "text")]:
            raise ValueError(f"{where}[{number}] must hold only text, not {shown(more[0])} as well")
    return "".join(part["text"] for part in content)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise ValueError(f"{where} must be a list of tool calls, not {shown(calls)}")
    return [_call(call, f"{where}[{number}]") for number, call in enumerate(calls)]


def _call(call: Any, where: str) -> dict[str, Any]:
    """Convert a tool call, or a bare {name, arguments}, to the form of Conversation."""
    if not isinstance(call, dict):
        raise ValueError(f"{where} must be a tool call, not {shown(call)}")
    if call.get("type") not in (None, "function"):
        raise ValueError(f"{where}.type must be 'function', not {shown(call['type'])}")
    around, function = dict(call), call.get("function")
    if function is None:
        function = {name: around.pop(name) for name in ("name", "arguments") if name in around}
    else:
        where += ".function"
    if not isinstance(function, dict):
        raise ValueError(f"{where} must be an object with name and arguments")
    name, arguments = function.get("name"), parsed(function.get("arguments"), f"{where}.arguments")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}.name must be a non-empty string, not {shown(name)}")
    if arguments is None and "parameters" not in call and "parameters" not in function:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError(f"{where}.arguments must be an object, not {shown(arguments)}")
    around = {name: part for name, part in around.items() if part is not None}
    _check_json(arguments, f"{where}.arguments")
    whole = function | {"name": name, "arguments": arguments}
    return around | {"type": "function", "function": whole}


def _thinking(given: Message, where: str) -> Message:
    """Remove the reasoning from `given`; return {"reasoning_content": reasoning} or {}."""
    fields = {name: given.pop(name) for name in THINKING if name in given}
    if not fields:
        return {}
    if len(fields) > 1:
        raise ValueError(f"{where} has {' and '.join(fields)}: they mean the same, keep one")
    ((name, thought),) = fields.items()
    if not isinstance(thought, str):
        raise ValueError(f"{where}.{name} must be a string, not {shown(thought)}")
    return {THINKING[0]: thought}


def _training(given: Message, where: str) -> Message:
    """Remove `train` or `weight` from `given`, check it and return it."""
    fields = {name: given.pop(name) for name in ("train", "weight") if name in given}
    if len(fields) > 1:
        raise ValueError(f"{where} has train and weight: keep one")
    if not isinstance(fields.get("train", True), bool):
        raise ValueError(f"{where}.train must be true or false, not {shown(fields['train'])}")
    if "weight" in fields:
        weight = fields["weight"]
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not 0 <= weight <= MAX_WEIGHT:
            raise ValueError(f"{where}.weight must be a number from 0, not {shown(weight)}")
        return {"weight": float(weight)}
    return fields


def to_tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    """Return a checked list of tools, given as a list or as JSON text; None if empty."""
    tools = parsed(tools or None, where)
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"{where} must be a list of objects, not {shown(tools)}")
    _check_depth(tools or [], where)
    _check_json(tools, where)
    return tools or None


def _check_json(value: Any, where: str) -> None:
    """Refuse values that JSON does not have: tables also hold dates, bytes and decimals."""
    pending = [value]
    while pending:
        inner = pending.pop()
        if isinstance(inner, dict | list):
            pending += inner.values() if isinstance(inner, dict) else inner
        elif inner is not None and not isinstance(inner, str | int | float | tuple):
            raise ValueError(f"{where} has a value that JSON does not have: {shown(inner)}")


def _check_depth(value: dict | list, where: str, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"{where} is nested more than {MAX_DEPTH} deep")
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            _check_depth(inner, where, depth + 1)
        elif isinstance(inner, float) and not math.isfinite(inner):  # from 1e999, or NaN
            raise ValueError(f"{where} has a number that JSON does not have: {inner}")


def parsed(value: Any, where: str) -> Any:
    """Return the value of a JSON text; return a value of any other type unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return DECODER.decode(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


BRIEF = reprlib.Repr()
BRIEF.maxlevel, BRIEF.maxlist, BRIEF.maxdict, BRIEF.maxstring = 3, 20, 10, 60


def shown(value: Any) -> str:
    """Return the repr of a value, shortened to at most 120 characters."""
    return f"{BRIEF.repr(value):.120}"
