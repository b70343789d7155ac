"""How every program starts and ends: safe output, signals, no traceback.

A program calls `begin` before its expensive imports and `run(main)` last. While it loads, a signal
ends it with one line. Within `main`, Ctrl-C is an exception (`Interrupted`), so that unfinished
files are removed; `train` has `preemption` instead, which saves.
"""

import atexit
import contextlib
import os
import shlex
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from jax_sft.runtime import exit_codes, terminal

# Which end a program; SIGUSR1 is Slurm's and Open MPI's way to announce that.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Slurm signals each process of a job step, a launcher hands its signal on, and who closes a
# terminal sends several kinds: within so long they are one request.
SAME_REQUEST_S = 3.0
# Nobody presses Ctrl-C twice so fast; shells and runners that hand it on do.
SAME_INTERRUPT_S = 0.1
DEAF_S = 3.0  # for the main thread to notice a signal; it may be compiling for minutes
LONGEST_LINE = 500  # characters of an unexpected error's message


class Interrupted(KeyboardInterrupt):
    """A signal ends this program; what is unfinished is removed on the way."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Requests:
    """Tells a second request to stop from the first one that comes by several ways.

    A SIGINT is a request of its own after SAME_INTERRUPT_S. Of other signals those within
    SAME_REQUEST_S are one, and a terminal that closes (SIGHUP) never adds to a request of another
    kind: who has pressed Ctrl-C may leave while the run is saved.
    """

    def __init__(self):
        self.count = 0
        self._kinds: set[int] = set()
        self._last = self._counted = float("-inf")  # the last signal, the last that counted

    def note(self, number: int) -> bool:
        """Note a signal; return whether it is a new request."""
        now = time.monotonic()
        if number == signal.SIGINT:
            is_new = now - self._last > SAME_INTERRUPT_S
        else:
            is_new = now - self._counted > SAME_REQUEST_S
        if number == signal.SIGHUP and self._kinds - {number}:
            is_new = False
        self._kinds.add(number)
        self._last = now
        if is_new:
            self.count += 1
            self._counted = now
        return is_new


# ---- the start ----------------------------------------------------------------------------------


class _Program:
    """What is known of the program that this process is; nothing in somebody else's."""

    is_ours = False
    requeues = False  # it ends with REQUEUE when told to stop
    folder: Path | None = None  # where it leaves the traceback of an unexpected error


def begin(requeues: bool = False) -> None:
    """Make output and signals safe; called by a program before what takes long to import.

    Args:
        requeues: it is started again after a request to stop, as a training is.
    """
    terminal.install(runs_on=requeues)
    _Program.is_ours, _Program.requeues = True, requeues
    listen(_end_at_once)
    atexit.register(listen, signal.SIG_IGN)  # the last of all: see `run`
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # see `huge_pages`


def is_ours() -> bool:
    """Whether this process is one of our programs, and may be ended as such."""
    return _Program.is_ours


def keeps(folder: Path) -> None:
    """Name the folder in which a traceback is kept, once there is one."""
    _Program.folder = folder


def listen(handler: Callable[[int, Any], Any] | signal.Handlers) -> dict[int, Any]:
    """Take the signals over, but for those that are ignored (nohup, a shell's background jobs).

    Returns:
        {signal: its handler before}.
    """
    return {
        number: signal.signal(number, handler)
        for number in SIGNALS
        if signal.getsignal(number) not in (signal.SIG_IGN, None)
    }


def _end_at_once(number: int, frame: Any = None) -> None:
    """Say so and end (a signal handler): nothing is there yet, or nothing is left, to be undone."""
    with contextlib.suppress(RuntimeError):  # interrupted within a write
        sys.stdout.flush()
    terminal.write_at_once(f"stopped: {signal.Signals(number).name}\n")
    os._exit(exit_codes.REQUEUE if _Program.requeues else 128 + number)


# ---- the end ------------------------------------------------------------------------------------


def run(main: Callable[[], Any], end: Callable[[int], Any] = sys.exit) -> NoReturn:
    """Run the main function of a program, and end with its exit code.

    Whatever it raises, library exceptions that are no `Exception` included (a panic in Rust), is
    one line and a code. JAX_SFT_TRACEBACK=1 shows the traceback as well.

    Args:
        end: ends the process.
    """
    try:
        with contextlib.nullcontext() if _Program.requeues else _Interruptible():
            code = _code_of(main)
    except KeyboardInterrupt as late:  # while an error was reported
        code = report(late)
    # A second Ctrl-C ends what still waits for threads. Behind that Python gives signals back their
    # defaults, and the exit code would be that of a signal: there they are ignored.
    listen(_end_at_once)
    sys.stdout.flush()
    sys.stderr.flush()
    end(code)
    raise AssertionError("the process has ended")


