"""Tables to rows: CSV, Parquet and Arrow; rows are dicts, or a string that says what is wrong.

Called by `read`, which opens, cuts and names. Values are what the file says: text stays text, and
objects have the fields that they were written with.
"""

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from jax_sft.data import json_rows

END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of Arrow
ESCAPED = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of a byte that is not UTF-8

csv.field_size_limit(2**31 - 1)  # the default refuses a field over 128 KiB


def csv_rows(text: TextIO, delimiter: str) -> Iterator[tuple[dict[str, str] | str, int]]:
    """Yield (row or what is wrong with it, about its size); values stay text, such as "007".

    Args:
        text: decoded with surrogateescape: a byte that is not UTF-8 spoils its row, not the file.

    Raises:
        ValueError: columns without a name or with the same one; quotes that do not pair up: there
            is no telling where the next row starts.
    """
    reader = csv.reader(text, delimiter=delimiter, strict=True)
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


def parquet_rows(file: Path, max_rows: int, block: int) -> Iterator[list[dict[str, Any] | str]]:
    """Yield lists of up to `max_rows` rows, or of about `block` bytes."""
    # By default all of a row group is read before its first row: often all of the file.
    with pq.ParquetFile(file, buffer_size=block, pre_buffer=False) as opened:
        about = opened.metadata
        groups = (about.row_group(number) for number in range(about.num_row_groups))
        size = max(1, sum(group.total_byte_size for group in groups))
        num_rows = min(max_rows, max(1, about.num_rows * block // size))
        batches = opened.iter_batches(num_rows, use_threads=False)
        yield from _sliced(opened.schema_arrow, batches, max_rows, block)


def arrow_rows(file: Path, max_rows: int, block: int) -> Iterator[list[dict[str, Any] | str]]:
    """Yield lists as `parquet_rows` does, of an Arrow file or stream."""
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
        yield from _sliced(opened.schema, map(_validated, batches), max_rows, block)


def _validated(batch):
    batch.validate(full=True)  # Arrow has no check sums, and pyarrow trusts what it reads
    return batch


def _sliced(
    schema: pa.Schema, batches: Iterable, max_rows: int, block: int
) -> Iterator[list[dict[str, Any] | str]]:
    _check_columns(schema.names)
    for batch in batches:
        step = min(max_rows, max(1, batch.num_rows * block // max(1, batch.nbytes)))
        for start in range(0, batch.num_rows, step):
            yield _batch_rows(batch.slice(start, step))


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
        return json_rows.DECODER.decode(value)
    if _is_list(kind):
        return [_as_written(item, kind.value_type) for item in value]
    if pa.types.is_struct(kind):
        fields = (kind.field(number) for number in range(kind.num_fields))
        there = (field for field in fields if value[field.name] is not None)
        return {field.name: _as_written(value[field.name], field.type) for field in there}
    return value
