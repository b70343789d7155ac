"""Nothing hangs for ever: threads that notice a process that died, stalls or is cut off.

`train` tells a Watchdog what it does and hands it the unfinished results of each step. Once a
second the processes tell each other what they do. When one was not heard of, or no step finished,
for too long, every process says which one is late and what each was doing, prints the stacks of
its threads and ends with exit_codes.LOST, so that the launcher starts all again.
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
STATUS_S = 2.0  # between two writings of the launcher's status file
# Limit of phases that are slow by nature and need not be in step: reading data, loading weights,
# compiling, saving. A process that dies is noticed in them as fast as ever.
SLOW_PHASE_S = 3600.0
SLOWER_THAN_USUAL = 5  # times the slowest of the last steps is still not a stall


class Watchdog:
    """The threads; a context manager. An error that leaves the context is told to the others.

    Args:
        timeout_s: seconds without a sign of life of a process, or without a step finished, after
            which all end; 0 = never.
        on_beat: called once a second, once all processes have met.
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
        # What this process does, since when, and for how long it may.
        self._phase, self._since, self._limit_s = "starting", time.monotonic(), SLOW_PHASE_S
        self._moved = self._begun = self._since  # when anything went on; when the step was begun
        self._step, self._done = -1, -1  # begun and finished
        self._durations: deque[float] = deque(maxlen=20)  # of the last steps, seconds
        self._in_flight: queue.SimpleQueue = queue.SimpleQueue()
        self._compiled: set[Any] = set()  # shapes of batches that have run
        self._joined = False
        self._heard: dict[str, str] = {}  # beat/N and goodbye/N of the others: their last text
        self._changed: dict[str, float] = {}  # and when it last changed
        self._answered = self._since  # when the coordinator last answered
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=f"watchdog: {name}", daemon=True)
            for name, target in (("clock", self._watch), ("steps", self._finish_steps))
        ]

    # ---- what train tells ----------------------------------------------------------------------

    def __enter__(self) -> "Watchdog":
        self._write_status()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._closing.set()  # from here on nobody else ends this process
        if isinstance(error, jax.errors.JaxRuntimeError):
            _explain(error)
        if self._done >= 0 and error is not None and not exit_codes.is_expected(error):
            error.exit_code = exit_codes.CRASH  # no error of the user's, who has trained so far
        if error is not None and not isinstance(error, cluster.Stopped):
            cluster.say_goodbye(f"{kind.__name__}: {error}", exit_codes.of(error))
        self._in_flight.put(None)
        for thread in self._threads:
            thread.join(timeout=2 * BEAT_S)
        self._write_status()

    def joined(self) -> None:
        """Note that all processes have met: from now on they watch each other."""
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
        """Note what this process does now, and for how long that may take."""
        self._since = self._moved = time.monotonic()
        self._phase, self._limit_s = phase, limit_s

    def batches(self, batches: Iterable[Any], first_step: int) -> Iterator[Any]:
        """Yield the batches of the steps from `first_step`, noting when one is waited for."""
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
        """Note the unfinished arrays of the step that was just handed to the devices."""
        self._in_flight.put((self._step, self._begun, results))

    # ---- threads -------------------------------------------------------------------------------

    def _finish_steps(self) -> None:
        """Wait for each step in turn: the loop itself runs ahead of the devices."""
        finished = 0.0
        while (item := self._in_flight.get()) is not None:
            step, begun, results = item
            try:
                jax.block_until_ready(results)
            except jax.errors.JaxRuntimeError as error:
                print(f"step {step} failed: {_first_line(error)}", file=sys.stderr, flush=True)
                continue  # the loop fails with it when it reads the results
            now = time.monotonic()
            if self._done >= 0:  # the first one compiles
                self._durations.append(now - max(finished, begun))
            finished = self._moved = now
            self._done = step

    def _beat(self) -> None:
        """Tell the others what this process does, and hear what they do."""
        beat_s = BEAT_S * max(1.0, cluster.num_processes() / 128)
        ours = {f"beat/{cluster.process_id()}", f"goodbye/{cluster.process_id()}"}
        count = 0
        while not self._closing.wait(beat_s):
            count += 1
            try:
                cluster.publish(f"beat/{cluster.process_id()}", self._state(count))
                found = cluster.read_all("beat") | cluster.read_all("goodbye")
                self._on_beat()
            except jax.errors.JaxRuntimeError as error:
                print(f"the coordinator does not answer: {error}", file=sys.stderr, flush=True)
                continue
            now = self._answered = time.monotonic()
            heard = self._heard | {key: text for key, text in found.items() if key not in ours}
            for key, text in heard.items():
                if text != self._heard.get(key):
                    self._changed[key] = now
            self._heard = heard

    def _state(self, count: int = 0) -> str:
        state = {"phase": self._phase, "for_s": round(time.monotonic() - self._since)}
        return json.dumps(state | {"step": self._step, "done": self._done, "count": count})

    def _watch(self) -> None:
        """Look at the clock; the only thread that ends the process."""
        last = written = time.monotonic()
        while not self._closing.wait(BEAT_S / 2):
            now = time.monotonic()
            if now - last > 10 * BEAT_S:  # this very process was stopped, and goes on
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

    # ---- what they find ------------------------------------------------------------------------

    def _verdict(self, now: float) -> int | None:
        """Return the exit code to end with at once, having said why; None = go on."""
        for key, text in sorted(self._heard.items()):
            # A moment later, so that who has the same reason can tell it in its own words.
            if key.startswith("goodbye/") and now - self._changed[key] > cluster.GOODBYE_S / 2:
                code, _, message = text.partition(" ")
                self._report(f"{cluster.name(_number(key))} ended: {message}")
                return int(code)
        if not self._timeout_s:
            return None
        waited_s = now - self._moved
        limit_s = max(self._limit_s, SLOWER_THAN_USUAL * max(self._durations, default=0.0))
        why = self._silent(now)
        if not why and waited_s > limit_s:
            why = f"{self._late()}: nothing went on for {waited_s:.0f} s (limit {limit_s:.0f} s)"
        if not why:
            return None
        self._report(why)
        # What hangs is among the threads; the real stderr, because Python's may be replaced.
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        cluster.say_goodbye(why, exit_codes.LOST)
        return exit_codes.LOST

    def _silent(self, now: float) -> str:
        """Say which processes were not heard of for too long; "" = none."""
        if not self._heard:
            return ""
        silent_s = now - self._answered
        if silent_s > self._timeout_s:
            return (
                f"{cluster.name(0)} does not answer for {silent_s:.0f} s, or is cut off from here"
            )
        beats = [key for key in self._heard if key.startswith("beat/")]
        lost = [_number(key) for key in beats if now - self._changed[key] > self._timeout_s]
        return f"{cluster.names(sorted(lost))} not heard of for {self._timeout_s:.0f} s" * bool(
            lost
        )

    def _late(self) -> str:
        """Say which process the others wait for, as far as can be told."""
        states = {cluster.process_id(): json.loads(self._state())}
        for key, text in self._heard.items():
            if key.startswith("beat/"):
                states[_number(key)] = json.loads(text)
        behind = min(state["step"] for state in states.values())
        late = [n for n, state in states.items() if state["step"] == behind]
        # Who does something else than to run the step keeps those waiting who run it.
        busy = [n for n in late if not states[n]["phase"].startswith("running step")]
        if len(states) > 1 and len(late) == len(states) and not busy:
            return f"all processes hang within step {behind}: a device or a link"
        return f"{cluster.names(sorted(busy or late))} late"

    def _report(self, why: str) -> None:
        now = time.monotonic()
        ours = (
            f"  {cluster.name(cluster.process_id())}: {self._phase} for {now - self._since:.0f} s"
        )
        lines = [f"STOPPED: {why}", f"{ours}, finished step {self._done}"]
        for key, text in sorted(self._heard.items()):
            if key.startswith("beat/"):
                state, silent_s = json.loads(text), now - self._changed[key]
                lines.append(
                    f"  {cluster.name(_number(key))}: {state['phase']} for {state['for_s']} s, "
                    f"finished step {state['done']}; heard of {silent_s:.0f} s ago"
                )
        print("\n".join(lines), file=sys.stderr, flush=True)

    def _write_status(self) -> None:
        """Tell the launcher of this host that this process is alive, and how far it is."""
        if not self._status_file:
            return
        status = {"phase": self._phase, "joined": self._joined, "step": self._done}
        unfinished = Path(f"{self._status_file}.{os.getpid()}")
        unfinished.write_text(json.dumps(status | {"time": time.time(), "pid": os.getpid()}))
        unfinished.replace(self._status_file)


def _explain(error: Exception) -> None:
    """Wait a moment for another process to say why it ended: broken collectives come first.

    Raises:
        cluster.Stopped: it has said why.
    """
    deadline = time.monotonic() + 2 * cluster.GOODBYE_S
    while cluster.num_processes() > 1 and time.monotonic() < deadline:
        try:
            cluster.check_others()
        except cluster.Stopped as told:
            raise told from error
        except jax.errors.JaxRuntimeError as broken:
            print(f"the coordinator does not answer: {broken}", file=sys.stderr, flush=True)
            return
        time.sleep(0.2)


def _first_line(error: Exception) -> str:
    """XLA's messages may list all buffers of a device."""
    return str(error).partition("\n")[0][:500]


def _number(key: str) -> int:
    """The process of a key such as beat/3."""
    return int(key.partition("/")[2])
