"""Which process something belongs to, as JSON in a file, and whether that process still runs."""

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
        "started": _started(pid),
        "where": _where(),
        "time": time.time(),
    }


def is_running(owner: dict[str, Any]) -> bool | None:
    """Whether the process of a description runs; None = it cannot be seen from here."""
    if owner.get("host") != socket.gethostname() or owner.get("where") != _where():
        return None
    pid = owner.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return owner.get("started") == _started(pid)  # another user's
    return owner.get("started") == _started(pid)


def name(owner: dict[str, Any]) -> str:
    """Return a process's description in words."""
    return f"process {owner.get('pid')} on {owner.get('host')}"


def _started(pid: int) -> str:
    """Return when a process began, in clock ticks since the boot: process ids are used again."""
    try:
        content = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # no /proc
        return ""
    fields = content.rpartition(")")[2].split()  # the name before it may hold anything
    return fields[19] if len(fields) > 19 else ""


def _where() -> str:
    """Return the boot and the process namespace: ids mean nothing outside of these."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        inner = re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
    except OSError:
        return ""
    return f"{boot}-{inner}"
