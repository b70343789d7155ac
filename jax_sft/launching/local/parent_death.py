"""Runs a command that ends when its parent does, however that ends (Linux).

    python -I -S tied.py PID_OF_PARENT command ...

A trainer whose supervisor was killed must not go on alone: it would hold GPUs and the coordinator's
port. A program of its own, because code between fork and exec is not safe beside threads.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>; it stays over exec


def main() -> None:
    """Replace this process by the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it could be watched
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
