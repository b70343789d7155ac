"""Ties a supervisor to the launcher that started it on another host, over its stdin.

The launcher sends a line every `BEAT_S`; a line `STOP` means what SIGTERM means, a
second one means at once. Where nothing comes for `SILENCE_S`, or the pipe ends, the launcher is
gone or out of reach.
"""

import os
import select
import signal
import threading

from jax_sft.launching.local.output import Printer

BEAT, STOP = b".\n", b"stop\n"
BEAT_S, SILENCE_S = 10, 60


def hold(printer: Printer, stdin: int = 0, silence_s: float = SILENCE_S) -> None:
    """Watch stdin in a thread, and send SIGTERM to this process when told, or when left alone."""
    threading.Thread(target=_watch, args=(printer, stdin, silence_s), daemon=True).start()


def _watch(printer: Printer, stdin: int, silence_s: float) -> None:
    received, told = b"", False
    while True:
        readable, _, _ = select.select([stdin], [], [], silence_s)
        chunk = os.read(stdin, 4096) if readable else b""
        if not chunk:
            why = "has ended" if readable else f"was not heard for {silence_s:.0f} s"
            printer.say(f"the launcher that started this host {why}: stopping")
            os.kill(os.getpid(), signal.SIGTERM)
            return
        *lines, received = (received + chunk).split(b"\n")
        if STOP.strip() in lines:  # another SIGTERM of these seconds would be the same request
            os.kill(os.getpid(), signal.SIGINT if told else signal.SIGTERM)
            told = True
