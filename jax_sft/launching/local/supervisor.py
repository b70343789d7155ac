"""Keep the processes of one host running: start, watch, stop and restart them.

Call `Supervisor(...).run()` in the main thread; it returns the exit code of this launcher.
"""

import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jax_sft.launching.local import restarts
from jax_sft.launching.local.child import Child
from jax_sft.launching.local.output import Printer
from jax_sft.launching.local.stop_requests import StopRequests
from jax_sft.launching.processes import Process
from jax_sft.runtime import exit_codes

TICK_S = 0.1
SETTLE_S = 2  # after the first end, for the other processes to report why, before they are stopped
FAREWELL_S = 10  # for other processes that have saved to close their files
LOST_KILL_S = 10  # the rest of a broken attempt has nothing to save
ABORT_S = 5  # for the stacks to be printed
UNKILLABLE_S = 60  # a process that waits for storage in the kernel cannot be killed
NEVER_WROTE_S = 600  # for the status file to appear: importing from a slow shared folder


@dataclass(frozen=True)
class Options:
    """Limits and timeouts of a supervisor."""

    max_restarts: int = 5  # without progress of the run
    grace_s: float = 120  # for saving after a request to stop
    stall_s: float = 120  # without an update of the status file
    writes_status: bool = True  # whether a program that never writes a status file is hanging


@dataclass(frozen=True)
class Outcome:
    """The end of an attempt."""

    code: int  # the decisive exit code, as a shell reports it
    step: int  # last finished step
    joined: bool  # whether all processes had joined
    stuck: bool  # whether a process still runs and cannot be killed


class Supervisor:
    """Runs the processes of one host until they are done or no restart can help."""

    def __init__(
        self,
        processes: Sequence[Process],
        options: Options,
        printer: Printer,
        *,
        alone: bool,
        host: str = "",
    ):
        """Prepare the supervisor without starting a process.

        Args:
            alone: whether the run has only one process, whose lines need no number.
            host: name of this host for the prefixes, if there are several hosts.
        """
        self.processes, self.options, self.printer = processes, options, printer
        self.alone, self.host = alone, host
        self.requests = StopRequests()
        self.obeyed = 0  # requests acted on

    def run(self) -> int:
        """Run the processes to their end and return the exit code of the launcher."""
        self.requests.listen()
        with tempfile.TemporaryDirectory(prefix="jax-sft-launch-") as folder:
            return self._run(Path(folder))

    def _run(self, folder: Path) -> int:
        history = restarts.History()
        attempt = 0
        while True:
            outcome = _Attempt(self, attempt, folder).run()
            if self.requests.count or outcome.code in exit_codes.FINAL:
                return outcome.code
            if outcome.stuck:
                self.say("not restarting while processes are left")
                return exit_codes.LOST
            history = restarts.after_failure(
                history, step=outcome.step, joined=outcome.joined, now=time.monotonic()
            )
            if history.counted > self.options.max_restarts:
                limit = self.options.max_restarts
                self.say(f"--max-restarts={limit} reached without progress: giving up")
                return outcome.code
            attempt += 1
            if not self._wait_to_restart(history, attempt):
                return exit_codes.REQUEUE

    def _wait_to_restart(self, history: restarts.History, attempt: int) -> bool:
        """Wait before a restart; return False if asked to stop meanwhile."""
        delay = restarts.delay_s(history)
        counted = f"restart {history.counted} of at most {self.options.max_restarts}"
        if not history.last_counts:
            counted = "not counted: the others were still shutting down"
        self.say(f"starting again in {delay} s ({counted}; attempt {attempt})")
        if self.requests.wait(delay):
            return True
        self.say("asked to stop while nothing was running")
        return False

    def say(self, text: str) -> None:
        self.printer.say(text)


