"""Reports of a run: the steps that are logged, the errors that stop a save, the end of trackers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_sft.training import metrics
from jax_sft.training.reporter import Reporter
from jax_sft.training.step_guard import Health


class Tracker:
    def __init__(self, calls: list, error: Exception | None = None):
        self.calls, self.error = calls, error

    def log(self, step: int, values: dict[str, float]) -> None:
        self.calls.append((step, values))

    def close(self) -> None:
        self.calls.append("closed")
        if self.error:
            raise self.error


def sums(skipped: float = 0.0) -> dict[str, Any]:
    values = {"loss": 120.0, "weight": 60.0, "correct": 30.0, "tokens": 150.0, "pairs": 900.0}
    values |= {"grad_norm": 2.0, "learning_rate": 1e-5, "skipped": skipped}
    return {key: np.float32(value) for key, value in values.items()}


def make_reporter(trackers, said: list[str], most: int = 1, evaluator: Any = None) -> Reporter:
    """A reporter of a run of 4 steps, of which every other one is logged."""
    health = Health(
        on_nonfinite="skip", most=most, dump=lambda steps: Path("dump"), say=said.append
    )
    meter = metrics.Meter(
        every_steps=2,
        num_steps=4,
        start_step=0,
        epoch_of=lambda step: step / 4,
        flops=lambda sums: 1.0,
        peak=None,
        observe=health.note,
    )
    return Reporter(
        meter=meter,
        health=health,
        evaluator=evaluator,
        trackers=trackers,
        num_steps=4,
        say=said.append,
    )


def test_a_due_step_is_printed_and_logged_once():
    said: list[str] = []
    calls: list = []
    reporter = make_reporter([Tracker(calls)], said)
    for _ in range(4):
        reporter.add(sums(), 200, 0.0)
        reporter.log_due()
        reporter.log_due()
    assert [step for step, _ in calls] == [2, 4] and len(said) == 2
    assert calls[0][1]["skipped_steps"] == 0 and "step" not in calls[0][1]


def test_the_last_metrics_are_those_of_steps_and_evaluations_together():
    said: list[str] = []
    calls: list = []
    evaluator = {7: {"eval/loss": 1.5}}.__getitem__
    reporter = make_reporter([Tracker(calls)], said, evaluator=evaluator)
    for _ in range(2):
        reporter.add(sums(), 200, 0.0)
    reporter.log_due()
    weights: Any = 7
    assert reporter.evaluate(3, weights) == {"eval/loss": 1.5}
    assert said[-1] == "step 3/4 | eval/loss 1.5000" and calls[-1] == (3, {"eval/loss": 1.5})
    assert reporter.last["step"] == 3 and reporter.last["eval/loss"] == 1.5
    assert reporter.last["loss"] == 2.0


def test_a_step_that_is_not_logged_still_stops_a_save_of_what_went_wrong():
    reporter = make_reporter([], said := [], most=0)
    reporter.add(sums(skipped=1.0), 200, 0.0)
    reporter.log_due()  # looks at nothing yet
    with pytest.raises(FloatingPointError, match="1 such step"):
        reporter.require_sound(1)
    assert said == []


def test_a_run_of_which_nothing_was_applied_is_refused_only_at_its_end():
    reporter = make_reporter([], [], most=9)
    for step in range(1, 5):
        reporter.add(sums(skipped=1.0), 200, 0.0)
        if step < 4:
            reporter.require_sound(step)
    assert reporter.skipped_steps == 3
    with pytest.raises(FloatingPointError, match="none of the 4 step"):
        reporter.require_sound(4)


def test_every_tracker_is_closed_whatever_another_one_raises():
    calls: list = []
    trackers = [Tracker(calls), Tracker(calls, OSError("disk")), Tracker(calls)]
    with pytest.raises(OSError, match="disk"), make_reporter(trackers, []):
        pass
    assert calls == ["closed"] * 3
