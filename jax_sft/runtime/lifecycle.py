"""Start and end every program: safe output, signals, no traceback.

A program calls `begin` before its expensive imports and `run(main)` last. While it loads, a signal
ends it with one line. Inside `main`, Ctrl-C raises an exception (`Interrupted`), so that unfinished
files are removed. `train` uses `preemption` instead, which saves.
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

# Signals that end a program. Slurm and Open MPI announce the end with SIGUSR1.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Slurm signals each process of a job step, a launcher passes its signal on, and closing a terminal
# sends several kinds of signals. Signals within this time are one request.
SAME_REQUEST_S = 3.0
# Nobody presses Ctrl-C twice this fast, but shells and runners that pass it on repeat it.
SAME_INTERRUPT_S = 0.1
DEAF_S = 3.0  # for the main thread to notice a signal; it may be compiling for minutes
LONGEST_LINE = 500  # characters of an unexpected error's message


class Interrupted(KeyboardInterrupt):
    """A signal ends this program; unfinished files are removed as the exception propagates."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Requests:
    """Distinguishes a second request to stop from several signals of the same request.

    A SIGINT is a new request after SAME_INTERRUPT_S. Other signals within SAME_REQUEST_S of the
    last request belong to it. A closing terminal (SIGHUP) never counts after a signal of another
    kind, so a user who has pressed Ctrl-C may leave while the run is saved.
    """

    def __init__(self):
        self.count = 0
        self._kinds: set[int] = set()
        # Times of the last signal and of the last signal that counted.
        self._last = self._counted = float("-inf")

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
    """Settings of the program of this process; the defaults apply in other programs."""

    is_jax_sft = False
    requeues = False  # whether it ends with REQUEUE when asked to stop
    folder: Path | None = None  # folder for the traceback of an unexpected error


def begin(requeues: bool = False) -> None:
    """Make output and signals safe; a program calls this before its slow imports.

    Args:
        requeues: whether the program is started again after a request to stop, as training is.
    """
    terminal.install(runs_on=requeues)
    _Program.is_jax_sft, _Program.requeues = True, requeues
    listen(_end_at_once)
    atexit.register(listen, signal.SIG_IGN)  # runs last of all exit handlers: see `run`
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked by `huge_pages`


def is_jax_sft() -> bool:
    """Return whether this process is a program of jax_sft, which jax_sft may end."""
    return _Program.is_jax_sft


def keeps(folder: Path) -> None:
    """Set the folder in which the traceback of an unexpected error is kept."""
    _Program.folder = folder


def listen(handler: Callable[[int, Any], Any] | signal.Handlers) -> dict[int, Any]:
    """Set the handler of all SIGNALS except ignored ones (nohup, a shell's background jobs).

    Returns:
        {signal: its previous handler}.
    """
    return {
        number: signal.signal(number, handler)
        for number in SIGNALS
        if signal.getsignal(number) not in (signal.SIG_IGN, None)
    }


def _end_at_once(number: int, frame: Any = None) -> None:
    """Report the signal and end the process; a handler for times when there is nothing to undo."""
    with contextlib.suppress(RuntimeError):  # the signal interrupted a write
        sys.stdout.flush()
    terminal.write_at_once(f"stopped: {signal.Signals(number).name}\n")
    os._exit(exit_codes.REQUEUE if _Program.requeues else 128 + number)


# ---- the end ------------------------------------------------------------------------------------


def run(main: Callable[[], Any], end: Callable[[int], Any] = sys.exit) -> NoReturn:
    """Run the main function of a program and end with its exit code.

    Any exception, including a library's that is not an `Exception` (a panic in Rust), becomes one
    line and an exit code. JAX_SFT_TRACEBACK=1 shows the traceback as well.

    Args:
        end: ends the process.
    """
    try:
        with contextlib.nullcontext() if _Program.requeues else _Interruptible():
            code = _code_of(main)
    except KeyboardInterrupt as interrupt:  # while an error was reported
        code = report(interrupt)
    # From here a second Ctrl-C ends a process that still waits for threads. After the exit handlers
    # Python restores the default handlers, and a signal would change the exit code. `begin` has
    # therefore registered an exit handler that ignores the signals.
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
        is_usage = ended.code == 2  # from argparse
        return exit_codes.USER_ERROR if is_usage else ended.code or exit_codes.DONE
    except BaseException as error:  # any exception: PanicException, library errors, bugs
        return report(error)


def report(error: BaseException) -> int:
    """Print one line about an error and return its exit code."""
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
    if code == exit_codes.REQUEUE:  # its notes have the command that resumes; others are JAX's
        line = "\n".join([line, *getattr(error, "__notes__", [])])
    print(line, file=sys.stderr, flush=True)
    return code


def _unexpected(error: BaseException) -> str:
    """Describe an unexpected error and the place of its traceback."""
    text = " ".join(str(error).split())
    if len(text) > LONGEST_LINE:
        text = text[:LONGEST_LINE] + " ..."
    try:
        where = f"traceback in {_keep_traceback(error)}"
    except OSError as write_error:
        where = f"its traceback could not be kept ({write_error})"
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
    """Return the command that started this program, in a form that can be typed again."""
    return os.environ.get("JAX_SFT_TYPED") or shlex.join(sys.orig_argv)


def program() -> str:
    """Return the name by which this program was called: "jax-sft train", "python -m jax_sft.train".

    The command `jax-sft` stores the typed line in JAX_SFT_TYPED.
    """
    file = Path(sys.argv[0])
    verb = file.parent.name if file.stem == "__main__" else file.stem
    is_short = os.environ.get("JAX_SFT_TYPED", "").startswith("jax-sft ")
    return f"jax-sft {verb}" if is_short else f"python -m jax_sft.{verb}"


def shows_traceback() -> bool:
    """Return whether JAX_SFT_TRACEBACK asks for tracebacks in addition to the one line."""
    return bool(os.environ.get("JAX_SFT_TRACEBACK"))


class _Interruptible:
    """Turns the first signal into `Interrupted` in the main thread; a second one ends the process.

    Handlers run between two instructions of the main thread. A thread notices the signal at once
    and ends the process if the main thread does not react within DEAF_S (a compiler, a library).
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
