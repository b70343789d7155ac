"""Read rows: `files` finds the files of a source, `chunks` splits them, `parse` parses a chunk.

`cache` calls the first two, which are cheap. `worker` calls `parse` in many processes. `json_rows`
and `tables` read the contents of JSON and of tables.
"""

import codecs
import collections
import dataclasses
import fnmatch
import glob
import importlib
import io
import itertools
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from jax_sft.data.sources import formats, json_rows, tables
from jax_sft.files import paths, regular
from jax_sft.settings import Source

KINDS = {
    **{".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv"},
    **{".parquet": "parquet", ".arrow": "arrow"},
}
CODECS = {".gz": "gzip", ".zst": "zstd"}
COMPRESSIBLE = ("jsonl", "json", "csv", "tsv")  # the others are compressed internally
# Files next to the data that folders and globs skip silently, as they skip hidden files.
SIDE_FILES = ("README*", "LICENSE*", "*.md", "_SUCCESS")
METADATA = ("dataset_info.json", "dataset_infos.json")  # of `datasets`

MAX_ROWS = 1000  # per chunk
BLOCK = 1_000_000  # bytes per read, and about per chunk
# About four million tokens of text, four times the longest context of any model. Tokenizers need
# some hundred bytes of memory per byte.
MAX_ROW_BYTES = 16_000_000
# Text is compressed to a tenth, tables of one repeated sentence to a hundredth.
MAX_RATIO = 300
BOMB = 8 << 30  # unpacked bytes above which the ratio is checked: about 10 s of unpacking

# Exceptions that `datasets` raises for data sets it cannot read; it documents no list.
LIBRARY_ERRORS = (
    *(OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError),
    *(ArithmeticError, AssertionError, EOFError, MemoryError, SyntaxError, pa.ArrowException),
)

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
SPLIT_NAME = re.compile(r"\w+(\.\w+)*")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one file, not parsed yet; small enough to send to a process.

    Attributes:
        first: number, from 1, of the first one within the file: a line number for "jsonl", a row
            number for the others.
        kind: "jsonl", "json" (elements of a list) or "rows" (made by other libraries).
        payload: bytes for "jsonl" and "json", dicts for "rows"; an error text in place of a row
            that cannot be used.
    """

    file: str
    first: int
    kind: str
    payload: list

    def __len__(self) -> int:
        """Return the number of records that `parse` yields; blank lines yield none."""
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


def files(source: Source) -> list[Path]:
    """Find the files of a source, in the order in which they are read.

    `source.path` is the first of these that applies:
    1. an existing file;
    2. a folder: all files in it and below, sorted by path;
    3. a glob such as `data/**/*.jsonl`: all files that match, sorted by path;
    4. owner/name of a hub data set, downloaded to the cache of `datasets`.

    Folders and globs skip hidden files and folders, and files that accompany a data set without
    being data (README, LICENSE, *.md, and the metadata of `datasets` and Spark). Any other file of
    unknown kind is an error. A folder is read whole: one that holds several splits needs a glob.

    Raises:
        ValueError: there is nothing to read, or a file is empty, not a regular file, or of unknown
            kind.
    """
    try:
        return _files(source)
    except OSError as error:
        raise ValueError(f"source.path = {source.path!r} cannot be read: {error}") from error


def _files(source: Source) -> list[Path]:
    given = source.path
    if not given:
        raise ValueError("source.path is empty: name a file, glob, folder or hub data set")
    path = paths.local(given, "source.path")
    if path.is_file():
        data_files = [path]
    elif path.is_dir():
        if (path / "dataset_dict.json").is_file():
            raise ValueError(
                f"source.path = {given!r} holds several splits: name one, such as its train"
            )
        data_files = _data_files(_below(path))
    elif glob.has_magic(given) and not path.exists():
        data_files = _data_files(_matches(path))
    elif HUB_NAME.fullmatch(given) and not _kind(path):
        return _hub_files(source)
    else:
        if path.exists():
            regular.check_mode(given, path.stat().st_mode)
        looked = "" if os.path.isabs(given) else f" in {Path.cwd()}"
        raise ValueError(f"source.path = {given!r} does not exist{looked}")
    if source.subset or source.revision or source.split != "train":
        raise ValueError(
            f"source.path = {given!r} is a local path, and source.subset, split and revision are "
            "for hub data sets: leave them out, and name the wanted files by a glob"
        )
    _check_files(given, data_files)
    return data_files


def _below(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder but hidden ones. Unlike glob, fail at an unreadable folder.

    Raises:
        ValueError: links lead to one folder twice; a cycle would never end.
    """
    seen: dict[tuple[int, int], Path] = {}
    pending = [folder]
    while pending:
        current = pending.pop()
        status = current.stat()
        other = seen.setdefault((status.st_dev, status.st_ino), current)
        if other is not current:
            raise ValueError(
                f"source.path = {str(folder)!r}: {str(other)!r} and {str(current)!r} are the same "
                "folder"
            )
        with os.scandir(current) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    if entry.is_dir():
                        pending.append(Path(entry.path))
                    else:
                        yield Path(entry.path)


