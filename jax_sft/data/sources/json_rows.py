"""Split JSON text into rows (`lines`, `elements`) and parse them (`parse_object`).

Called by `read`. A row over the size limit is reported without being held in memory. The json
module parses row by row, so every value stays exactly what the file says.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

BLANKS = re.compile(rb"[ \t\r\n]*+")
# JSON up to and including its next bracket outside strings; no match if the bytes end before it.
BRACKET = re.compile(rb'[^"\[\]{}]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^"\[\]{}]*+)*+([\[\]{}])', re.S)
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.S)
PLAIN_VALUE = re.compile(rb"[^ \t\r\n,\[\]{}\"]++(?=.)", re.S)  # a number, true, false, null
PLAIN_END = re.compile(rb'[ \t\r\n,\[\]{}"]')
# States of the list scanner: {what is expected: {mark: what is expected next}}; "" = nothing.
AFTER = {
    **{"[": {"[": "a value or ]"}, "a value or ]": {"]": ""}, "a value": {}},
    **{", or ]": {",": "a value", "]": ""}, "": {}},
}


def too_long(max_bytes: int) -> str:
    """Return the error text of a row over the size limit."""
    return (
        f"is longer than data.max_row_bytes = {max_bytes:,}: raise it, or split or leave out the "
        "row"
    )


def lines(
    stream: io.BufferedReader, block: int, max_bytes: int
) -> Iterator[tuple[int, list[bytes | str]]]:
    """Yield (number of the first line, lines) of about `block` bytes; lines end at b"\n" only.

    A line of more than `max_bytes` is replaced by an error text. Blocks of nothing but white space
    are left out.
    """
    group: list[bytes | str] = []
    rest, is_long, number, first = b"", False, 1, 1
    while data := stream.read(block):
        if not (rest or is_long or data.strip()):
            num_lines = data.count(b"\n")
            if group:
                yield first, group
            group, first, number = [], number + num_lines, number + num_lines
            continue
        head, *more = data.split(b"\n")
        is_long |= len(rest) + len(head) > max_bytes
        rest = b"" if is_long else rest + head
        if more:
            if group:
                yield first, group
            group = [too_long(max_bytes) if is_long else rest, *more[:-1]]
            if block > max_bytes:
                group = [too_long(max_bytes) if len(line) > max_bytes else line for line in group]
            first, number = number, number + len(group)
            rest, is_long = more[-1], len(more[-1]) > max_bytes
    if is_long or rest:
        group.append(too_long(max_bytes) if is_long else rest)
    if group:
        yield first, group


def elements(stream: io.BufferedReader, block: int, max_bytes: int) -> Iterator[bytes | str]:
    """Split a JSON list into its elements, at brackets and commas outside strings.

    The content of an element is not checked: a malformed one whose brackets match is one bad row.
    An element of more than `max_bytes` is replaced by an error text.

    Args:
        block: minimum number of bytes to read at once.

    Raises:
        ValueError: the list is malformed between its elements or is cut off, so that the start of
            the next element is unknown.
    """
    buffer, at, line, expected = stream.read(block).removeprefix(codecs.BOM_UTF8), 0, 1, "["
    while True:
        blanks = BLANKS.match(buffer, at)
        assert blanks is not None  # it matches the empty string
        line += buffer.count(b"\n", at, blanks.end())
        at = blanks.end()
        mark = buffer[at : at + 1].decode("latin-1")
        is_value = expected in ("a value", "a value or ]") and mark not in ("", "]", "}", ",")
        end = _value_end(buffer, at) if is_value else at + len(mark)
        if end <= at:  # the next mark or value is not, or not wholly, in the buffer
            if is_value and len(buffer) - at >= block:
                value, buffer, num_lines = _long_value(stream, buffer[at:], block, max_bytes)
                at, line, expected = 0, line + num_lines, ", or ]"
                yield value
                continue
            more = stream.read(block)
            if not more and not expected:
                return
            if not more:
                raise ValueError(f"line {line}: the file ends within the list")
            buffer, at = buffer[at:] + more, 0
            continue
        if is_value:
            yield buffer[at:end] if end - at <= max_bytes else too_long(max_bytes)
            line += buffer.count(b"\n", at, end)
            expected = ", or ]"
        elif mark in AFTER[expected]:
            expected = AFTER[expected][mark]
        else:
            needed = f"{expected} is needed" if expected else "the list has ended"
            raise ValueError(f"line {line}: {needed} where {mark!r} stands")
        at = end


def _value_end(data: bytes, start: int) -> int:
    """Return the end of the JSON value at `start`, or -1 if `data` ends before it."""
    if data[start] not in b"[{":
        pattern = STRING if data[start] == b'"'[0] else PLAIN_VALUE
        match = pattern.match(data, start)
        return match.end() if match else -1
    depth, end = 0, start
    while match := BRACKET.match(data, end):
        depth += 1 if match[1] in b"[{" else -1
        end = match.end()
        if not depth:
            return end
    return -1


def _long_value(
    stream: io.BufferedReader, data: bytes, block: int, max_bytes: int
) -> tuple[bytes | str, bytes, int]:
    """Read the rest of the JSON value that `data` begins with, in blocks.

    Returns:
        The value, or an error text if it is over `max_bytes`; the bytes read after it; and the
        number of newlines within it.

    Raises:
        ValueError: the file ends before the value.
    """
    held, value, size, num_lines = io.BytesIO(data), [], 0, 0
    find_end = _plain_end if data[0] not in b'[{"' else _NestedEnd().find
    while data := held.read(block) or stream.read(block):
        if (len(data) - len(data.rstrip(b"\\"))) % 2:  # the last backslash escapes the next byte
            data += held.read(1) or stream.read(1)
        end = find_end(data)
        value.append(data[:end] if end >= 0 else data)
        size += len(value[-1])
        num_lines += value[-1].count(b"\n")
        if size > max_bytes:
            value.clear()
        if end >= 0:
            whole = b"".join(value) if size <= max_bytes else too_long(max_bytes)
            return whole, data[end:] + held.read(), num_lines
    raise ValueError("the file ends within the list")


def _plain_end(data: bytes) -> int:
    """Return the end of a number or a literal, or -1 if `data` ends before it."""
    match = PLAIN_END.search(data)
    return match.start() if match else -1


class _NestedEnd:
    """Finds the end of a string, list or object that arrives in pieces, at 100 MB/s or more.

    The speed does not depend on the content. A regex match per bracket, as in `_value_end`, takes
    minutes for a value of nothing but brackets.
    """

    def __init__(self):
        self._depth, self._in_string = 0, False

    def find(self, data: bytes) -> int:
        """Return the end of the value, or -1 if `data` ends before it."""
        # Escaped backslashes and quotes are replaced by blanks of equal length.
        marks = np.frombuffer(data.replace(rb"\\", b"  ").replace(rb"\"", b"  "), np.uint8)
        quotes = marks == ord('"')
        within = (np.cumsum(quotes) + self._in_string) % 2 == 1  # a closing quote is outside
        opening = (marks == ord("[")) | (marks == ord("{"))
        closing = (marks == ord("]")) | (marks == ord("}"))
        steps = (opening.astype(np.int8) - closing) * ~within
        depths = self._depth + np.cumsum(steps, dtype=np.int64)
        self._depth, self._in_string = int(depths[-1]), bool(within[-1])
        ends = np.flatnonzero((depths == 0) & ~within & (closing | quotes))
        return int(ends[0]) + 1 if len(ends) else -1


def parse_object(data: bytes) -> tuple[dict[str, Any] | None, str]:
    """Return (object, "") or (None, error text)."""
    try:
        value = DECODER.decode(data.rstrip(b"\r\n").decode())
    except UnicodeDecodeError as error:
        return None, f"is not UTF-8: {error.reason} at byte {error.start + 1}"
    except json.JSONDecodeError as error:
        return None, f"is not JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}"
    except RecursionError:
        return None, "is nested too deeply"
    except ValueError as error:  # from `_unique`, or int() of thousands of digits
        return None, f"cannot be read: {error}"
    if not isinstance(value, dict):
        names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
        return None, f"must be an object, not {names.get(type(value), 'a number')}"
    return value, ""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {twice!r:.80} occurs twice")
    return fields


DECODER = json.JSONDecoder(object_pairs_hook=_unique)
