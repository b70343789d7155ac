"""Execute a run, for `jax_sft.train(...)` and the command `python -m jax_sft.train`.

`_run` has the order of a run, `_train_steps` its loop. The modules `open_run`, `open_data` and
`open_state` open the parts of a run, and `reporter` prints and logs its metrics.
"""

import contextlib
import dataclasses
import re
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from jax_sft import config
from jax_sft.checkpoint import saving, to_hf
from jax_sft.files import paths, run_files, run_lock
from jax_sft.hosts import cluster, consensus
from jax_sft.hosts.preemption import Preempted, Preemption
from jax_sft.hosts.watchdog import SLOW_PHASE_S, Watchdog
from jax_sft.runtime import terminal
from jax_sft.runtime.startup import Startup
from jax_sft.settings import Settings
from jax_sft.training import trackers
from jax_sft.training.open_data import Data, open_data
from jax_sft.training.open_run import Run, open_run
from jax_sft.training.open_state import Start, how_to_train_on, open_checkpoints, restore_or_load
from jax_sft.training.program import Program, program
from jax_sft.training.reporter import Reporter, open_reporter
from jax_sft.training.state import TrainState

# XLA's messages for a device that is out of memory; JAX has no separate exception for it.
OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)


def train(cfg: config.Config, workdir: str | Path, began: float | None = None) -> dict[str, float]:
    """Fine-tune according to the config, like the command `python -m jax_sft.train`.

    Args:
        cfg: from `jax_sft.config.default()`.
        workdir: the run's folder; the run resumes a checkpoint in it.
        began: time from which the start is measured, by `time.perf_counter`; None = now.

    Returns:
        The metrics of the last step and the last evaluation (empty if nothing was left to do).

    Raises:
        ValueError: anything is wrong with config, model or data, reported before training starts;
            or the memory is too small.
        FloatingPointError: the loss was not finite too often (train.max_nonfinite).
        Preempted: SIGTERM, SIGINT, SIGHUP or SIGUSR1 was received; the state is saved. A second
            SIGINT, or a SIGINT before there is anything to save, raises KeyboardInterrupt. In the
            programs of jax_sft both end the process.
        NotSaved: trained to the end, but the last state could not be stored.
        Lost, Stopped: another process did not respond, or ended with an error (cluster.py).

    The watchdog ends a process that hangs or that waits too long for another process.
    """
    settings = config.to_settings(cfg)
    startup = Startup(time.perf_counter() if began is None else began)
    if began is not None:
        startup.end("imports")
    folder = paths.local(workdir, "--workdir")
    with (
        terminal.guarded(),
        Preemption(end=run_lock.end_process) as preemption,
        Watchdog(
            settings.train.stall_timeout_s, preemption.beat, end=run_lock.end_process
        ) as watch,
        _memory_explained(preemption),
        contextlib.ExitStack() as ends,
    ):
        return _run(settings, folder, preemption, watch, startup, ends)


