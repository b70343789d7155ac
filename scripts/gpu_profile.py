"""Trace a step with JAX's profiler and summarize which kernels take its time.

Called by `scripts/gpu_case.py` and `scripts/gpu_torch.py`. The trace itself is not kept.
"""

import dataclasses
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

MOST_KERNELS = 25  # number of kernels named in a summary
# {kind of kernel: pattern of its name}; the first match counts.
KINDS = {
    "attention": r"sdpa|flash|fmha|attention|cudnn",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|wgmma|^dot|matmul",
    "communication": r"nccl|all-?reduce|all-?gather|reduce-?scatter|all-?to-?all",
    "copies": r"memcpy|memset|^copy|transpose",
    "optimizer": r"adam|multi_tensor",
    "scatter, gather, sort": r"scatter|gather|sort|index",
}
OTHER = "elementwise and reductions"


@dataclasses.dataclass(frozen=True)
class Event:
    """One kernel execution: start and end (ns), kernel name, and its XLA instruction."""

    start: float
    end: float
    name: str
    op: str


def profiled(step: Callable[[], Any], num_steps: int, text: str) -> dict[str, Any]:
    """Trace `num_steps` steps and return their `summary`, or {"profile_problem"}.

    Args:
        text: text of the compiled program, which maps instructions to source operations.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            began = time.perf_counter()
            with jax.profiler.trace(folder):
                for _ in range(num_steps):
                    step()
            seconds = time.perf_counter() - began
            events = list(read(Path(folder)))
        except (RuntimeError, ValueError) as error:  # e.g. no profiler is available to the driver
            return {"profile_problem": str(error)[:300]}
    if not events:
        return {"profile_problem": "the trace has no kernels"}
    return summary(events, num_steps, op_names(text)) | {"profiled_s": seconds / num_steps}


def read(folder: Path) -> Iterator[Event]:
    """Yield the kernels of a trace, from the GPUs or else from the CPU's threads."""
    planes = [
        plane
        for file in folder.rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
    ]
    on_gpus = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in on_gpus or planes:
        for line in plane.lines:
            for event in line.events:
                op = next((str(value) for name, value in event.stats if name == "hlo_op"), "")
                # On GPUs only streams count; lines that repeat them ("XLA Ops") would count twice.
                if (on_gpus and line.name.startswith("Stream")) or (not on_gpus and op):
                    start = event.start_ns
                    yield Event(start, start + event.duration_ns, event.name, op)


def op_names(text: str) -> dict[str, str]:
    """Return {instruction: source operation} of a compiled program."""
    return dict(re.findall(r'%?([\w.\-]+) = [^\n]*?op_name="([^"]*)"', text))


def summary(events: Iterable[Event], num_steps: int, names: dict[str, str]) -> dict[str, Any]:
    """Return the busy ms per step: in total, by kind, and for the longest kernels.

    Kernels that run concurrently count twice by kind and once in `busy_ms`.
    """
    events = sorted(events, key=lambda event: event.start)
    per_step = 1e6 * num_steps
    kinds: dict[str, float] = defaultdict(float)
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    busy, until = 0.0, 0.0
    for event in events:
        busy += max(event.end - max(event.start, until), 0.0)
        until = max(until, event.end)
        kinds[kind_of(event.name, event.op)] += (event.end - event.start) / per_step
        times[event.name, event.op].append(event.end - event.start)
    longest = sorted(times.items(), key=lambda item: -sum(item[1]))[:MOST_KERNELS]
    return {
        "busy_ms": busy / per_step,
        "span_ms": (until - events[0].start) / per_step,
        "kinds_ms": {kind: round(ms, 3) for kind, ms in sorted(kinds.items(), key=_second)},
        "kernels": [
            {
                "ms": round(sum(ns) / per_step, 3),
                "count": len(ns) / num_steps,
                "name": name[:120],
                "op": op,
                "from": names.get(op, "")[-120:],
            }
            for (name, op), ns in longest
        ],
    }


def _second(item: tuple[str, float]) -> float:
    return -item[1]


def kind_of(name: str, op: str = "") -> str:
    """Return the kind of a kernel by its name, or else by its XLA instruction."""
    for kind, pattern in KINDS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return next((kind for kind, p in KINDS.items() if op and re.search(p, op)), OTHER)
