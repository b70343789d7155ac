"""Run every check that needs a GPU, in less than ten minutes on one H200.

    python -m scripts.gpu_checks [--only CHECK ...] [--out FILE] [--budget SECONDS] [--smoke]

Each task runs in its own process (scripts/gpu_measure.py) with a time limit, so that a crash or a
hang loses no other result. Results are printed, and appended to the file as JSON lines, at once.
Run this in the clone's root; the package need not be installed, and nothing is downloaded. --smoke
runs all tasks with toy sizes on the CPU. The exit code is 1 if a task failed. `model` and `flags`
use all GPUs, the other checks use one.
"""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
MEASURE = REPO / "scripts" / "gpu_measure.py"
CHECKS = ("versions", "selftest", "model", "attention", "cross_entropy", "flags")
BACKENDS = ("cudnn", "tokamax", "blockwise")  # attention backends, each in its own task

Row = dict[str, Any]  # one line of the results

# XLA flags to try, each set in its own process. A flag named here replaces the trainer's option of
# that name. All of them are experiments.
FLAGS = {
    "default": "",
    "any order of sums": "--xla_gpu_exclude_nondeterministic_ops=false",
    "one order of sums": "--xla_gpu_exclude_nondeterministic_ops=true",
    "latency hiding off": "--xla_gpu_enable_latency_hiding_scheduler=false",
    "combine 256 MiB": "--xla_gpu_all_gather_combine_threshold_bytes=268435456 "
    "--xla_gpu_reduce_scatter_combine_threshold_bytes=268435456",
    "no command buffers": "--xla_gpu_enable_command_buffer=",
    "no triton products": "--xla_gpu_enable_triton_gemm=false",
    "recomputation by XLA": "--xla_disable_hlo_passes=",
    "products write into loops' results": "--xla_gpu_enable_dynamic_slice_fusion=true",
    "double buffered loops": "--xla_gpu_enable_while_loop_double_buffering=true",
}


@dataclasses.dataclass(frozen=True)
class Task:
    """One process: `check(argument)` of a script (None = gpu_measure.py), its time limit in
    seconds, and additions to its environment."""

    check: str
    argument: str
    limit_s: float
    env: dict[str, str]
    script: Path | None = None

    @property
    def name(self) -> str:
        return f"{self.check}/{self.argument}" if self.argument else self.check


def tasks(smoke: bool = False) -> list[Task]:
    """Return all tasks, the most important first, as time may run out."""
    backends = ("blockwise",) if smoke else BACKENDS
    return [
        Task("versions", "", 60, {}),
        *(Task("selftest", backend, 90, {}) for backend in backends),
        Task("model", "", 240, {}),
        *(Task("attention", backend, 120, {}) for backend in backends),
        Task("cross_entropy", "", 60, {}),
        *(
            Task("flags", name, 90, {"XLA_FLAGS": FLAGS[name]})
            for name in list(FLAGS)[: 2 if smoke else None]
        ),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CHECKS, help="run these checks alone")
    parser.add_argument("--out", type=Path, default=Path("gpu_checks.jsonl"), help="of the results")
    parser.add_argument("--budget", type=float, default=570, help="seconds for all of it")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, on CPU")
    options = parser.parse_args(argv)
    chosen = [t for t in tasks(options.smoke) if not options.only or t.check in options.only]
    return run_all(chosen, options.out, options.budget, smoke=options.smoke)


def run_all(chosen: list[Task], out: Path, budget_s: float, *, smoke: bool) -> int:
    """Run tasks in turn; return 1 if one of them failed, else 0."""
    deadline = time.monotonic() + budget_s
    outcomes = []
    for task in chosen:
        left = deadline - time.monotonic()
        print(f"\n{task.name}", flush=True)
        began = time.monotonic()
        outcome = (
            run_task(task, out, min(task.limit_s, left), smoke=smoke) if left > 5 else "skipped"
        )
        taken = round(time.monotonic() - began, 1)
        record(out, {"task": task.name, "outcome": outcome, "seconds": taken})
        outcomes.append((task.name, outcome, taken))
    print(
        "\n" + "\n".join(f"{name:32} {taken:6.1f} s  {result}" for name, result, taken in outcomes)
    )
    print(f"results: {out}")
    return int(any(result not in ("ok", "skipped") for _, result, _ in outcomes))


def run_task(task: Task, out: Path, limit_s: float, *, smoke: bool) -> str:
    """Run one task in a new process; return "ok" or a line that describes the failure."""
    command = [sys.executable, str(task.script or MEASURE), task.name, "--out", str(out)]
    command += ["--smoke"] if smoke else []
    env = os.environ | task.env
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    env["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {task.env.get('XLA_FLAGS', '')}".strip()
    env |= {"JAX_PLATFORMS": "cpu"} if smoke else {}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, env=env, stderr=errors, start_new_session=True)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"stopped after {limit_s:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with its children, e.g. the plan
                process.wait()
        errors.seek(0)
        error_lines = errors.read().decode(errors="replace").strip().splitlines()
    if code == 0:
        return "ok"
    print("\n".join(error_lines[-15:]), file=sys.stderr, flush=True)
    return f"failed with {code}: {error_lines[-1] if error_lines else 'no message'}"


def record(out: Path, row: Row) -> None:
    """Append a line of results, written to the file before the next step."""
    with out.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
