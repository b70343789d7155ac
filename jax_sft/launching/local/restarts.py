"""Decide after an attempt whether to pass its exit code on or to restart, and when.

This module only decides, without a clock or processes; `supervisor` acts on the decisions.
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jax_sft.runtime import exit_codes

MAX_DELAY_S = 60
# A restarted process may fail because the others are still shutting down. Such failures do not
# count for this long.
REGROUP_S = 600
# Precedence among exit codes, from any process. No restart helps against the first three.
_HANDED_ON = (
    exit_codes.USER_ERROR,
    exit_codes.BAD_DATA,
    exit_codes.NOT_SAVED,
    exit_codes.REQUEUE,
)
# Exit codes of a trainer that was stopped before it could save, or whose peers had already left.
_CUT_SHORT = {
    *(-signal.SIGTERM, -signal.SIGINT, -signal.SIGUSR1, -signal.SIGHUP),
    *(-signal.SIGKILL, -signal.SIGABRT, exit_codes.LOST),
}


def first_error(ends: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Return (process, code) of the process that failed first, or None if all succeeded.

    Args:
        ends: (process, code) in the order in which the processes ended, within moments of each
            other and before any was asked to stop. A process that reports a reason precedes those
            that only noticed that it had ended.
    """
    # 1. A code that is passed on, in the order of _HANDED_ON.
    for handed_on in _HANDED_ON:
        for process, code in ends:
            if code == handed_on:
                return process, code
    # 2. A failure of the process itself. 3. A process that noticed the end of another one.
    failed = [(process, code) for process, code in ends if code != exit_codes.DONE]
    explained = [end for end in failed if end[1] not in (exit_codes.LOST, -signal.SIGABRT)]
    return next(iter(explained + failed), None)


def after_stop(codes: Sequence[int]) -> int:
    """Return the exit code of a supervisor that was asked to stop.

    A run that was cut short before it could save is also requeued, because its last checkpoint is
    still valid.
    """
    if all(code == exit_codes.DONE for code in codes):
        return exit_codes.DONE
    if exit_codes.REQUEUE in codes:
        return exit_codes.REQUEUE
    others = [code for code in codes if code != exit_codes.DONE and code not in _CUT_SHORT]
    return others[0] if others else exit_codes.REQUEUE


def for_the_shell(code: int) -> int:
    """Return a process's code as a shell reports it: 137 for killed by signal 9.

    ssh returns 255 when a host is lost, so a program's own 255 becomes 1.
    """
    return 128 - code if code < 0 else 1 if code == 255 else code


@dataclass(frozen=True)
class History:
    """Record of the attempts of a supervisor so far."""

    counted: int = 0  # counted failures since the run last made progress
    failures: int = 0  # all failures since then, including those that do not count
    furthest: int = -1  # highest finished step of a failed attempt
    joined_once: bool = False
    apart_since: float | None = None  # when attempts began to end before all processes had rejoined
    last_counts: bool = False  # whether the last failure counts


def after_failure(history: History, *, step: int, joined: bool, now: float) -> History:
    """Return the history with one more attempt that failed.

    Args:
        step: last finished step, -1 for none.
        joined: whether all processes had joined.
        now: time of a monotonic clock, in seconds.
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
    """Return the seconds to wait before the next attempt: 1, 2, 4 ... 60."""
    return min(MAX_DELAY_S, 2 ** min(history.failures - 1, 10))
