"""Trackers, which receive the metrics: classes with `log(step, metrics)` and `close()`."""

import functools
import json
import queue
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from jax_sft.files import run_files

CLOSE_S = 60.0  # for a library to send its pending metrics


class TensorBoard:
    """Scalars for TensorBoard, written with tensorboardX."""

    def __init__(self, workdir: Path, config: dict, start_step: int):
        import tensorboardX

        self._open = functools.partial(
            tensorboardX.SummaryWriter, str(workdir / "tensorboard"), flush_secs=20
        )
        self._writer = self._open(purge_step=start_step + 1 if start_step else None)
        self._writer.add_text("config", json.dumps(config, indent=2))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write each metric as a scalar."""
        # The writer's thread ends at its first error, such as a full disk, and later events would
        # be ignored: open a new writer.
        events = getattr(self._writer.file_writer, "event_writer", None)
        worker = getattr(events, "_worker", None)
        if worker is not None and not worker.is_alive():
            self._writer = self._open()
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the writer."""
        self._writer.close()


class Wandb:
    """A Weights & Biases run (offline with WANDB_MODE=offline), continued when training resumes."""

    def __init__(self, workdir: Path, config: dict, start_step: int):
        import wandb

        id_file = workdir / "wandb_run_id"
        if not (start_step and id_file.exists()):
            run_files.replace(id_file, uuid.uuid4().hex[:8].encode())
        self._run = wandb.init(
            dir=str(workdir), config=config, id=id_file.read_text(), resume="allow"
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics at this step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


CLASSES = {"tensorboard": TensorBoard, "wandb": Wandb}  # keys: names in log.trackers


def start(
    names, workdir: Path, config: dict, start_step: int, say: Callable[[str], object] = print
) -> list:
    """Open metrics.jsonl and the named trackers in `workdir`.

    Args:
        config: config as a plain dict; trackers that can record it do.
        start_step: steps already done; metrics logged after this step are dropped if possible.
        say: prints a line.

    Raises:
        ValueError: a tracker cannot be started.
    """
    others = []
    for name in names:
        with _Anything() as outcome:
            others.append(InThread(name, CLASSES[name](workdir, config, start_step), say))
        if outcome.error and not isinstance(outcome.error, Exception):
            raise outcome.error  # Ctrl-C
        if outcome.error:
            raise ValueError(
                f"log.trackers: {name} cannot be started: {_line(outcome.error)}. Set it up, or "
                "leave it out"
            ) from outcome.error
    return [run_files.Jsonl(workdir / "metrics.jsonl", start_step, say), *others]


class InThread:
    """Calls a library's tracker in a separate thread, so that a call that hangs blocks nothing.

    An error is printed once until a call succeeds again.
    """

    def __init__(self, name: str, tracker, say: Callable[[str], object]):
        self._name, self._tracker, self._say = name, tracker, say
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._is_troubled = False
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue the metrics for logging, in order."""
        self._calls.put(functools.partial(self._tracker.log, step, dict(metrics)))

    def close(self) -> None:
        """Let the library finish, for at most CLOSE_S."""
        self._calls.put(self._tracker.close)
        self._calls.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._say(f"WARNING {self._name} did not finish within {CLOSE_S:.0f} s")

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            with _Anything() as outcome:
                call()
            if outcome.error and not self._is_troubled:
                self._say(
                    f"WARNING {self._name} failed ({_line(outcome.error)}): training continues, "
                    "and what is logged is tried all the same"
                )
            self._is_troubled = outcome.error is not None


class _Anything:
    """Catches any exception of a block, because libraries can raise any type; see `error`."""

    error: BaseException | None = None

    def __enter__(self) -> "_Anything":
        return self

    def __exit__(self, kind, error: BaseException | None, traceback) -> bool:
        self.error = error
        return True


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
