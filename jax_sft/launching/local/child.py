"""One running trainer: how it was started, whether it still makes progress, how it ended."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from jax_sft.launching.local import output, parent_death
from jax_sft.launching.processes import Process

_ORPHANS_S = 2.0  # for what a trainer has started to end after it


@dataclass(frozen=True)
class Status:
    """What a trainer last wrote about itself into its status file."""

    phase: str = "starting"
    joined: bool = False  # all processes have met
    step: int = -1  # last finished one


class Child:
    """A trainer in its own session, with its output pumped and its status file watched."""

    def __init__(
        self, process: Process, attempt: int, folder: Path, prefix: str, printer: output.Printer
    ):
        """Start it.

        Args:
            folder: for the status file; on this machine.
            prefix: in front of each of its lines.

        Raises:
            OSError: it cannot be started.
        """
        self.number = process.number
        self._file = folder / f"status.{process.number}.{attempt}"
        variables = {"JAX_SFT_STATUS": str(self._file), "JAX_SFT_ATTEMPT": str(attempt)}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", parent_death.__file__, str(os.getpid()), *process.command],
            env=os.environ | process.variables | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        stdout, stderr = self._process.stdout, self._process.stderr
        assert stdout and stderr
        self.pumps = (
            output.Pump(stdout, output.STDOUT, prefix, printer),
            output.Pump(stderr, output.STDERR, prefix, printer),
        )
        self.code: int | None = None  # how it ended
        self.aborted_at: float | None = None  # when it was ended for not making progress
        self.ever_wrote = False
        self._stamp: tuple[int, int] | None = None
        self._renewed = time.monotonic()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return how it ended, or None."""
        self.code = self._process.poll()
        return self.code

    def send(self, number: int, group: bool = False) -> None:
        """Send a signal to it, or to everything that it has started as well."""
        if self._process.poll() is not None:
            return
        if group:
            _signal_group(self._process.pid, number)
        else:
            self._process.send_signal(number)

    def silent_s(self) -> float:
        """Return for how many seconds it has not renewed its status file (or has not made it)."""
        try:
            found = self._file.stat()
        except FileNotFoundError:
            stamp = None
        else:
            stamp = (found.st_mtime_ns, found.st_ino)
        if stamp and stamp != self._stamp:
            self._stamp, self._renewed, self.ever_wrote = stamp, time.monotonic(), True
        return time.monotonic() - self._renewed

    def forgive(self, seconds: float) -> None:
        """Do not count seconds in which this whole machine stood still."""
        self._renewed += seconds

    def status(self) -> Status:
        """Return what it last wrote about itself."""
        try:
            raw = json.loads(self._file.read_text())
            return Status(str(raw["phase"]), bool(raw["joined"]), int(raw["step"]))
        except FileNotFoundError:
            return Status()
        except (OSError, ValueError, KeyError, TypeError) as error:
            return Status(phase=f"status file not readable: {error}")

    def clean_up(self) -> None:
        """After its end: end what it has left running, and take the rest of its output."""
        deadline = time.monotonic() + _ORPHANS_S
        while _signal_group(self._process.pid, 0) and time.monotonic() < deadline:
            time.sleep(0.02)
        _signal_group(self._process.pid, signal.SIGKILL)
        for pump in self.pumps:
            pump.join(timeout=_ORPHANS_S)


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to a process group; False if nothing of it is left."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
