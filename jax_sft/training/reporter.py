"""What a run reports: its steps and evaluations, on the screen and to its trackers.

The loop in `run` gives the sums of each step. The reporter turns them into metrics, prints and logs
them, and stops a run that has gone wrong.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jax_sft.training import evaluate
from jax_sft.training.metrics import Meter
from jax_sft.training.step_guard import Health


class Reporter:
    """Measures, judges, prints and logs the steps of one run. Every process has one.

    A context manager: it closes the trackers at its end.

    Args:
        meter: turns sums into metrics; `health` observes its steps.
        health: judges each step.
        evaluator: evaluates weights.
        trackers: get all metrics, see `trackers`; none on other processes than the first.
        num_steps: of the whole run.
        say: prints a line.

    Attributes:
        last: the newest value of each metric.
    """

    def __init__(
        self,
        *,
        meter: Meter,
        health: Health,
        evaluator: evaluate.Evaluator,
        trackers: Sequence[Any],
        num_steps: int,
        say: Callable[[str], None],
    ):
        self._meter, self._health, self._evaluator = meter, health, evaluator
        self._trackers, self._num_steps, self._say = trackers, num_steps, say
        self.last: dict[str, float] = {}

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        with contextlib.ExitStack() as stack:  # closes each, whatever another one raises
            for tracker in self._trackers:
                stack.callback(tracker.close)

    @property
    def skipped_steps(self) -> int:
        """Steps of the whole run that were not applied, of those that were looked at."""
        return self._health.skipped

    def start_clock(self) -> None:
        """Leave the time until now out of the speed."""
        self._meter.start_clock()

    def add(self, sums: dict[str, jax.Array], num_slots: int, wait_ms: float) -> None:
        """Take the sums of the next step, which may be unfinished.

        Args:
            num_slots: size of its batch in tokens, padding included.
            wait_ms: how long the step waited for its batch.
        """
        self._meter.add(sums, num_slots, wait_ms)

    def log_due(self) -> None:
        """Print and log the last step added, if it is one to log. Waits for that step.

        Raises:
            FloatingPointError: too many steps in a row were not finite.
        """
        if not self._meter.due:
            return
        metrics = self._meter.read() | {"skipped_steps": self._health.skipped}
        self._say(self._meter.line(metrics))
        self._log(metrics)

    def evaluate(self, step: int, weights: dict[str, jax.Array]) -> dict[str, float]:
        """Evaluate the weights after a step; print, log and return the metrics.

        Raises:
            Preempted: the run was told to stop meanwhile; nothing is printed or logged.
            FloatingPointError: a loss is not finite.
        """
        with self._meter.paused():
            metrics = self._evaluator(weights)
        self._say(f"step {step}/{self._num_steps} | " + evaluate.line(metrics))
        self._log({"step": step, **metrics})
        return metrics

    def require_sound(self, step: int) -> None:
        """Log what is due, and refuse to go on from a state that must not be saved.

        Args:
            step: the last step added.

        Raises:
            FloatingPointError: too many steps in a row were not finite, or this is the last step
                and no step of the run was applied.
        """
        self.log_due()
        self._meter.check()
        if step == self._num_steps:
            self._health.require_applied(step)

    def _log(self, metrics: dict[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(int(metrics["step"]), {k: v for k, v in metrics.items() if k != "step"})
        self.last.update(metrics)
