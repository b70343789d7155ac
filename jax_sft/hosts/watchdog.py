"""Detect dead, stalled or unreachable processes and end the run, so that nothing hangs forever.

`train` reports its phase to a Watchdog and hands it the unfinished results of each step. Once a
second the processes exchange their phases. When a process is silent, or no step finishes, for too
long, every process prints which one is late, the phase of each and the stacks of its own threads.
It then ends with exit_codes.LOST, so that the launcher restarts the run.
"""

import faulthandler
import json
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from jax_sft.hosts import cluster
from jax_sft.runtime import exit_codes

BEAT_S = 1.0
STATUS_S = 2.0  # between two writes of the launcher's status file
# Limit for phases that are slow by nature and that processes need not enter together: reading
# data, loading weights, compiling, saving. A process that dies is noticed as fast as in any other.
SLOW_PHASE_S = 3600.0
SLOWER_THAN_USUAL = 5  # up to this many times the slowest recent step is not a stall


class Watchdog:
    """A context manager that runs the watching threads.

    An error that leaves the context is reported to the other processes.

    Args:
        timeout_s: seconds without a sign of life from a process, or without a finished step, after
            which all processes end; 0 = never.
        on_beat: called once a second after all processes have joined.
        end: ends the process with an exit code; tests replace it.
    """

    def __init__(
        self,
        timeout_s: float,
        on_beat: Callable[[], Any] = lambda: None,
        end: Callable[[int], Any] = os._exit,
    ):
        self._timeout_s, self._on_beat, self._end = timeout_s, on_beat, end
        self._status_file = os.environ.get("JAX_SFT_STATUS", "")
        # Current phase of this process, when it began, and its time limit.
        self._phase, self._since, self._limit_s = "starting", time.monotonic(), SLOW_PHASE_S
        self._moved = self._begun = self._since  # last progress; start of the current step
        self._step, self._done = -1, -1  # last step begun, last step finished
        self._durations: deque[float] = deque(maxlen=20)  # of the last steps, in seconds
        self._in_flight: queue.SimpleQueue = queue.SimpleQueue()
        self._compiled: set[Any] = set()  # shapes of batches that have run
        self._joined = False
        self._heard: dict[str, str] = {}  # last beat/N and goodbye/N of the other processes
        self._changed: dict[str, float] = {}  # when each of them last changed
        self._answered = self._since  # when the coordinator last answered
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=f"watchdog: {name}", daemon=True)
            for name, target in (("clock", self._watch), ("steps", self._finish_steps))
        ]

    # ---- called by train -----------------------------------------------------------------------

    def __enter__(self) -> "Watchdog":
        self._write_status()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._closing.set()  # from here on the watching thread does not end this process
        if isinstance(error, jax.errors.JaxRuntimeError):
            _explain(error)
        if self._done >= 0 and error is not None and not exit_codes.is_expected(error):
            error.exit_code = exit_codes.CRASH  # training worked until now: not the user's error
        if error is not None and not isinstance(error, cluster.Stopped):
            cluster.say_goodbye(f"{kind.__name__}: {error}", exit_codes.of(error))
        self._in_flight.put(None)
        for thread in self._threads:
            thread.join(timeout=2 * BEAT_S)
        self._write_status()

    def joined(self) -> None:
        """Note that all processes have joined; from now on they watch each other."""
        self._joined = True
        if cluster.num_processes() == 1:
            return
        cluster.hosts()
        others = set(range(cluster.num_processes())) - {cluster.process_id()}
        self._answered = time.monotonic()
        self._heard = {f"beat/{n}": self._state() for n in others}
        self._changed = dict.fromkeys(self._heard, self._answered)
        beats = threading.Thread(target=self._beat, name="watchdog: beats", daemon=True)
        beats.start()
        self._threads.append(beats)

    def at(self, phase: str, limit_s: float = SLOW_PHASE_S) -> None:
        """Note the phase that this process enters, and the time limit of the phase."""
        self._since = self._moved = time.monotonic()
        self._phase, self._limit_s = phase, limit_s

    def batches(self, batches: Iterable[Any], first_step: int) -> Iterator[Any]:
        """Yield the batches of the steps from `first_step`, noting each wait and each step."""
        iterator, step, limit_s = iter(batches), first_step, SLOW_PHASE_S
        while True:
            self.at(f"waiting for the data of step {step}", limit_s)
            batch = next(iterator, None)
            if batch is None:
                return
            shapes = tuple((name, array.shape) for name, array in batch.items())
            limit_s = self._timeout_s if shapes in self._compiled else SLOW_PHASE_S
            self._step, self._begun = step, time.monotonic()
            self.at(f"running step {step}", limit_s)
            yield batch
            self._compiled.add(shapes)
            limit_s = self._timeout_s
            step += 1

    def started(self, results: Any) -> None:
        """Note the unfinished result arrays of the step that was just dispatched."""
        self._in_flight.put((self._step, self._begun, results))

    # ---- threads -------------------------------------------------------------------------------

    def _finish_steps(self) -> None:
        """Wait for each step in turn; the training loop itself runs ahead of the devices."""
        finished = 0.0
        while (item := self._in_flight.get()) is not None:
            step, begun, results = item
            try:
                jax.block_until_ready(results)
            except jax.errors.JaxRuntimeError as error:
                print(f"step {step} failed: {_first_line(error)}", file=sys.stderr, flush=True)
                continue  # the training loop raises the error when it reads the results
            now = time.monotonic()
            if self._done >= 0:  # the first step compiles
                self._durations.append(now - max(finished, begun))
            finished = self._moved = now
            self._done = step

    def _beat(self) -> None:
        """Publish the phase of this process and read those of the other processes."""
        beat_s = BEAT_S * max(1.0, cluster.num_processes() / 128)
        own_keys = {f"beat/{cluster.process_id()}", f"goodbye/{cluster.process_id()}"}
        count = 0
        while not self._closing.wait(beat_s):
            count += 1
            try:
                cluster.publish(f"beat/{cluster.process_id()}", self._state(count))
                texts = cluster.read_all("beat") | cluster.read_all("goodbye")
                self._on_beat()
            except jax.errors.JaxRuntimeError as error:
                print(f"the coordinator does not answer: {error}", file=sys.stderr, flush=True)
                continue
            now = self._answered = time.monotonic()
            heard = self._heard | {k: text for k, text in texts.items() if k not in own_keys}
            for key, text in heard.items():
                if text != self._heard.get(key):
                    self._changed[key] = now
            self._heard = heard

    def _state(self, count: int = 0) -> str:
        state = {"phase": self._phase, "for_s": round(time.monotonic() - self._since)}
        return json.dumps(state | {"step": self._step, "done": self._done, "count": count})

    def _watch(self) -> None:
        """Check the time limits; the only thread that ends the process."""
        last = written = time.monotonic()
        while not self._closing.wait(BEAT_S / 2):
            now = time.monotonic()
            if now - last > 10 * BEAT_S:  # this process itself was suspended and has resumed
                self._moved = self._since = self._answered = now
                self._changed = dict.fromkeys(self._changed, now)
            last = now
            if now - written > STATUS_S:
                self._write_status()
                written = now
            code = self._verdict(now)
            if code is not None:
                self._end(code)
                return

    # ---- judging what was heard ----------------------------------------------------------------

    def _verdict(self, now: float) -> int | None:
        """Report why this process must end now and return its exit code; None = continue."""
        # 1. A goodbye decides the exit code, even where there is no timeout.
        for key, text in sorted(self._heard.items()):
            # Wait a moment, so that a process with the same reason can report it itself.
            if key.startswith("goodbye/") and now - self._changed[key] > cluster.GOODBYE_S / 2:
                code, _, message = text.partition(" ")
                self._report(f"{cluster.name(_number(key))} ended: {message}")
                return int(code)
        if not self._timeout_s:
            return None
        # 2. A silent process is reported rather than the lack of progress.
        waited_s = now - self._moved
        limit_s = max(self._limit_s, SLOWER_THAN_USUAL * max(self._durations, default=0.0))
        why = self._silent(now)
        if not why and waited_s > limit_s:
            why = f"{self._late()}: no progress for {waited_s:.0f} s (limit {limit_s:.0f} s)"
        if not why:
            return None
        self._report(why)
        # The stacks show the thread that hangs. sys.stderr may be replaced, so use the original.
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        cluster.say_goodbye(why, exit_codes.LOST)
        return exit_codes.LOST

    def _silent(self, now: float) -> str:
        """Return a message that names the processes that were silent for too long; "" = none."""
        if not self._heard:
            return ""
        silent_s = now - self._answered
        if silent_s > self._timeout_s:
            name = cluster.name(0)
            return f"{name} has not answered for {silent_s:.0f} s, or cannot be reached from here"
        beats = [key for key in self._heard if key.startswith("beat/")]
        lost = [_number(key) for key in beats if now - self._changed[key] > self._timeout_s]
        return (
            f"{cluster.names(sorted(lost))} sent no sign of life for {self._timeout_s:.0f} s"
            * bool(lost)
        )

    def _late(self) -> str:
        """Return a message that names the processes the others are probably waiting for."""
        states = {cluster.process_id(): json.loads(self._state())}
        for key, text in self._heard.items():
            if key.startswith("beat/"):
                states[_number(key)] = json.loads(text)
        behind = min(state["step"] for state in states.values())
        late = [n for n, state in states.items() if state["step"] == behind]
        # Processes that are not in the step are the ones the others are waiting for.
        busy = [n for n in late if not states[n]["phase"].startswith("running step")]
        if len(states) > 1 and len(late) == len(states) and not busy:
            return f"all processes hang within step {behind}: a device or a link"
        return f"{cluster.names(sorted(busy or late))} late"

    def _report(self, why: str) -> None:
        now = time.monotonic()
        own_line = (
            f"  {cluster.name(cluster.process_id())}: {self._phase} for {now - self._since:.0f} s"
        )
        lines = [f"STOPPED: {why}", f"{own_line}, finished step {self._done}"]
        for key, text in sorted(self._heard.items()):
            if key.startswith("beat/"):
                state, silent_s = json.loads(text), now - self._changed[key]
                lines.append(
                    f"  {cluster.name(_number(key))}: {state['phase']} for {state['for_s']} s, "
                    f"finished step {state['done']}; last sign of life {silent_s:.0f} s ago"
                )
        print("\n".join(lines), file=sys.stderr, flush=True)

    def _write_status(self) -> None:
        """Report to this host's launcher that this process is alive, its phase and its step."""
        if not self._status_file:
            return
        status = {"phase": self._phase, "joined": self._joined, "step": self._done}
        unfinished = Path(f"{self._status_file}.{os.getpid()}")
        unfinished.write_text(json.dumps(status | {"time": time.time(), "pid": os.getpid()}))
        unfinished.replace(self._status_file)


def _explain(error: Exception) -> None:
    """Wait a moment for another process to report why it ended.

    Broken collectives are noticed before its message arrives.

    Raises:
        cluster.Stopped: another process reported why it ended.
    """
    deadline = time.monotonic() + 2 * cluster.GOODBYE_S
    while cluster.num_processes() > 1 and time.monotonic() < deadline:
        try:
            cluster.check_others()
        except cluster.Stopped as stopped:
            raise stopped from error
        except jax.errors.JaxRuntimeError as no_answer:
            print(f"the coordinator does not answer: {no_answer}", file=sys.stderr, flush=True)
            return
        time.sleep(0.2)


def _first_line(error: Exception) -> str:
    """Return the start of a message; XLA's messages may list all buffers of a device."""
    return str(error).partition("\n")[0][:500]


def _number(key: str) -> int:
    """Return the process number in a key such as beat/3."""
    return int(key.partition("/")[2])
