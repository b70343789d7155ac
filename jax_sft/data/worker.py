"""Chunks of rows to arrays of tokens: in this process, or in processes of our own.

Called by `cache`. The processes are started without multiprocessing: fork is unsafe beside JAX's
threads, and spawn runs the user's script again. They import no JAX and end when this one does.
"""

import collections
import contextlib
import dataclasses
import functools
import gc
import hashlib
import importlib.metadata
import itertools
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from jax_sft.data import chat, formats, read

# Up to so many chunks (of up to 1 MB, 0.3 s each) the processes, which take 3 s to start, would
# be slower than this one alone.
FEW_CHUNKS = 16
# Chunks in flight per process: one long chunk must not stop the others, nor memory grow.
WINDOW = 8
NO_TEMPLATE = ("text", "tokens", "prompt_completion")  # formats whose items need no chat template
LONGEST_REASON = 1000  # characters
LIBRARIES = ("tokenizers", "transformers", "jinja2", "datasets", "pyarrow")

# An import at the top of a module; all of ours are there. (Parsing would take 0.2 s of each start.)
IMPORT = re.compile(r"^(?:from ([\w.]+) )?import (\([^)]*\)|.+)", re.MULTILINE)

# The child finds modules exactly where this process does. Where torch is installed transformers
# would import it: 2 s and 180 MB in each process, for nothing.
CHILD = (
    "import sys; sys.path[:] = sys.argv[2:]; sys.modules['torch'] = None; "
    "from jax_sft.data import worker; worker.serve(int(sys.argv[1]))"
)
# One process per core: no library may start threads of its own for each core again.
ONE_THREAD = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process must know to tokenize the chunks of one source; sent to it once.

    Attributes:
        source: from `config.source`.
        format: one of formats.FORMATS.
    """

    tokenizer_folder: Path
    options: chat.Options
    source: Any
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
        trained: int32 [examples], tokens that train; the first one never does.
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


Encode = Callable[[read.Chunk], Tokenized]


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


def _without_collections(function: Encode) -> Encode:
    """Pause Python's search for reference cycles: over so many small objects, none of which is in
    one, it takes a seventh of the time.
    """

    @functools.wraps(function)
    def paused(chunk: read.Chunk) -> Tokenized:
        was_on = gc.isenabled()
        gc.disable()
        try:
            return function(chunk)
        finally:
            if was_on:
                gc.enable()

    return paused


def load(job: Job) -> Encode:
    """Load the tokenizer and return the function that tokenizes a chunk.

    Raises:
        ValueError: no usable tokenizer, or no chat template where the format needs one.
    """
    needs_template = job.format not in NO_TEMPLATE
    tokenizer = chat.load_tokenizer(job.tokenizer_folder, needs_template, job.options.chat_template)
    encoder = chat.Encoder(tokenizer, job.options)
    to_item = formats.FORMATS[job.format]
    source = types.SimpleNamespace(**job.source)  # a ConfigDict would take 5 us per row to ask

    @_without_collections
    def encode(chunk: read.Chunk) -> Tokenized:
        places, reasons, items, item_rows = [], {}, [], []
        for row, record in enumerate(read.parse(chunk)):
            places.append(_place(record.where, chunk.file))
            try:
                if record.row is None:
                    raise ValueError(record.error)
                items.append(to_item(record.row, source))
                item_rows.append(row)
            except ValueError as error:
                reasons[row] = str(error)
        examples, rows = [], []
        for row, found in zip(item_rows, encoder.encode(items), strict=True):
            if isinstance(found, str):
                reasons[row] = found
            else:
                examples += found
                rows += [row] * len(found)
        refused = [Refused(row, places[row], _printable(reasons[row])) for row in sorted(reasons)]
        return _tokenized(places, examples, rows, refused)

    return encode


def _place(where: str, file: str) -> str:
    """The "line 12" of "FILE, line 12": a store must not depend on where the files lie."""
    assert where.startswith(file + ", "), where
    return where[len(file) + 2 :]


def _printable(reason: str) -> str:
    """A reason may quote anything from the data, half characters and huge strings included."""
    if len(reason) > LONGEST_REASON:
        reason = reason[:LONGEST_REASON] + " ..."
    return reason.encode("utf-8", "backslashreplace").decode()


def _tokenized(
    places: Sequence[str], examples: Sequence[Any], rows: Sequence[int], refused: list[Refused]
) -> Tokenized:
    """Lay the examples of a chunk end to end."""
    numbers = [int(place.rpartition(" ")[2]) for place in places]
    unit = places[0].rpartition(" ")[0] if places else ""
    ids = np.concatenate([np.zeros(0, np.int32), *(one.ids for one in examples)])
    weights = np.concatenate([np.zeros(0, np.float32), *(one.weights for one in examples)])
    assert ids.dtype == np.int32 and weights.dtype == np.float32 and len(ids) == len(weights)
    if ((weights == 0) | (weights == 1)).all():
        weights = weights.astype(np.uint8)
    return Tokenized(
        num_rows=len(places),
        ids=ids,
        weights=weights,
        lengths=np.array([len(one.ids) for one in examples], np.int64),
        rows=np.array(rows, np.int64),
        places=np.array([numbers[row] for row in rows], np.int64),
        num_cut=np.array([one.num_cut for one in examples], np.int32),
        trained=np.array([np.count_nonzero(one.weights[1:]) for one in examples], np.int32),
        unit=unit,
        refused=refused,
        turn_ends=dict(collections.Counter(end for one in examples for end in one.turn_ends)),
    )


def tokenize(
    job: Job, chunks: Iterable[read.Chunk], num_workers: int
) -> Generator[tuple[read.Chunk, Tokenized]]:
    """Yield each chunk with its tokens, in order; close the generator to end its processes.

    Little data, and all data of a single worker, is tokenized in this process.

    Raises:
        ValueError: see `load`, and what reading the chunks raises.
        RuntimeError: a process ended before its work was done.
    """
    chunks = iter(chunks)
    first = collections.deque(itertools.islice(chunks, max(num_workers, FEW_CHUNKS + 1)))
    num_workers = min(num_workers, len(first))
    chunks = itertools.chain(_emptied(first), chunks)
    if num_workers == 1 or len(first) <= FEW_CHUNKS:
        encode = load(job)
        for chunk in chunks:
            yield chunk, encode(chunk)
    else:
        with _Processes(job, num_workers) as processes:
            yield from processes.tokenize(chunks)


def _emptied(queue: collections.deque) -> Iterator[Any]:
    while queue:
        yield queue.popleft()


class _Processes:
    """The processes that tokenize for this one, each with at most one chunk at a time.

    A process is sent a chunk only when it waits for one, so neither end blocks on a full pipe.
    """

    def __init__(self, job: Job, num_workers: int):
        self._processes: dict[Connection, subprocess.Popen] = {}
        self._num_workers, self._job = num_workers, job

    def __enter__(self) -> "_Processes":
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for _ in range(self._num_workers):
                connection, process = _start()
                self._processes[connection] = process
                self._send(connection, (self._job, CODE))
            undo.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End all processes; whatever they were doing is lost."""
        for connection, process in self._processes.items():
            connection.close()
            process.terminate()
        for process in self._processes.values():
            process.wait()

    def tokenize(self, chunks: Iterable[read.Chunk]) -> Iterator[tuple[read.Chunk, Tokenized]]:
        """Yield each chunk with its tokens, in order."""
        upcoming = enumerate(chunks)
        following = next(upcoming, None)
        idle: list[Connection] = []  # those that are loading are not idle yet
        working: dict[Connection, tuple[int, read.Chunk]] = {}
        done: dict[int, tuple[read.Chunk, Tokenized]] = {}
        num_yielded = 0
        while following is not None or working or done:
            while idle and following and following[0] < num_yielded + WINDOW * self._num_workers:
                self._send(idle[-1], following[1])
                working[idle.pop()] = following
                following = next(upcoming, None)
            if num_yielded in done:
                yield done.pop(num_yielded)
                num_yielded += 1
                continue
            for connection in wait(list(self._processes)):
                assert isinstance(connection, Connection)
                result = self._receive(connection)
                idle.append(connection)
                if connection in working:
                    number, chunk = working.pop(connection)
                    done[number] = chunk, result

    def _send(self, connection: Connection, message: Any) -> None:
        try:
            connection.send(message)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._ended(connection) from error

    def _receive(self, connection: Connection) -> Any:
        try:
            result = connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._ended(connection) from error
        if isinstance(result, str):
            raise ValueError(result)
        return result

    def _ended(self, connection: Connection) -> RuntimeError:
        code = self._processes[connection].wait()
        if code >= 0:
            return RuntimeError(
                f"a process that tokenizes failed (code {code}): see its error above"
            )
        name = signal.Signals(-code).name
        out_of_memory = (
            ", often the system's answer to too little memory: set data.num_workers below "
            f"{self._num_workers}"
        )
        return RuntimeError(
            f"a process that tokenizes was ended from outside by {name}"
            f"{out_of_memory if -code == signal.SIGKILL else ''}"
        )


