"""Told to stop (by a signal): all processes leave the loop at the same step, saved.

A scheduler that takes a machine away sends a signal some time before (Slurm's --signal and
Kubernetes do), a user presses Ctrl-C or closes the terminal. Not every process need get one.
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
    """Told to stop; what can be saved is saved."""

    exit_code = exit_codes.REQUEUE


class Preemption:
    """Notices the signals and agrees on where to stop; a context manager.

    The loop asks `reached` before each piece of work that all processes do together. Work is
    counted, and once one process was told to stop each says how many pieces it has begun: all stop
    after the highest of these, which nobody is past. Before `saves_from_here` there is nothing to
    save, and the process ends at once; a second request (see `lifecycle.Requests`) ends it at once
    as well. In a program that is not ours (a notebook) SIGINT raises KeyboardInterrupt instead.

    Args:
        end: ends the process with an exit code; tests replace it.
    """

    def __init__(self, end: Callable[[int], Any] = os._exit):
        self._end = end
        self._told = threading.Event()
        self._requests = lifecycle.Requests()
        self._saves = False
        self._idle = "there is nothing to save yet"
        self._on_signal: BaseException | None = None  # is raised instead of ending the process
        self._raises: BaseException | None = None  # by the main thread, as soon as it can
        self._changing = threading.Condition()
        self._begun = 0  # pieces of work
        self._posted: int | None = None  # what this process has told the others
        self._last: int | None = None  # the piece of work after which all stop
        self._before: dict[int, Any] = {}
        self._before_fd = -1

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may have signals: then they do what they always do
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        # Python's own handlers run only between two instructions of the main thread, which may be
        # compiling for minutes; the file descriptor is written to at once.
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
        """Whether there is work to be saved."""
        return self._saves

    @property
    def told(self) -> bool:
        """Whether this process knows that all are to stop."""
        return self._told.is_set()

    def saves_from_here(self, saves: bool = True) -> None:
        """Note that there is work to be saved from now on, or that there is none any more.

        Then a process that was told to stop does not wait for others; one alone is done.
        """
        with self._changing:
            self._saves, self._idle = saves, "nothing is left to save"
        if not saves and self.told and cluster.num_processes() > 1:
            self._end_at_once(self._idle)

    @contextmanager
    def raising(self, error: BaseException) -> Iterator[None]:
        """Raise an error at a request to stop within, so that unfinished files are removed."""
        with self._changing:
            self._on_signal = error
        try:
            yield
        finally:
            with self._changing:
                self._on_signal = None

    def reached(self) -> bool:
        """Count one more piece of work; return whether to stop instead of beginning it.

        Raises:
            cluster.Stopped: another process has said why it ends.
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
        """Look whether another process was told to stop; called about once a second.

        Raises:
            jax.errors.JaxRuntimeError: the coordinator does not answer.
        """
        if cluster.num_processes() == 1:
            return
        found = cluster.read_all("stop")
        if not (found or self.told) or self._on_signal:
            return
        self._told.set()
        with self._changing:
            saves = self._saves
            if saves and self._posted is None:
                self._posted = self._begun
        if not saves:
            self._end_at_once(self._idle)
            return
        cluster.publish(f"stop/{cluster.process_id()}", str(self._posted))
        found = cluster.read_all("stop")
        if len(found) == cluster.num_processes():
            with self._changing:
                self._last = max(int(text) for text in found.values())
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
        self._told.set()
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
        if number == signal.SIGINT and not lifecycle.is_ours() and self._before:
            self._raise(KeyboardInterrupt(why), number)
            return
        cluster.say_goodbye(f"told to stop; {why}", exit_codes.REQUEUE)
        self._end(exit_codes.REQUEUE)

    def _raise(self, error: BaseException, number: int) -> None:
        """Raise in the main thread, which handles signals between two of its instructions."""
        self._raises = error
        signal.pthread_kill(threading.main_thread().ident or 0, number)

    def _handle(self, number: int, frame: Any) -> None:
        """Take the place of a signal's default, which would end the process."""
        error, self._raises = self._raises, None
        if error:
            raise error
