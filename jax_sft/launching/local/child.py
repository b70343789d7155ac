"""One running trainer: its start, its progress and its end."""

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

_ORPHANS_S = 2.0  # for processes that a trainer started to end after it


@dataclass(frozen=True)
class Status:
    """Content of a trainer's status file."""

    phase: str = "starting"
    joined: bool = False  # whether all processes have joined
    step: int = -1  # last finished step


class Child:
    """A trainer in its own session, with its output forwarded and its status file watched."""

    def __init__(
        self, process: Process, attempt: int, folder: Path, prefix: str, printer: output.Printer
    ):
        """Start the trainer.

        Args:
            folder: local folder for the status file.
            prefix: text in front of each line of its output.

        Raises:
            OSError: the trainer cannot be started.
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
        self.code: int | None = None  # exit code, None while it runs
        self.aborted_at: float | None = None  # when the launcher ended it for lack of progress
        self.ever_wrote = False
        self._stamp: tuple[int, int] | None = None
        self._renewed = time.monotonic()

    @property
    def pid(self) -> int:
        """Process id of the trainer."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, or None while the trainer runs."""
        self.code = self._process.poll()
        return self.code

    def send(self, number: int, group: bool = False) -> None:
        """Send a signal to the trainer, or to its whole process group."""
        if self._process.poll() is not None:
            return
        if group:
            _signal_group(self._process.pid, number)
        else:
            self._process.send_signal(number)

    def silent_s(self) -> float:
        """Return the seconds since the status file was last updated, or since the start."""
        try:
            stat = self._file.stat()
        except FileNotFoundError:
            stamp = None
        else:
            stamp = (stat.st_mtime_ns, stat.st_ino)
        if stamp and stamp != self._stamp:
            self._stamp, self._renewed, self.ever_wrote = stamp, time.monotonic(), True
        return time.monotonic() - self._renewed

    def forgive(self, seconds: float) -> None:
        """Do not count seconds in which this whole machine was suspended."""
        self._renewed += seconds

    def status(self) -> Status:
        """Return the content of the status file; an unreadable file is reported as the phase."""
        try:
            raw = json.loads(self._file.read_text())
            return Status(str(raw["phase"]), bool(raw["joined"]), int(raw["step"]))
        except FileNotFoundError:
            return Status()
        except (OSError, ValueError, KeyError, TypeError) as error:
            return Status(phase=f"status file not readable: {error}")

    def clean_up(self) -> None:
        """Kill processes that the trainer left running at its end; read the rest of its output."""
        deadline = time.monotonic() + _ORPHANS_S
        while _signal_group(self._process.pid, 0) and time.monotonic() < deadline:
            time.sleep(0.02)
        _signal_group(self._process.pid, signal.SIGKILL)
        for pump in self.pumps:
            pump.join(timeout=_ORPHANS_S)


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to a process group; return False if the group no longer exists."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
