"""Asynchronous checkpointing of a run: saving, retention and resume.

Orbax writes a save to `STEP.incomplete`, and manifests list its files with sizes and checksums.
After all processes have reported success, the first one renames the folder to `STEP`. A failure on
one process fails the save on all of them, with a message, and earlier steps are kept.
"""

import dataclasses
import math
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jax_sft.checkpoint import array_checksums, model_files, orbax_io
from jax_sft.checkpoint.resume import FORMAT_VERSION, Resume, StoredStep, nested
from jax_sft.files import manifest, plain_paths, run_lock, step_folders
from jax_sft.files.disk import probe_folder
from jax_sft.hosts import cluster, consensus, preflight
from jax_sft.runtime import exit_codes
from jax_sft.runtime.text import at_most
from jax_sft.weights.vocabulary import Vocabulary

PAUSES_S = (0, 2, 5)  # before each attempt at a save with `wait`
LEAST_BOUND_S = 120  # minimum timeout of a save; at least 5 times the slowest save so far
SLOWEST_BYTES_PER_S = 20e6  # sets the timeout of the first save
BROKEN_S = 5  # timeout of a running save after a collective has failed
_LOOK_S = 0.2  # interval at which a process waiting for Orbax checks the others for failure
_GIVEN_UP = "abandoned, as another process failed"


class NotSaved(RuntimeError):
    """Training is done, but its last state could not be saved."""

    exit_code = exit_codes.NOT_SAVED


@dataclasses.dataclass
class _Save:
    """A save in progress.

    Attributes:
        response: Orbax's response; None if the save could not be started on this process.
        problem: error on this process; "" = none.
        sums: checksums of the arrays, still being computed.
        arrays: {name: {"shape", "dtype"}}, in the order of `sums`.
    """

    step: int
    number: int
    path: Path
    began: float
    bound_s: float
    arrays: dict[str, dict[str, Any]]
    sums: jax.Array
    response: orbax_io.Response
    problem: str


