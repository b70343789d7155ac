"""Read the rows of CSV, Parquet and Arrow tables: dicts, or an error text in place of a bad row.

Called by `read`, which makes chunks of the rows. Values are what the file says: text stays text,
and objects have the fields that they were written with.
"""

import collections
import csv
import io
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from jax_sft.data.sources import json_rows

END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # the last bytes of an Arrow stream
PIECE = 1 << 20  # characters of a long row held at once
ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, as surrogateescape decodes them

LARGE_GROUP = 1 << 29  # bytes
BOMB = 1 << 30  # bytes of the values of a column that is compressed to almost nothing
MAX_RATIO = 300  # compression ratio of a column: see read.MAX_RATIO
PARQUET_ROWS = 100  # decoded at once: a value shared by many rows is copied for each
# Exceptions of pyarrow for values that Python does not have; it documents no list. ValueError and
# OverflowError (times before the year 1) and NotImplementedError (intervals) have been seen. The
# others come from converting extension types. The row becomes a bad row, which is counted.
NOT_CONVERTED = (
    *(ValueError, OverflowError, RecursionError, LookupError, TypeError, NotImplementedError),
    pa.ArrowException,
)

csv.field_size_limit(2**31 - 1)  # the default refuses a field over 128 KiB


def csv_rows(
    text: TextIO, delimiter: str, max_size: int
) -> Iterator[tuple[dict[str, str] | str, int]]:
    """Yield (row or error text, its approximate size); values stay text, such as "007".

    Args:
        text: decoded with surrogateescape: a byte that is not UTF-8 spoils its row, not the file.
        max_size: characters per row; a longer row is skipped without being held in memory.

    Raises:
        ValueError: a column without a name, or two with the same one; or quotes that do not pair
            up, so that the start of the next row is unknown.
    """
    lines, columns = _Lines(text, max_size), None
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        while (values := _next_row(reader, lines)) is not None:
            if columns is None and values:
                if isinstance(values, str):
                    raise ValueError(f"the names of the columns: the row {values}")
                columns = values
                _check_columns(columns)
            elif isinstance(values, str):
                yield values, 0
            elif columns and values:
                yield _csv_row(columns, values), sum(map(len, values)) + len(values)
    except csv.Error as error:
        raise ValueError(f"the row that starts at line {lines.start}: {error}") from error


def _next_row(reader: Iterator[list[str]], lines: "_Lines") -> list[str] | str | None:
    """Return the values of a row, or an error text; None at the end."""
    lines.start_row()
    try:
        return next(reader, None)
    except _RowTooLong:
        lines.finish_row()
        return json_rows.too_long(lines.max_size)


class _RowTooLong(Exception):
    """csv.reader asked for more characters than a row may have."""


class _Lines:
    """The lines of a table, for csv.reader; limits the size of each row.

    Attributes:
        start: number, from 1, of the line where the row starts.
    """

    def __init__(self, text: TextIO, max_size: int):
        self._text, self.max_size = text, max_size
        self._number = 0  # whole lines read
        self._last = ""
        self._ahead = io.StringIO()  # already read, not yet returned
        self.start_row()

    def start_row(self) -> None:
        self.start = self._number + 1
        self._size = self._num_quotes = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if not self._read(self.max_size + 1 - self._size):
            raise StopIteration
        if self._size > self.max_size:
            raise _RowTooLong
        return self._last

    def finish_row(self) -> None:
        """Read to the end of the row: a line end at which all quotes are closed."""
        while not self._last.endswith(("\n", "\r")) or self._num_quotes % 2:
            if self._num_quotes % 2:
                self._skip_to_quote()
            if not self._read(PIECE):
                if self._num_quotes % 2:
                    raise csv.Error("the file ends within quotes")
                return

    def _skip_to_quote(self) -> None:
        """Skip text, newlines included, up to the next quote."""
        while piece := self._ahead.read(PIECE) or self._text.read(PIECE):
            before, quote, behind = piece.partition('"')
            self._number += before.count("\n")
            if quote:
                self._ahead = io.StringIO(quote + behind + self._ahead.read(), newline="")
                return

    def _read(self, size: int) -> str:
        line = self._ahead.readline(size)
        if not line.endswith(("\n", "\r")):
            line += self._text.readline(size - len(line))
        self._last = line
        self._size += len(line)
        self._num_quotes += line.count('"')
        self._number += line.endswith(("\n", "\r"))
        return line


