"""Train a tiny model for twenty steps, and compare its losses with those of one process.

Shared by the scripts of this folder that start real launchers and clusters.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCH = str(ROOT / "scripts" / "launch.sh")
STEPS = 20
SAVE_STEPS = 5
# One process and two differ only in the order of additions.
TOLERANCE = 1e-6

CONFIG = """\
from jax_sft import config, tiny


def get_config():
    parts = tiny.build({parts!r})
    cfg = config.default()
    cfg.model.path = str(parts / "model")
    cfg.model.dtype = "float32"
    cfg.data.train.words = config.source(str(parts / "train.jsonl"))
    cfg.data.seq_len = 256
    cfg.batch.rows = 16
    cfg.train.steps = {steps}
    cfg.optimizer.learning_rate = 1e-3
    cfg.mesh.fsdp = 2
    cfg.mesh.data = 2
    cfg.mesh.cpu_devices = 4
    cfg.checkpoint.every_steps = {save_steps}
    cfg.log.every_steps = 1
    return cfg
"""


class Claims:
    """Print each claim with its measured values, and count those that fail."""

    def __init__(self):
        self.failed = 0

    def check(self, held: bool, text: str) -> None:
        """Print a claim, and count it if it does not hold."""
        print(f"{'holds' if held else 'FAILS'}   {text}", flush=True)
        self.failed += not held

    def equal(self, losses: Sequence[float], expected: Sequence[float], what: str) -> None:
        """Claim that losses are equal within TOLERANCE."""
        far = max((abs(a - b) for a, b in zip(losses, expected, strict=False)), default=0.0)
        text = f"{what}: {len(losses)} losses, at most {far:.1e} from one process's"
        self.check(len(losses) == len(expected) == STEPS and far <= TOLERANCE, text)

    def same(self, losses: Sequence[float], expected: Sequence[float], what: str) -> None:
        """Claim that losses are bitwise equal."""
        equal = sum(a == b for a, b in zip(losses, expected, strict=False))
        text = f"{what}: {equal} of {len(expected)} losses bitwise the same"
        self.check(list(losses) == list(expected) and len(losses) >= STEPS, text)

    def end(self) -> None:
        """End the program, with 1 if a claim failed."""
        sys.exit(bool(self.failed))


def environment(work: Path) -> dict[str, str]:
    """Return the trainers' environment: CPU devices, no network, their own cache."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_SFT_"))}
    return env | {
        "PYTHON": os.environ.get("PYTHON", sys.executable),
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(work / "cache"),
    }


@contextlib.contextmanager
def workplace(name: str) -> Iterator[Path]:
    """Yield a folder with the config file; delete it unless the body raises or exits."""
    # The spaces in the name must not break anything.
    work = Path(tempfile.mkdtemp(prefix=f"jax sft {name}-"))
    print(f"works in {work}", flush=True)
    file = CONFIG.format(parts=str(work / "parts"), steps=STEPS, save_steps=SAVE_STEPS)
    (work / "tiny20.py").write_text(file)
    yield work
    subprocess.run(["rm", "-rf", str(work)], check=True)


def options(work: Path, run: str) -> list[str]:
    """Return the trainer's options for a run in `work`."""
    return [f"--config={work}/tiny20.py", f"--workdir={work}/{run}"]


def alone(work: Path) -> list[float]:
    """Train without a cluster, in one process; return the losses."""
    finish([LAUNCH, *options(work, "alone")], environment(work), work / "alone.log")
    return losses(work / "alone")


def losses(run: Path) -> list[float]:
    """Return the losses of a run, step by step."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return []
    lines = [line for line in file.read_text().split("\n")[:-1]]
    with_loss = [metrics for metrics in map(json.loads, lines) if "loss" in metrics]
    steps = [metrics["step"] for metrics in with_loss]
    assert steps == list(range(1, len(steps) + 1)), f"{file} has the steps {steps}"
    return [metrics["loss"] for metrics in with_loss]


def finish(command: Sequence[str], env: Mapping[str, str], log: Path, timeout_s: int = 400) -> int:
    """Run a command to its end with output to a file; return its exit code."""
    with log.open("wb") as output:
        done = subprocess.run(
            command, env=env, stdout=output, stderr=subprocess.STDOUT, timeout=timeout_s
        )
    return done.returncode


def wait_for_step(run: Path, step: int, timeout_s: float = 200) -> int:
    """Wait until a run has logged a step; return its newest step."""
    deadline = time.monotonic() + timeout_s
    while len(logged := losses(run)) < step:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{run} is at step {len(logged)} after {timeout_s} s")
        time.sleep(0.02)
    return len(logged)


def kill(run: Path, process: int, module: str = "jax_sft.train") -> int:
    """Kill the trainer (or launcher) of a process number with SIGKILL; return its process id."""
    pid = find(run, process, module)
    os.kill(pid, signal.SIGKILL)
    return pid


def find(run: Path, process: int, module: str = "jax_sft.train") -> int:
    """Return the process id of a trainer of a run (or of its launcher, jax_sft.launch).

    Raises:
        LookupError: not exactly one process matches.
    """
    pids = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            command = (entry / "cmdline").read_bytes().decode().split("\0")
            variables = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        numbers = {f"{name}={process}" for name in ("JAX_SFT_PROCESS_ID", "SLURM_PROCID")}
        numbers.add(f"OMPI_COMM_WORLD_RANK={process}")
        is_python = command[1:3] == ["-m", module]
        if is_python and f"--workdir={run}" in command and numbers & set(variables):
            pids.append(int(entry.name))
    if len(pids) != 1:
        raise LookupError(f"{len(pids)} processes {process} of {module} for {run}: {pids}")
    return pids[0]


def wait_until(condition, what: str, timeout_s: float = 60) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: it does not hold within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s} s")
        time.sleep(0.2)


def need(*programs: str, packages: str) -> None:
    """End with a message if programs are missing."""
    missing = [
        program
        for program in programs
        if subprocess.run(["bash", "-c", f"command -v {program}"], capture_output=True).returncode
    ]
    if missing:
        print(f"error: {', '.join(missing)} missing: install {packages}", file=sys.stderr)
        sys.exit(64)
