"""Requests to stop that reach a launcher as signals."""

import time

from jax_sft.runtime import lifecycle


class StopRequests:
    """Counts them; one that comes by several ways counts once (`lifecycle.Requests`)."""

    def __init__(self):
        self._requests = lifecycle.Requests()

    @property
    def count(self) -> int:
        """Number of requests so far."""
        return self._requests.count

    def listen(self) -> None:
        """Take the signals over, in the main thread, but for those that are ignored (nohup)."""
        lifecycle.listen(lambda number, _: self._requests.note(number))

    def wait(self, delay_s: float) -> bool:
        """Wait so long; return False at once when a request comes."""
        deadline = time.monotonic() + delay_s
        while not self.count and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.count
