"""Run a command that is killed when its parent ends for any reason (Linux).

    python -I -S parent_death.py PID_OF_PARENT command ...

A trainer whose supervisor was killed must not continue alone: it would hold GPUs and the
coordinator's port. This is a separate program because running Python code between fork and exec is
not safe in a process with threads.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>; the setting survives exec


def main() -> None:
    """Replace this process with the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before prctl took effect
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