@contextlib.contextmanager
def _memory_explained(preemption: Preemption) -> Iterator[None]:
    """Advise what to change if memory is too small for the first step.

    Raises:
        ValueError: the advice, in place of JAX's error.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        text = " ".join(str(error).split())
        on_host = isinstance(error, MemoryError)
        if preemption.saves or not (on_host or OUT_OF_MEMORY.search(text)):
            raise
        raise ValueError(
            f"the memory of {'this machine' if on_host else 'the devices'} is too small for this "
            f'run: {text[:300]}\nset batch.micro_rows lower, model.remat = "full", data.seq_len '
            "shorter, or use more devices (mesh.fsdp); python -m jax_sft.plan with the same config "
            "tells what fits"
        ) from error


def _run(
    given: Settings,
    workdir: Path,
    preemption: Preemption,
    watch: Watchdog,
    startup: Startup,
    ends: contextlib.ExitStack,
) -> dict[str, float]:
    """Execute a run, from joining the processes to the export; see `train`."""
    # ---- processes, devices, config, workdir -----------------------------------------------------
    run = open_run(given, workdir, preemption, watch, startup, ends)
    settings = run.settings

    # ---- data ------------------------------------------------------------------------------------
    data = open_data(run)
    num_steps = data.num_steps

    # ---- program and state: a checkpoint of this run, or the pretrained weights ------------------
    checkpoints, stored = open_checkpoints(run, data)
    compiled = program(settings, run.mesh, num_steps, num_sources=len(data.source_names))
    state, start = restore_or_load(run, data, compiled, checkpoints, stored)
    if start.step < num_steps:
        checkpoints.keep_model_files()
        if settings.train.export:  # an export that cannot be written fails now, not after training
            consensus.from_first("export folder", lambda: to_hf.check_run_export(workdir, run.say))
    else:
        advice = how_to_train_on(settings, start.step, data.loader)
        run.say(f"done    step {start.step} of {num_steps} is already there: {advice}")
        if not start.owes_evaluation:  # nothing to train, so nothing to write
            _end_run(run)
            return {}
    record = _open_record(run, data) if run.is_first else None
    opened = (
        trackers.start(settings.log.trackers, workdir, run.config, start.step, run.say)
        if run.is_first
        else []
    )
    startup.end("weights")

    # ---- loop ------------------------------------------------------------------------------------
    reporter = open_reporter(run, data, compiled, state.weights, start, opened)
    trainer = Trainer(run, data, compiled, checkpoints, record, reporter)
    # The contexts are left in reverse order, even after an error: the running save finishes before
    # the trackers are closed.
    with reporter, checkpoints, jax.set_mesh(run.mesh):
        step, is_stopped = _train_steps(trainer, state, start)
    if is_stopped:
        is_saved = f"is saved in {workdir}" if checkpoints.saved_step == step else "is NOT saved"
        raise Preempted(f"asked to stop: step {step} of {num_steps} {is_saved}")

    # ---- end -------------------------------------------------------------------------------------
    if start.step < num_steps:
        checkpoints.require(num_steps)
        run.say(f"saved   {workdir / 'checkpoints'}")
    _end_run(run)
    return reporter.last


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The parts of a run that the training loop uses.

    Attributes:
        run: environment of the run.
        data: loaders and the number of steps.
        program: the compiled steps.
        checkpoints: saves the state.
        record: config.json and data_report.json; None on every process but the first.
        reporter: prints, logs and checks the steps.
    """

    run: Run
    data: Data
    program: Program
    checkpoints: saving.Checkpoints
    record: run_files.Record | None
    reporter: Reporter


def _train_steps(trainer: Trainer, state: TrainState, start: Start) -> tuple[int, bool]:
    """Train from a state to the last step, or until the run is asked to stop.

    Args:
        state: state after `start.step` steps; donated.

    Returns:
        The steps done, and whether the run was asked to stop.
    """
    run, data, reporter = trainer.run, trainer.data, trainer.reporter
    settings, step, num_steps = run.settings, start.step, data.num_steps
    scalars = trainer.program.scalars.on(run.mesh)  # sent once, not with each step
    is_stopped = owes_evaluation = False
    if start.owes_evaluation:
        reporter.evaluate(step, state.weights)
        run.startup.end("evaluation")
    began = time.perf_counter()
    reporter.start_clock()
    for batch in run.watch.batches(data.loader.batches(step, num_steps), step + 1):
        # 1. All processes stop before the same step.
        is_stopped = run.preemption.reached()
        if is_stopped:
            break
        # 2. A run that has lost its workdir to another run stops training.
        if run.lock:
            run.lock.check()
        # 3. Dispatch the step. The devices may finish it much later; nothing here waits for it.
        state, sums = trainer.program.train_step(state, batch, scalars)
        run.watch.started(sums)
        # 4. Log the previous step, if it is due: this waits for it, while the devices have work.
        reporter.log_due()
        reporter.add(sums, batch["tokens"].size, data.loader.wait_ms)
        step += 1
        if step == start.step + 1:
            _finish_first_step(run, reporter, sums, began)
        # 5. Evaluate before saving: the save stores the metrics, which choose the best step.
        is_last = step == num_steps
        metrics = None
        if data.eval_loaders and (is_last or _is_due(step, settings.eval.every_steps)):
            reporter.log_due()  # log the metrics of the step before those of its evaluation
            try:
                metrics = reporter.evaluate(step, state.weights)
            except Preempted as request:
                run.say(f"step {step}: {request}")
                is_stopped = owes_evaluation = True
        # 6. A run that was asked to stop saves after the loop, where it waits for the save.
        if is_stopped:
            break
        if is_last or _is_due(step, settings.checkpoint.every_steps):
            _save(trainer, step, state, metrics, owes_evaluation=False, wait=is_last)
    reporter.log_due()
    if is_stopped:  # this save also retries a save that has failed
        _save(trainer, step, state, None, owes_evaluation=owes_evaluation, wait=True)
    run.watch.at("waiting for the last save")
    return step, is_stopped