class _Attempt:
    """One attempt: from the start of all processes of this host to the end of the last."""

    def __init__(self, supervisor: Supervisor, attempt: int, folder: Path):
        self._s, self._options, self._say = supervisor, supervisor.options, supervisor.say
        self._children = [
            Child(process, attempt, folder, self._prefix(process), supervisor.printer)
            for process in supervisor.processes
        ]
        self._ends: list[tuple[int, int]] = []  # (process, code), in order of their ends
        self._first_end = 0.0
        self._decided: tuple[int, int] | None = None  # (process, code): why the others stop
        self._stop_at: float | None = None  # when to send them SIGTERM
        self._kill_at: float | None = None  # when to send them SIGKILL

    def _prefix(self, process: Process) -> str:
        if self._s.alone:
            return ""
        return f"[{process.number} {self._s.host}] " if self._s.host else f"[{process.number}] "

    def run(self) -> Outcome:
        """Wait until all processes have ended; stop the others when one has failed."""
        before = time.monotonic()
        while running := [child for child in self._children if child.code is None]:
            time.sleep(TICK_S)
            now = time.monotonic()
            if now - before > 50 * TICK_S:  # this machine was suspended, or is very busy
                for child in running:
                    child.forgive(now - before)
            before = now
            self._collect(running, now)
            self._obey(now)
            self._stop_others(now)
            self._watch(now)
            if self._kill_at and now > self._kill_at + UNKILLABLE_S:
                self._say(f"{_numbers(running)} cannot be killed: is storage hanging?")
                break
        for child in self._children:
            child.clean_up()
        return self._outcome()

    def _collect(self, running: list[Child], now: float) -> None:
        """Note processes that have ended, and decide after SETTLE_S what their ends mean."""
        ended = [child for child in running if child.poll() is not None]
        if ended and not any(code != exit_codes.DONE for _, code in self._ends):
            self._first_end = now
        self._ends += [(child.number, child.code or 0) for child in ended]
        if self._decided or self._s.requests.count or now < self._first_end + SETTLE_S:
            return
        self._decided = restarts.first_error(self._ends)
        if self._decided is None:
            return
        # Time for the other processes to end, by what they may still have to do.
        code = self._decided[1]
        if code == exit_codes.REQUEUE:
            self._stop_at, self._kill_at = now + FAREWELL_S, now + self._options.grace_s
        elif code in exit_codes.FINAL:
            self._stop_at, self._kill_at = now, now + self._options.grace_s
        else:
            self._stop_at, self._kill_at = now, now + LOST_KILL_S - SETTLE_S

    def _obey(self, now: float) -> None:
        """Pass requests to stop on to the processes; the first one starts the grace period."""
        if self._s.requests.count == self._s.obeyed:
            return
        again = self._s.obeyed > 0
        self._s.obeyed = self._s.requests.count
        grace = self._options.grace_s
        self._say("asked again to stop: now" if again else f"asked to stop: at most {grace:g} s")
        for child in self._children:
            # A trainer counts a second SIGTERM within seconds as the same request, so send SIGINT.
            child.send(signal.SIGINT if again else signal.SIGTERM)
        self._stop_at = None
        self._kill_at = min(self._kill_at or now + grace, now + grace)

    def _stop_others(self, now: float) -> None:
        if self._stop_at and now >= self._stop_at:
            for child in self._children:
                child.send(signal.SIGTERM)
            self._stop_at = None
        if self._kill_at and now >= self._kill_at:
            for child in self._children:
                child.send(signal.SIGKILL, group=True)

    def _watch(self, now: float) -> None:
        """Abort a process that no longer updates its status file."""
        for child in self._children:
            if child.code is not None:
                continue
            if child.aborted_at is not None:
                if now >= child.aborted_at + ABORT_S:
                    child.send(signal.SIGKILL, group=True)
                continue
            limit = self._options.stall_s
            silent = child.silent_s()
            if not child.ever_wrote:
                limit = NEVER_WROTE_S if self._options.writes_status else float("inf")
            if silent > limit:
                self._say(
                    f"process {child.number} has said nothing for {silent:.0f} s, last at "
                    f"{child.status().phase!r}: printing its stacks and ending it"
                )
                child.aborted_at = now
                self._kill_at = self._kill_at or now + ABORT_S + LOST_KILL_S
                child.send(signal.SIGABRT)

    def _outcome(self) -> Outcome:
        statuses = [child.status() for child in self._children]
        stuck = any(child.code is None for child in self._children)
        if self._s.requests.count:
            code = restarts.after_stop(
                [exit_codes.LOST if c.code is None else c.code for c in self._children]
            )
            self._say(f"stopped: {exit_codes.describe(code)}")
        else:
            first = self._decided or restarts.first_error(self._ends)
            code = first[1] if first else exit_codes.LOST if stuck else exit_codes.DONE
            if first:
                self._tell(*first)
        return Outcome(
            code=restarts.for_the_shell(code),
            step=max(status.step for status in statuses),
            joined=any(status.joined for status in statuses),
            stuck=stuck,
        )

    def _tell(self, number: int, code: int) -> None:
        """Print which process failed first, why, and its last lines of stderr."""
        child = next(child for child in self._children if child.number == number)
        where = f" on {self._s.host}" if self._s.host else ""
        lines = [f"process {number}{where} ended first: {exit_codes.describe(code)}"]
        if child.aborted_at is not None:
            lines[0] += f" (ended by the launcher: no progress in {child.status().phase!r})"
        others = [end for end in self._ends if end[0] != number]
        if others:
            lines += ["the others: " + ", ".join(f"process {n}: {c}" for n, c in others)]
        tail = child.pumps[1].tail
        if tail and not self._s.alone:  # the lines of a process that is alone are right above
            lines += [f"the last lines of process {number}:"]
            lines += ["  " + line.decode(errors="replace") for line in tail]
        self._say("\n".join(lines))


def _numbers(children: Sequence[Child]) -> str:
    return ", ".join(f"process {child.number} (pid {child.pid})" for child in children)