def _csv_row(columns: list[str], values: list[str]) -> dict[str, str] | str:
    if len(values) != len(columns):
        return f"has {len(values)} values for {len(columns)} columns"
    if ESCAPED.search("".join(values)):
        return "is not UTF-8"
    return dict(zip(columns, values, strict=True))


def _check_columns(columns: Sequence[str]) -> None:
    if "" in columns:
        number = columns.index("") + 1
        raise ValueError(f"column {number} has no name (pandas: to_csv(index=False))")
    column, count = collections.Counter(columns).most_common(1)[0] if columns else ("", 0)
    if count > 1:
        raise ValueError(f"two columns are called {column!r}")


def parquet_rows(
    file: Path, used: Collection[str], max_rows: int, block: int, max_bytes: int
) -> Iterator[list[dict[str, Any] | str]]:
    """Yield lists of up to `max_rows` rows, or of about `block` bytes.

    Args:
        used: columns to read; the others are None in all rows.
        max_bytes: a longer row is replaced by an error text.
    """
    # By default a whole row group, often the whole file, is read before its first row.
    with pq.ParquetFile(file, buffer_size=block, pre_buffer=False) as opened:
        _check_columns(opened.schema_arrow.names)
        columns = [name for name in opened.schema_arrow.names if name in used]
        yield from _grouped(_parquet_parts(opened, columns, block, max_bytes), max_rows, block)


