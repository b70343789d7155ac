"""Stop a supervisor when the launcher that started it from another host stops or is lost.

The launcher sends a line to the supervisor's stdin every `BEAT_S`. A `STOP` line means the same as
SIGTERM, and a second one means to stop at once. If nothing arrives for `SILENCE_S`, or the pipe
ends, the launcher is gone or unreachable.
"""

import os
import select
import signal
import threading

from jax_sft.launching.local.output import Printer

BEAT, STOP = b".\n", b"stop\n"
BEAT_S, SILENCE_S = 10, 60


def hold(printer: Printer, stdin: int = 0, silence_s: float = SILENCE_S) -> None:
    """Watch stdin in a thread; send SIGTERM to this process on STOP or if the launcher is lost."""
    threading.Thread(target=_watch, args=(printer, stdin, silence_s), daemon=True).start()


def _watch(printer: Printer, stdin: int, silence_s: float) -> None:
    received, was_stopped = b"", False
    while True:
        readable, _, _ = select.select([stdin], [], [], silence_s)
        chunk = os.read(stdin, 4096) if readable else b""
        if not chunk:
            why = "has ended" if readable else f"sent no heartbeat for {silence_s:.0f} s"
            printer.say(f"the launcher that started this host {why}: stopping")
            os.kill(os.getpid(), signal.SIGTERM)
            return
        *lines, received = (received + chunk).split(b"\n")
        if STOP.strip() in lines:  # a second SIGTERM within seconds would be the same request
            os.kill(os.getpid(), signal.SIGINT if was_stopped else signal.SIGTERM)
            was_stopped = True
