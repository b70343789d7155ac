"""Whether a text holds the parts of a message, in any form in which chat templates print them.

Called by `assistant_turns`, to refuse templates that leave out or change a part. Templates print
the arguments of tool calls as JSON of any layout, by Python's `str`, or escaped as in XML.
"""

import collections
import html
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
_MARKUP = frozenset("&<>\"'")
# Escapes of jinja2's own `tojson`.
_SAFE_JSON = {ord(char): f"\\u{ord(char):04x}" for char in "<>&'"}


def is_in(part: str, text: str) -> bool:
    """Whether a text holds a part: verbatim without outer white space, or escaped as in JSON."""
    if part.strip() in text:
        return True
    escaped = (json.dumps(part, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False))
    return any(form in text for form in escaped)


def missing_part(message: Mapping[str, Any], text: str) -> str | None:
    """Return the first name or value of a message's tool calls that a text lacks.

    A value that occurs several times in the calls must occur as often in the text.
    """
    # Counted by type as well, since True, 1 and 1.0 are the same key.
    counts = collections.Counter((type(leaf), leaf) for leaf in _leaves(list(_calls(message))))
    for (_, leaf), times in counts.items():
        printed = leaf.strip() if isinstance(leaf, str) else json.dumps(leaf)
        if printed in text and times == 1:
            continue
        if printed and _count(leaf, printed, text, times) < times:
            return leaf if isinstance(leaf, str) else printed
    return None


def _calls(message: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the name and the arguments of each tool call."""
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        arguments = function.get("arguments", {})
        yield function["name"]
        # Some templates want text, see ChatTemplate.styled.
        yield json.loads(arguments) if isinstance(arguments, str) else arguments


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the keys and the innermost values of a JSON value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _count(leaf: Any, printed: str, text: str, enough: int) -> int:
    """Count a value in a text, over all its forms; stop once there are enough."""
    forms = _forms_of_text(printed) if isinstance(leaf, str) else (printed, str(leaf))
    count = 0
    for form in dict.fromkeys(forms):
        count += text.count(form)
        if count >= enough:
            return count
    if isinstance(leaf, int | float) and not isinstance(leaf, bool):
        # The same number in other digits: 5 for 5.0, 1e5 for 100000.0.
        equal = sum(float(number) == leaf for number in _NUMBER.findall(text))
        return max(count, equal)
    return count


def _forms_of_text(text: str) -> Iterator[str]:
    """Yield a text as it is printed within JSON, by Python, and as XML of each of these."""
    as_json = json.dumps(text, ensure_ascii=False)[1:-1]
    plain = [text, as_json, json.dumps(text)[1:-1], repr(text)[1:-1], ascii(text)[1:-1]]
    plain += [as_json.translate(_SAFE_JSON), json.dumps(as_json, ensure_ascii=False)[1:-1]]
    for form in dict.fromkeys(plain):
        yield form
        if not _MARKUP.isdisjoint(form):
            yield html.escape(form, quote=False)
            yield html.escape(form)
            yield html.escape(form, quote=False).replace('"', "&#34;").replace("'", "&#39;")
