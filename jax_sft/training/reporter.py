"""Report the steps and evaluations of a run on the screen and to its trackers.

The loop in `run` passes in the sums of each step. The reporter turns them into metrics, prints and
logs them, and stops a run that has gone wrong.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jax_sft.checkpoint import stop_tokens
from jax_sft.data.tokens.detokenize import Detokenizer
from jax_sft.hosts.preemption import Preempted, Preemption
from jax_sft.hosts.watchdog import Watchdog
from jax_sft.inference import LoadedModel
from jax_sft.training import evaluate
from jax_sft.training.metrics import Meter, peak_flops, step_flops
from jax_sft.training.open_data import Data
from jax_sft.training.open_run import Run
from jax_sft.training.open_state import Start
from jax_sft.training.program import Program
from jax_sft.training.step_guard import Health, dump_batches


class Reporter:
    """Measures, checks, prints and logs the steps of one run. Every process has a reporter.

    A context manager that closes the trackers on exit.

    Args:
        meter: turns sums into metrics; `health` observes its steps.
        health: checks each step.
        evaluator: evaluates weights.
        trackers: receive all metrics, see `trackers`; empty on every process but the first.
        num_steps: steps of the whole run.
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
        with contextlib.ExitStack() as stack:  # closes every tracker even if another one raises
            for tracker in self._trackers:
                stack.callback(tracker.close)

    @property
    def skipped_steps(self) -> int:
        """Number of steps of the whole run, among those checked so far, that were not applied."""
        return self._health.skipped

    def start_clock(self) -> None:
        """Exclude the time until now from the speed."""
        self._meter.start_clock()

    def add(self, sums: dict[str, jax.Array], num_slots: int, wait_ms: float) -> None:
        """Add the sums of the next step, which may be unfinished.

        Args:
            num_slots: size of its batch in tokens, including padding.
            wait_ms: how long the step waited for its batch.
        """
        self._meter.add(sums, num_slots, wait_ms)

    def log_due(self) -> None:
        """Print and log the last step added, if it is due for logging. Waits for that step.

        Raises:
            FloatingPointError: too many steps in a row were not finite.
        """
        if not self._meter.due:
            return
        metrics = self._meter.read() | {"skipped_steps": self._health.skipped}
        self._say(self._meter.line(metrics))
        self._log(metrics)

    def evaluate(self, step: int, weights: dict[str, jax.Array]) -> dict[str, float]:
        """Evaluate the weights after a step, then print, log and return the metrics.

        Raises:
            Preempted: the run was asked to stop meanwhile; nothing is printed or logged.
            FloatingPointError: a loss is not finite.
        """
        with self._meter.paused():
            metrics = self._evaluator(weights)
        self._say(f"step {step}/{self._num_steps} | " + evaluate.line(metrics))
        self._log({"step": step, **metrics})
        return metrics

    def require_sound(self, step: int) -> None:
        """Log the last step if due, and raise if the state must not be saved.

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


def open_reporter(
    run: Run,
    data: Data,
    program: Program,
    weights: dict[str, jax.Array],
    start: Start,
    trackers: Sequence[Any],
) -> Reporter:
    """Return the reporter of a run.

    Args:
        weights: initial weights of the model that answers samples.
        trackers: open trackers, which the reporter closes.
    """
    health = Health(
        on_nonfinite=run.settings.train.on_nonfinite,
        most=run.settings.train.max_nonfinite,
        dump=functools.partial(_dump, run, data),
        say=run.say,
        skipped=start.skipped_steps,
        vocab=run.settings.model_cfg.vocab,
    )
    return Reporter(
        meter=_meter(run, data, program, start, health),
        health=health,
        evaluator=_evaluator(run, data, program, weights),
        trackers=trackers,
        num_steps=data.num_steps,
        say=run.say,
    )


def _meter(run: Run, data: Data, program: Program, start: Start, health: Health) -> Meter:
    model_def, is_tied = program.model_def, run.settings.model_cfg.tied

    def flops(sums: Mapping[str, float]) -> float:
        tokens, pairs = sums["tokens"], sums["pairs"]
        return step_flops(
            model_def.specs, model_def.axis_sizes, is_tied, tokens, pairs, model_def.frozen_bytes
        )

    return Meter(
        every_steps=run.settings.log.every_steps,
        num_steps=data.num_steps,
        start_step=start.step,
        epoch_of=data.loader.epoch_of,
        sources=data.source_names,
        flops=flops,
        peak=peak_flops(jax.devices()),
        observe=health.note,
    )


def _evaluator(
    run: Run, data: Data, program: Program, weights: dict[str, jax.Array]
) -> evaluate.Evaluator:
    num_samples = run.settings.eval.samples
    return evaluate.Evaluator(
        program.eval_step,
        data.eval_loaders,
        tick=functools.partial(_tick, run.watch, run.preemption),
        examples=data.eval,
        num_samples=num_samples,
        stop_ids=stop_tokens.union(data.model_stops, data.turn_ends),
        answerer=LoadedModel(program.model_def, weights, run.mesh) if num_samples else None,
        detokenizer=Detokenizer(run.model.folder) if num_samples and data.eval else None,
        say=run.say,
    )


def _tick(watch: Watchdog, preemption: Preemption) -> None:
    """Report to the watchdog that the evaluation makes progress.

    Raises:
        Preempted: the run was asked to stop.
    """
    watch.at("evaluating")
    if preemption.reached():
        raise Preempted("asked to stop within an evaluation")


def _dump(run: Run, data: Data, sums: Mapping[int, Mapping[str, float]]) -> Path:
    """Write the batches of steps that went wrong on process 0; return their folder."""
    folder = run.workdir / "nonfinite"
    if run.is_first:
        dump_batches(folder, data.loader, data.train, sums)
    return folder
