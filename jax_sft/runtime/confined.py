"""A Python process with hard bounds of time and memory, for programs that come with a model.

Chat templates, tokenizers and their regular expressions are third-party programs. `worker` and
`detokenize` run them in such a process, never in the process that trains. One process is kept for
reuse. It ends with the process that started it.
"""

import atexit
import contextlib
import ctypes
import enum
import math
import mmap
import multiprocessing
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

BOUND_S = 8  # of CPU time per request; wall time may be longer on a busy machine
# Extra bounds for a large request: 2 GB in total, enough for a row of 12 MB in Qwen's tokens.
MOST_MORE_S, MOST_MORE_BYTES = 16, 200_000_000
BOUND_BYTES = 1_800_000_000  # in addition to the size of the process when a request arrives
STILL_S = 600  # without any CPU time, before a process is given up
OUT_OF_MEMORY = 3  # exit code

# Imported before the first request arrives, while the parent does other work.
PRELOADED = ("jax_sft.data.tokens.worker", "transformers.models.auto.tokenization_auto")
# The child has the same sys.path as this process. If torch is installed, transformers would import
# it for nothing: 2 s and 180 MB in each process.
CHILD = (
    "import sys; sys.path[:] = sys.argv[3:]; sys.modules['torch'] = None; "
    "from jax_sft.runtime import confined; confined.serve(int(sys.argv[1]), int(sys.argv[2]))"
)
ENVIRONMENT = {
    # There is one process per core, so no library may start a thread per core itself.
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RUST_BACKTRACE": "0",
}
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_NOTES = struct.Struct("=iii")  # stage, row, seconds allowed
_NOT_OF_LIBRARIES = (MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit)
_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class Stage(enum.IntEnum):
    """Stage of the process's work, which the parent can read."""

    IDLE = 0
    LOADING = 1  # a tokenizer
    COMPILING = 2  # a chat template, and probing how it renders
    READING = 3  # a row
    RENDERING = 4  # a row
    TOKENIZING = 5  # a row
    DECODING = 6


class OutOfBounds(ValueError):
    """A program that came with a model exceeded its bounds or crashed."""


class Ended(Exception):
    """The process ended before it answered.

    Attributes:
        code: return code as in subprocess.
        why: "time", "memory", "crash", "outside" (a signal from outside) or "fault" (of this
            package).
        stage, row: its stage and row at the end; -1 = no row.
        bound_s: seconds of CPU time that it was allowed.
        log: the end of its stderr.
    """

    def __init__(self, code: int, why: str, notes: tuple[int, int, int], log: str):
        super().__init__(f"the process ended with {code}")
        self.code, self.why, self.log = code, why, log
        self.stage, self.row, self.bound_s = Stage(notes[0]), notes[1], notes[2]

    def excess(self) -> str:
        """Return which bound the process exceeded, or how it crashed, for a message."""
        if self.why == "time":
            return f"does not end within {self.bound_s} s of computing"
        if self.why == "memory":
            return f"needs more than {BOUND_BYTES / 1e9:.1f} GB of memory"
        return f"crashes ({signal.Signals(-self.code).name})"


# ---- in the parent ------------------------------------------------------------------------------


