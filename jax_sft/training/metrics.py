"""Speed and progress of training: tokens/s, MFU, time left, and the line on the screen."""

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from jax_sft.hardware import CHIPS
from jax_sft.nn.flops import model_flops
from jax_sft.weights.param_spec import ParamSpec

# Dense bfloat16 peak of one device in FLOP/s, from the vendors' data sheets, by a substring of
# `device_kind`. The first match counts, so a longer name comes before its own prefix.
PEAK_FLOPS = {
    "B200": CHIPS["b200"].peak_flops,
    "H200": CHIPS["h200"].peak_flops,  # GH200 too
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": CHIPS["h100"].peak_flops,
    "A100": CHIPS["a100"].peak_flops,
    "L40S": 362e12,
    "A10G": 70e12,
}


def peak_flops(devices: Iterable[Any]) -> float | None:
    """Return the summed bfloat16 peak of the devices in FLOP/s, or None if any is unknown."""
    peaks = []
    for device in devices:
        matches = [peak for name, peak in PEAK_FLOPS.items() if name in device.device_kind]
        if not matches:
            return None
        peaks.append(matches[0])
    return sum(peaks)


def step_flops(
    specs: Iterable[ParamSpec],
    axis_sizes: Mapping[str, int],
    tied: bool,
    tokens: float,
    pairs: float,
    frozen: Collection[str] = (),
) -> float:
    """Return the model FLOPs of a training step by the convention for MFU.

    By convention the output head is counted for every token, not only for trained ones. The
    arguments are those of `flops.model_flops`.
    """
    return sum(model_flops(specs, axis_sizes, tied, tokens, pairs, tokens, frozen).values())


