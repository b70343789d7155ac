"""The files of one tokenized source: `Writer` writes them, `open_store` verifies and maps them.

A store is a folder of flat arrays, errors.jsonl and meta.json. meta.json is written last and holds
a checksum of each file and of itself. Called by `cache`, which names the folder and lets one
process at a time build it.
"""

import bisect
import collections
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from tqdm import tqdm

from jax_sft.data.tokens import worker
from jax_sft.files import regular
from jax_sft.files.disk import sync, write_all

# The flat little-endian arrays of a store; weights are float32 if any is neither 0 nor 1.
DTYPES = {
    "ids": "<i4",
    "weights": "|u1",
    "starts": "<i8",
    "rows": "<i8",
    "places": "<i8",
    "num_cut": "<i4",
    "trained": "<i4",
}
WEIGHTS = ("|u1", "<f4")
# The fields of meta.json and their types; `Store` describes them.
FIELDS = {
    **{"key": str, "content": str, "format": str, "format_reason": str, "weights": str},
    **{"rows": int, "highest_id": int, "refused": dict, "files": list, "turn_ends": dict},
    **{"sizes": dict, "digests": dict, "checksum": str},
}
FILE_FIELDS = {"name": str, "first_row": int, "unit": str}
MAX_META = 64 << 20  # bytes of meta.json: some 400,000 data files
MAX_REASONS = 50  # kinds of refusal that are counted separately
BLOCK = 4 << 20  # bytes hashed at once
SHOW_CHECKING = 2_000_000_000  # bytes from which the check shows a progress bar


class Damaged(Exception):
    """A store's files are not as they were written; the text says what is wrong."""


@dataclasses.dataclass(frozen=True)
class Store:
    """One tokenized source. The arrays are mapped from the disk, read-only.

    Attributes:
        folder: its folder in the cache.
        root: the folder that the names of the data files are relative to.
        meta: key, content (a hash of the examples alone, not of their files), format,
            format_reason, rows (read), highest_id (of a token; -1 = none), turn_ends {id of a
            special token, as text: trained turns that it ends}, refused {kind of reason: rows},
            files [{name, first_row, unit}], weights (their dtype), sizes and digests {file: bytes,
            and their xxh3_128}, checksum (of meta without it).
        cached: whether it already existed.
        ids: int32 [tokens], not shifted, example after example.
        weights: [tokens], uint8 or float32, the loss weight of each token.
        starts, stops: int64 [examples], the tokens of each example.
        rows: int64 [examples], the row of the source of each example, from 0; ascending.
        places: int64 [examples], its line or row within the file, from 1.
        num_cut: int32 [examples], turns left out at its start.
        trained: int32 [examples], trained tokens, without the first, which is never a target.
    """

    folder: Path
    root: Path
    meta: dict
    cached: bool
    ids: np.ndarray
    weights: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    rows: np.ndarray
    places: np.ndarray
    num_cut: np.ndarray
    trained: np.ndarray

    def where(self, example: int) -> str:
        """Return the place of an example, as "FILE, line 12"."""
        files = self.meta["files"]
        row = int(self.rows[example])
        file = files[bisect.bisect_right(files, row, key=lambda file: file["first_row"]) - 1]
        return f"{self.root / file['name']}, {file['unit']} {self.places[example]}"

    def errors(self) -> Iterator[dict]:
        """Yield the refused rows in order: {"row": from 0, "where": str, "error": str}."""
        with open(self.folder / "errors.jsonl", encoding="ascii") as lines:
            for line in lines:
                error = json.loads(line)
                where = f"{self.root / error['file']}, {error['place']}"
                yield {"row": error["row"], "where": where, "error": error["error"]}