def _parquet_parts(
    opened: pq.ParquetFile, columns: list[str], block: int, max_bytes: int
) -> Iterator[tuple[list[dict[str, Any] | str], int]]:
    names = opened.schema_arrow.names
    for number in range(opened.metadata.num_row_groups):
        group = opened.metadata.row_group(number)
        num_rows, size = _group_size(group, columns)
        shrunk = [part for part in _parts(group, columns) if _is_one_value(part)]
        bomb = any(
            part.num_values * part.total_uncompressed_size > BOMB
            for part in shrunk
            if "." in part.path_in_schema  # nested: a row may have any number of values
        )
        # Decoding could exhaust the memory, and hardly any row is within the limit: read none.
        if bomb or size > max(max_bytes * num_rows, LARGE_GROUP):
            for _ in range(num_rows):
                yield [json_rows.too_long(max_bytes)], 0
        else:
            at_once = 1 if shrunk else min(PARQUET_ROWS, max(1, num_rows * block // max(1, size)))
            batches = opened.iter_batches(at_once, [number], columns, use_threads=False)
            yield from _sliced(names, batches, block, max_bytes)


def _group_size(group, columns: Collection[str]) -> tuple[int, int]:
    """Return the number of rows of a row group, and the bytes of some of its columns."""
    sizes = (part.total_uncompressed_size for part in _parts(group, columns))
    return group.num_rows, sum(sizes)


def _parts(group, columns: Collection[str]) -> Iterator[Any]:
    """Yield the metadata of some columns of a row group."""
    for number in range(group.num_columns):
        part = group.column(number)
        path = part.path_in_schema
        if any(path == name or path.startswith(name + ".") for name in columns):
            yield part


def _is_one_value(part) -> bool:
    """Whether a column seems to refer again and again to one huge, highly compressed value.

    Decoding makes a copy for each reference.
    """
    size = part.total_uncompressed_size
    is_large = size > max(1 << 20, 16 * part.num_values)
    return is_large and size > MAX_RATIO * part.total_compressed_size


def arrow_rows(
    file: Path, used: Collection[str], max_rows: int, block: int, max_bytes: int
) -> Iterator[list[dict[str, Any] | str]]:
    """Yield the rows of an Arrow file or stream, in lists as `parquet_rows` does."""
    with pa.OSFile(str(file)) as stream:  # not mapped: wrong offsets would crash the process
        if stream.read(6) == b"ARROW1":
            opened = pa.ipc.open_file(stream)
            batches = map(opened.get_batch, range(opened.num_record_batches))
        else:
            stream.seek(max(0, stream.size() - 8))
            if stream.read(8) != END_OF_STREAM:  # pyarrow accepts any batch as the last
                raise ValueError("the file is cut off")
            stream.seek(0)
            batches = opened = pa.ipc.open_stream(stream)
        _check_columns(opened.schema.names)
        columns = [name for name in opened.schema.names if name in used]
        chosen = (_validated(batch.select(columns)) for batch in batches)
        parts = _sliced(opened.schema.names, chosen, block, max_bytes)
        yield from _grouped(parts, max_rows, block)


def _validated(batch):
    batch.validate(full=True)  # Arrow has no checksums, and pyarrow trusts what it reads
    return batch


def _sliced(
    names: Sequence[str], batches: Iterable, block: int, max_bytes: int
) -> Iterator[tuple[list[dict[str, Any] | str], int]]:
    """Yield (rows, bytes) of slices of batches, each of up to about `block` bytes."""
    for batch in batches:
        step = max(1, batch.num_rows * block // max(block, batch.nbytes))
        for start in range(0, batch.num_rows, step):
            part = batch.slice(start, step)
            yield _batch_rows(part, names, max_bytes), part.nbytes


def _grouped(
    parts: Iterable[tuple[list[dict[str, Any] | str], int]], max_rows: int, block: int
) -> Iterator[list[dict[str, Any] | str]]:
    """Join neighboring lists of rows into lists of up to `max_rows` rows or about `block` bytes."""
    group: list[dict[str, Any] | str] = []
    group_size = 0
    for rows, size in parts:
        for start in range(0, len(rows), max_rows):
            more = rows[start : start + max_rows]
            if group and (len(group) + len(more) > max_rows or group_size + size > block):
                yield group
                group, group_size = [], 0
            group, group_size = group + more, group_size + size
    if group:
        yield group


def _batch_rows(batch, names: Sequence[str], max_bytes: int) -> list[dict[str, Any] | str]:
    """Return the rows of an Arrow batch, with an error text for each that cannot be read.

    Args:
        names: of all columns of the file; those that the batch does not have are None.
    """
    if batch.nbytes > max_bytes:
        if batch.num_rows == 1:
            return [json_rows.too_long(max_bytes)]
        return [
            row
            for row_batch in _single_rows(batch)
            for row in _batch_rows(row_batch, names, max_bytes)
        ]
    nested = [field for field in batch.schema if _holds_objects(field.type)]
    try:
        rows = batch.to_pylist()
        for row in rows:
            row |= {field.name: _as_written(row[field.name], field.type) for field in nested}
    except NOT_CONVERTED:
        if batch.num_rows == 1:
            return [_what_is_wrong(batch)]
        return [
            row
            for row_batch in _single_rows(batch)
            for row in _batch_rows(row_batch, names, max_bytes)
        ]
    if len(names) == len(batch.schema.names):
        return rows
    unused = dict.fromkeys(names)
    return [unused | row for row in rows]


def _single_rows(batch) -> Iterator[Any]:
    return (batch.slice(number, 1) for number in range(batch.num_rows))


def _what_is_wrong(row) -> str:
    """Return the error text of a batch of one row: its first column that cannot be converted."""
    for field, column in zip(row.schema, row.columns, strict=True):
        try:
            _as_written(column.to_pylist()[0], field.type)
        except NOT_CONVERTED as error:
            return f"field {field.name!r} cannot be read: {error}"
    return "cannot be read"


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

    An absent field and a null field look the same; both are treated as absent. Otherwise every tool
    call would have the arguments of every other tool.
    """
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return json_rows.DECODER.decode(value)
    if _is_list(kind):
        return [_as_written(item, kind.value_type) for item in value]
    if pa.types.is_struct(kind):
        fields = (kind.field(number) for number in range(kind.num_fields))
        present = (field for field in fields if value[field.name] is not None)
        return {field.name: _as_written(value[field.name], field.type) for field in present}
    return value
