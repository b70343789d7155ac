"""Measure the parts of the time from the command to the first finished step, for `train`."""

import collections
import functools
import time

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT = "/jax/compilation_cache/cache_hits"
_seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
_counts: collections.Counter[str] = collections.Counter()


class Startup:
    """A clock for consecutive parts of the start.

    Args:
        began: start of the first part, by `time.perf_counter`.
    """

    def __init__(self, began: float):
        _listen()
        self._began = self._last = began
        self._parts: dict[str, float] = {}
        self._seconds, self._counts = _seconds.copy(), _counts.copy()

    def end(self, part: str) -> None:
        """Note the end of a part, which began at the end of the previous part."""
        now = time.perf_counter()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now

    def line(self) -> str:
        """Return the parts in one line, with the number and time of compiled programs."""
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self._parts.items())
        programs = _counts[_COMPILED] - self._counts[_COMPILED]
        cached = _counts[_CACHE_HIT] - self._counts[_CACHE_HIT]
        compile_s = _seconds[_COMPILED] - self._seconds[_COMPILED]
        return (
            f"started in {self._last - self._began:.1f} s: {parts}; of this {compile_s:.1f} for "
            f"{programs} compiled programs, {cached} of them from the compilation cache"
        )


@functools.cache
def _listen() -> None:
    """Count JAX's events from now on, for the whole process: JAX cannot remove a listener."""

    def compiled(event: str, duration_secs: float, **_) -> None:
        _seconds[event] += duration_secs
        _counts[event] += 1

    def cache_hit(event: str, **_) -> None:
        _counts[event] += 1

    jax.monitoring.register_event_duration_secs_listener(compiled)
    jax.monitoring.register_event_listener(cache_hit)
