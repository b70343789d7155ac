"""Detect steps that went wrong: losses that are not finite, and losses far above the usual.

A step whose loss or gradient is not finite changes nothing (`state.update` decides so on the
devices). Some steps later, this module counts and prints it. Too many such steps in a row stop the
run and leave a dump of their batches.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_sft.data.batches.examples import Examples
from jax_sft.data.batches.loader import Loader

WINDOW = 100  # number of last losses for the median
GUESSES = 2  # a loss above this multiple of ln(vocabulary), the loss of guessing, is a mistake
FEWEST = 20  # number of losses before a loss can count as a spike
# A spike exceeds the median by SPIKE_SHARE of it and by SPIKE_SPREADS median absolute deviations.
SPIKE_SHARE, SPIKE_SPREADS = 0.5, 10


class Health:
    """Checks the sums of every step, in order.

    Args:
        on_nonfinite: "skip" or "raise" (at the first step that is not finite).
        most: number of steps in a row that may be skipped; one more stops the run.
        dump: writes the batches of the steps and returns their folder.
        say: prints a line.
        skipped: steps skipped before a resume.
        vocab: vocabulary size of the model; 0 = never warn of a loss far above that of guessing.
    """

    def __init__(
        self,
        *,
        on_nonfinite: str,
        most: int,
        dump: Callable[[Mapping[int, Mapping[str, float]]], Path],
        say: Callable[[str], Any] = print,
        skipped: int = 0,
        vocab: int = 0,
    ):
        self._most = most if on_nonfinite == "skip" else 0
        self._dump, self._say = dump, say
        self._in_a_row: dict[int, Mapping[str, float]] = {}
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self.skipped = skipped  # steps of the whole run
        self.spikes = 0  # warnings since this process started
        self._highest = GUESSES * math.log(vocab) if vocab > 1 else math.inf
        self._is_far = False  # whether the last loss was above `_highest`

    def note(self, step: int, sums: Mapping[str, Any]) -> None:
        """Check the sums of the next step.

        Raises:
            FloatingPointError: too many steps in a row were not finite.
        """
        sums = {key: float(value) for key, value in sums.items() if np.ndim(value) == 0}
        if not sums["skipped"]:
            self._in_a_row = {}
            loss = sums["loss"] / (sums["weight"] or 1.0)
            self._look_for_guessing(step, loss)
            self._look_for_spike(step, loss)
            return
        self.skipped += 1
        self._in_a_row[step] = sums
        summary = f"step {step}: loss {sums['loss']}, gradient norm {sums['grad_norm']}"
        if len(self._in_a_row) > self._most:
            raise FloatingPointError(
                f"{summary}: {len(self._in_a_row)} such step(s) in a row, {self.skipped} in all "
                f"(train.on_nonfinite, train.max_nonfinite). Their batches are in "
                f"{self._dump(self._in_a_row)}: look at them, or lower optimizer.learning_rate"
            )
        self._say(
            f"WARNING {summary}: not finite, so not applied ({len(self._in_a_row)} in a row, "
            f"{self.skipped} in all)"
        )

    def require_applied(self, step: int) -> None:
        """Refuse the result of a run in which no step was applied.

        Args:
            step: steps done in the whole run.

        Raises:
            FloatingPointError: all steps were skipped.
        """
        if step and self.skipped >= step:
            raise FloatingPointError(
                f"none of the {step} step(s) was applied: loss or gradient was never finite. "
                "Nothing was trained, so nothing is saved as the result. The batches are in "
                f"{self._dump(self._in_a_row)}: look at them and at the weights of model.path, or "
                "lower optimizer.learning_rate"
            )

    def _look_for_guessing(self, step: int, loss: float) -> None:
        """Warn of a loss far above that of guessing, once until the loss is lower again."""
        if loss > self._highest and not self._is_far:
            self.spikes += 1
            self._say(
                f"WARNING step {step}: loss {loss:.4f} is above {self._highest:.1f}, {GUESSES} "
                "times that of guessing: the model's files do not fit together, the data are not "
                "its language, or optimizer.learning_rate is too high"
            )
        self._is_far = loss > self._highest

    def _look_for_spike(self, step: int, loss: float) -> None:
        if len(self._losses) >= FEWEST:
            median = statistics.median(self._losses)
            spread = statistics.median(abs(other - median) for other in self._losses)
            if loss > median + max(SPIKE_SHARE * median, SPIKE_SPREADS * spread):
                self.spikes += 1
                self._say(
                    f"WARNING step {step}: loss {loss:.4f} is {loss / median:.1f} times the median "
                    f"of the last {len(self._losses)} steps ({median:.4f})"
                )
        self._losses.append(loss)


def dump_batches(
    folder: Path,
    loader: Loader,
    examples: Examples,
    sums_by_step: Mapping[int, Mapping[str, float]],
) -> Path:
    """Write the batches and sums of steps for inspection.

    Args:
        folder: where to write step_N.json (the sums, and the source and row of each example) and
            step_N.npz (the arrays [rows, tokens]) of each step.
        sums_by_step: {step, counted from 1: its sums}.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for step, sums in sums_by_step.items():
        rows = loader.schedule.rows_of(step - 1)
        summary = {
            "step": step,
            # JSON has neither infinity nor NaN.
            "sums": {key: v if math.isfinite(v) else str(v) for key, v in sums.items()},
            "rows": [_names(examples, ids) for ids in rows],
        }
        (folder / f"step_{step}.json").write_text(json.dumps(summary, indent=1) + "\n")
        arrays: Any = loader.build(step - 1, range(len(rows)))
        np.savez_compressed(folder / f"step_{step}.npz", **arrays)
    return folder


def _names(examples: Examples, ids: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
    """Return the source of each example and its row there, counted from 0."""
    sources = list(examples.sources)
    named = []
    for example in np.asarray(ids, np.int64).tolist():
        source = sources[int(examples.source_of[example])]
        named.append({"id": example, "source": source, "row": int(examples.rows[example])})
    return named
