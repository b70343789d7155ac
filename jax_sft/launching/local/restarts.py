"""What follows from how an attempt ended: hand the code on, or start again, and when.

Decisions only, no clock and no processes: `supervisor` does what is decided here.
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jax_sft.runtime import exit_codes

MAX_DELAY_S = 60
# A process that starts again may find the others still going down: that is not its failure.
REGROUP_S = 600
# In this order, whichever process said it: no restart helps against the first three.
_HANDED_ON = (
    exit_codes.USER_ERROR,
    exit_codes.BAD_DATA,
    exit_codes.NOT_SAVED,
    exit_codes.REQUEUE,
)
# How a trainer ends that was told to stop before it could save, or whose peers had left already.
_CUT_SHORT = {
    *(-signal.SIGTERM, -signal.SIGINT, -signal.SIGUSR1, -signal.SIGHUP),
    *(-signal.SIGKILL, -signal.SIGABRT, exit_codes.LOST),
}


def first_error(ends: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Return (process, code) of the first process that failed, or None if all were done.

    Args:
        ends: (process, code) in the order in which they ended; those that ended within moments of
            each other, before anybody was told to stop. One that says why comes before those that
            only noticed that it was gone.
    """
    for wanted in _HANDED_ON:
        for process, code in ends:
            if code == wanted:
                return process, code
    failed = [(process, code) for process, code in ends if code != exit_codes.DONE]
    told = [end for end in failed if end[1] not in (exit_codes.LOST, -signal.SIGABRT)]
    return next(iter(told + failed), None)


def after_stop(codes: Sequence[int]) -> int:
    """Return what a supervisor hands on that was told to stop.

    Those that were cut short before they could save are to be queued again, too: their last
    checkpoint stands.
    """
    if all(code == exit_codes.DONE for code in codes):
        return exit_codes.DONE
    if exit_codes.REQUEUE in codes:
        return exit_codes.REQUEUE
    others = [code for code in codes if code != exit_codes.DONE and code not in _CUT_SHORT]
    return others[0] if others else exit_codes.REQUEUE


def for_the_shell(code: int) -> int:
    """Return a process's code as a shell would: 137 for killed by signal 9.

    255 is what ssh says when a host is lost, so a program's own 255 becomes 1.
    """
    return 128 - code if code < 0 else 1 if code == 255 else code


@dataclass(frozen=True)
class History:
    """What happened in the attempts of a supervisor so far."""

    counted: int = 0  # failures since the run last got further
    failures: int = 0  # the same with those that do not count
    furthest: int = -1  # step at which an attempt failed
    joined_once: bool = False
    apart_since: float | None = None  # when attempts began to end before all had met again
    last_counts: bool = False  # whether the last failure does


def after_failure(history: History, *, step: int, joined: bool, now: float) -> History:
    """Return the history with one more attempt that failed.

    Args:
        step: the last that was finished, -1 for none.
        joined: whether all processes had met.
        now: of a monotonic clock, in seconds.
    """
    if step > history.furthest:
        history = replace(history, counted=0, failures=0, furthest=step)
    since = history.apart_since
    if joined:
        since = None
    elif history.joined_once and since is None:
        since = now
    counts = since is None or now - since > REGROUP_S
    return replace(
        history,
        counted=history.counted + counts,
        failures=history.failures + 1,
        joined_once=history.joined_once or joined,
        last_counts=counts,
        apart_since=since,
    )


def delay_s(history: History) -> int:
    """Return how long to wait before the next attempt: 1, 2, 4 ... 60 s."""
    return min(MAX_DELAY_S, 2 ** min(history.failures - 1, 10))
