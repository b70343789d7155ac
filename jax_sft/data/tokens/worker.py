"""Tokenize chunks of rows into arrays, in separate processes.

Called by `cache`. The processes are `confined`: they import no JAX, and end when this one does.
"""

import collections
import contextlib
import dataclasses
import gc
import importlib.metadata
import itertools
import os
import platform
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_sft.data.chat import chat_templates, encoding
from jax_sft.data.sources import formats, read
from jax_sft.runtime import confined
from jax_sft.runtime.confined import Ended, Stage
from jax_sft.settings import Source

# Up to this many chunks (of up to 1 MB, 0.3 s each), one process is faster than several, which take
# 3 s to start.
FEW_CHUNKS = 16
# Chunks in flight per process: enough that one slow chunk does not stop the others, few enough
# that memory does not grow.
WINDOW = 8
NO_TEMPLATE = ("text", "tokens", "prompt_completion")  # formats whose items need no chat template
LONGEST_REASON = 1000  # characters
# Allowances of a confined process beyond its fixed bounds, by the size of its input: several times
# what the slowest of the usual tokenizers and templates need.
LOADED_PER_S = 2_000_000  # bytes of a tokenizer's files
RENDERED_PER_S = 1_000_000  # bytes
BYTES_PER_BYTE = 200  # memory per byte of text, at a token per byte
LONG = 20  # messages of a long conversation