def _code_of(main: Callable[[], Any]) -> int:
    try:
        return main() or exit_codes.DONE
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
            return exit_codes.CRASH
        is_usage = ended.code == 2  # argparse's
        return exit_codes.USER_ERROR if is_usage else ended.code or exit_codes.DONE
    except BaseException as error:  # anything at all: PanicException, library errors, bugs
        return report(error)


def report(error: BaseException) -> int:
    """Print one line about an error, and return the exit code that it means."""
    code = exit_codes.of(error)
    if shows_traceback():
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        line = f"stopped: {str(error) or 'SIGINT'}"
    elif isinstance(error, OSError) and exit_codes.is_expected(error):
        line = f"error: {type(error).__name__}: {error}"
    elif exit_codes.is_expected(error):
        line = f"{'stopped' if code == exit_codes.REQUEUE else 'error'}: {error}"
    else:
        line = f"error: {_unexpected(error)}"
    if code == exit_codes.REQUEUE:  # with the command that resumes; other notes are JAX's
        line = "\n".join([line, *getattr(error, "__notes__", [])])
    print(line, file=sys.stderr, flush=True)
    return code


def _unexpected(error: BaseException) -> str:
    """Describe an error that nobody foresaw, and where its traceback is kept."""
    text = " ".join(str(error).split())
    if len(text) > LONGEST_LINE:
        text = text[:LONGEST_LINE] + " ..."
    try:
        where = f"traceback in {_keep_traceback(error)}"
    except OSError as full:
        where = f"its traceback could not be kept ({full})"
    return (
        f"unexpected {type(error).__name__}: {text} ({where}; JAX_SFT_TRACEBACK=1 shows it; it is "
        "a bug of this program, or of a library with a file that it was given)"
    )


def _keep_traceback(error: BaseException) -> str:
    folder = _Program.folder if _Program.folder and _Program.folder.is_dir() else None
    number, file = tempfile.mkstemp(prefix="traceback-", suffix=".txt", dir=folder)
    with open(number, "w", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(f"{typed()}\n\n")
        traceback.print_exception(error, file=stream)
    return file


def typed() -> str:
    """Return the command that started this program, as it can be typed again."""
    return os.environ.get("JAX_SFT_TYPED") or shlex.join(sys.orig_argv)


def program() -> str:
    """Return the name of this program as it was called: "jax-sft train", "python -m jax_sft.train".

    The command `jax-sft` leaves the line that was typed in JAX_SFT_TYPED.
    """
    file = Path(sys.argv[0])
    verb = file.parent.name if file.stem == "__main__" else file.stem
    is_short = os.environ.get("JAX_SFT_TYPED", "").startswith("jax-sft ")
    return f"jax-sft {verb}" if is_short else f"python -m jax_sft.{verb}"


def shows_traceback() -> bool:
    """Whether JAX_SFT_TRACEBACK asks for tracebacks as well as one line."""
    return bool(os.environ.get("JAX_SFT_TRACEBACK"))


class _Interruptible:
    """Turns the first signal into `Interrupted` in the main thread; a second one ends the process.

    Handlers run between two instructions of the main thread. A thread notices at once, and ends a
    process whose main thread does not (a compiler, a library).
    """

    def __enter__(self) -> None:
        self._requests, self._raised = Requests(), threading.Event()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        listen(self._raise)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(self._before_fd)
        self._writer.close()  # ends the thread
        self._thread.join()
        self._reader.close()

    def _raise(self, number: int, frame: Any) -> None:
        if not self._raised.is_set():
            self._raised.set()
            raise Interrupted(number)

    def _watch(self) -> None:
        first = 0
        while True:
            try:
                received = self._reader.recv(64)
            except TimeoutError:
                if not self._raised.is_set():
                    _end_at_once(first)
                self._reader.settimeout(None)
                continue
            if not received:
                return
            for number in received:
                if number in SIGNALS and self._requests.note(number):
                    if self._requests.count > 1:
                        _end_at_once(number)
                    first = number
                    self._reader.settimeout(DEAF_S)
