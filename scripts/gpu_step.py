"""Predict the trainer's step with `plan`, and measure it on random weights and tokens.

Called by the gpu_*.py scripts and `scripts/bench_growth.py`.
"""

import functools
import json
import math
import os
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from scripts import stand_ins

if missing := stand_ins.install():
    print(f"stand-ins for {missing}, which are not installed", file=sys.stderr)

from jax_sft.hardware import CHIPS
from jax_sft.nn.layers import INIT_STD
from jax_sft.settings import Settings
from jax_sft.sharding import rules
from jax_sft.sharding.mesh import make_mesh
from jax_sft.training import program, state
from jax_sft.validate import validate
from jax_sft.weights import placement
from jax_sft.weights.param_spec import ParamSpec

REPO = Path(__file__).resolve().parent.parent
PLAN = """
import runpy
from scripts import stand_ins
stand_ins.install()
runpy.run_module("jax_sft.plan", run_name="__main__", alter_sys=True)
"""


def write_config(folder: Path, raw: dict[str, Any], rows: int, changes: dict[str, Any]) -> Path:
    """Write a config file for a model with this config.json, and the files that it names.

    Args:
        rows: number of rows per step and device.
        changes: {config key: value}.
    """
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(raw))
    data = folder / "data.jsonl"
    data.write_text('{"prompt": "a", "response": "b"}\n')
    settings = changes | {
        "model.path": str(folder / "model"),
        "batch.rows": rows * jax.local_device_count(),
    }
    lines = [f"    cfg.{key} = {value!r}" for key, value in settings.items()]
    text = "\n".join(
        [
            "from jax_sft import config",
            "def get_config():",
            "    cfg = config.default()",
            *lines,
            f"    cfg.data.train.main = config.source({str(data)!r})",
            "    return cfg",
        ]
    )
    file = folder / "config.py"
    file.write_text(text + "\n")
    return file


def predicted(config_file: Path, folder: Path) -> dict[str, Any]:
    """Return {"attention", "peak_bytes", "step_time_s"} as `plan` predicts them, or {"problem"}."""
    kind = jax.local_devices()[0].device_kind
    target = next((chip.name for chip in CHIPS.values() if chip.kind == kind), "h200")
    command = [sys.executable, "-c", PLAN, f"--config={config_file}", f"--target={target}"]
    command += ["--hosts=1", f"--gpus-per-host={jax.local_device_count()}", f"--workdir={folder}"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=REPO)
    plan_file = folder / "plan.json"
    if not plan_file.exists():
        return {"problem": f"plan ended with {done.returncode}: {done.stderr.strip()[-500:]}"}
    plan = json.loads(plan_file.read_text())
    if "memory" not in plan:
        return {"problem": f"no plan for GPUs: {done.stderr.strip()[-500:]}"}
    return {
        "attention": plan["config"]["attention"],
        "peak_bytes": plan["memory"]["peak_bytes"],
        "step_time_s": plan["predicted"]["step_time_s"],
    }


def measured_step(
    config_file: Path,
    num_steps: int,
    *,
    max_segments: int = 1,
    median: int = 0,
    finish: Callable[[Callable[[], Any], str], dict[str, Any]] = lambda step, text: {},
) -> dict[str, Any]:
    """Run the trainer's step with a config and return its times and peak memory.

    Args:
        max_segments, median: see `rows_of_segments`.
        finish: called at the end with a function that runs one more step and with the text of the
            compiled program; its result is added to the returned dict.
    """
    cfg = runpy.run_path(str(config_file))["get_config"]()
    settings = validate(cfg, jax.device_count())
    mesh = make_mesh(settings.mesh_shape)
    with mock.patch.object(program, "gpu_options", options_left):
        planned = program.program(settings, mesh, num_steps=1000)
    rows, dims = planned.model_def.specs, settings.model_cfg.axis_sizes
    dtype = jnp.dtype(settings.model.param_dtype)
    with jax.set_mesh(mesh):
        current = state.create(planned.tx, random_params(rows, dims, mesh, dtype), rows, mesh)
        batch = random_batch(settings, dims["vocab"], mesh, max_segments, median)
        before = peak_bytes()
        began = time.perf_counter()
        scalars = planned.scalars.on(mesh)
        compiled = planned.train_step.lower(current, batch, scalars).compile()
        compile_s = time.perf_counter() - began

        def step() -> float:
            nonlocal current
            current, sums = compiled(current, batch, scalars)
            return float(sums["loss"] / sums["weight"])  # waits for the step

        times = timed(step, num_steps, f"with attention {settings.attention}")
        peak = peak_bytes()
        extra = finish(step, compiled.as_text() or "")
    tokens = int((batch["segment_ids"] > 0).sum())
    return {
        "layers": dims["layers"],
        "attention": settings.attention,
        "options": options_left(settings.attention),
        "compile_s": compile_s,
        **times,
        "tokens": tokens,
        "pairs": int((batch["positions"] + 1).astype(jnp.float32).sum()),
        "tokens_per_s": tokens / times["step_time_s"],
        "peak_bytes": peak,
        "peak_bytes_before": before,
        **extra,
    }


