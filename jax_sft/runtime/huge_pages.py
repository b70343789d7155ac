"""Use huge pages for the arrays of a step on CPUs.

XLA allocates the memory of each step again, and the kernel clears it page by page on first touch: a
third of a million page faults for a step of a 135M model. Linux clears 2 MB at a time for programs
that request it. glibc (2.35 and later) requests it for programs started with a tunable.
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
    """Restart this program in the same process if huge pages are available on request.

    A program calls this before its slow imports. Nothing happens on GPUs, if the kernel gives huge
    pages to all programs or to none, or if the tunable is already set.
    GLIBC_TUNABLES=glibc.malloc.hugetlb=0 disables huge pages.

    Args:
        command: arguments after "python" if the program is its own process. A program started in
            any other way, by a debugger or in a notebook, is not restarted.
    """
    tunables = os.environ.get(TUNABLES, "")
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not GPU.exists()
    is_own = tuple(sys.orig_argv[1 : 1 + len(command)]) == command
    if is_own and on_cpu and HUGE_PAGES not in tunables and _are_on_request():
        setting = f"{HUGE_PAGES}=1"
        os.environ[TUNABLES] = f"{tunables}:{setting}" if tunables else setting
        # Block signals until `lifecycle.begin` of the new start. Before it, Python would print a
        # traceback.
        signal.pthread_sigmask(signal.SIG_BLOCK, lifecycle.SIGNALS)
        with contextlib.suppress(OSError):  # continue without huge pages: slower but correct
            os.execv(sys.executable, sys.orig_argv)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, lifecycle.SIGNALS)


def in_use() -> bool:
    """Return whether this process requests huge pages."""
    return f"{HUGE_PAGES}=1" in os.environ.get(TUNABLES, "").split(":")


def _are_on_request() -> bool:
    try:
        return "[madvise]" in ON_REQUEST.read_text()
    except OSError:  # not Linux, or a kernel without transparent huge pages
        return False
