"""Describe the process that owns a file, and check whether that process still runs.

`outputs` stores a description as JSON next to an unfinished output. `run_lock` checks the holder of
a workdir.
"""

import contextlib
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

DAY_S = 86_400


def this_process() -> dict[str, Any]:
    """Describe this process so that another one can check whether it still runs."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "started": started(pid) or "",
        "where": _where(),
        "time": time.time(),
    }


def is_running(owner: dict[str, Any]) -> bool | None:
    """Whether the process of a description runs; None = not visible from this process."""
    if owner.get("host") != socket.gethostname() or owner.get("where") != _where():
        return None
    return runs(owner.get("pid"), owner.get("started"))


def name(owner: dict[str, Any]) -> str:
    """Return a process's description in words."""
    return f"process {owner.get('pid')} on {owner.get('host')}"


def runs(pid: Any, start: Any) -> bool | None:
    """Whether a process of this machine runs; None = not known.

    Args:
        start: its start time, see `started`; distinguishes reused process ids.
    """
    if not isinstance(pid, int) or not 0 < pid < 1 << 31:
        return False
    try:
        with contextlib.suppress(PermissionError):  # the process of another user
            os.kill(pid, 0)
    except ProcessLookupError:
        return False
    now = started(pid)
    return None if now is None else now == start


def started(pid: int) -> str | None:
    """Return when a process started, in ticks since boot; "" = it has ended; None = not known."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # no /proc
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the name before ")" may contain anything
    return "" if state in "ZX" else fields[18]


def machine() -> str:
    """Return an id of this boot of the machine and of the namespace of its process ids.

    Process ids are only valid within both. "" = not known.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _where() -> str:
    """Return `machine()` in the form that is stored in descriptions."""
    return re.sub(r" \D*(\d*)\D*", r"-\1", machine())
