"""Files to rows: `files` finds what a source names, `chunks` cuts it up, `parse` makes rows of it.

The first two run in one process and are cheap; `parse` runs wherever a chunk is sent. JSON is
parsed by the json module, row by row, so every value stays exactly what the file says.
"""

import csv
import dataclasses
import fnmatch
import glob
import importlib
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

KINDS = {
    **{".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv"},
    **{".parquet": "parquet", ".arrow": "arrow"},
}
CODECS = {".gz": "gzip", ".zst": "zstd"}
COMPRESSIBLE = ("jsonl", "json", "csv", "tsv")  # the others are compressed within
# What a folder or a glob may hold beside data, skipped without a word. Hidden files are, too.
BESIDE_DATA = ("README*", "LICENSE*", "*.md", "_SUCCESS")
METADATA = ("dataset_info.json", "dataset_infos.json")  # of `datasets`

MAX_ROWS = 1000  # per chunk
BLOCK = 1_000_000  # bytes; about the size of a chunk, and of one read

BOM = b"\xef\xbb\xbf"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of Arrow
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
SPLIT_NAME = re.compile(r"\w+(\.\w+)*")
BLANKS = re.compile(rb"[ \t\r\n]*+")
# JSON up to and with its next bracket outside of strings; no match if the bytes end before it.
BRACKET = re.compile(rb'[^"\[\]{}]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^"\[\]{}]*+)*+([\[\]{}])', re.S)
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.S)
ESCAPED = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of a byte that is not UTF-8
PLAIN_VALUE = re.compile(rb"[^ \t\r\n,\[\]{}\"]++(?=.)", re.S)  # a number, true, false, null
# What is wanted in a list, and after each mark: "" = nothing more.
AFTER = {
    **{"[": {"[": "a value or ]"}, "a value or ]": {"]": ""}, "a value": {}},
    **{", or ]": {",": "a value", "]": ""}, "": {}},
}

