"""Requests to stop that reach a launcher as signals."""

import signal
import time

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
ONE_REQUEST_S = 3  # engines send the same signal to every process, and some of them twice


class StopRequests:
    """Counts them; signals within ONE_REQUEST_S of each other are one."""

    def __init__(self):
        self.count = 0
        self._last = float("-inf")

    def listen(self) -> None:
        """Take the signals over, in the main thread, but for those that are ignored (nohup)."""
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame) -> None:
        now = time.monotonic()
        if now - self._last >= ONE_REQUEST_S:
            self.count += 1
            self._last = now

    def wait(self, delay_s: float) -> bool:
        """Wait so long; return False at once when a request comes."""
        deadline = time.monotonic() + delay_s
        while not self.count and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.count