class Process:
    """A confined process, which answers requests one at a time, in order."""

    def __init__(self):
        self._notes, self._log = tempfile.TemporaryFile(), tempfile.TemporaryFile("a+b")
        self._notes.truncate(_NOTES.size)
        self.connection, child_end = multiprocessing.Pipe()
        with child_end:
            passed = (child_end.fileno(), self._notes.fileno())
            self.popen = subprocess.Popen(
                [sys.executable, "-c", CHILD, *map(str, passed), *sys.path],
                pass_fds=passed,
                env=os.environ | ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._log,  # a panic of a Rust library writes to stderr even if caught
                process_group=0,  # Ctrl-C reaches only this process, which then ends the child
            )
        self.pending = 0  # requests without an answer yet

    def send(self, function: Callable, *args: Any) -> None:
        """Request function(*args); the child imports the function by its name.

        Raises:
            Ended: the process has ended.
        """
        try:
            self.connection.send((function, args))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._ended() from error
        self.pending += 1

    def receive(self) -> Any:
        """Return the answer to the oldest request.

        Raises:
            ValueError: the function raised a ValueError.
            Ended: the process ended: it exceeded its bounds, crashed, or has a fault.
        """
        if not self.connection.poll():
            wait_for([self])
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError) as error:  # OSError: it ended during an answer
            raise self._ended() from error
        self.pending -= 1
        if kind == "refused":
            raise ValueError(value)
        return value

    def call(self, function: Callable, *args: Any) -> Any:
        """Request function(*args) and return the answer; see `send` and `receive`."""
        self.send(function, *args)
        return self.receive()

    def cpu_s(self) -> float:
        """Return the seconds of CPU time so far, or 0.0 if the system does not report them."""
        try:
            fields = Path(f"/proc/{self.popen.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Kill the process and discard its work."""
        self.connection.close()
        self.popen.kill()
        self.popen.wait()
        self._notes.close()
        self._log.close()

    def _ended(self) -> Ended:
        code = self.popen.wait()
        notes = _NOTES.unpack(os.pread(self._notes.fileno(), _NOTES.size, 0))
        size = os.fstat(self._log.fileno()).st_size
        log = os.pread(self._log.fileno(), 4000, max(0, size - 4000)).decode(errors="replace")
        if code == -signal.SIGXCPU:
            why = "time"
        elif code == OUT_OF_MEMORY or "memory allocation of" in log:
            why = "memory"
        elif code >= 0:
            why = "fault"
        else:
            why = "outside" if -code in _OUTSIDE else "crash"
        return Ended(code, why, notes, log)


def wait_for(processes: list[Process]) -> list[Process]:
    """Wait until some of the processes have answered or ended, and return these.

    Each process measures its own bound, by its CPU time. Processes that neither compute nor answer
    for STILL_S are given up.

    Raises:
        RuntimeError: no process has computed or answered for STILL_S.
    """
    by_connection = {process.connection: process for process in processes}
    still, before = 0, [process.cpu_s() for process in processes]
    while not (ready := wait(list(by_connection), timeout=1)):
        now = [process.cpu_s() for process in processes]
        # Count turns of this loop, not wall time: a machine may have been suspended.
        still = 0 if now != before else still + 1
        before = now
        if still >= STILL_S:
            raise RuntimeError(
                f"the processes that tokenize have not computed for {STILL_S} s: start again"
            )
    return [by_connection[item] for item in ready if isinstance(item, Connection)]


# {process id: confined process kept for its next request}. By process id, because a fork has a copy
# of its parent's.
_kept: dict[int, Process] = {}


def take() -> Process:
    """Return a process that is ready for requests: the kept one if it still runs, or a new one."""
    process = _kept.pop(os.getpid(), None)
    if process and process.popen.poll() is not None:
        process.close()
        process = None
    return process or Process()


def give_back(process: Process) -> None:
    """Keep a process for the next use, or end it if it cannot be reused."""
    if process.pending or process.popen.poll() is not None or os.getpid() in _kept:
        process.close()
    else:
        _kept[os.getpid()] = process


def start_early() -> None:
    """Start the kept process, so that its imports overlap with other work."""
    give_back(take())


@contextlib.contextmanager
def borrowed() -> Iterator[Process]:
    """Yield a process that is ready for requests, and keep it afterwards."""
    process = take()
    try:
        yield process
    finally:
        give_back(process)


@atexit.register
def _end_kept() -> None:
    process = _kept.pop(os.getpid(), None)
    if process:
        process.close()


# ---- in the process -----------------------------------------------------------------------------

# In a confined process, `serve` replaces it with memory shared with the parent.
_notes: Any = bytearray(_NOTES.size)


def at(stage: Stage) -> None:
    """Note the current stage, for the message if the process exceeds its bounds."""
    _notes[0] = stage


def at_row(row: int) -> None:
    """Note the current row of the chunk."""
    struct.pack_into("=i", _notes, 4, row)


def serve(file_descriptor: int, notes: int) -> None:
    """Answer requests until the parent closes the pipe; the main function of the process."""
    global _notes
    _notes = mmap.mmap(notes, _NOTES.size)
    if sys.platform == "linux":  # end this process if the parent dies during a request
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for module in PRELOADED:
        import_module(module)
    connection = Connection(file_descriptor)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        while True:
            function, args = connection.recv()
            os.ftruncate(sys.stderr.fileno(), 0)
            at(Stage.IDLE)
            at_row(-1)
            allow()
            _send(connection, _answer(function, args))
    os._exit(0)


def _answer(function: Callable, args: tuple) -> tuple[str, Any]:
    try:
        return "done", function(*args)
    except ValueError as error:
        return "refused", str(error).encode("utf-8", "backslashreplace").decode()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)  # the state of this process is unreliable now


def _send(connection: Connection, answer: tuple[str, Any]) -> None:
    try:
        connection.send(answer)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


def allow(more_s: float = 0, more_bytes: int = 0) -> None:
    """Set the bounds of this process, counted from now. Does nothing outside a confined process.

    Args:
        more_s: CPU time in addition to BOUND_S; at most MOST_MORE_S counts.
        more_bytes: memory in addition to BOUND_BYTES; at most MOST_MORE_BYTES counts.
    """
    if not isinstance(_notes, mmap.mmap):
        return
    bound_s = math.ceil(BOUND_S + min(more_s, MOST_MORE_S))
    struct.pack_into("=i", _notes, 8, bound_s)
    _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + bound_s)
    with contextlib.suppress(OSError), open("/proc/self/statm") as stream:  # Linux
        size = int(stream.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        _limit(resource.RLIMIT_AS, size + BOUND_BYTES + min(more_bytes, MOST_MORE_BYTES))


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


class library_errors:
    """A context manager that turns errors of a library into a ValueError that begins with `what`.

    A Rust library panics with an exception that is not an Exception and cannot be imported. A
    MemoryError passes through, because it must end a confined process.
    """

    def __init__(self, what: str):
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind, error: BaseException | None, _traceback) -> None:
        if error is not None and not isinstance(error, _NOT_OF_LIBRARIES):
            text = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{self._what}: {text[:500]}") from error