def open_store(folder: Path, root: Path, *, progress: bool = False) -> Store | None:
    """Verify a store against its checksums and map it; return None if there is none.

    The whole store is read once: 0.6 s per billion tokens from memory, otherwise at disk speed.
    While an array of the store is alive, the file of ids has a shared lock, so that no process
    removes the store.

    Args:
        root: see Store.
        progress: show a bar for a large store.

    Raises:
        Damaged: its files are not as they were written.
        OSError: the system refuses to read them.
    """
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        if folder.is_symlink():
            raise ValueError("the folder is a link")
        with contextlib.ExitStack() as stack:
            files = {
                name: stack.enter_context(regular.open_regular(folder / name, follow=False))
                for name in (*DTYPES, "errors.jsonl", "meta.json")
            }
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(files["ids"], fcntl.LOCK_SH | fcntl.LOCK_NB)
            meta = _read_meta(files.pop("meta.json"))
            if meta["key"] != folder.name:
                raise ValueError("meta.json is that of another store")
            totals = _verify_files(files, meta, progress)
            dtypes = DTYPES | {"weights": meta["weights"]}
            arrays = {name: _map(files[name], dtype) for name, dtype in dtypes.items()}
        _verify_arrays(arrays, meta, totals)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise Damaged(str(error)) from error
    bounds = arrays.pop("starts")
    return Store(folder, root, meta, True, starts=bounds[:-1], stops=bounds[1:], **arrays)


def _read_meta(stream: BinaryIO) -> dict[str, Any]:
    """Read meta.json; raise ValueError unless it is as `Writer.finish` wrote it."""
    text = stream.read(MAX_META + 1)
    try:
        meta = json.loads(text) if len(text) <= MAX_META else None
    except (ValueError, RecursionError) as error:
        raise ValueError("meta.json is not the JSON of a store") from error
    if not isinstance(meta, dict) or meta.keys() != FIELDS.keys():
        raise ValueError("meta.json does not have the fields of a store")
    for name, kind in FIELDS.items():
        if type(meta[name]) is not kind:
            raise ValueError(f"meta.json: {name} is not of type {kind.__name__}")
    if meta["checksum"] != _checksum(meta):
        raise ValueError("meta.json does not match its checksum")
    names = {*DTYPES, "errors.jsonl"}
    if meta["sizes"].keys() != names or meta["digests"].keys() != names:
        raise ValueError("meta.json: sizes and digests are not those of a store's files")
    for file in meta["files"]:
        if type(file) is not dict or {k: type(v) for k, v in file.items()} != FILE_FIELDS:
            raise ValueError("meta.json: files does not have the fields of a file")
    for name in ("refused", "turn_ends"):
        if any(type(number) is not int for number in meta[name].values()):
            raise ValueError(f"meta.json: {name} does not hold numbers")
    if not all(token.isdecimal() for token in meta["turn_ends"]):
        raise ValueError("meta.json: turn_ends does not name tokens")
    if meta["weights"] not in WEIGHTS:
        raise ValueError(f"meta.json: weights is not one of {WEIGHTS}")
    return meta