class Meter:
    """Turns the sums of steps into metrics, one step late so that devices never wait for it.

    Args:
        every_steps: interval of the metrics in steps.
        num_steps: steps of the whole run.
        start_step: steps already done.
        epoch_of: maps steps done to epochs done.
        flops: maps the sums of a step to its model FLOPs.
        peak: FLOP/s of all devices together, or None if unknown.
        sources: names of the train sources whose losses are logged.
        observe: called once per step, in order, with the step and its sums; its exceptions pass
            through `check` and `read`.
    """

    def __init__(
        self,
        *,
        every_steps: int,
        num_steps: int,
        start_step: int,
        epoch_of: Callable[[int], float],
        flops: Callable[[Mapping[str, float]], float],
        peak: float | None,
        sources: Sequence[str] = (),
        observe: Callable[[int, Mapping[str, Any]], Any] = lambda step, sums: None,
    ):
        self._every, self._num_steps = every_steps, num_steps
        self._epoch_of, self._sources = epoch_of, sources
        self._flops, self._peak, self._observe = flops, peak, observe
        self._observed = start_step
        self._window: list[dict[str, jax.Array]] = []
        self._slots = 0  # tokens of the window's batches, including padding
        self._wait_ms = 0.0
        self._step = start_step
        self._began = self._time = time.perf_counter()
        self._untimed = 0  # steps of the window before the clock started

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside the block, for instance an evaluation, from the speed."""
        jax.block_until_ready(self._window)
        began = time.perf_counter()
        yield
        self._time += time.perf_counter() - began

    def start_clock(self) -> None:
        """Exclude the steps until now, such as the first, which compiles, from the speed."""
        self._time, self._untimed = time.perf_counter(), len(self._window)

    def add(self, sums: dict[str, jax.Array], slots: int, wait_ms: float = 0.0) -> None:
        """Add the next step.

        Args:
            sums: sums of the step, which may be unfinished.
            slots: size of its batch in tokens, including padding.
            wait_ms: how long the step waited for its batch.
        """
        self._window.append(sums)
        self._slots += slots
        self._wait_ms += wait_ms
        self._step += 1

    @property
    def due(self) -> bool:
        """Whether the last step added is due for logging."""
        last = self._step == self._num_steps
        return bool(self._window) and (last or self._step % self._every == 0)

    def check(self) -> list[dict[str, Any]]:
        """Wait for the steps since the last metrics, observe each, and return their sums."""
        window = jax.device_get(self._window)
        for step, sums in enumerate(window, start=self._step - len(window) + 1):
            if step > self._observed:
                self._observed = step
                self._observe(step, sums)
        return window

    def read(self) -> dict[str, float]:
        """Wait for the last step and return its metrics.

        Speeds are means over the steps since the last call. Loss and gradient norm are those of the
        last step that was applied, NaN if none was.
        """
        window = self.check()
        now = time.perf_counter()
        timed = len(window) - self._untimed
        seconds = (now - self._time) / timed if timed else (now - self._began) / len(window)
        slots, wait_ms = self._slots / len(window), self._wait_ms / len(window)
        self._time, self._window, self._untimed = now, [], 0
        self._slots, self._wait_ms = 0, 0.0
        applied = [sums for sums in window if not sums["skipped"]]
        last = dict((applied or window)[-1])
        by_source = {key: last.pop(key) for key in list(last) if key.endswith("_by_source")}
        mean = {key: sum(float(sums[key]) for sums in applied) / len(window) for key in last}
        metrics = {
            "step": self._step,
            "epoch": self._epoch_of(self._step),
            "loss": float(last["loss"]) / (float(last["weight"]) or 1.0) if applied else math.nan,
            "learning_rate": float(window[-1]["learning_rate"]),
            "grad_norm": float(last["grad_norm"]) if applied else math.nan,
            "tokens_per_s": mean["tokens"] / seconds,
            "trained_tokens_per_s": mean["weight"] / seconds,
            "fill": mean["tokens"] / slots,
            "step_time_s": seconds,
            "data/wait_ms": wait_ms,
        }
        if "router_loss" in last:
            router_loss = float(last["router_loss"]) / (float(last["weight"]) or 1.0)
            metrics["router_loss"] = router_loss if applied else math.nan
        if by_source and applied:
            losses, weights = by_source["loss_by_source"], by_source["weight_by_source"]
            metrics |= {
                f"loss/{name}": float(loss / weight)
                for name, loss, weight in zip(self._sources, losses, weights, strict=True)
                if weight
            }
        if self._peak:
            metrics["mfu"] = self._flops(mean) / seconds / self._peak
        return metrics

    def line(self, metrics: Mapping[str, float]) -> str:
        """Return the metrics as one line for the screen."""
        left_s = (self._num_steps - metrics["step"]) * metrics["step_time_s"]
        parts = [
            f"step {metrics['step']}/{self._num_steps}",
            f"epoch {metrics['epoch']:.2f}",
            f"loss {metrics['loss']:.4f}",
            *([f"router {metrics['router_loss']:.4f}"] if "router_loss" in metrics else []),
            f"lr {metrics['learning_rate']:.2e}",
            f"grad {metrics['grad_norm']:.3f}",
            f"{count(metrics['tokens_per_s'])} tok/s",
            f"{count(metrics['trained_tokens_per_s'])} trained tok/s",
            f"fill {metrics['fill']:.1%}",
            f"{metrics['step_time_s']:.3f} s/step",
            *(
                [f"WAITING FOR DATA {metrics['data/wait_ms']:.0f} ms/step"]
                if stalls(metrics)
                else []
            ),
            *([f"MFU {metrics['mfu']:.1%}"] if "mfu" in metrics else []),
            f"ETA {duration(left_s)}",
        ]
        return " | ".join(parts)


def stalls(metrics: Mapping[str, float]) -> bool:
    """Return whether more than a twentieth of the time is spent waiting for data."""
    return metrics["data/wait_ms"] > 50 * metrics["step_time_s"]


def count(number: float) -> str:
    """Format a count: 950, 12.3k, 4.56M, 7.61B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:  # a number that rounds to 1000 gets the next letter
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Format a duration: 42s, 3m05s, 2h07m."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes_left:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
