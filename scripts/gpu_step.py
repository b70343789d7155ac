"""The trainer's step on random weights and tokens: what `plan` predicts of it, and what is so.

Called by `scripts/gpu_measure.py`.
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
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

# Python finds the package by the line above: hence E402.
from jax_sft import parallel, program, state  # noqa: E402
from jax_sft.models.layers import INIT_STD  # noqa: E402
from jax_sft.models.spec import Weight  # noqa: E402
from jax_sft.planning.chips import CHIPS  # noqa: E402
from jax_sft.validate import validate  # noqa: E402


def write_config(folder: Path, raw: dict[str, Any], rows: int, changes: dict[str, Any]) -> Path:
    """Write a config file for a model of this config.json, and the files that it names.

    Args:
        rows: per step and device.
        changes: {key of the config: value}.
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
    """{"peak_bytes", "step_time_s"} as `plan` predicts them, or {"problem"}."""
    kind = jax.local_devices()[0].device_kind
    target = next((chip.name for chip in CHIPS.values() if chip.kind == kind), "h200")
    command = [
        sys.executable,
        "-m",
        "jax_sft.plan",
        f"--config={config_file}",
        f"--target={target}",
    ]
    command += ["--hosts=1", f"--gpus-per-host={jax.local_device_count()}", f"--workdir={folder}"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=REPO)
    written = folder / "plan.json"
    if not written.exists():
        return {"problem": f"plan ended with {done.returncode}: {done.stderr.strip()[-500:]}"}
    found = json.loads(written.read_text())
    if "memory" not in found:
        return {"problem": f"no plan for GPUs: {done.stderr.strip()[-500:]}"}
    return {
        "attention": found["config"]["attention"],
        "peak_bytes": found["memory"]["peak_bytes"],
        "step_time_s": found["predicted"]["step_time_s"],
    }


def measured_step(config_file: Path, num_steps: int) -> dict[str, Any]:
    """Run the trainer's step of this config, on rows of one segment."""
    cfg = runpy.run_path(str(config_file))["get_config"]()
    resolved = validate(cfg, jax.device_count())
    mesh = parallel.make_mesh(resolved.mesh_shape)
    with mock.patch.object(program, "gpu_options", options_left):
        compiled = program.program(cfg, resolved, mesh, num_steps=1000)
    rows, dims = compiled.model_def.rows, resolved.model_cfg.dims
    with jax.set_mesh(mesh):
        current = state.create(compiled.tx, random_params(rows, dims, mesh), rows, mesh)
        batch = random_batch(cfg.batch.rows, cfg.data.seq_len, dims["vocab"], mesh)
        before = peak_bytes()
        times = []
        for _ in range(1 + num_steps):
            began = time.perf_counter()
            current, sums = compiled.train_step(current, batch)
            loss = float(sums["loss"] / sums["weight"])  # waits for the step
            times.append(time.perf_counter() - began)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} with attention {resolved.attention}")
    seconds = float(np.median(times[1:]))
    return {
        "layers": dims["layers"],
        "attention": resolved.attention,
        "options": options_left(resolved.attention),
        "first_step_s": times[0],
        "step_time_s": seconds,
        "slowest_s": max(times[1:]),
        "tokens_per_s": batch["tokens"].size / seconds,
        "peak_bytes": peak_bytes(),
        "peak_bytes_before": before,
        "loss": loss,
    }


_trainer_options = program.gpu_options


def options_left(attention: str) -> dict[str, Any]:
    """What the trainer tells XLA, but for what XLA_FLAGS names, over which it would win."""
    named = re.findall(r"--(\w+)", os.environ.get("XLA_FLAGS", ""))
    return {name: v for name, v in _trainer_options(attention).items() if name not in named}


def random_params(rows: Iterable[Weight], dims: dict[str, int], mesh) -> dict[str, jax.Array]:
    """Float32 weights as a model from scratch has them, each made where it stays."""
    rows = list(rows)
    params = {}
    for number, (row, sharding) in enumerate(
        zip(rows, state.param_shardings(rows, mesh).values(), strict=True)
    ):
        make = functools.partial(
            hashed, row.shape(dims), number, float(row.path.endswith(".scale"))
        )
        params[row.path] = jax.jit(make, out_shardings=sharding)()
    return params


def hashed(shape: tuple[int, ...], seed: int, mean: float) -> jax.Array:
    """Numbers without a pattern and with a standard deviation of INIT_STD.

    Of the elements' indices: jax.random takes a second to compile for each shape.
    """
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    x = jnp.full(shape, seed, jnp.uint32) * 668265263
    for dim, stride in enumerate(strides):
        x += jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * jnp.uint32(stride)
    for multiplier, shift in ((2654435761, 15), (2246822519, 13), (3266489917, 16)):
        x *= jnp.uint32(multiplier)
        x ^= x >> shift
    return mean + INIT_STD * math.sqrt(12) * (x.astype(jnp.float32) / 2.0**32 - 0.5)


def random_batch(num_rows: int, num_tokens: int, vocab: int, mesh) -> dict[str, jax.Array]:
    """Rows of one segment of random tokens, all of them trained."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (1, num_rows, num_tokens + 1), np.int32)
    segments, positions = rows_of_segments(num_rows, num_tokens)
    arrays = {
        "tokens": tokens[..., :-1],
        "targets": tokens[..., 1:],
        "weights": np.ones((1, num_rows, num_tokens), np.float32),
        "segment_ids": segments[None],
        "positions": positions[None],
    }
    sharding = parallel.sharding(mesh, "micro_batch", "batch", "token")
    return {name: jax.device_put(array, sharding) for name, array in arrays.items()}


def peak_bytes() -> int | None:
    """Most bytes in use on the fullest device so far; None where JAX does not count (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    return max((s["peak_bytes_in_use"] for s in stats if s), default=None)


def rows_of_segments(
    num_rows: int, num_tokens: int, max_segments: int = 1, median: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return (segment ids, positions), int32 [rows, tokens], of rows without padding.

    Args:
        median: of the segments' lengths, which are log-normal with sigma 1, but for a last one that
            fills the row; 0 = as many segments as there may be, of equal lengths.
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