def _start() -> tuple[Connection, subprocess.Popen]:
    ours, theirs = multiprocessing.Pipe()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(theirs.fileno()), *sys.path],
            pass_fds=[theirs.fileno()],
            env=os.environ | ONE_THREAD,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is for this process, which then ends the others
        )
    return ours, process


def serve(file_descriptor: int) -> None:
    """Tokenize what comes in, until the other end closes; the main function of a process.

    Answers (Job, CODE) with None when it is ready, or with the text of a ValueError.
    """
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        connection = Connection(file_descriptor)
        job, code = connection.recv()
        try:
            if code != CODE:
                raise ValueError("the code of the program changed since it started: start it again")
            encode = load(job)
        except ValueError as error:
            connection.send(str(error))
            return
        connection.send(None)
        while True:
            connection.send(encode(connection.recv()))


def code_versions(module: str) -> dict[str, str]:
    """Say what changes with the code: a hash of the source of a module and of each that it imports
    of this package; the versions of the libraries and of Python itself (its Unicode tables).
    """
    package = __name__.partition(".")[0]
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    versions["python"] = platform.python_version()
    pending = [module]
    while pending:
        name = pending.pop()
        if name in versions or name not in sys.modules or name.partition(".")[0] != package:
            continue
        text = Path(str(sys.modules[name].__file__)).read_bytes()
        versions[name] = hashlib.sha256(text).hexdigest()
        for source, imported in IMPORT.findall(text.decode()):
            names = re.findall(r"[\w.]+", imported)
            pending += [source, *(f"{source}.{name}" for name in names)] if source else names
    return dict(sorted(versions.items()))


# Taken now: the text of a module may change while the process runs on with the old one.
CODE = code_versions(__name__)