csv.field_size_limit(2**31 - 1)  # the default refuses a field over 128 KiB


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some neighbouring rows of one file, not parsed yet; small enough to send to a process.

    Attributes:
        first: number, from 1, of the first one within the file: of a line for "jsonl", of a row
            for the others.
        kind: "jsonl", "json" (elements of a list) or "rows" (made by other libraries).
        payload: bytes for "jsonl" and "json"; else dicts, or a string that says what is wrong.
    """

    file: str
    first: int
    kind: str
    payload: list

    def __len__(self) -> int:
        """The number of records that `parse` makes of it: blank lines are none."""
        if self.kind != "jsonl":
            return len(self.payload)
        return sum(1 for line in self.payload if line.strip())


@dataclasses.dataclass(frozen=True)
class Record:
    """One row, or why it cannot be read: `row` is None exactly when `error` is not empty."""

    where: str  # "FILE, line 12" or "FILE, row 12"
    row: dict[str, Any] | None
    error: str


# ---- files ---------------------------------------------------------------------------------------


def files(source) -> list[Path]:
    """Find the files of a source, in the order in which they are read.

    `source.path` is, whichever fits first:
    1. a file that is there;
    2. a folder: all files in it and below, sorted by path;
    3. a glob such as `data/**/*.jsonl`: all files that match, sorted by path;
    4. owner/name of a hub data set, downloaded to the cache of `datasets`.

    In folders and globs, hidden files and folders are left out and so is what belongs to a data
    set without being data (README, LICENSE, *.md, and what `datasets` and Spark write beside it);
    any other file that is of no known kind is an error. A folder is read whole: one with several
    splits side by side needs a glob.

    Raises:
        ValueError: there is nothing to read, a file is empty, or of no known kind.
    """
    given = source.path
    if not given:
        raise ValueError("source.path is empty: name a file, glob, folder or hub data set")
    path = Path(given).expanduser()
    if path.is_file():
        found = [path]
    elif path.is_dir():
        if (path / "dataset_dict.json").is_file():
            raise ValueError(
                f"source.path = {given!r} holds several splits: name one, such as its train"
            )
        found = _matches(os.path.join(glob.escape(str(path)), "**"))
    elif glob.has_magic(given):
        found = _matches(str(path))
    elif HUB_NAME.fullmatch(given) and not _kind(path):
        return _hub_files(source)
    else:
        raise ValueError(f"source.path = {given!r} does not exist")
    if source.subset or source.revision or source.split != "train":
        raise ValueError(
            f"source.path = {given!r} is a local path, and source.subset, split and revision are "
            "for hub data sets: leave them out, and name the wanted files by a glob"
        )
    _check_files(given, found)
    return found


def _matches(pattern: str) -> list[Path]:
    found = (Path(name) for name in glob.glob(pattern, recursive=True))
    return sorted(file for file in found if not file.is_dir() and not _is_beside_data(file))


def _is_beside_data(file: Path) -> bool:
    if file.name == "state.json":  # as Dataset.save_to_disk writes it
        return (file.parent / METADATA[0]).is_file()
    named = any(fnmatch.fnmatch(file.name, pattern) for pattern in BESIDE_DATA)
    return file.name in METADATA or (named and not _kind(file))


def _check_files(given: str, found: Sequence[Path]) -> None:
    """Raise ValueError unless there are files, each of a known kind, not empty, and given once."""
    if not found:
        raise ValueError(f"source.path = {given!r} has no data file")
    first: dict[str, Path] = {}
    for file in found:
        other = first.setdefault(os.path.realpath(file), file)
        if other is not file:
            raise ValueError(
                f"source.path = {given!r}: {str(other)!r} and {str(file)!r} are the same file"
            )
    if unknown := [str(file) for file in found if not _kind(file)]:
        raise ValueError(
            f"source.path = {given!r}: {len(unknown)} files are of no known kind, such as "
            f"{unknown[0]!r}: use {', '.join(KINDS)} (text also as {' or '.join(CODECS)}), or name "
            "the wanted files by a glob"
        )
    if missing := [str(file) for file in found if not file.exists()]:
        raise ValueError(f"source.path = {given!r}: {missing[0]!r} is a link to nothing")
    if empty := [str(file) for file in found if file.stat().st_size == 0]:
        raise ValueError(f"source.path = {given!r}: {empty[0]!r} is empty")


def _kind(file: Path) -> str:
    """Tell the kind of a file by its name; "" if it is of none."""
    if file.suffix.lower() not in CODECS:
        return KINDS.get(file.suffix.lower(), "")
    inner = KINDS.get(Path(file.stem).suffix.lower(), "")
    return inner if inner in COMPRESSIBLE else ""


def _hub_files(source) -> list[Path]:
    """Download a hub data set, or find it in the cache of `datasets`: its .arrow files."""
    if not SPLIT_NAME.fullmatch(source.split):
        raise ValueError(
            f"source.split = {source.split!r} must name one split, not a slice or a sum: use "
            "source.limit, or several sources"
        )
    datasets = importlib.import_module("datasets")  # takes over a second, and few sources need it
    try:
        rows = datasets.load_dataset(
            source.path,
            name=source.subset or None,
            split=source.split,
            revision=source.revision or None,
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"source.path = {source.path!r} is no local path, and no such data set (split "
            f"{source.split!r}) can be had from the Hugging Face hub: {error}"
        ) from error
    return [Path(file["filename"]) for file in rows.cache_files]


# ---- chunks --------------------------------------------------------------------------------------


def chunks(source, files: Sequence[Path]) -> Iterator[Chunk]:
    """Cut files into chunks of up to MAX_ROWS rows or about BLOCK bytes; no chunk spans two files.

    Rows that cannot be parsed count as rows, also for `source.limit`. Memory does not grow with
    the files.

    Raises:
        ValueError: a file that is broken as a whole or from some place on, or has no rows.
    """
    left = source.limit or math.inf
    for file in files:
        num_rows = 0
        try:
            for chunk in _read(file):
                if (size := len(chunk)) > left:
                    chunk, size = _first_rows(chunk, left), left
                if size:
                    yield chunk
                num_rows, left = num_rows + size, left - size
                if not left:
                    return
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ValueError(f"source.path = {source.path!r}: {file}: {error}") from error
        if not num_rows:
            raise ValueError(f"source.path = {source.path!r}: {file} has no rows")


def _first_rows(chunk: Chunk, num_rows: float) -> Chunk:
    ends = (end for end, row in enumerate(chunk.payload, 1) if chunk.kind != "jsonl" or row.strip())
    end = next(end for number, end in enumerate(ends, 1) if number == num_rows)
    return dataclasses.replace(chunk, payload=chunk.payload[:end])


def _read(file: Path) -> Iterator[Chunk]:
    kind = _kind(file)
    if kind == "json":
        kind = "json" if _starts_with_bracket(file) else "jsonl"
    readers = {
        **{"jsonl": _read_jsonl, "json": _read_json_list, "csv": _read_csv, "tsv": _read_csv},
        **{"parquet": _read_parquet, "arrow": _read_arrow},
    }
    return readers[kind](file)


def _open(file: Path) -> io.BufferedReader:
    """Open a file for reading, uncompressed.

    pyarrow reads all members or frames of an archive and raises OSError where one is cut off.
    """
    codec = CODECS.get(file.suffix.lower())
    # Any: not a RawIOBase, though it has all that is needed of one.
    raw: Any = pa.CompressedInputStream(pa.OSFile(str(file)), codec) if codec else io.FileIO(file)
    return io.BufferedReader(raw, BLOCK)


def _read_jsonl(file: Path) -> Iterator[Chunk]:
    first = 1
    with _open(file) as stream:
        while lines := stream.readlines(BLOCK):  # splits at b"\n" only, as text would not
            if first == 1:
                lines[0] = lines[0].removeprefix(BOM)
            for start in range(0, len(lines), MAX_ROWS):
                yield Chunk(str(file), first + start, "jsonl", lines[start : start + MAX_ROWS])
            first += len(lines)


def _starts_with_bracket(file: Path) -> bool:
    with _open(file) as stream:
        block = stream.read(BLOCK).removeprefix(BOM)
        while block and not block.strip():
            block = stream.read(BLOCK)
    return block.lstrip().startswith(b"[")


def _read_json_list(file: Path) -> Iterator[Chunk]:
    with _open(file) as stream:
        yield from _grouped(file, "json", ((row, len(row)) for row in _list_elements(stream)))


def _grouped(file: Path, kind: str, rows: Iterable[tuple[Any, int]]) -> Iterator[Chunk]:
    """Make chunks of (row, size in bytes)."""
    payload, first, num_bytes = [], 1, 0
    for row, size in rows:
        payload.append(row)
        num_bytes += size
        if len(payload) == MAX_ROWS or num_bytes >= BLOCK:
            yield Chunk(str(file), first, kind, payload)
            payload, first, num_bytes = [], first + len(payload), 0
    if payload:
        yield Chunk(str(file), first, kind, payload)


def _list_elements(stream: io.BufferedReader) -> Iterator[bytes]:
    """Cut a JSON list into its elements, by its brackets and commas outside of strings.

    What is within an element is not looked at: a bad one whose brackets pair up is one bad row.

    Raises:
        ValueError: the list is malformed between its elements, or is cut off. There is no telling
            where the next element starts.
    """
    buffer, at, line, wanted = stream.read(BLOCK).removeprefix(BOM), 0, 1, "["
    while True:
        blanks = BLANKS.match(buffer, at)
        assert blanks is not None  # it matches the empty string
        line += buffer.count(b"\n", at, blanks.end())
        at = blanks.end()
        mark = buffer[at : at + 1].decode("latin-1")
        is_value = wanted in ("a value", "a value or ]") and mark not in ("", "]", "}", ",")
        end = _value_end(buffer, at) if is_value else at + len(mark)
        if end <= at:  # what comes next is not in the buffer, or not all of it
            more = stream.read(max(BLOCK, len(buffer) - at))  # twice as much each time: linear
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


def _read_csv(file: Path) -> Iterator[Chunk]:
    with _open(file) as stream:
        # surrogateescape: a byte that is not UTF-8 spoils its row, not the file.
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        delimiter = "\t" if _kind(file) == "tsv" else ","
        yield from _grouped(
            file, "rows", _csv_rows(csv.reader(text, delimiter=delimiter, strict=True))
        )


def _csv_rows(reader) -> Iterator[tuple[dict[str, str] | str, int]]:
    """Return (row or what is wrong with it, about its size); values stay text, such as "007".

    Raises:
        ValueError: columns without a name or with the same one; quotes that do not pair up: there
            is no telling where the next row starts.
    """
    start, columns = 1, None
    try:
        for values in reader:
            size = sum(map(len, values))
            if columns is None and values:
                columns = values
                _check_columns(columns)
            elif columns and values:
                yield _csv_row(columns, values), size
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"the row that starts at line {start}: {error}") from error


def _csv_row(columns: list[str], values: list[str]) -> dict[str, str] | str:
    if len(values) != len(columns):
        return f"has {len(values)} values for {len(columns)} columns"
    if ESCAPED.search("".join(values)):
        return "is not UTF-8"
    return dict(zip(columns, values, strict=True))


def _check_columns(columns: Sequence[str]) -> None:
    for number, column in enumerate(columns):
        if not column:
            raise ValueError(f"column {number + 1} has no name (pandas: to_csv(index=False))")
        if column in columns[:number]:
            raise ValueError(f"two columns are called {column!r}")


def _read_parquet(file: Path) -> Iterator[Chunk]:
    # By default all of a row group is read before its first row: often all of the file.
    with pq.ParquetFile(file, buffer_size=BLOCK, pre_buffer=False) as opened:
        about = opened.metadata
        groups = (about.row_group(number) for number in range(about.num_row_groups))
        size = max(1, sum(group.total_byte_size for group in groups))
        num_rows = min(MAX_ROWS, max(1, about.num_rows * BLOCK // size))
        batches = opened.iter_batches(num_rows, use_threads=False)
        yield from _batch_chunks(file, opened.schema_arrow, batches)


def _read_arrow(file: Path) -> Iterator[Chunk]:
    with pa.OSFile(str(file)) as stream:  # not mapped: wrong offsets would end the process
        if stream.read(6) == b"ARROW1":
            opened = pa.ipc.open_file(stream)
            batches = map(opened.get_batch, range(opened.num_record_batches))
        else:
            stream.seek(max(0, stream.size() - 8))
            if stream.read(8) != END_OF_STREAM:  # pyarrow takes any batch for the last
                raise ValueError("the file is cut off")
            stream.seek(0)
            batches = opened = pa.ipc.open_stream(stream)
        yield from _batch_chunks(file, opened.schema, map(_validated, batches))


def _validated(batch):
    batch.validate(full=True)  # Arrow has no check sums, and pyarrow trusts what it reads
    return batch


def _batch_chunks(file: Path, schema: pa.Schema, batches: Iterable) -> Iterator[Chunk]:
    _check_columns(schema.names)
    first = 1
    for batch in batches:
        step = min(MAX_ROWS, max(1, batch.num_rows * BLOCK // max(1, batch.nbytes)))
        for start in range(0, batch.num_rows, step):
            rows = _batch_rows(batch.slice(start, step))
            yield Chunk(str(file), first, "rows", rows)
            first += len(rows)


def _batch_rows(batch) -> list[dict[str, Any] | str]:
    """Return the rows of an Arrow batch, or what is wrong with each that cannot be had."""
    nested = [field for field in batch.schema if _holds_objects(field.type)]
    try:
        rows = batch.to_pylist()
        for row in rows:
            row |= {field.name: _as_written(row[field.name], field.type) for field in nested}
        return rows
    except (ValueError, OverflowError, RecursionError) as error:
        if batch.num_rows == 1:
            return [f"cannot be read: {error}"]
        return [_batch_rows(batch.slice(number, 1))[0] for number in range(batch.num_rows)]


def _holds_objects(kind: pa.DataType) -> bool:
    return (
        isinstance(kind, pa.JsonType)
        or pa.types.is_struct(kind)
        or (_is_list(kind) and _holds_objects(kind.value_type))
    )


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _as_written(value: Any, kind: pa.DataType) -> Any:
    """Undo what Arrow does to objects: a struct has the fields of all rows, null where absent.

    An absent field and one that is null look the same; it is taken for absent. Otherwise every
    tool call would have the arguments of every other tool.
    """
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return _DECODER.decode(value)
    if _is_list(kind):
        return [_as_written(item, kind.value_type) for item in value]
    if pa.types.is_struct(kind):
        fields = (kind.field(number) for number in range(kind.num_fields))
        there = (field for field in fields if value[field.name] is not None)
        return {field.name: _as_written(value[field.name], field.type) for field in there}
    return value


# ---- rows ----------------------------------------------------------------------------------------


def parse(chunk: Chunk) -> Iterator[Record]:
    """Make one record per row of a chunk, in order; a bad row is a record with an error."""
    unit = "line" if chunk.kind == "jsonl" else "row"
    for number, found in enumerate(chunk.payload, chunk.first):
        where = f"{chunk.file}, {unit} {number}"
        if isinstance(found, dict):
            yield Record(where, found, "")
        elif isinstance(found, str):
            yield Record(where, None, found)
        elif found.strip():
            yield Record(where, *_parse_object(found))


def _parse_object(data: bytes) -> tuple[dict[str, Any] | None, str]:
    """Return (object, "") or (None, what is wrong)."""
    try:
        found = _DECODER.decode(data.rstrip(b"\r\n").decode())
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


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
