"""Count the requests to stop that reach a launcher as signals."""

import time

from jax_sft.runtime import lifecycle


class StopRequests:
    """Counts requests to stop; several signals of the same request count once."""

    def __init__(self):
        self._requests = lifecycle.Requests()

    @property
    def count(self) -> int:
        """Number of requests so far."""
        return self._requests.count

    def listen(self) -> None:
        """Handle the signals, except ignored ones (nohup); called in the main thread."""
        lifecycle.listen(lambda number, _: self._requests.note(number))

    def wait(self, delay_s: float) -> bool:
        """Wait for `delay_s` and return True, or return False as soon as a request arrives."""
        deadline = time.monotonic() + delay_s
        while not self.count and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.count
