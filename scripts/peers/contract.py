"""Define the input, timing and output of every subject of scripts/bench.py.

A subject is a script that runs in its own environment: `python SUBJECT.py SPEC.json`, with the
clone's root on PYTHONPATH. Its last line of output is one JSON object, see `report`. This module
uses only the standard library and NumPy.
"""

import dataclasses
import json
import math
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

IGNORED = -100  # label of a token that does not train, in torch and transformers


@dataclasses.dataclass(frozen=True)
class Spec:
    """The work of one run.

    Attributes:
        model: Hugging Face folder; all subjects start from its weights.
        rows: npz file of packed rows in the order of the steps, arrays [steps, rows, seq_len]:
            tokens, targets, weights, segment_ids (0 = padding), positions.
        examples: JSON lines {"ids", "mask"}, the examples of these rows in the same order; mask 1 =
            the token trains.
        held_out: JSON lines as above, never trained on; "" = measure no held-out loss.
        seq_len: tokens per row.
        steps: optimizer steps, one batch of `rows` each.
        warmup: number of first steps, which are not timed.
        dtype: dtype of activations, and of weights in matrix products; masters are float32.
        device: "cpu" or "gpu".
        optimizer: options of AdamW: learning_rate (constant), b1, b2, eps, weight_decay (on
            matrices only), clip_norm.
        variant: variant of the subject; "" = its only one.
        started: start time of the process, in seconds since the epoch.
        workdir: an empty folder for the subject's files.
        ours: options of our own trainer alone: {"data": path, "source": {...}, "cache_dir": path,
            "rows": rows per batch, "changes": {config key: value}}.
    """

    model: str
    rows: str
    examples: str
    held_out: str
    seq_len: int
    steps: int
    warmup: int
    dtype: str
    device: str
    optimizer: dict[str, float]
    variant: str
    started: float
    workdir: str
    ours: dict[str, Any]

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield the packed rows of each step, arrays [rows, seq_len]."""
        with np.load(self.rows) as stored:
            arrays = {name: stored[name] for name in stored.files}
        for step in range(self.steps):
            yield {name: array[step] for name, array in arrays.items()}


def read() -> Spec:
    """Return the spec in the file that the command line names."""
    return Spec(**json.loads(Path(sys.argv[1]).read_text()))


def read_examples(path: str) -> list[tuple[list[int], list[int]]]:
    """Return (ids, mask) of each example of a file."""
    lines = Path(path).read_text().splitlines()
    return [(example["ids"], example["mask"]) for example in map(json.loads, lines)]


def segments(row: dict[str, np.ndarray]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (ids, labels) of each example of a packed row, in the format of transformers.

    Labels are not shifted: a token that trains is its own label. A row holds inputs only, so the
    last target of an example is appended only if it trains. A last target that does not train
    would add no work, as nothing is computed or learned from it.
    """
    for segment in range(1, int(row["segment_ids"].max()) + 1):
        in_segment = row["segment_ids"] == segment
        ids = row["tokens"][in_segment].tolist()
        targets, weights = row["targets"][in_segment].tolist(), row["weights"][in_segment].tolist()
        labels = [t if w else IGNORED for t, w in zip(targets, weights, strict=True)]
        if labels[-1] != IGNORED:
            ids.append(targets[-1])
        yield ids, [IGNORED, *labels][: len(ids)]


def counts(spec: Spec) -> tuple[list[int], list[int]]:
    """Return (tokens that are not padding, tokens that train) of each timed step of packed rows."""
    timed = list(spec.batches())[spec.warmup :]
    return (
        [int((batch["segment_ids"] > 0).sum()) for batch in timed],
        [int((batch["weights"] > 0).sum()) for batch in timed],
    )


class Clock:
    """Record when steps end. Callers of `step` wait for the device first."""

    def __init__(self, spec: Spec):
        self._spec = spec
        self._ends: list[float] = []
        self.first_step_s = math.nan

    def first(self) -> None:
        """Record the end of the first step; needed only if `step` is called too late for it."""
        self.first_step_s = time.time() - self._spec.started

    def step(self) -> None:
        """Record the end of a step."""
        self._ends.append(time.perf_counter())
        if math.isnan(self.first_step_s):
            self.first()

    @property
    def timed(self) -> list[float]:
        """Seconds of each step after the warm-up.

        Raises:
            ValueError: the number of recorded steps differs from the spec's.
        """
        if len(self._ends) != self._spec.steps:
            raise ValueError(f"{len(self._ends)} steps ended, {self._spec.steps} were asked for")
        return np.diff(self._ends)[self._spec.warmup - 1 :].tolist()


def mean_loss(spec: Spec, nll_of: Callable[[Sequence[int], Sequence[int]], float]) -> float | None:
    """Return the mean loss of the trained tokens of the held-out examples.

    Args:
        nll_of: maps (ids, mask) of a single example to the summed loss of its trained tokens.
    """
    if not spec.held_out:
        return None
    examples = read_examples(spec.held_out)
    total = sum(nll_of(ids, mask) for ids, mask in examples)
    return total / sum(sum(mask[1:]) for _, mask in examples)


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(lines[0].split()[1]) * 1024
    # macOS has no /proc; its ru_maxrss is in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def report(
    *,
    how: str,
    packages: Sequence[str],
    step_s: Sequence[float],
    losses: Sequence[float],
    tokens: Sequence[int],
    trained: Sequence[int],
    first_step_s: float,
    peak_bytes: int,
    held_out_before: float | None,
    held_out_after: float | None,
) -> None:
    """Print the result of a run.

    Args:
        how: description of the run.
        packages: packages whose versions to report.
        step_s: seconds of each timed step.
        losses: mean loss over the trained tokens of each step, including the warm-up.
        tokens, trained: number of all and of trained tokens per timed step; padding never counts.
        first_step_s: seconds from the start of the process to the end of the first step.
        peak_bytes: peak memory of the device until the last step; on a CPU of the whole process.
        held_out_before, held_out_after: mean loss of the held-out examples' trained tokens.
    """
    result = {
        "how": how,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "step_s": list(step_s),
        "losses": list(losses),
        "tokens": list(tokens),
        "trained": list(trained),
        "first_step_s": first_step_s,
        "peak_bytes": peak_bytes,
        "held_out_before": held_out_before,
        "held_out_after": held_out_after,
    }
    print("\n" + json.dumps(result), flush=True)