class Checkpoints:
    """The checkpoints of one run. Every process has one and calls the same methods.

    Args:
        folder: the checkpoint folder; created if missing.
        options: `cfg.checkpoint`.
        model: the model whose files are stored next to the steps.
        data: fingerprint of the training data.
        eval_data: {name: fingerprint} of the eval sets.
        bound: keys of config.FREE that may not change in this run.
        adapters: resolved `lora.*` settings, stored with each step.
        vocabulary: the model's vocabulary, whose padding depends on the mesh; None = no padding.
        turn_ends: {token id: trained turns it ends}, stored with each step; see stop_tokens.
        guard: `RunLock.check`, called on the first process before a step is published.
        say: prints a line; called on the first process only, possibly from a thread.

    Attributes:
        saved_step: the newest complete step; None if there is none yet.
        failures: number of failed saves so far.
    """

    def __init__(
        self,
        folder: Path,
        options,
        *,
        model: model_files.Model | None = None,
        data: str = "",
        eval_data: Mapping[str, str] | None = None,
        bound: Collection[str] = (),
        adapters: Mapping[str, Any] | None = None,
        vocabulary: Vocabulary | None = None,
        turn_ends: Mapping[int, int] | None = None,
        guard: Callable[[bool], None] | None = None,
        say: Callable[[str], None] = print,
    ):
        self._folder, self._options, self._model = folder.absolute(), options, model
        self._data, self._adapters = data, dict(adapters or {})
        self._turn_ends = {str(end): count for end, count in (turn_ends or {}).items()}
        self._vocabulary = vocabulary or Vocabulary(0, {})
        self._guard = guard
        self._frozen: dict[str, dict[str, Any]] = {}
        self._versions = preflight.versions()
        self._say = say if cluster.process_id() == 0 else _silent
        self._eval_data = dict(eval_data or {})
        self._resume = Resume(
            *(self._folder, options, model, data, self._vocabulary, self._say),
            eval_data=self._eval_data,
            bound=bound,
        )
        self.saved_step: int | None = None
        self.failures = 0
        self._num_saves = 0
        self._slowest_s = 0.0
        self._thread: threading.Thread | None = None
        self._lost: RuntimeError | None = None

    def start(self, today: dict[str, Any]) -> StoredStep | None:
        """Clean up and find the newest good step, reading no arrays; see `Resume.start`."""
        newest = self._resume.start(today)
        self.saved_step = newest.step if newest else None
        return newest

    def restore(
        self, stored_step: StoredStep, abstract: Mapping[str, jax.ShapeDtypeStruct]
    ) -> tuple[dict[str, jax.Array], StoredStep]:
        """Return the arrays of the step in `stored_step` or an older one; see `Resume.restore`."""
        arrays, stored_step = self._resume.restore(stored_step, abstract)
        self.saved_step = stored_step.step
        return arrays, stored_step

    def keep_model_files(self) -> None:
        """Store the current model files; see `Resume.keep_model_files`."""
        self._resume.keep_model_files()

    def keep_frozen(self, frozen: Mapping[str, jax.Array], stored_step: StoredStep | None) -> None:
        """Record checksums of the frozen weights, and compare them with those of a resumed run.

        Raises:
            ValueError: the model folder has other weights than when the run began.
        """
        if not frozen:
            return
        shapes = {path: self._vocabulary.cut(path, array.shape) for path, array in frozen.items()}
        sums = array_checksums.read(frozen, array_checksums.start(frozen, shapes))
        self._frozen = {
            path: {"dtype": str(array.dtype), "sum": sums[path]} for path, array in frozen.items()
        }
        stored = (stored_step.metadata.get("frozen") if stored_step else None) or self._frozen
        changed = [path for path, recorded in self._frozen.items() if stored.get(path) != recorded]
        if changed:
            raise ValueError(
                f"the checkpoints in {self._folder} belong to other weights than model.path has: "
                f"{', '.join(at_most(changed))} differ. Use the model that the run began "
                "with, or choose another workdir"
            )

    # ---- saving --------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        arrays: Mapping[str, jax.Array],
        config: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        extra: Mapping[str, Any] | None = None,
        wait: bool = False,
    ) -> None:
        """Save a state asynchronously; returns once its arrays may be changed.

        A failure is printed and counted in `failures`, not raised; see `saved_step`.

        Args:
            step: number of optimizer steps done.
            arrays: the state after that step, see `TrainState.named`.
            config: the resolved config, stored with the step.
            metrics: evaluation metrics of this step, for `keep_best`.
            extra: small JSON-serializable data; a resumed run reads it from `StoredStep.extra`.
            wait: return only when the step is stored, or after a few failed attempts.

        Raises:
            cluster.Lost, cluster.Stopped: another process is gone.
        """
        metadata = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "data_position": step,  # see data.batches.loader
            "seed": config.get("seed"),  # seed and step determine all randomness, see config.seed
            "data": self._data,
            "eval_data": self._eval_data,
            "config": dict(config),
            "metrics": dict(metrics or {}),
            "extra": dict(extra or {}),
            "lora": self._adapters,
            "vocab": self._vocabulary.size,
            "turn_ends": self._turn_ends,
            "frozen": self._frozen,  # dtypes and checksums of weights that no step stores
            "num_processes": cluster.num_processes(),
            "versions": self._versions,
        }
        if wait:
            self._wait()
            if self.saved_step == step:
                return
        for pause in PAUSES_S if wait else PAUSES_S[:1]:
            time.sleep(pause)
            self._start_saving(step, arrays, metadata)
            if wait:
                self._wait()
                if self.saved_step == step:
                    return

    def require(self, step: int) -> None:
        """Wait for the running save.

        Raises:
            NotSaved: the step is not stored.
        """
        self._wait()
        if self.saved_step != step:
            raise NotSaved(
                f"step {step} could not be saved to {self._folder}: see the messages above. "
                + (f"Step {self.saved_step} is there" if self.saved_step else "No step is there")
                + "; make room or repair the folder and start again to resume from it"
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        broken = isinstance(error, jax.errors.JaxRuntimeError) and cluster.num_processes() > 1
        self.close(BROKEN_S if broken else None)

    def close(self, most_s: float | None = None) -> None:
        """Wait for the running save, at most `most_s` seconds."""
        self._wait(most_s)

    def _wait(self, most_s: float | None = None) -> bool:
        """Wait for the running save, and return whether it has ended.

        Raises:
            cluster.Lost, cluster.Stopped: the save lost another process.
        """
        if self._thread:
            self._thread.join(most_s)
            if self._thread.is_alive():
                return False
            self._thread = None
        if self._lost:
            lost, self._lost = self._lost, None
            raise lost
        return True

    def _start_saving(
        self, step: int, arrays: Mapping[str, jax.Array], metadata: dict[str, Any]
    ) -> None:
        began = time.monotonic()
        num_bytes = sum(array.nbytes for array in arrays.values())
        bound_s = max(LEAST_BOUND_S, 5 * self._slowest_s)
        if not self._slowest_s:
            bound_s = max(bound_s, num_bytes / SLOWEST_BYTES_PER_S)
        free = self._wait(bound_s)
        reason = (
            self._obstacle(num_bytes) if free else f"the previous save has run for {bound_s:.0f} s"
        )
        problems = consensus.gather("save prepared", [reason] if reason else [])
        if problems:
            self._fail(step, problems)
            return
        self._num_saves += 1
        number = self._num_saves
        name = f"{step}{step_folders.INCOMPLETE}" + (f"-{number}" if number > 1 else "")
        response, problem = None, ""
        sums = array_checksums.start(arrays)
        # Orbax starts with its own collectives. On CPU they would run concurrently with the
        # checksums' collectives, in any order, and gloo would mix them up. On GPU they wait for
        # the checksums, as the copies to the host do.
        if cluster.num_processes() > 1:
            jax.block_until_ready(sums)
        parts = nested(arrays)
        try:
            response = orbax_io.start_saving(
                self._folder / name, parts["params"], parts["optimizer"], metadata, bound_s
            )
        except orbax_io.Failed as error:
            problem = str(error)
        save = _Save(
            step=step,
            number=number,
            path=self._folder / name,
            began=began,
            bound_s=bound_s,
            arrays={
                name: {"shape": array.shape, "dtype": str(array.dtype)}
                for name, array in arrays.items()
            },
            sums=sums,
            response=response,
            problem=problem,
        )
        # A daemon thread, so that a save that hangs cannot keep the process from exiting.
        self._thread = threading.Thread(
            target=self._complete, args=(save,), name=f"save of step {step}", daemon=True
        )
        self._thread.start()

    def _obstacle(self, num_bytes: int) -> str:
        """Return why a save would fail on this process, or "". Recreates a missing folder."""
        try:
            probe_folder(self._folder)
            if cluster.process_id() == 0 and self._model:
                model_files.keep(self._folder, self._model)
            free = shutil.disk_usage(self._folder).free
        except OSError as error:
            return _text(error)
        if free < num_bytes:
            return f"it needs {_gb(num_bytes)}, {_gb(free)} are free"
        return ""

    # ---- in the thread -------------------------------------------------------------------------

    def _complete(self, save: _Save) -> None:
        """Complete a save in its thread, with the same outcome on all processes."""
        try:
            problems = self._steps_of(save)
        except (cluster.Lost, cluster.Stopped, jax.errors.JaxRuntimeError) as error:
            self._lost = error  # JaxRuntimeError: the coordination service itself is gone
            return
        if problems:
            if cluster.process_id() == 0:
                self._clean_up(save.path)
            self._fail(save.step, problems)
            return
        if cluster.process_id() == 0 and (problem := _attempt(self._thin_out)):
            self._say(f"WARNING steps that are not needed any more could not be removed: {problem}")
        took = time.monotonic() - save.began
        self._slowest_s = max(self._slowest_s, took)
        self.saved_step = save.step

    def _steps_of(self, save: _Save) -> list[str]:
        """Run the phases of a save, each after all processes are done with the one before it.

        1. Wait until Orbax has written the arrays on every process.
        2. Each process writes the manifest of its own files.
        3. The first process checks and renames the folder, which publishes the step.
        """
        problem = save.problem or self._await(save)
        for phase, do in (
            ("save written", lambda: None),
            ("save listed", lambda: self._write_manifest(save)),
            ("save complete", lambda: self._publish(save)),
        ):
            if not problem:
                problem = _attempt(do)
            problems = consensus.gather(phase, [problem] if problem else [], save.bound_s + 60)
            if problems:
                return [p for p in problems if not p.startswith(_GIVEN_UP)] or problems
        return []

    def _await(self, save: _Save) -> str:
        """Wait for Orbax, and give up once another process has failed; return the error or ""."""
        failed = f"save/{save.number}"
        deadline = time.monotonic() + save.bound_s
        while time.monotonic() < deadline:
            try:
                if orbax_io.is_saved(save.response, _LOOK_S):
                    return ""
            except orbax_io.Failed as error:
                cluster.publish(f"{failed}/{cluster.process_id()}", "failed")
                return str(error)
            # A failure on another process leaves Orbax on this one in a barrier for minutes.
            if any(key.startswith(f"{failed}/") for key in cluster.read_all(failed)):
                return _GIVEN_UP
        return f"it was not written within {save.bound_s:.0f} s"

    def _write_manifest(self, save: _Save) -> None:
        sums = array_checksums.read(save.arrays, save.sums)
        arrays = {name: array | {"sum": sums[name]} for name, array in save.arrays.items()}
        manifest.write(save.path, cluster.process_id(), cluster.num_processes(), arrays)

    def _publish(self, save: _Save) -> None:
        if cluster.process_id() == 0:
            orbax_io.require_readable(save.path, save.arrays)
            # Check the lock right before the rename: a run that has lost it publishes nothing.
            if self._guard:
                self._guard(True)
            step_folders.publish(save.path, save.step)

    def _thin_out(self) -> None:
        """Remove the steps that need not be kept after a newer one was published."""
        scores: dict[int, float] = {}
        present = step_folders.present(self._folder)
        for step in present:
            metrics = step_folders.metadata(self._folder / str(step)).get("metrics") or {}
            score = metrics.get(self._options.metric)
            if isinstance(score, float | int) and math.isfinite(score):
                scores[step] = score
        best = sorted(scores, key=lambda step: (scores[step], step))[: self._options.keep_best]
        step_folders.remove_all(self._folder, {*present} - {*present[: self._options.keep], *best})

    def _clean_up(self, path: Path) -> None:
        """Remove the leftovers of a failed save."""
        for left in path.parent.glob(f"{path.name}*"):
            problem = _attempt(lambda left=left: step_folders.remove(left))
            if problem:
                self._say(f"WARNING {left} is left over: {problem}")

    def _fail(self, step: int, problems: Sequence[str]) -> None:
        self.failures += 1
        try:
            free = f", {_gb(shutil.disk_usage(self._folder).free)} free there"
        except OSError as error:
            free = f" ({_text(error)})"
        present = step_folders.present(self._folder)
        kept = f"step {present[0]} remains the newest stored step" if present else "none is stored"
        self._say(f"WARNING step {step} could NOT be saved to {self._folder}{free}; {kept}:")
        for problem in at_most(problems):
            self._say(f"WARNING   {problem}")


def check_folder(folder: Path) -> None:
    """Create the checkpoint folder and write to it, from every process.

    Raises:
        ValueError: a process cannot; the message names each with its error.
    """

    def use() -> None:
        probe_folder(folder)
        plain_paths.plain(folder)  # fail now if Orbax cannot store under its name

    problem = _attempt(use)
    if problems := consensus.gather("checkpoint folder, writing", [problem] if problem else []):
        raise ValueError(f"checkpoints cannot be written to {folder}: {'; '.join(problems)}")


def _attempt(do: Callable[[], None]) -> str:
    """Run a file operation and return its error, or ""."""
    try:
        do()
    except (OSError, orbax_io.Failed, run_lock.Refused) as error:
        return _text(error)
    return ""


def _text(error: BaseException) -> str:
    """Return an error as one line of at most about 600 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 600 else text[:600] + " ..."


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


def _silent(_: str) -> None:
    """Discard the message (used on every process but the first)."""
