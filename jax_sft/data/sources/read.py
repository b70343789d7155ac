"""Files to rows: `files` finds what a source names, `chunks` cuts it up, `parse` makes rows of it.

`cache` calls the first two, which are cheap; `worker` the third, in many processes. What is within
JSON and within tables is the matter of `json_rows` and `tables`.
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
# Four million tokens of text: four times the longest that any model reads at once. Tokenizers take
# some hundred bytes per byte.
MAX_ROW_BYTES = 16_000_000
# Text shrinks to a tenth, tables of one sentence to a hundredth.
MAX_RATIO = 300
BOMB = 8 << 30  # bytes, unpacked, from which the ratio is looked at: some 10 s

# What `datasets` raises of data sets that it cannot read; it documents no list.
LIBRARY_ERRORS = (
    *(OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError),
    *(ArithmeticError, AssertionError, EOFError, MemoryError, SyntaxError, pa.ArrowException),
)

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
SPLIT_NAME = re.compile(r"\w+(\.\w+)*")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some neighbouring rows of one file, not parsed yet; small enough to send to a process.

    Attributes:
        first: number, from 1, of the first one within the file: of a line for "jsonl", of a row
            for the others.
        kind: "jsonl", "json" (elements of a list) or "rows" (made by other libraries).
        payload: bytes for "jsonl" and "json", dicts for "rows"; or a string that says what is
            wrong.
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
        ValueError: there is nothing to read, a file is empty, not a regular file, or of no known
            kind.
    """
    try:
        return _files(source)
    except OSError as error:
        raise ValueError(f"source.path = {source.path!r} cannot be read: {error}") from error


def _files(source) -> list[Path]:
    given = source.path
    if not given:
        raise ValueError("source.path is empty: name a file, glob, folder or hub data set")
    path = paths.local(given, "source.path")
    if path.is_file():
        found = [path]
    elif path.is_dir():
        if (path / "dataset_dict.json").is_file():
            raise ValueError(
                f"source.path = {given!r} holds several splits: name one, such as its train"
            )
        found = _data_files(_below(path))
    elif glob.has_magic(given) and not path.exists():
        found = _data_files(_matches(path))
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
    _check_files(given, found)
    return found


def _below(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder but hidden ones; unlike glob, fail where one is not readable.

    Raises:
        ValueError: links lead to one folder twice; in a circle, that would never end.
    """
    seen: dict[tuple[int, int], Path] = {}
    pending = [folder]
    while pending:
        here = pending.pop()
        status = here.stat()
        other = seen.setdefault((status.st_dev, status.st_ino), here)
        if other is not here:
            raise ValueError(
                f"source.path = {str(folder)!r}: {str(other)!r} and {str(here)!r} are the same "
                "folder"
            )
        with os.scandir(here) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    if entry.is_dir():
                        pending.append(Path(entry.path))
                    else:
                        yield Path(entry.path)


def _matches(pattern: Path) -> Iterator[Path]:
    """Yield what a glob matches: files, and folders that are called as a data file is."""
    if "**" in pattern.parts:
        plain = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts)
        if (above := Path(*plain)).is_dir():
            collections.deque(_below(above), maxlen=0)  # glob would follow links in a circle
    for name in glob.iglob(str(pattern), recursive=True):
        if _kind(file := Path(name)) or not file.is_dir():
            yield file


def _data_files(found: Iterable[Path]) -> list[Path]:
    return sorted(file for file in found if not _is_beside_data(file))


def _is_beside_data(file: Path) -> bool:
    if file.name == "state.json":  # as Dataset.save_to_disk writes it
        return (file.parent / METADATA[0]).is_file()
    named = any(fnmatch.fnmatch(file.name, pattern) for pattern in BESIDE_DATA)
    return file.name in METADATA or (named and not _kind(file))


def _check_files(given: str, found: Sequence[Path]) -> None:
    """Raise ValueError unless there are files, each of a known kind, not empty, and given once."""
    if not found:
        hint = (
            " (*, ? and [ make it a glob: write [[] for a bracket)" if glob.has_magic(given) else ""
        )
        raise ValueError(f"source.path = {given!r} has no data file{hint}")
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
    for file in found:
        regular.check_mode(file, file.stat().st_mode)
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
    httpx = importlib.import_module("httpx")  # which the hub's library uses, and datasets loads
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
    found = [Path(file["filename"]) for file in rows.cache_files]
    if not found:
        raise ValueError(f"source.path = {source.path!r} (split {source.split!r}) has no rows")
    return found


# ---- chunks --------------------------------------------------------------------------------------


def chunks(source, files: Sequence[Path], max_row_bytes: int = MAX_ROW_BYTES) -> Iterator[Chunk]:
    """Cut files into chunks of up to MAX_ROWS rows or about BLOCK bytes; no chunk spans two files.

    Rows that cannot be parsed count as rows, also for `source.limit`. Memory does not grow with
    the files.

    Args:
        max_row_bytes: about; a longer row is one that cannot be used, and is never held.

    Raises:
        ValueError: a file that is broken as a whole or from some place on, or has no rows.
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
    if kind == "json":
        kind = "json" if _starts_with_bracket(file) else "jsonl"
    if kind == "parquet":
        return _numbered(file, tables.parquet_rows(file, used, MAX_ROWS, BLOCK, max_bytes))
    if kind == "arrow":
        return _numbered(file, tables.arrow_rows(file, used, MAX_ROWS, BLOCK, max_bytes))
    return {"jsonl": _read_jsonl, "json": _read_json_list}.get(kind, _read_csv)(file, max_bytes)


def _open(file: Path) -> io.BufferedReader:
    """Open a file for reading, uncompressed.

    pyarrow reads all members or frames of an archive and raises OSError where one is cut off.
    """
    codec = CODECS.get(file.suffix.lower())
    raw = _Unpacked(file, codec) if codec else regular.open_regular(file).detach()
    return io.BufferedReader(raw, BLOCK)


class _Unpacked(io.RawIOBase):
    """A compressed file; refuses to unpack what is far larger than data can be."""

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
    """Make one record per row of a chunk, in order; a bad row is a record with an error."""
    unit = "line" if chunk.kind == "jsonl" else "row"
    for number, found in enumerate(chunk.payload, chunk.first):
        where = f"{chunk.file}, {unit} {number}"
        if isinstance(found, dict):
            yield Record(where, found, "")
        elif isinstance(found, str):
            yield Record(where, None, found)
        elif found.strip():
            yield Record(where, *json_rows.parse_object(found))
