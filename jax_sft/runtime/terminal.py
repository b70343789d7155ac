"""Safe output streams: printing never fails, and printed data cannot move the cursor.

`install` replaces stdout and stderr of a program of jax_sft. `guarded` replaces them while
`jax_sft.train` runs inside another program. Output that cannot be written is dropped. Characters
that cannot be encoded and control characters are shown as escapes, because names, messages and
templates come from untrusted files.
"""

import contextlib
import io
import os
import re
import select
import stat
import sys
from collections.abc import Iterator
from typing import Any

STDOUT, STDERR = 1, 2
STUCK_S = 10.0  # for a reader that reads nothing (Ctrl-S, a pager); later output is dropped
# A pipe that is ready accepts this many bytes without blocking (POSIX: PIPE_BUF is 4096 on Linux).
_PIECE = 4096
# C0 except tab and newline, DEL, C1, line separators, and characters that reorder text (bidi
# overrides and isolates).
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
# Progress bars, of jax_sft and of libraries, move the cursor up if several are below each other.
_UP = re.compile(r"(\x1b\[A)+")


def escaped(text: str) -> str:
    r"""Escape control characters of a text, as in \x1b and \u202e; tabs and newlines stay."""
    return _CONTROL.sub(_escape, text) if _CONTROL.search(text) else text


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def printable(text: str) -> str:
    """Escape a text written to a stream, except for the cursor movements of progress bars."""
    if text.startswith("\r"):
        return "\r" + escaped(text[1:])
    return text if _UP.fullmatch(text) else escaped(text)


class Sink(io.RawIOBase):
    """A file descriptor that accepts all bytes and drops those that cannot be written.

    Args:
        runs_on: whether the program continues without a reader. It then waits at most STUCK_S for
            a reader, and reports on stderr that its stdout is lost.
    """

    def __init__(self, number: int, runs_on: bool):
        self.name = f"<{'stdout' if number == STDOUT else 'stderr'}>"
        self._number, self._tells = number, runs_on and number == STDOUT
        self._waits = select.poll() if runs_on and _may_block(number) else None
        if self._waits:
            self._waits.register(number, select.POLLOUT)
        self._dropped = 0  # bytes dropped since the reader got stuck

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        with contextlib.suppress(OSError):
            return os.isatty(self._number)
        return False

    def write(self, given: Any, /) -> int:
        """Write or drop all bytes."""
        data = bytes(given)
        try:
            self._write(data)
        except OSError as error:
            if self._tells:
                self._tells = False
                write_at_once(f"stdout cannot be written, and is dropped: {error}\n")
        return len(data)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            if self._waits and not self._is_taken(len(rest)):
                return
            try:
                rest = rest[os.write(self._number, rest[:_PIECE] if self._waits else rest) :]
            except BlockingIOError:  # another program has made the terminal non-blocking
                select.select([], [self._number], [], STUCK_S)

    def _is_taken(self, num_bytes: int) -> bool:
        """Wait until the reader is ready; return False if it is not within STUCK_S."""
        assert self._waits
        if not self._waits.poll(0 if self._dropped else STUCK_S * 1000):
            self._dropped += num_bytes
            return False
        if self._dropped:
            note = f"\n[{self._dropped} bytes were dropped: nobody read them for {STUCK_S:.0f} s]\n"
            self._dropped = 0
            os.write(self._number, note.encode())
        return True


def _may_block(number: int) -> bool:
    """Return whether a file descriptor is a pipe, a terminal or a socket."""
    with contextlib.suppress(OSError):
        return not stat.S_ISREG(os.fstat(number).st_mode)
    return False


class _Stream(io.TextIOWrapper):
    """Stdout or stderr of a program of jax_sft."""

    is_in_bar = False  # whether the cursor is behind a progress bar: other text begins a line

    def write(self, text: str, /) -> int:
        if not text:
            return 0
        if self.is_in_bar and text[0] not in "\r\n\x1b":
            super().write("\n")
        self.is_in_bar = text[0] == "\r" and text[-1] not in "\r\n"
        return super().write(printable(text))

    def write_trusted(self, text: str) -> None:
        """Write trusted text without escaping its escape sequences."""
        super().write(text)


class _Guard(io.TextIOBase):
    """Wraps a stream of another program (a notebook, a test), which may fail or be closed."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return self._stream.isatty()
        return False

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("closed")
        return self._stream.fileno()

    def write(self, text: str, /) -> int:
        self._write(printable(text))
        return len(text)

    def write_trusted(self, text: str) -> None:
        """Write trusted text without escaping its escape sequences."""
        self._write(text)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                raw = text.encode(self.encoding, "backslashreplace")
                self._stream.write(raw.decode(self.encoding))

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._stream.flush()


def _safe(stream: Any, number: int, runs_on: bool) -> Any:
    """Return the safe replacement of sys.stdout or sys.stderr."""
    if isinstance(stream, _Stream | _Guard):
        return stream
    is_own = False
    # The stream may be None or have no file descriptor.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        stream.flush()
        is_own = isinstance(stream, io.TextIOWrapper) and stream.fileno() == number
    if not is_own:
        return _Guard(stream)
    return _Stream(
        io.BufferedWriter(Sink(number, runs_on)),
        encoding=stream.encoding,
        errors=stream.errors if stream.errors in ("replace", "ignore") else "backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def install(runs_on: bool = False) -> None:
    """Replace stdout and stderr of this program.

    A program calls this first, because libraries keep the streams that they see.

    Args:
        runs_on: whether the program continues without a reader, as training does; see `Sink`.
    """
    _fill_closed()
    sys.stdout = _safe(sys.stdout, STDOUT, runs_on)
    sys.stderr = _safe(sys.stderr, STDERR, runs_on)


def _fill_closed() -> None:
    """Open stdin, stdout and stderr if they are closed.

    Otherwise the next file would get their number, and the prints of a library would go into it.
    """
    for number in (0, STDOUT, STDERR):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Make stdout and stderr of another program safe inside the block."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _safe(sys.stdout, STDOUT, True), _safe(sys.stderr, STDERR, True)
    try:
        yield
    finally:
        streams = sys.stdout, sys.stderr
        for stream in streams:
            stream.flush()
        sys.stdout, sys.stderr = before


def print_trusted(text: str) -> None:
    """Print text with colors; its untrusted parts must be escaped already."""
    stream: Any = sys.stdout
    if isinstance(stream, _Stream | _Guard):
        stream.write_trusted(text + "\n")
    else:
        print(text)


def write_at_once(text: str) -> None:
    """Write to stderr without buffers, e.g. from inside a write or a signal handler."""
    start = "\n" if getattr(sys.stderr, "is_in_bar", False) else ""
    with contextlib.suppress(OSError):
        os.write(STDERR, (start + escaped(text)).encode(errors="backslashreplace"))