def _checksum(meta: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in meta.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass
class _Totals:
    """Counts taken while the files of a store are read."""

    lowest_id: int = 0
    highest_id: int = -1
    num_trained: int = 0
    sound_weights: bool = True
    num_errors: int = 0

    def add(self, name: str, block: bytes, weights: str) -> None:
        if name == "ids":
            ids = np.frombuffer(block, DTYPES["ids"])
            self.lowest_id = min(self.lowest_id, int(ids.min()))
            self.highest_id = max(self.highest_id, int(ids.max()))
        elif name == "weights":
            array = np.frombuffer(block, weights)
            self.num_trained += int(np.count_nonzero(array))
            highest = 1 if weights == "|u1" else np.finfo(np.float32).max
            self.sound_weights &= bool(array.min() >= 0 and array.max() <= highest)  # false for NaN
        elif name == "errors.jsonl":
            self.num_errors += block.count(b"\n")


def _verify_files(
    files: Mapping[str, BinaryIO], meta: Mapping[str, Any], progress: bool
) -> _Totals:
    """Compare sizes and digests, and count; raise ValueError if they differ.

    The files are read in blocks, not mapped: mapped pages would count as memory of this process.
    """
    totals = _Totals()
    total = sum(os.fstat(stream.fileno()).st_size for stream in files.values())
    hide = not progress or total < SHOW_CHECKING
    with tqdm(total=total, desc="checking tokens", unit="B", unit_scale=True, disable=hide) as bar:
        for name, stream in files.items():
            size = os.fstat(stream.fileno()).st_size
            if size != meta["sizes"][name]:
                raise ValueError(f"{name} has {size:,} bytes, not {meta['sizes'][name]}")
            digest = xxhash.xxh3_128()
            while block := stream.read(BLOCK):
                digest.update(block)
                totals.add(name, block, meta["weights"])
                bar.update(len(block))
            if digest.hexdigest() != meta["digests"][name]:
                raise ValueError(f"{name} does not match its checksum")
    return totals


def _map(stream: BinaryIO, dtype: str) -> np.ndarray:
    if os.fstat(stream.fileno()).st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    # As a plain array: slices of a memmap cost several times as much. The mapping holds a copy of
    # the file's descriptor, and with it the lock.
    return np.asarray(np.memmap(stream, dtype, mode="r"))


def _verify_arrays(
    arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], totals: _Totals
) -> None:
    """Compare the arrays with each other and with meta.json; raise ValueError if they disagree.

    Checksums find what changed since the store was written. This check finds what was never right.
    """
    starts, rows, lengths = arrays["starts"], arrays["rows"], np.diff(arrays["starts"])
    never_targets = np.count_nonzero(arrays["weights"][starts[:-1]])
    first_rows = [file["first_row"] for file in meta["files"]]
    claims = {
        "starts": len(starts) > 0 and starts[0] == 0 and starts[-1] == len(arrays["ids"]),
        "lengths": bool((lengths > 0).all()),
        "weights": totals.sound_weights and len(arrays["weights"]) == len(arrays["ids"]),
        "rows": bool((np.diff(rows) >= 0).all() and ((rows >= 0) & (rows < meta["rows"])).all()),
        "trained": bool(((arrays["trained"] >= 0) & (arrays["trained"] < lengths)).all())
        and arrays["trained"].sum(dtype=np.int64) == totals.num_trained - never_targets,
        "num_cut": bool((arrays["num_cut"] >= 0).all()),
        "places": bool((arrays["places"] > 0).all()),
        "files": first_rows[:1] == [0] and first_rows == sorted(first_rows),
        "ids": totals.lowest_id >= 0,
        "highest_id": meta["highest_id"] == totals.highest_id,
        "refused": sum(meta["refused"].values()) == totals.num_errors,
    }
    per_example = {len(arrays[name]) for name in ("rows", "places", "num_cut", "trained")}
    claims["examples"] = per_example == {len(lengths)}
    if wrong := [name for name, holds in claims.items() if not holds]:
        raise ValueError(f"{', '.join(wrong)}: not those of a store")


