"""Where metrics go. A tracker is a class with `log(step, metrics)` and `close()`."""

import importlib.util
import json
import math
import uuid
from collections.abc import Mapping
from pathlib import Path


class Jsonl:
    """One JSON object per logged step in a file; always on."""

    def __init__(self, file: Path, start_step: int):
        """Open for appending; lines of lost steps (past `start_step`) are removed."""
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        kept = [line for line in lines if start_step and _step_of(line) <= start_step]
        cleaned = file.with_suffix(".tmp")
        cleaned.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        cleaned.replace(file)
        self._stream = file.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line, on disk before the next step."""
        # JSON has no NaN: a window of steps of which none was applied has no loss.
        finite = {key: v if math.isfinite(v) else None for key, v in metrics.items()}
        self._stream.write(json.dumps({"step": step, **finite}) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


class TensorBoard:
    """Scalars for TensorBoard, by tensorboardX."""

    def __init__(self, workdir: Path, config: dict, start_step: int):
        import tensorboardX

        self._writer = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=start_step + 1 if start_step else None
        )
        self._writer.add_text("config", json.dumps(config, indent=2))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write each metric as a scalar."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class Wandb:
    """A Weights & Biases run (offline with WANDB_MODE=offline); a resumed run goes on."""

    def __init__(self, workdir: Path, config: dict, start_step: int):
        import wandb

        id_file = workdir / "wandb_run_id"
        if not (start_step and id_file.exists()):
            id_file.write_text(uuid.uuid4().hex[:8])
        self._run = wandb.init(
            dir=str(workdir), config=config, id=id_file.read_text(), resume="allow"
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics at this step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


# log.trackers -> (class, the package it needs).
TRACKERS = {"tensorboard": (TensorBoard, "tensorboardX"), "wandb": (Wandb, "wandb")}


def problems(names) -> list[str]:
    """List the trackers that are unknown or whose package is missing."""
    found = []
    for name in names:
        if name not in TRACKERS:
            found.append(f"log.trackers: {name!r} is not one of {list(TRACKERS)}")
        elif importlib.util.find_spec(TRACKERS[name][1]) is None:
            found.append(f"log.trackers: {name!r} needs `pip install {TRACKERS[name][1]}`")
    return found


def start(names, workdir: Path, config: dict, start_step: int) -> list:
    """Open metrics.jsonl and the named trackers in `workdir`.

    Args:
        config: plain dict, recorded by trackers that can.
        start_step: steps already done; what was logged after it is dropped where possible.
    """
    others = [TRACKERS[name][0](workdir, config, start_step) for name in names]
    return [Jsonl(workdir / "metrics.jsonl", start_step), *others]


def _step_of(line: str) -> float:
    """The step of a line; a line cut short by a crash counts as infinitely late."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