def _finish_first_step(
    run: Run, reporter: Reporter, sums: dict[str, jax.Array], began: float
) -> None:
    """Wait for the first step, which compiles, and print how long the start took.

    Args:
        began: time at which the wait for the first batch began, by `time.perf_counter`.
    """
    jax.block_until_ready(sums)
    run.say(f"compiled and ran the first step in {time.perf_counter() - began:.1f} s")
    run.startup.end("first step")
    run.say(run.startup.line())
    reporter.start_clock()
    run.preemption.saves_from_here()


def _save(
    trainer: Trainer,
    step: int,
    state: TrainState,
    metrics: dict[str, float] | None,
    *,
    owes_evaluation: bool,
    wait: bool,
) -> None:
    """Save the state after a step.

    Args:
        metrics: metrics of the evaluation of this same step, or None.
        owes_evaluation: whether a run that resumes this step must evaluate it first.
        wait: whether to wait until the state is stored.

    Raises:
        FloatingPointError: too many steps were not finite, or no step of the run was applied.
    """
    run, reporter = trainer.run, trainer.reporter
    # 1. A run that has gone wrong stops without saving.
    reporter.require_sound(step)
    # 2. A run that has lost its workdir does too: read the lock's file now.
    if run.lock:
        run.lock.check(look=True)
    # 3. Write small files again that could not be written or were removed.
    if trainer.record:
        trainer.record.mend()
    run.watch.at(f"saving step {step}")
    extra = {"skipped_steps": reporter.skipped_steps, "owes_evaluation": owes_evaluation}
    trainer.checkpoints.save(step, state.named(), run.config, metrics, extra, wait)


def _end_run(run: Run) -> None:
    """Export the saved model if train.export is set, and wait for the other processes.

    Raises:
        Preempted: the run was asked to stop before the export was written.
    """
    stopped = Preempted("asked to stop: the run is saved, and not exported yet")
    if run.settings.train.export and run.preemption.requested:
        raise stopped
    run.preemption.saves_from_here(False)
    if run.settings.train.export and run.is_first:
        run.watch.at("exporting")
        if run.lock:
            run.lock.check(look=True)
        with run.preemption.raising(stopped):
            to_hf.export_run(
                run.workdir,
                tokenizer_eos=run.settings.train.export_tokenizer_eos,
                say=lambda line: run.say(f"export  {line}"),
            )
    run.watch.at("waiting for the other processes to finish")
    cluster.exchange("the end", "", timeout_s=SLOW_PHASE_S)


def _open_record(run: Run, data: Data) -> run_files.Record:
    """Write data_report.json and config.json."""
    record = run_files.Record(run.workdir, run.say)
    record.write("data_report.json", data.report)
    record.write("config.json", run.config)
    return record


def _is_due(step: int, every: int) -> bool:
    """Return whether an action that runs every `every` steps (0 = never) is due after `step`."""
    return every > 0 and step % every == 0
