"""Merge the output of many processes: whole lines, each with a prefix that names its process."""

import collections
import os
import threading
from typing import IO, Protocol

from jax_sft.runtime import terminal

TAIL_LINES = 20
_MAX_LINE = 1 << 16  # bytes; a progress bar without line ends is cut after so many
STDOUT, STDERR = terminal.STDOUT, terminal.STDERR


class Printer:
    """Writes whole lines to this process's stdout and stderr, from any thread.

    Output that cannot be written (a closed pipe, a full disk under a log file) is dropped, so that
    training does not end because of its log. Control characters are escaped, see `terminal`.
    """

    def __init__(self, name: str = ""):
        """Args: name: prefix of this launcher's own lines, e.g. its host if there are several."""
        self._lock = threading.Lock()
        self._sinks = {n: terminal.Sink(n, runs_on=True) for n in (STDOUT, STDERR)}
        self._say_prefix = f"[{name}] launch: " if name else "launch: "

    def say(self, text: str) -> None:
        """Print a message of the launcher itself to stderr."""
        for line in text.splitlines():
            self.write(STDERR, (self._say_prefix + line + "\n").encode())

    def write(self, stream: int, line: bytes) -> None:
        """Write one line, including its line end, to STDOUT or STDERR."""
        text = line.decode(errors="backslashreplace")
        with self._lock:
            self._sinks[stream].write(terminal.printable(text).encode(errors="backslashreplace"))


class Writer(Protocol):
    """A receiver of lines: a Printer, or an object that sends them elsewhere."""

    def write(self, stream: int, line: bytes) -> None:
        """Receive one line of STDOUT or STDERR, including its line end."""
        ...


class Pump(threading.Thread):
    """Reads a pipe to its end and passes every line on with a prefix."""

    def __init__(self, pipe: IO[bytes], stream: int, prefix: str, printer: Writer):
        super().__init__(daemon=True)
        self._pipe, self._stream = pipe, stream
        self._prefix, self._printer = prefix.encode(), printer
        self.tail: collections.deque[bytes] = collections.deque(maxlen=TAIL_LINES)
        self.num_lines = 0
        self.start()

    def run(self) -> None:
        rest = b""
        while chunk := os.read(self._pipe.fileno(), _MAX_LINE):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) >= _MAX_LINE:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._line(line)
        if rest:
            self._line(rest)
        self._pipe.close()

    def _line(self, line: bytes) -> None:
        line = line.rstrip(b"\r").rpartition(b"\r")[2]  # last state of a progress bar
        self.tail.append(line)
        self.num_lines += 1
        self._printer.write(self._stream, self._prefix + line + b"\n")