def timed(step: Callable[[], float], num_steps: int, of: str = "") -> dict[str, Any]:
    """Call a step once, then `num_steps` times, and return the times and losses.

    Args:
        step: returns its loss when the device is done.
        of: description of the step for the error message.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    times, losses = [], []
    for _ in range(1 + num_steps):
        began = time.perf_counter()
        losses.append(step())
        times.append(time.perf_counter() - began)
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} {of}".strip())
    return {
        "first_step_s": times[0],
        "step_time_s": float(np.median(times[1:])),
        "slowest_s": max(times[1:]),
        "fastest_s": min(times[1:]),
        "first_loss": losses[0],
        "loss": losses[-1],
    }


_trainer_options = program.gpu_options


def options_left(attention: str) -> dict[str, Any]:
    """Return the trainer's XLA options without those in XLA_FLAGS, which they would override."""
    named = re.findall(r"--(\w+)", os.environ.get("XLA_FLAGS", ""))
    return {name: v for name, v in _trainer_options(attention).items() if name not in named}


def random_params(
    rows: Iterable[ParamSpec], dims: dict[str, int], mesh, dtype=jnp.float32
) -> dict[str, jax.Array]:
    """Return weights as of a model from scratch, each created directly in its sharding."""
    rows = list(rows)
    params = {}
    for number, (row, sharding) in enumerate(
        zip(rows, placement.shardings(rows, mesh).values(), strict=True)
    ):
        mean = float(row.path.endswith(".scale"))
        make = functools.partial(hashed, row.shape(dims), number, mean, dtype)
        params[row.path] = jax.jit(make, out_shardings=sharding)()
    return params


def hashed(shape: tuple[int, ...], seed: int, mean: float, dtype=jnp.float32) -> jax.Array:
    """Return numbers without a pattern and with a standard deviation of INIT_STD.

    They are hashes of the elements' indices, as jax.random takes a second to compile per shape.
    """
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    x = jnp.full(shape, seed, jnp.uint32) * 668265263
    for dim, stride in enumerate(strides):
        x += jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * jnp.uint32(stride)
    for multiplier, shift in ((2654435761, 15), (2246822519, 13), (3266489917, 16)):
        x *= jnp.uint32(multiplier)
        x ^= x >> shift
    spread = INIT_STD * math.sqrt(12) * (x.astype(jnp.float32) / 2.0**32 - 0.5)
    return (mean + spread).astype(dtype)


def random_batch(
    settings: Settings, vocab: int, mesh, max_segments: int = 1, median: int = 0
) -> dict[str, jax.Array]:
    """Return one batch of random tokens, all trained, in micro-batches as the config sets them.

    Args:
        max_segments, median: see `rows_of_segments`.
    """
    num_rows, num_tokens = settings.batch.rows, settings.data.seq_len
    micro_rows = settings.batch.micro_rows or num_rows
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (num_rows, num_tokens + 1), np.int32)
    segments, positions = rows_of_segments(num_rows, num_tokens, max_segments, median)
    arrays = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((num_rows, num_tokens), np.float32),
        "segment_ids": segments,
        "positions": positions,
    }
    sharding = rules.sharding(mesh, "micro_batch", "batch", "token")
    return {
        name: jax.device_put(array.reshape(-1, micro_rows, num_tokens), sharding)
        for name, array in arrays.items()
    }


def peak_bytes() -> int | None:
    """Return the peak bytes in use on the fullest device; None where JAX does not count (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    return max((s["peak_bytes_in_use"] for s in stats if s), default=None)


def rows_of_segments(
    num_rows: int, num_tokens: int, max_segments: int = 1, median: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return (segment ids, positions), int32 [rows, tokens], of rows without padding.

    Args:
        median: median segment length. Lengths are log-normal with sigma 1, except for the last
            segment, which fills the row. 0 = `max_segments` segments of equal lengths.
    """
    rng = np.random.default_rng(0)
    max_segments = min(max_segments, num_tokens)
    segments, positions = np.zeros((2, num_rows, num_tokens), np.int32)
    for row in range(num_rows):
        starts = np.arange(max_segments) * num_tokens // max_segments
        if median:
            lengths = 1 + np.int32(median * rng.lognormal(size=max_segments - 1))
            starts = np.concatenate([[0], np.cumsum(lengths)])
            starts = starts[starts < num_tokens]
        segments[row] = np.searchsorted(starts, np.arange(num_tokens), side="right")
        positions[row] = np.arange(num_tokens) - starts[segments[row] - 1]
    return segments, positions
