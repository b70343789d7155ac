"""On a signal to stop, all processes leave the loop after the same step and save.

A scheduler that takes a machine away sends a signal some time before (Slurm's --signal and
Kubernetes do). A user presses Ctrl-C or closes the terminal. Not every process needs to get it.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jax_sft.hosts import cluster
from jax_sft.runtime import exit_codes, lifecycle

SIGNALS = lifecycle.SIGNALS


class Preempted(RuntimeError):
    """The run was asked to stop; all that can be saved is saved."""

    exit_code = exit_codes.REQUEUE


class Preemption:
    """A context manager that notices the signals and agrees with all processes where to stop.

    The loop calls `reached` before each piece of work that all processes do together. Once one
    process is asked to stop, each publishes how many pieces it has begun. All stop after the
    highest of these counts, which no process has passed. Before `saves_from_here` there is nothing
    to save, and the process ends at once. A second request (see `lifecycle.Requests`) also ends it
    at once. In a program that is not part of jax_sft (a notebook), SIGINT raises KeyboardInterrupt
    instead of ending the process.

    Args:
        end: ends the process with an exit code; tests replace it.
    """

    def __init__(self, end: Callable[[int], Any] = os._exit):
        self._end = end
        self._asked = threading.Event()
        self._requests = lifecycle.Requests()
        self._saves = False
        self._idle = "there is nothing to save yet"
        self._on_signal: BaseException | None = None  # raised instead of ending the process
        self._raises: BaseException | None = None  # raised by the main thread as soon as it can
        self._changing = threading.Condition()
        self._begun = 0  # pieces of work begun
        self._posted: int | None = None  # count that this process has published
        self._last: int | None = None  # the piece of work after which all stop
        self._before: dict[int, Any] = {}
        self._before_fd = -1

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may set handlers: signals keep their usual effect
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        # Python's own handlers run only between two instructions of the main thread, which may be
        # compiling for minutes. The file descriptor is written to immediately.
        self._before_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._before = lifecycle.listen(self._handle)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._before_fd)
        self._writer.close()  # ends the thread
        self._thread.join()
        self._reader.close()

    @property
    def saves(self) -> bool:
        """Whether there is work to save."""
        return self._saves

    @property
    def requested(self) -> bool:
        """Whether this process knows that all processes are to stop."""
        return self._asked.is_set()

    def saves_from_here(self, saves: bool = True) -> None:
        """Note that there is work to save from now on, or that none is left.

        If none is left, a process of several that was asked to stop ends at once, without waiting
        for the others. A process that is alone continues to its end.
        """
        with self._changing:
            self._saves, self._idle = saves, "nothing is left to save"
        if not saves and self.requested and cluster.num_processes() > 1:
            self._end_at_once(self._idle)

    @contextmanager
    def raising(self, error: BaseException) -> Iterator[None]:
        """Raise `error` if asked to stop inside the block, so that unfinished files are removed."""
        with self._changing:
            self._on_signal = error
        try:
            yield
        finally:
            with self._changing:
                self._on_signal = None

    def reached(self) -> bool:
        """Count one more piece of work and return whether to stop instead of beginning it.

        Raises:
            cluster.Stopped: another process reported why it ends.
        """
        with self._changing:
            self._begun += 1
            if self._posted is None:
                return False
        while True:
            with self._changing:
                if self._last is None:
                    self._changing.wait(timeout=1.0)
                if self._last is not None:
                    return self._begun > self._last
            cluster.check_others()

    def beat(self) -> None:
        """Check whether another process was asked to stop; called about once a second.

        Raises:
            jax.errors.JaxRuntimeError: the coordinator does not answer.
        """
        if cluster.num_processes() == 1:
            return
        counts = cluster.read_all("stop")
        if not (counts or self.requested) or self._on_signal:
            return
        self._asked.set()
        with self._changing:
            saves = self._saves
            if saves and self._posted is None:
                self._posted = self._begun
        if not saves:
            self._end_at_once(self._idle)
            return
        cluster.publish(f"stop/{cluster.process_id()}", str(self._posted))
        counts = cluster.read_all("stop")
        if len(counts) == cluster.num_processes():
            with self._changing:
                self._last = max(int(text) for text in counts.values())
                self._changing.notify_all()

    def _listen(self) -> None:
        while received := self._reader.recv(64):
            for number in received:
                if number in SIGNALS and not self._raises:
                    self._notice(signal.Signals(number).name)

    def _notice(self, name: str) -> None:
        number = signal.Signals[name]
        if not self._requests.note(number):
            return
        if self._requests.count > 1:
            self._end_at_once(f"{name} for the second time: what is saved stays", number)
            return
        self._asked.set()
        with self._changing:
            saves, on_signal = self._saves, self._on_signal
            if saves and cluster.num_processes() == 1:
                self._posted = self._last = self._begun
        if saves:
            print(f"{name}: saving after this step; again = at once", file=sys.stderr, flush=True)
        elif on_signal:
            self._raise(on_signal, number)
        else:
            self._end_at_once(f"{name}: {self._idle}", number)

    def _end_at_once(self, why: str, number: int = 0) -> None:
        print(f"stopped at once: {why}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        if number == signal.SIGINT and not lifecycle.is_jax_sft() and self._before:
            self._raise(KeyboardInterrupt(why), number)
            return
        cluster.say_goodbye(f"asked to stop; {why}", exit_codes.REQUEUE)
        self._end(exit_codes.REQUEUE)

    def _raise(self, error: BaseException, number: int) -> None:
        """Raise an error in the main thread, which handles signals between two instructions."""
        self._raises = error
        signal.pthread_kill(threading.main_thread().ident or 0, number)

    def _handle(self, number: int, frame: Any) -> None:
        """Replace a signal's default action, which would end the process."""
        error, self._raises = self._raises, None
        if error:
            raise error
