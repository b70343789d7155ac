"""Watch launchers on other hosts.

All stop when one ends with a final exit code, and all restart when a host is lost. `ssh` and
`ray_cluster` implement the connection to a host.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from jax_sft.launching.local import restarts
from jax_sft.launching.local.output import Printer
from jax_sft.launching.local.stop_requests import StopRequests
from jax_sft.launching.remote import heartbeat
from jax_sft.runtime import exit_codes

GONE = 255  # in place of an exit code: the host or the connection to it is lost
TICK_S = 0.2
STOP_MARGIN_S = 30  # added to the grace period, for a launcher to end after its trainers
STEADY_S = 600  # after an attempt that lasted so long, earlier losses no longer count


class Remote(Protocol):
    """A launcher on another host."""

    @property
    def name(self) -> str:
        """Name of the launcher in messages."""
        ...

    @property
    def reached(self) -> bool:
        """Whether the launcher has ever responded."""
        ...

    def poll(self) -> int | None:
        """Return the exit code, GONE, or None while the launcher runs."""
        ...

    def send(self, line: bytes) -> None:
        """Send the launcher a line of `heartbeat`."""
        ...

    def end(self) -> None:
        """Close the connection without waiting for the launcher."""
        ...


@dataclass(frozen=True)
class Options:
    """Limits and timeouts for the remote hosts."""

    max_restarts: int = 5
    grace_s: float = 120


def run(
    start: Callable[[StopRequests], Sequence[Remote]], options: Options, printer: Printer
) -> int:
    """Start a launcher on all hosts, restart all when one is lost, and return the exit code.

    Args:
        start: starts a launcher on every host; returns an empty list if asked to stop meanwhile.

    Raises:
        ValueError: `start` raised it, or no launcher could be started on a host.
    """
    requests = StopRequests()
    requests.listen()
    failures = 0
    while True:
        began = time.monotonic()
        remotes = start(requests)
        if not remotes:
            return exit_codes.REQUEUE
        try:
            codes = _watch(remotes, options, printer, requests)
        finally:
            for remote in remotes:
                remote.end()
        if requests.count:
            return restarts.after_stop(
                [exit_codes.LOST if code == GONE else code for _, code in codes]
            )
        name, code = next(((n, code) for n, code in codes if code), ("", exit_codes.DONE))
        if code != GONE:
            return code
        if not all(remote.reached for remote in remotes if remote.name == name):
            raise ValueError(f"no launcher could be started on {name}: see above")
        failures = 1 if time.monotonic() - began > STEADY_S else failures + 1
        if failures > options.max_restarts:
            printer.say(f"{name} is lost, and --max-restarts={options.max_restarts} reached")
            return exit_codes.LOST
        delay = min(restarts.MAX_DELAY_S, 2 ** (failures - 1))
        printer.say(
            f"{name} was lost: starting all again in {delay} s "
            f"(restart {failures} of at most {options.max_restarts})"
        )
        if not requests.wait(delay):
            return exit_codes.REQUEUE


def _watch(
    remotes: Sequence[Remote], options: Options, printer: Printer, requests: StopRequests
) -> list[tuple[str, int]]:
    """Watch until all launchers have ended; return (name, exit code) in the order of their ends."""
    ends: dict[int, int] = {}
    obeyed, deadline, beat_at = 0, float("inf"), 0.0
    while len(ends) < len(remotes):
        time.sleep(TICK_S)
        now = time.monotonic()
        running = [n for n in range(len(remotes)) if n not in ends]
        failed = any(ends.values())
        ends |= {n: code for n in running if (code := remotes[n].poll()) is not None}
        lines = []
        if now >= beat_at:
            lines, beat_at = [heartbeat.BEAT], now + heartbeat.BEAT_S
        if requests.count > obeyed or (any(ends.values()) and not failed):
            if requests.count > obeyed:
                printer.say("asked to stop: stopping all hosts")
            else:
                why = ", ".join(f"{remotes[n].name} {_how(ends[n])}" for n in ends if ends[n])
                printer.say(f"{why}: stopping the others")
            obeyed = requests.count
            lines.append(heartbeat.STOP)
            deadline = min(deadline, now + options.grace_s + STOP_MARGIN_S)
        for line in lines:
            for n in running:
                remotes[n].send(line)
        if now > deadline:
            late = [remotes[n].name for n in running if n not in ends]
            printer.say(f"{', '.join(late)} did not stop in time: no longer waiting")
            ends |= {n: GONE for n in running if n not in ends}
    return [(remotes[n].name, code) for n, code in ends.items()]


def _how(code: int) -> str:
    return "is lost" if code == GONE else f"ended with {exit_codes.describe(code)}"