# Version of the tokens that this package makes of given data; part of the key of the token cache.
# Raise it with every change that may alter the rows, tokens, weights, places or refused rows of any
# source, or the layout of a store's files. All users' data are then tokenized again. Leave it for
# anything else, reworded messages included. A test compares a digest of the tokens of each format
# with tests/data/tokens/token_digests.json.
TOKENS_VERSION = 1
# Libraries whose update may change tokens: they tokenize, render templates and read files.
LIBRARIES = ("tokenizers", "transformers", "jinja2", "datasets", "pyarrow")


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a process needs to tokenize the chunks of one source; sent to it once.

    Attributes:
        source: the source, whose chunks are tokenized.
        format: one of formats.FORMATS.
    """

    tokenizer_folder: Path
    options: encoding.Options
    source: Source
    format: str


@dataclasses.dataclass(frozen=True)
class Refused:
    """A row that cannot be used: `row` counts from 0 within its chunk, `place` is "line 12"."""

    row: int
    place: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """The rows of one chunk, example after example.

    Attributes:
        num_rows: rows of the chunk, refused ones too.
        ids: int32 [tokens].
        weights: [tokens]; uint8 where each is 0 or 1, else float32.
        lengths: int64 [examples], tokens of each.
        rows: int64 [examples], counted from 0 within the chunk.
        places: int64 [examples], the line or row within the file, from 1.
        num_cut: int32 [examples], turns left out at the start.
        trained: int32 [examples], trained tokens; the first token never counts.
        unit: what `places` counts: "line" or "row".
        turn_ends: {id of a special token: trained turns that it ends}.
        refused: in the order of rows.
    """

    num_rows: int
    ids: np.ndarray
    weights: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    places: np.ndarray
    num_cut: np.ndarray
    trained: np.ndarray
    unit: str
    refused: list[Refused]
    turn_ends: dict[int, int]


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


def load_tokenizer(folder: Path, needs_template: bool = False, chat_template: str = "") -> Any:
    """Load a tokenizer within the limits of a confined process; see `encoding.load_tokenizer`."""
    confined.at(Stage.LOADING)
    size = sum(file.stat().st_size for file in folder.glob("tokenizer*"))
    confined.allow(size / LOADED_PER_S, 20 * size)
    return encoding.load_tokenizer(folder, needs_template, chat_template)


class Encoder:
    """Tokenizes the chunks of one source.

    Raises:
        ValueError: no usable tokenizer, or no chat template where the format needs one.
    """

    def __init__(self, job: Job):
        needs_template = job.format not in NO_TEMPLATE
        template = job.options.chat_template
        tokenizer = load_tokenizer(job.tokenizer_folder, needs_template, template)
        try:
            self._encoder = encoding.Encoder(tokenizer, job.options)
        except ValueError as error:
            raise ValueError(f"{job.tokenizer_folder}: {error}") from error
        self._to_item = formats.FORMATS[job.format]
        self._source = job.source

    def encode(self, chunk: read.Chunk) -> Tokenized:
        """Tokenize a chunk."""
        with _without_collections():
            return self._encode(chunk)

    def _encode(self, chunk: read.Chunk) -> Tokenized:
        size = _size(chunk)
        confined.allow(0, BYTES_PER_BYTE * size)
        confined.at(Stage.READING)
        places, reasons, items, item_rows, work = [], {}, [], [], 0
        confined.at_row(0)
        for row, record in enumerate(read.parse(chunk)):
            places.append(_place(record.where, chunk.file))
            confined.at_row(row + 1)  # the row that is parsed next
            try:
                if record.row is None:
                    raise ValueError(record.error)
                item = self._to_item(record.row, self._source)
                items.append(item)
                item_rows.append(row)
                work += _work(item)
            except ValueError as error:
                reasons[row] = str(error)
        # Each turn of a conversation is found by rendering all messages before it.
        confined.allow((size + work) / RENDERED_PER_S, BYTES_PER_BYTE * size)
        examples, rows = [], []
        for row, result in zip(item_rows, self._encoder.encode(items, item_rows), strict=True):
            if isinstance(result, str):
                reasons[row] = result
            else:
                examples += result
                rows += [row] * len(result)
        refused = [Refused(row, places[row], _printable(reasons[row])) for row in sorted(reasons)]
        return _tokenized(places, examples, rows, refused)


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Pause Python's search for reference cycles.

    It takes a seventh of the time over so many small objects, none of which is in a cycle.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _size(chunk: read.Chunk) -> int:
    """Return the approximate number of bytes of a chunk."""
    if chunk.kind == "rows":
        return sum(len(str(row)) for row in chunk.payload)
    return sum(map(len, chunk.payload))


def _work(item: formats.Item) -> int:
    """Return the number of characters rendered to find the turns of a long conversation."""
    if not isinstance(item, formats.Conversation) or len(item.messages) < LONG:
        return 0
    return len(item.messages) * sum(len(str(message)) for message in item.messages)


def _place(where: str, file: str) -> str:
    """Return the "line 12" of "FILE, line 12".

    A store must not depend on where the files are.
    """
    assert where.startswith(file + ", "), where
    return where[len(file) + 2 :]


def _printable(reason: str) -> str:
    """Return a reason, cut after LONGEST_REASON characters, without lone surrogates.

    A reason may quote anything from the data, huge strings included.
    """
    if len(reason) > LONGEST_REASON:
        reason = reason[:LONGEST_REASON] + " ..."
    return reason.encode("utf-8", "backslashreplace").decode()


def _tokenized(
    places: Sequence[str], examples: Sequence[Any], rows: Sequence[int], refused: list[Refused]
) -> Tokenized:
    """Concatenate the examples of a chunk."""
    numbers = [int(place.rpartition(" ")[2]) for place in places]
    unit = places[0].rpartition(" ")[0] if places else ""
    ids = np.concatenate([np.zeros(0, np.int32), *(example.ids for example in examples)])
    weights = np.concatenate([np.zeros(0, np.float32), *(example.weights for example in examples)])
    assert ids.dtype == np.int32 and weights.dtype == np.float32 and len(ids) == len(weights)
    if ((weights == 0) | (weights == 1)).all():
        weights = weights.astype(np.uint8)
    return Tokenized(
        num_rows=len(places),
        ids=ids,
        weights=weights,
        lengths=np.array([len(example.ids) for example in examples], np.int64),
        rows=np.array(rows, np.int64),
        places=np.array([numbers[row] for row in rows], np.int64),
        num_cut=np.array([example.num_cut for example in examples], np.int32),
        trained=np.array([np.count_nonzero(example.weights[1:]) for example in examples], np.int32),
        unit=unit,
        refused=refused,
        turn_ends=dict(
            collections.Counter(end for example in examples for end in example.turn_ends)
        ),
    )


def tokenize(
    job: Job, chunks: Iterable[read.Chunk], num_workers: int
) -> Generator[tuple[read.Chunk, Tokenized]]:
    """Yield each chunk with its tokens, in order; close the generator to end its processes.

    Few chunks are tokenized by one process, which is kept for later calls.

    Raises:
        ValueError: see `Encoder`, and the errors of reading the chunks.
        confined.OutOfBounds: the tokenizer or the template exceeded its limits.
        RuntimeError: a process ended before its work was done.
    """
    chunks = iter(chunks)
    first = collections.deque(itertools.islice(chunks, max(num_workers, FEW_CHUNKS + 1)))
    num_workers = min(num_workers, len(first)) if len(first) > FEW_CHUNKS else 1
    with _Processes(job, num_workers) as processes:
        yield from processes.tokenize(itertools.chain(_emptied(first), chunks))


def _emptied(queue: collections.deque) -> Iterator[Any]:
    while queue:
        yield queue.popleft()


class _Processes:
    """The processes that tokenize, each with at most one chunk at a time.

    A process is sent a chunk only when it waits for one, so neither end blocks on a full pipe. The
    first process loads the tokenizer and encodes the first chunk alone, so that data which exhaust
    the memory exhaust it once, not in all processes at the same time. The others take as long to
    start anyway.
    """

    def __init__(self, job: Job, num_workers: int):
        self._job, self._num_workers = job, num_workers
        self._processes: list[confined.Process] = []
        self._working: dict[confined.Process, tuple[int, read.Chunk]] = {}
        self._not_begun: list[confined.Process] = []

    def __enter__(self) -> "_Processes":
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for _ in range(self._num_workers):
                self._processes.append(confined.take())
            self._not_begun = self._processes[1:]
            self._send(self._processes[0], _begin, self._job, VERSIONS, SOURCES)
            undo.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Keep a process that waits for work; end all others, whatever they are doing."""
        for process in self._processes:
            confined.give_back(process)

    def tokenize(self, chunks: Iterable[read.Chunk]) -> Iterator[tuple[read.Chunk, Tokenized]]:
        """Yield each chunk with its tokens, in order."""
        upcoming = enumerate(chunks)
        following = next(upcoming, None)
        idle: list[confined.Process] = []  # without those that are still loading
        working = self._working
        done: dict[int, tuple[read.Chunk, Tokenized]] = {}
        num_yielded = 0
        while following is not None or working or done:
            while idle and following and following[0] < num_yielded + WINDOW * self._num_workers:
                working[idle[-1]] = following
                self._send(idle.pop(), _encode, following[1])
                following = next(upcoming, None)
            if num_yielded in done:
                yield done.pop(num_yielded)
                num_yielded += 1
                continue
            for process in confined.wait_for([p for p in self._processes if p.pending]):
                result = self._receive(process)
                idle.append(process)
                if process in working:
                    number, chunk = working.pop(process)
                    done[number] = chunk, result
                    while self._not_begun:
                        self._send(self._not_begun.pop(), _begin, self._job, VERSIONS, SOURCES)

    def _send(self, process: confined.Process, function: Callable, *args: Any) -> None:
        try:
            process.send(function, *args)
        except Ended as error:
            raise self._explained(process, error) from error

    def _receive(self, process: confined.Process) -> Any:
        try:
            return process.receive()
        except Ended as error:
            raise self._explained(process, error) from error

    def _explained(self, process: confined.Process, ended: Ended) -> Exception:
        _, chunk = self._working.get(process, (0, None))
        return explained(
            ended,
            self._job.tokenizer_folder,
            template=chat_templates.KEY if self._job.options.chat_template else "",
            chunk=chunk,
            num_workers=self._num_workers,
        )