def _matches(pattern: Path) -> Iterator[Path]:
    """Yield the matches of a glob: files, and folders that are named like data files."""
    if "**" in pattern.parts:
        plain = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts)
        if (above := Path(*plain)).is_dir():
            collections.deque(
                _below(above), maxlen=0
            )  # fails at a cycle of links, which glob would follow
    for name in glob.iglob(str(pattern), recursive=True):
        if _kind(file := Path(name)) or not file.is_dir():
            yield file


def _data_files(files: Iterable[Path]) -> list[Path]:
    return sorted(file for file in files if not _is_side_file(file))


def _is_side_file(file: Path) -> bool:
    if file.name == "state.json":  # as Dataset.save_to_disk writes it
        return (file.parent / METADATA[0]).is_file()
    named = any(fnmatch.fnmatch(file.name, pattern) for pattern in SIDE_FILES)
    return file.name in METADATA or (named and not _kind(file))


def _check_files(given: str, data_files: Sequence[Path]) -> None:
    """Raise ValueError unless there are files, each of a known kind, not empty, and given once."""
    if not data_files:
        hint = (
            " (*, ? and [ make it a glob: write [[] for a bracket)" if glob.has_magic(given) else ""
        )
        raise ValueError(f"source.path = {given!r} has no data file{hint}")
    first: dict[str, Path] = {}
    for file in data_files:
        other = first.setdefault(os.path.realpath(file), file)
        if other is not file:
            raise ValueError(
                f"source.path = {given!r}: {str(other)!r} and {str(file)!r} are the same file"
            )
    if unknown := [str(file) for file in data_files if not _kind(file)]:
        raise ValueError(
            f"source.path = {given!r}: {len(unknown)} files are of no known kind, such as "
            f"{unknown[0]!r}: use {', '.join(KINDS)} (text also as {' or '.join(CODECS)}), or name "
            "the wanted files by a glob"
        )
    if missing := [str(file) for file in data_files if not file.exists()]:
        raise ValueError(f"source.path = {given!r}: {missing[0]!r} is a broken link")
    for file in data_files:
        regular.check_mode(file, file.stat().st_mode)
    if empty := [str(file) for file in data_files if file.stat().st_size == 0]:
        raise ValueError(f"source.path = {given!r}: {empty[0]!r} is empty")


def _kind(file: Path) -> str:
    """Return the kind of a file, from its name; "" if unknown."""
    if file.suffix.lower() not in CODECS:
        return KINDS.get(file.suffix.lower(), "")
    inner = KINDS.get(Path(file.stem).suffix.lower(), "")
    return inner if inner in COMPRESSIBLE else ""


def _hub_files(source: Source) -> list[Path]:
    """Return the .arrow files of a hub data set, downloaded or from the cache of `datasets`."""
    if not SPLIT_NAME.fullmatch(source.split):
        raise ValueError(
            f"source.split = {source.split!r} must name one split, not a slice or a sum: use "
            "source.limit, or several sources"
        )
    datasets = importlib.import_module("datasets")  # takes over 1 s, and few sources need it
    httpx = importlib.import_module("httpx")  # used by the hub's library, which datasets loads
    try:
        rows = datasets.load_dataset(
            source.path,
            name=source.subset or None,
            split=source.split,
            revision=source.revision or None,
        )
    except (*LIBRARY_ERRORS, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"source.path = {source.path!r} is no local path, and no such data set (split "
            f"{source.split!r}) can be had from the Hugging Face hub: {type(error).__name__}: "
            f"{error}"
        ) from error
    arrow_files = [Path(file["filename"]) for file in rows.cache_files]
    if not arrow_files:
        raise ValueError(f"source.path = {source.path!r} (split {source.split!r}) has no rows")
    return arrow_files


# ---- chunks --------------------------------------------------------------------------------------


def chunks(
    source: Source, files: Sequence[Path], max_row_bytes: int = MAX_ROW_BYTES
) -> Iterator[Chunk]:
    """Split files into chunks of up to MAX_ROWS rows or about BLOCK bytes; each is of one file.

    Rows that cannot be parsed count as rows, also for `source.limit`. Memory does not grow with
    the files.

    Args:
        max_row_bytes: approximate; a longer row cannot be used and is never held in memory.

    Raises:
        ValueError: a file is unreadable as a whole or from some place on, or has no rows.
    """
    left, used = source.limit or math.inf, formats.columns(source)
    for file in files:
        num_rows = 0
        try:
            for chunk in _read(file, used, max_row_bytes):
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


