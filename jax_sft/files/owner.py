"""Which process something belongs to, and whether that process still runs.

`outputs` keeps a description as JSON beside an unfinished output; `run_lock` judges the holder of a
workdir.
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
    """Describe this process so that another one can tell whether it still runs."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "started": started(pid) or "",
        "where": _where(),
        "time": time.time(),
    }


def is_running(owner: dict[str, Any]) -> bool | None:
    """Whether the process of a description runs; None = it cannot be seen from here."""
    if owner.get("host") != socket.gethostname() or owner.get("where") != _where():
        return None
    return runs(owner.get("pid"), owner.get("started"))


def name(owner: dict[str, Any]) -> str:
    """Return a process's description in words."""
    return f"process {owner.get('pid')} on {owner.get('host')}"


def runs(pid: Any, start: Any) -> bool | None:
    """Whether a process of this machine runs; None = not known.

    Args:
        start: when it was started, see `started`: process ids are used again.
    """
    if not isinstance(pid, int) or not 0 < pid < 1 << 31:
        return False
    try:
        with contextlib.suppress(PermissionError):  # another user's
            os.kill(pid, 0)
    except ProcessLookupError:
        return False
    now = started(pid)
    return None if now is None else now == start


def started(pid: int) -> str | None:
    """When a process was started, in ticks since the boot; "" = it has ended; None = not known."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # no /proc
        return None
    state, *fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return "" if state in "ZX" else fields[18]


def machine() -> str:
    """Return an id of this boot of the machine and of the namespace of its process ids.

    Process ids mean nothing outside of these. "" = not known.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _where() -> str:
    """`machine` as it is written in descriptions."""
    return re.sub(r" \D*(\d*)\D*", r"-\1", machine())
