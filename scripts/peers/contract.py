"""What every subject of scripts/bench.py is told, how it keeps time, and what it prints.

A subject is a script that runs in an environment of its own: `python SUBJECT.py SPEC.json`, with
the clone's root on PYTHONPATH. Its last line of output is one JSON object, see `report`. Standard
library and NumPy only.
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
        rows: npz of packed rows in the order of the steps, arrays [steps, rows, seq_len]: tokens,
            targets, weights, segment_ids (0 = padding), positions.
        examples: JSON lines {"ids", "mask"}, the examples of these rows in their order; mask 1 =
            the token trains.
        held_out: JSON lines as above, never trained on; "" = no loss is asked for.
        seq_len: tokens per row.
        steps: optimizer steps, one batch of `rows` each.
        warmup: the first steps, which are not timed.
        dtype: of activations and of the weights while they multiply; masters are float32.
        device: "cpu" or "gpu".
        optimizer: AdamW: learning_rate (constant), b1, b2, eps, weight_decay (on matrices only),
            clip_norm.
        variant: which of the ways that a subject knows; "" = its only one.
        started: seconds since the epoch when the process was started.
        workdir: an empty folder for whatever the subject writes.
        ours: what only our own trainer takes: {"data": path, "source": {...}, "cache_dir": path,
            "rows": of a batch, "changes": {key of the config: value}}.
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
    """Return the spec that the command line names."""
    return Spec(**json.loads(Path(sys.argv[1]).read_text()))


def read_examples(path: str) -> list[tuple[list[int], list[int]]]:
    """Return (ids, mask) of each example of a file."""
    lines = Path(path).read_text().splitlines()
    return [(one["ids"], one["mask"]) for one in map(json.loads, lines)]


def segments(row: dict[str, np.ndarray]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (ids, labels) of each example of a packed row, as transformers takes them.

    Labels are not shifted: a token that trains is its own label. A row holds inputs only, so the
    last target of an example comes back only if it trains: what nothing is computed from and
    nothing is learned from is no work.
    """
    for segment in range(1, int(row["segment_ids"].max()) + 1):
        here = row["segment_ids"] == segment
        ids = row["tokens"][here].tolist()
        targets, weights = row["targets"][here].tolist(), row["weights"][here].tolist()
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
    """The ends of the steps. Whoever calls `step` has waited for the device."""

    def __init__(self, spec: Spec):
        self._spec = spec
        self._ends: list[float] = []
        self.first_step_s = math.nan

    def first(self) -> None:
        """Note the end of the first step; only where `step` notes it too late."""
        self.first_step_s = time.time() - self._spec.started

    def step(self) -> None:
        """Note the end of a step."""
        self._ends.append(time.perf_counter())
        if math.isnan(self.first_step_s):
            self.first()

    @property
    def timed(self) -> list[float]:
        """Seconds of each step after the warm-up.

        Raises:
            ValueError: not as many steps as were asked for.
        """
        if len(self._ends) != self._spec.steps:
            raise ValueError(f"{len(self._ends)} steps ended, {self._spec.steps} were asked for")
        return np.diff(self._ends)[self._spec.warmup - 1 :].tolist()


def mean_loss(spec: Spec, nll_of: Callable[[Sequence[int], Sequence[int]], float]) -> float | None:
    """Return the mean loss of the trained tokens of the held-out examples.

    Args:
        nll_of: (ids, mask) of an example alone -> sum of the losses of its trained tokens.
    """
    if not spec.held_out:
        return None
    examples = read_examples(spec.held_out)
    total = sum(nll_of(ids, mask) for ids, mask in examples)
    return total / sum(sum(mask[1:]) for _, mask in examples)


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident."""
    status = Path("/proc/self/status")
    if status.exists():
        found = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(found[0].split()[1]) * 1024
    # Without /proc (macOS): bytes there.
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
        how: what was run, in words.
        packages: whose versions matter.
        step_s: seconds of each timed step.
        losses: of each step from the first, the mean over its trained tokens.
        tokens, trained: of each timed step; padding never counts.
        first_step_s: from the start of the process to the end of the first step.
        peak_bytes: of the device until the last step; on a CPU of the whole process.
        held_out_before, held_out_after: mean loss of the held-out examples' trained tokens.
    """
    found = {
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
    print("\n" + json.dumps(found), flush=True)