def _read(file: Path, used: Collection[str], max_bytes: int) -> Iterator[Chunk]:
    kind = _kind(file)
    if kind == "json":  # a list, or one object per line
        kind = "json" if _starts_with_bracket(file) else "jsonl"
    if kind == "parquet":
        return _numbered(file, tables.parquet_rows(file, used, MAX_ROWS, BLOCK, max_bytes))
    if kind == "arrow":
        return _numbered(file, tables.arrow_rows(file, used, MAX_ROWS, BLOCK, max_bytes))
    return {"jsonl": _read_jsonl, "json": _read_json_list}.get(kind, _read_csv)(file, max_bytes)


def _open(file: Path) -> io.BufferedReader:
    """Open a file for reading, decompressed.

    pyarrow reads all members or frames of an archive and raises OSError if one is cut off.
    """
    codec = CODECS.get(file.suffix.lower())
    raw = _Unpacked(file, codec) if codec else regular.open_regular(file).detach()
    return io.BufferedReader(raw, BLOCK)


class _Unpacked(io.RawIOBase):
    """Decompresses a file; refuses to unpack far more than real data would be."""

    def __init__(self, file: Path, codec: str):
        self._most = max(BOMB, MAX_RATIO * file.stat().st_size)
        self._stream = pa.CompressedInputStream(pa.OSFile(str(file)), codec)
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        num_bytes = self._stream.readinto(buffer)
        self._num_bytes += num_bytes
        if self._num_bytes > self._most:
            raise ValueError(
                f"unpacks to over {self._most:,} bytes, more than {MAX_RATIO} times its size: "
                "unpack it if that is right"
            )
        return num_bytes

    def close(self) -> None:
        self._stream.close()
        super().close()


def _read_jsonl(file: Path, max_bytes: int) -> Iterator[Chunk]:
    with _open(file) as stream:
        for first, lines in json_rows.lines(stream, BLOCK, max_bytes):
            if first == 1 and isinstance(lines[0], bytes):
                lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
            for start in range(0, len(lines), MAX_ROWS):
                yield Chunk(str(file), first + start, "jsonl", lines[start : start + MAX_ROWS])


def _starts_with_bracket(file: Path) -> bool:
    with _open(file) as stream:
        block = stream.read(BLOCK).removeprefix(codecs.BOM_UTF8)
        while block and not block.strip():
            block = stream.read(BLOCK)
    return block.lstrip().startswith(b"[")


def _read_json_list(file: Path, max_bytes: int) -> Iterator[Chunk]:
    with _open(file) as stream:
        rows = json_rows.elements(stream, BLOCK, max_bytes)
        yield from _grouped(file, "json", ((row, len(row)) for row in rows))


def _grouped(file: Path, kind: str, rows: Iterable[tuple[Any, int]]) -> Iterator[Chunk]:
    """Group (row, size in bytes) into chunks."""
    payload, first, num_bytes = [], 1, 0
    for row, size in rows:
        payload.append(row)
        num_bytes += size
        if len(payload) == MAX_ROWS or num_bytes >= BLOCK:
            yield Chunk(str(file), first, kind, payload)
            payload, first, num_bytes = [], first + len(payload), 0
    if payload:
        yield Chunk(str(file), first, kind, payload)


def _read_csv(file: Path, max_bytes: int) -> Iterator[Chunk]:
    with _open(file) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        delimiter = "\t" if _kind(file) == "tsv" else ","
        yield from _grouped(file, "rows", tables.csv_rows(text, delimiter, max_bytes))


def _numbered(file: Path, lists: Iterable[list]) -> Iterator[Chunk]:
    first = 1
    for rows in lists:
        yield Chunk(str(file), first, "rows", rows)
        first += len(rows)


# ---- rows ----------------------------------------------------------------------------------------


def parse(chunk: Chunk) -> Iterator[Record]:
    """Yield one record per row of a chunk, in order; a bad row is a record with an error."""
    unit = "line" if chunk.kind == "jsonl" else "row"
    for number, row in enumerate(chunk.payload, chunk.first):
        where = f"{chunk.file}, {unit} {number}"
        if isinstance(row, dict):
            yield Record(where, row, "")
        elif isinstance(row, str):
            yield Record(where, None, row)
        elif row.strip():
            yield Record(where, *json_rows.parse_object(row))
