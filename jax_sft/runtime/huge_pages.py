"""Huge pages for the arrays of a step on CPUs.

XLA asks for the memory of each step anew, and the kernel clears it page by page when it is first
touched: a third of a million faults for a step of a 135M model. Linux does it 2 MB at a time for
programs that want it, and glibc (2.35 and later) asks on behalf of those started with a tunable.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path

from jax_sft.runtime import lifecycle

TUNABLES = "GLIBC_TUNABLES"  # NAME=VALUE joined by colons
HUGE_PAGES = "glibc.malloc.hugetlb"
ON_REQUEST = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # "always [madvise] never"
GPU = Path("/dev/nvidiactl")


def use(*command: str) -> None:
    """Start this program anew, as the same process, where huge pages are to be had by asking.

    Called by a program before it imports anything heavy. Nothing happens on GPUs, where the kernel
    gives huge pages to all or to none, and where the tunable is set already:
    GLIBC_TUNABLES=glibc.malloc.hugetlb=0 keeps them out.

    Args:
        command: what follows "python" where the program is a process of its own. Started in any
            other way, by a debugger or in a notebook, it is left alone.
    """
    tunables = os.environ.get(TUNABLES, "")
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not GPU.exists()
    is_own = tuple(sys.orig_argv[1 : 1 + len(command)]) == command
    if is_own and on_cpu and HUGE_PAGES not in tunables and _are_on_request():
        asked = f"{HUGE_PAGES}=1"
        os.environ[TUNABLES] = f"{tunables}:{asked}" if tunables else asked
        # Until `lifecycle.begin` of the new start, whose Python would print a traceback.
        signal.pthread_sigmask(signal.SIG_BLOCK, lifecycle.SIGNALS)
        with contextlib.suppress(OSError):  # slower, but as right
            os.execv(sys.executable, sys.orig_argv)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, lifecycle.SIGNALS)


def in_use() -> bool:
    """Whether this process asks for them."""
    return f"{HUGE_PAGES}=1" in os.environ.get(TUNABLES, "").split(":")


def _are_on_request() -> bool:
    try:
        return "[madvise]" in ON_REQUEST.read_text()
    except OSError:  # not Linux, or without them
        return False
