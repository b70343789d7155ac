"""JSON to rows: `elements` cuts the text of a list up, `parse_object` makes a row of one element.

Called by `read`, for lines too. JSON is parsed by the json module, row by row, so every value stays
exactly what the file says.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import Any

BLANKS = re.compile(rb"[ \t\r\n]*+")
# JSON up to and with its next bracket outside of strings; no match if the bytes end before it.
BRACKET = re.compile(rb'[^"\[\]{}]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^"\[\]{}]*+)*+([\[\]{}])', re.S)
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.S)
PLAIN_VALUE = re.compile(rb"[^ \t\r\n,\[\]{}\"]++(?=.)", re.S)  # a number, true, false, null
# What is wanted in a list, and after each mark: "" = nothing more.
AFTER = {
    **{"[": {"[": "a value or ]"}, "a value or ]": {"]": ""}, "a value": {}},
    **{", or ]": {",": "a value", "]": ""}, "": {}},
}


def elements(stream: io.BufferedReader, block: int) -> Iterator[bytes]:
    """Cut a JSON list into its elements, by its brackets and commas outside of strings.

    What is within an element is not looked at: a bad one whose brackets pair up is one bad row.

    Args:
        block: bytes to read at once, at least.

    Raises:
        ValueError: the list is malformed between its elements, or is cut off. There is no telling
            where the next element starts.
    """
    buffer, at, line, wanted = stream.read(block).removeprefix(codecs.BOM_UTF8), 0, 1, "["
    while True:
        blanks = BLANKS.match(buffer, at)
        assert blanks is not None  # it matches the empty string
        line += buffer.count(b"\n", at, blanks.end())
        at = blanks.end()
        mark = buffer[at : at + 1].decode("latin-1")
        is_value = wanted in ("a value", "a value or ]") and mark not in ("", "]", "}", ",")
        end = _value_end(buffer, at) if is_value else at + len(mark)
        if end <= at:  # what comes next is not in the buffer, or not all of it
            more = stream.read(max(block, len(buffer) - at))  # twice as much each time: linear
            if not more and not wanted:
                return
            if not more:
                raise ValueError(f"line {line}: the file ends within the list")
            buffer, at = buffer[at:] + more, 0
            continue
        if is_value:
            yield buffer[at:end]
            line += buffer.count(b"\n", at, end)
            wanted = ", or ]"
        elif mark in AFTER[wanted]:
            wanted = AFTER[wanted][mark]
        else:
            needed = f"{wanted} is needed" if wanted else "the list has ended"
            raise ValueError(f"line {line}: {needed} where {mark!r} stands")
        at = end


def _value_end(data: bytes, start: int) -> int:
    """Return where the JSON value that starts at `start` ends, or -1 if `data` ends before it."""
    if data[start] not in b"[{":
        pattern = STRING if data[start] == b'"'[0] else PLAIN_VALUE
        found = pattern.match(data, start)
        return found.end() if found else -1
    depth, end = 0, start
    while found := BRACKET.match(data, end):
        depth += 1 if found[1] in b"[{" else -1
        end = found.end()
        if not depth:
            return end
    return -1


def parse_object(data: bytes) -> tuple[dict[str, Any] | None, str]:
    """Return (object, "") or (None, what is wrong)."""
    try:
        found = DECODER.decode(data.rstrip(b"\r\n").decode())
    except UnicodeDecodeError as error:
        return None, f"is not UTF-8: {error.reason} at byte {error.start + 1}"
    except json.JSONDecodeError as error:
        return None, f"is not JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}"
    except RecursionError:
        return None, "is nested too deeply"
    except ValueError as error:  # from `_unique`, or int() of thousands of digits
        return None, f"cannot be read: {error}"
    if not isinstance(found, dict):
        names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
        return None, f"must be an object, not {names.get(type(found), 'a number')}"
    return found, ""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise ValueError(f"key {twice!r:.80} is there twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_unique)
