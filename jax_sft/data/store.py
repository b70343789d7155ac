"""The files of one tokenized source: `Writer` makes them, `open_store` maps them, read-only.

A store is a folder of flat arrays, errors.jsonl and meta.json, which is written last. Called by
`cache`, which names the folder and lets one process at a time build it.
"""

import bisect
import collections
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jax_sft.data import worker

# The flat little-endian arrays of a store; weights are float32 where one is neither 0 nor 1.
DTYPES = {
    "ids": "<i4",
    "weights": "|u1",
    "starts": "<i8",
    "rows": "<i8",
    "places": "<i8",
    "num_cut": "<i4",
    "trained": "<i4",
}
MAX_REASONS = 50  # kinds of refusal told apart


@dataclasses.dataclass(frozen=True)
class Store:
    """One tokenized source. The arrays are mapped from the disk, read-only.

    Attributes:
        folder: its folder in the cache.
        root: the folder that the names of the data files are relative to.
        meta: key, content (a hash of the examples, whatever they were made from), format,
            format_reason, rows (read), highest_id (of a token; -1 = none), turn_ends {id of a
            special token, as text: trained turns that it ends}, refused {kind of reason: rows},
            files [{name, first_row, unit}], dtypes and sizes.
        cached: whether it was there already.
        ids: int32 [tokens], not shifted, example after example.
        weights: [tokens], uint8 or float32, the loss weight of each token.
        starts, stops: int64 [examples], the tokens of each example.
        rows: int64 [examples], the row of the source that it came from, from 0; ascending.
        places: int64 [examples], the line or row within its file, from 1.
        num_cut: int32 [examples], turns left out at its start.
        trained: int32 [examples], tokens that train, without the first, which is never a target.
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
        """Name the place that an example came from, as "FILE, line 12"."""
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


def open_store(folder: Path, root: Path) -> Store | None:
    """Map a store; None where there is none, or one whose files are not as they were written.

    Args:
        root: see Store.

    Raises:
        OSError: the system refuses to read what is there.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="ascii"))
        for file, size in meta["sizes"].items():
            if (folder / file).stat().st_size != size:
                return None
        arrays = {name: _map(folder / name, dtype) for name, dtype in meta["dtypes"].items()}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return None
    bounds = arrays.pop("starts")
    return Store(folder, root, meta, True, starts=bounds[:-1], stops=bounds[1:], **arrays)


def _map(file: Path, dtype: str) -> np.ndarray:
    if file.stat().st_size == 0:  # which cannot be mapped
        return np.zeros(0, dtype)
    # As a plain array: slices of a memmap cost several times as much.
    return np.asarray(np.memmap(file, dtype, mode="r"))


class Writer:
    """Appends chunks to the files of a store; closed by the stack it is given."""

    def __init__(self, folder: Path, root: Path, stack: contextlib.ExitStack):
        self._folder, self._root, self._stack = folder, root, stack
        self._dtypes = dict(DTYPES)
        self._streams = {name: self._create(name) for name in [*DTYPES, "errors.jsonl"]}
        self._num_rows = self._num_tokens = 0
        self._highest_id = -1
        self._turn_ends: collections.Counter[int] = collections.Counter()
        self._files: list[dict] = []
        self._refused: collections.Counter[str] = collections.Counter()
        self._digests = [hashlib.sha256() for _ in ("ids", "weights", "lengths")]
        self._append("starts", np.zeros(1, np.int64))

    def _create(self, name: str) -> BinaryIO:
        # Unbuffered: what is in a buffer when the disk is full fails again when it is closed.
        return self._stack.enter_context(open(self._folder / name, "wb", buffering=0))

    def _append(self, name: str, array: np.ndarray) -> None:
        _write(self._streams[name], array.astype(self._dtypes[name]).tobytes())

    def add(self, path: str, result: worker.Tokenized) -> None:
        """Append the rows of the chunk that follows; they are from the file `path`."""
        file = os.path.relpath(path, self._root)
        if not self._files or self._files[-1]["name"] != file:
            found = {"name": file, "first_row": self._num_rows, "unit": result.unit}
            self._files.append(found)
        if result.weights.dtype == np.float32 and self._dtypes["weights"] == "|u1":
            self._widen_weights()
        for name in ("ids", "weights", "places", "num_cut", "trained"):
            self._append(name, getattr(result, name))
        self._append("starts", self._num_tokens + np.cumsum(result.lengths))
        found = ((result.ids, "<i4"), (result.weights, "<f4"), (result.lengths, "<i8"))
        for digest, (array, dtype) in zip(self._digests, found, strict=True):
            digest.update(np.ascontiguousarray(array.astype(dtype)).data)
        self._append("rows", self._num_rows + result.rows)
        for bad in result.refused:
            error = {"row": self._num_rows + bad.row, "file": file, "place": bad.place}
            line = json.dumps(error | {"error": bad.reason}) + "\n"
            _write(self._streams["errors.jsonl"], line.encode("ascii"))
            kind = _kind(bad.reason)
            full = len(self._refused) >= MAX_REASONS and kind not in self._refused
            self._refused["other reasons" if full else kind] += 1
        self._highest_id = max(self._highest_id, int(result.ids.max(initial=-1)))
        self._turn_ends.update(result.turn_ends)
        self._num_tokens += len(result.ids)
        self._num_rows += result.num_rows

    def _widen_weights(self) -> None:
        """Write the weights so far as float32, once a fraction comes along."""
        self._streams["weights"].close()
        narrow = (self._folder / "weights").rename(self._folder / "narrow")
        self._dtypes["weights"] = "<f4"
        self._streams["weights"] = self._create("weights")
        with open(narrow, "rb") as stream:
            while block := stream.read(1 << 20):
                self._append("weights", np.frombuffer(block, np.uint8))
        narrow.unlink()

    def finish(self, **about: str) -> None:
        """Have all files on the disk; meta.json, without which there is no store, last."""
        for stream in self._streams.values():
            os.fsync(stream.fileno())
        meta = about | {
            "content": " ".join(digest.hexdigest() for digest in self._digests),
            "rows": self._num_rows,
            "highest_id": self._highest_id,
            "turn_ends": {str(end): count for end, count in self._turn_ends.most_common()},
            "refused": dict(self._refused.most_common()),
            "files": self._files,
            "dtypes": self._dtypes,
            "sizes": {name: stream.tell() for name, stream in self._streams.items()},
        }
        with open(self._folder / "meta.json", "w", encoding="ascii") as stream:
            json.dump(meta, stream, indent=2)
            stream.flush()
            os.fsync(stream.fileno())
        _sync(self._folder)


def publish(folder: Path, final: Path) -> None:
    """Rename a finished store to its name, unless another process without locks was first."""
    try:
        folder.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    _sync(final.parent)


def _sync(folder: Path) -> None:
    """Have the names in a folder written to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(stream: BinaryIO, data: bytes) -> None:
    """Write all of it: one call may write less than it is given."""
    left = memoryview(data)
    while left:
        left = left[stream.write(left) :]


def _kind(reason: str) -> str:
    """Reasons that differ in numbers and quoted text only are of one kind."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "...", reason.partition("\n")[0])[:100]
