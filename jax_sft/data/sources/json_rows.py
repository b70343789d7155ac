"""JSON to rows: `lines` and `elements` cut text up, `parse_object` makes a row of one of them.

Called by `read`. A row over a bound is passed over without holding it. JSON is parsed by the json
module, row by row, so every value stays exactly what the file says.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

BLANKS = re.compile(rb"[ \t\r\n]*+")
# JSON up to and with its next bracket outside of strings; no match if the bytes end before it.
BRACKET = re.compile(rb'[^"\[\]{}]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^"\[\]{}]*+)*+([\[\]{}])', re.S)
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.S)
PLAIN_VALUE = re.compile(rb"[^ \t\r\n,\[\]{}\"]++(?=.)", re.S)  # a number, true, false, null
PLAIN_END = re.compile(rb'[ \t\r\n,\[\]{}"]')
# What is wanted in a list, and after each mark: "" = nothing more.
AFTER = {
    **{"[": {"[": "a value or ]"}, "a value or ]": {"]": ""}, "a value": {}},
    **{", or ]": {",": "a value", "]": ""}, "": {}},
}


def too_long(max_bytes: int) -> str:
    """Say what is wrong with a row over the bound."""
    return (
        f"is longer than data.max_row_bytes = {max_bytes:,}: raise it, or split or leave out the "
        "row"
    )


def lines(
    stream: io.BufferedReader, block: int, max_bytes: int
) -> Iterator[tuple[int, list[bytes | str]]]:
    """Yield (number of the first, lines) of about `block` bytes; lines end at b"\n" only.

    A line of more than `max_bytes` is a string that says so. Blocks of nothing but blanks are left
    out.
    """
    found: list[bytes | str] = []
    rest, is_long, number, first = b"", False, 1, 1
    while data := stream.read(block):
        if not (rest or is_long or data.strip()):
            num_lines = data.count(b"\n")
            if found:
                yield first, found
            found, first, number = [], number + num_lines, number + num_lines
            continue
        head, *more = data.split(b"\n")
        is_long |= len(rest) + len(head) > max_bytes
        rest = b"" if is_long else rest + head
        if more:
            if found:
                yield first, found
            found = [too_long(max_bytes) if is_long else rest, *more[:-1]]
            if block > max_bytes:
                found = [too_long(max_bytes) if len(line) > max_bytes else line for line in found]
            first, number = number, number + len(found)
            rest, is_long = more[-1], len(more[-1]) > max_bytes
    if is_long or rest:
        found.append(too_long(max_bytes) if is_long else rest)
    if found:
        yield first, found


def elements(stream: io.BufferedReader, block: int, max_bytes: int) -> Iterator[bytes | str]:
    """Cut a JSON list into its elements, by its brackets and commas outside of strings.

    What is within an element is not looked at: a bad one whose brackets pair up is one bad row.
    One of more than `max_bytes` is a string that says so.

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
            if is_value and len(buffer) - at >= block:
                value, buffer, num_lines = _long_value(stream, buffer[at:], block, max_bytes)
                at, line, wanted = 0, line + num_lines, ", or ]"
                yield value
                continue
            more = stream.read(block)
            if not more and not wanted:
                return
            if not more:
                raise ValueError(f"line {line}: the file ends within the list")
            buffer, at = buffer[at:] + more, 0
            continue
        if is_value:
            yield buffer[at:end] if end - at <= max_bytes else too_long(max_bytes)
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


def _long_value(
    stream: io.BufferedReader, data: bytes, block: int, max_bytes: int
) -> tuple[bytes | str, bytes, int]:
    """Read on to the end of the JSON value that `data` begins with, in blocks.

    Returns:
        The value, or a string that says that it is over `max_bytes`; what was read behind it; and
        the number of newlines within it.

    Raises:
        ValueError: the file ends before the value.
    """
    held, value, size, num_lines = io.BytesIO(data), [], 0, 0
    find_end = _plain_end if data[0] not in b'[{"' else _NestedEnd().find
    while data := held.read(block) or stream.read(block):
        if (len(data) - len(data.rstrip(b"\\"))) % 2:  # the last one escapes the next byte
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
    """Return where a number or a word ends, or -1 if `data` ends before it."""
    found = PLAIN_END.search(data)
    return found.start() if found else -1


class _NestedEnd:
    """Finds where a string, list or object ends that is given in pieces, at 100 MB/s or more.

    Whatever it holds: a match per bracket, as in `_value_end`, takes minutes for brackets alone.
    """

    def __init__(self):
        self._depth, self._in_string = 0, False

    def find(self, data: bytes) -> int:
        """Return where it ends, or -1 if `data` ends before it."""
        # Bytes of equal length without a special meaning take the place of what is escaped.
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
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {twice!r:.80} is there twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_unique)