class Writer:
    """Appends chunks to the files of a store, which the given ExitStack closes."""

    def __init__(self, folder: Path, root: Path, stack: contextlib.ExitStack):
        self._folder, self._root, self._stack = folder, root, stack
        self._dtypes = dict(DTYPES)
        self._streams = {name: self._create(name) for name in [*DTYPES, "errors.jsonl"]}
        self._num_rows = self._num_tokens = 0
        self._highest_id = -1
        self._turn_ends: collections.Counter[int] = collections.Counter()
        self._files: list[dict] = []
        self._refused: collections.Counter[str] = collections.Counter()
        self._content = [hashlib.sha256() for _ in ("ids", "weights", "lengths")]
        self._digests = {name: xxhash.xxh3_128() for name in self._streams}
        self._append("starts", np.zeros(1, np.int64))

    def _create(self, name: str) -> BinaryIO:
        # Unbuffered: a buffer that a full disk refuses would fail again when the file is closed.
        return self._stack.enter_context(open(self._folder / name, "wb", buffering=0))

    def _append(self, name: str, array: np.ndarray) -> None:
        self._write(name, array.astype(self._dtypes[name]).tobytes())

    def _write(self, name: str, data: bytes) -> None:
        write_all(self._streams[name], data)
        self._digests[name].update(data)

    def add(self, path: str, result: worker.Tokenized) -> None:
        """Append the rows of the next chunk, which come from the file `path`."""
        file = os.path.relpath(path, self._root)
        if not self._files or self._files[-1]["name"] != file:
            entry = {"name": file, "first_row": self._num_rows, "unit": result.unit}
            self._files.append(entry)
        if result.weights.dtype == np.float32 and self._dtypes["weights"] == "|u1":
            self._widen_weights()
        for name in ("ids", "weights", "places", "num_cut", "trained"):
            self._append(name, getattr(result, name))
        self._append("starts", self._num_tokens + np.cumsum(result.lengths))
        arrays = ((result.ids, "<i4"), (result.weights, "<f4"), (result.lengths, "<i8"))
        for digest, (array, dtype) in zip(self._content, arrays, strict=True):
            digest.update(np.ascontiguousarray(array.astype(dtype)).data)
        self._append("rows", self._num_rows + result.rows)
        for bad in result.refused:
            error = {"row": self._num_rows + bad.row, "file": file, "place": bad.place}
            line = json.dumps(error | {"error": bad.reason}) + "\n"
            self._write("errors.jsonl", line.encode("ascii"))
            kind = _kind(bad.reason)
            full = len(self._refused) >= MAX_REASONS and kind not in self._refused
            self._refused["other reasons" if full else kind] += 1
        self._highest_id = max(self._highest_id, int(result.ids.max(initial=-1)))
        self._turn_ends.update(result.turn_ends)
        self._num_tokens += len(result.ids)
        self._num_rows += result.num_rows

    def _widen_weights(self) -> None:
        """Rewrite the weights so far as float32, when the first fraction arrives."""
        self._streams["weights"].close()
        narrow = (self._folder / "weights").rename(self._folder / "narrow")
        self._dtypes["weights"] = "<f4"
        self._streams["weights"] = self._create("weights")
        self._digests["weights"] = xxhash.xxh3_128()
        with open(narrow, "rb") as stream:
            while block := stream.read(1 << 20):
                self._append("weights", np.frombuffer(block, np.uint8))
        narrow.unlink()

    def finish(self, **about: str) -> None:
        """Flush all files to disk; meta.json goes last, since a folder without it is no store."""
        for stream in self._streams.values():
            os.fsync(stream.fileno())
        meta: dict[str, Any] = about | {
            "content": " ".join(digest.hexdigest() for digest in self._content),
            "rows": self._num_rows,
            "highest_id": self._highest_id,
            "turn_ends": {str(end): count for end, count in self._turn_ends.most_common()},
            "refused": dict(self._refused.most_common()),
            "files": self._files,
            "weights": self._dtypes["weights"],
            "sizes": {name: stream.tell() for name, stream in self._streams.items()},
            "digests": {name: digest.hexdigest() for name, digest in self._digests.items()},
        }
        meta["checksum"] = _checksum(meta)
        with open(self._folder / "meta.json", "w", encoding="ascii") as stream:
            json.dump(meta, stream, indent=2)
            stream.flush()
            os.fsync(stream.fileno())
        sync(self._folder)


def publish(folder: Path, final: Path) -> None:
    """Rename a finished store to its name, unless another process was first (without locks)."""
    try:
        folder.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    sync(final.parent)


def _kind(reason: str) -> str:
    """Return the kind of a reason: reasons that differ only in numbers and quotes have the same."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "...", reason.partition("\n")[0])[:100]