def explained(
    ended: Ended,
    folder: Path,
    *,
    template: str = "",
    chunk: read.Chunk | None = None,
    num_workers: int = 1,
) -> Exception:
    """Return an exception that names the program that exceeded its limits, and the row.

    Args:
        template: the config key that names the chat template; "" = it is that of the folder.
    """
    if ended.why == "fault":
        return RuntimeError(f"a process that tokenizes failed (code {ended.code}):\n{ended.log}")
    if ended.why == "outside":
        remedy = ", often the system's answer to too little memory: set data.num_workers below "
        return RuntimeError(
            f"a process that tokenizes was ended from outside by {signal.Signals(-ended.code).name}"
            f"{f'{remedy}{num_workers}' if ended.code == -signal.SIGKILL else ''}"
        )
    where = _where(chunk, ended.row) if chunk and ended.row >= 0 else ""
    if ended.stage in (Stage.COMPILING, Stage.RENDERING):
        on = f" (at {where})" if where else ""
        return confined.OutOfBounds(
            f"the chat template {template or encoding.template_file(folder)} {ended.excess()}{on}: "
            f"mend it, {'leave out the row, ' if where else ''}or use that of another model"
        )
    if ended.stage == Stage.READING and where:
        return confined.OutOfBounds(f"{where}: reading this row {ended.excess()}: remove it")
    on = f" on {where}" if where else ""
    return confined.OutOfBounds(
        f"the tokenizer {folder / 'tokenizer.json'} {ended.excess()}{on}: mend it, or "
        f"{'leave out the row' if where else 'take it from the original model'}"
    )


def _where(chunk: read.Chunk, row: int) -> str:
    return next(itertools.islice((record.where for record in read.parse(chunk)), row, None), "")


# ---- versions -----------------------------------------------------------------------------------


def _versions() -> dict[str, str]:
    """Return the version of everything that decides the tokens of given data."""
    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
    # Python's version decides its Unicode tables and its readers of JSON and CSV.
    return {"tokens": str(TOKENS_VERSION), "python": platform.python_version()} | libraries


def _sources() -> dict[str, tuple[int, int]]:
    """Return {module: (time of its last change in ns, size)} of this package's loaded modules."""
    package = __name__.partition(".")[0]
    return {
        name: _state(module.__file__)
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == package and getattr(module, "__file__", None)
    }


def _state(file: Any) -> tuple[int, int]:
    try:
        status = os.stat(file)
    except OSError:  # it was removed after it was loaded
        return 0, 0
    return status.st_mtime_ns, status.st_size


VERSIONS = _versions()
# Recorded at import: the files may change while this process runs the old code. A process started
# after that would run the new code.
SOURCES = _sources()


# ---- in the process that tokenizes --------------------------------------------------------------

_encoders: list[Encoder] = []  # the encoder of the current source


def _begin(job: Job, versions: Mapping[str, str], sources: Mapping[str, tuple[int, int]]) -> None:
    # The parent may have loaded more modules of this package than this process.
    if versions != VERSIONS or not SOURCES.items() <= sources.items():
        raise ValueError("the code of the program changed since it started: start it again")
    _encoders.clear()
    _encoders.append(Encoder(job))


def _encode(chunk: read.Chunk) -> Tokenized:
    return _encoders[0].encode(chunk)
