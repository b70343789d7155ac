"""Run one check on the GPUs of this machine; `scripts/gpu_checks.py` starts this for each.

    python -m scripts.gpu_measure CHECK[/ARGUMENT] --out FILE [--smoke]

Prints the results and appends them to the file as JSON lines, each at once. Weights and tokens are
random. The exit code is 1 if a result is wrong.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scripts import stand_ins

if missing := stand_ins.install():
    print(f"stand-ins for {missing}, which are not installed", file=sys.stderr)

from jax_sft.nn.layers import INIT_STD
from jax_sft.ops.attention import cudnn, dispatch, self_test
from jax_sft.ops.cross_entropy import cross_entropy
from jax_sft.sharding.mesh import single_device_mesh, use_gpu_memory
from scripts import gpu_step
from scripts.gpu_checks import Row, record

REPO = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes to measure: a model's widths and the numbers of tokens.

    Attributes:
        attention: the model's attention backend.
        head_shapes: (heads per kv head, head dim) of the self-tests.
        lengths: row lengths in tokens; each batch has `row_tokens` tokens.
        median_length: median segment length of packed rows (log-normal, sigma 1).
        seq_len, rows: tokens per row, and rows per step and device.
        steps: number of timed steps.
        flag_layers: number of layers of the model in the check of compiler flags.
        shortest_s: a time is the mean over as many calls as take this long, at most 50.
    """

    dtype: str
    attention: str
    head_shapes: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]
    row_tokens: int
    median_length: int
    model: dict[str, Any]
    seq_len: int
    rows: int
    steps: int
    flag_layers: int
    shortest_s: float

    @property
    def head_dim(self) -> int:
        return self.model["hidden_size"] // self.model["num_attention_heads"]


_QWEN = dict(
    model_type="qwen2",
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=False,
    max_position_embeddings=131072,
)
# Qwen2.5-7B. With float32 weights, moments and gradients it uses 114 of the 140 GiB of an H200.
H200 = Sizes(
    dtype="bfloat16",
    attention="auto",
    head_shapes=((7, 128), (1, 64), (8, 128), (5, 96)),
    lengths=(2048, 8192, 32768),
    row_tokens=32768,
    median_length=400,
    model=dict(
        **_QWEN,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
    ),
    seq_len=4096,
    rows=2,
    steps=5,
    flag_layers=4,
    shortest_s=0.2,
)
SMOKE = Sizes(
    dtype="float32",
    attention="reference",  # it compiles fastest
    head_shapes=((2, 16),),
    lengths=(64, 128),
    row_tokens=256,
    median_length=20,
    model=dict(
        **_QWEN,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
    ),
    seq_len=128,
    rows=8,
    steps=2,
    flag_layers=1,
    shortest_s=0.0,
)

MAX_SEGMENTS = 256  # per row; the default of data.max_segments
# Contents of rows: (maximum number of segments, their median length); 0 = equal lengths, see
# gpu_step.rows_of_segments.
KINDS: dict[str, Callable[[Sizes], tuple[int, int]]] = {
    "one segment": lambda sizes: (1, 0),
    "packed": lambda sizes: (MAX_SEGMENTS, sizes.median_length),
    "most segments": lambda sizes: (MAX_SEGMENTS, 0),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", help="e.g. versions, selftest/cudnn or attention/tokamax")
    parser.add_argument("--out", type=Path, required=True, help="of the results")
    parser.add_argument("--smoke", action="store_true", help="toy sizes")
    options = parser.parse_args(argv)
    use_gpu_memory()
    check, _, argument = options.task.partition("/")
    passed = True
    for row in CHECKS[check](argument, SMOKE if options.smoke else H200):
        print("  " + "  ".join(f"{key} {shown(value)}" for key, value in row.items()), flush=True)
        record(options.out, {"task": options.task, **row})
        passed &= row.get("passed", True)
    return int(not passed)


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def versions(_: str, sizes: Sizes) -> Iterator[Row]:
    """Yield the device, the package versions and the problems of each attention backend."""
    device = jax.local_devices()[0]
    yield {
        "device": f"{jax.local_device_count()} x {device.device_kind}",
        "memory_GiB": (device.memory_stats() or {}).get("bytes_limit", 0) / 2**30,
        "platform": device.client.platform_version.splitlines()[-1],
        "python": platform.python_version(),
    }
    names = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "tokamax", "flax", "optax")
    package_versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            package_versions[name] = importlib.metadata.version(name)
    yield package_versions
    for backend in dispatch.BACKENDS:
        problems = backend_problems(backend, sizes)
        yield {"attention": backend, "problems": "; ".join(problems) or "none"}


def selftest(backend: str, sizes: Sizes) -> Iterator[Row]:
    """Check a backend against NumPy, and at full size against blockwise attention."""
    if problems := backend_problems(backend, sizes):
        yield {"skipped": "; ".join(problems)}
        return
    mesh = single_device_mesh()
    for num_heads_per_kv, head_dim in sizes.head_shapes:
        shape = {"heads_per_kv": num_heads_per_kv, "head_dim": head_dim}
        try:
            self_test.self_test(
                backend,
                dtype=sizes.dtype,
                num_heads_per_kv=num_heads_per_kv,
                head_dim=head_dim,
                mesh=mesh,
            )
            yield {**shape, "passed": True}
        except ValueError as error:
            yield {**shape, "passed": False, "error": str(error)}
    tokens = sizes.lengths[1]
    both = [jax.jit(attend_both(name)) for name in (backend, "blockwise")]
    for kind in KINDS:
        inputs, _ = attention_inputs(sizes, tokens, kind)
        with jax.set_mesh(mesh):
            arrays, expected = (run(*inputs) for run in both)
        errors = [
            # For segments of one token, dq and dk are zero except for rounding.
            float(jnp.abs(array - reference).max() / jnp.maximum(jnp.abs(reference).max(), 1e-2))
            for array, reference in zip(arrays, expected, strict=True)
        ]
        row = {"tokens": tokens, "rows of": kind, "largest_error": max(errors)}
        yield {**row, "passed": max(errors) <= self_test.TOLERANCE[sizes.dtype]}


def backend_problems(backend: str, sizes: Sizes) -> list[str]:
    try:
        dispatch.resolve(
            backend,
            platform=jax.default_backend(),
            dtype=sizes.dtype,
            head_dim=sizes.head_dim,
            sequence=1,
        )
        return []
    except ValueError as error:
        return [str(error)]


def attention_times(backend: str, sizes: Sizes) -> Iterator[Row]:
    """Time forward, and forward with backward, on rows of one segment and on packed rows."""
    if problems := backend_problems(backend, sizes):
        yield {"skipped": "; ".join(problems)}
        return
    parts = (("forward", attend(backend), 4), ("both", attend_both(backend), 14))
    for tokens in sizes.lengths:
        compiled = {}
        for kind in ("one segment", "packed"):
            inputs, pairs = attention_inputs(sizes, tokens, kind)
            B, _, N, H = inputs[0].shape
            row: Row = {"tokens": tokens, "rows": B, "of": kind, "segments": int(inputs[3].max())}
            # Operations per pair, head and element, 2 per matrix product. Forward has 2 products;
            # backward has 5, as it computes the scores again. Both together have 7.
            for name, function, operations in parts:
                arguments = inputs[:-1] if name == "forward" else inputs
                if name not in compiled:
                    compiled[name] = compile_here(function, arguments)
                seconds, memory = measured(compiled[name], arguments, sizes.shortest_s)
                row[f"{name}_ms"] = 1e3 * seconds
                row[f"{name}_TFLOPs"] = operations * pairs * N * H / seconds / 1e12
                row[f"{name}_MiB"] = memory / 2**20
            if backend == "cudnn":
                row["workspace_MiB"] = expected_workspace(inputs) / 2**20  # in both_MiB
            yield row


def expected_workspace(inputs: tuple) -> int:
    """Return the workspace bytes that our formula predicts for cuDNN."""
    (B, tokens, N, H), K = inputs[0].shape, inputs[1].shape[2]
    return cudnn.workspace_bytes(
        rows=B,
        num_tokens=tokens,
        num_heads=N,
        num_kv_heads=K,
        head_dim=H,
        max_segments=MAX_SEGMENTS,
    )


def attention_inputs(sizes: Sizes, tokens: int, kind: str) -> tuple[tuple, int]:
    """Return ((q, k, v, segment ids, positions, gradient of the output), attended query-key pairs).

    The number of rows of this kind is such that they have `row_tokens` tokens.
    """
    B = max(1, sizes.row_tokens // tokens)
    max_segments, median = KINDS[kind](sizes)
    segments, positions = gpu_step.rows_of_segments(B, tokens, max_segments, median)
    N, K = sizes.model["num_attention_heads"], sizes.model["num_key_value_heads"]
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, grad = (
        jax.random.normal(key, (B, tokens, heads, sizes.head_dim), sizes.dtype)
        for key, heads in zip(keys, (N, K, K, N), strict=True)
    )
    pairs = int(np.where(segments > 0, positions + 1, 0).sum())
    return (q, k, v, jnp.asarray(segments), jnp.asarray(positions), grad), pairs


def attend(backend: str) -> Callable:
    def forward(q, k, v, segments, positions):
        scale = 1 / math.sqrt(q.shape[-1])
        return dispatch.packed_attention(q, k, v, segments, positions, scale=scale, backend=backend)

    return forward


def attend_both(backend: str) -> Callable:
    def both(q, k, v, segments, positions, grad):
        def forward(q, k, v):
            return attend(backend)(q, k, v, segments, positions)

        out, backward = jax.vjp(forward, q, k, v)
        return out, *backward(grad)

    return both


def compile_here(function: Callable, arguments: tuple) -> jax.stages.Compiled:
    """Compile for one device."""
    with jax.set_mesh(single_device_mesh()):
        return jax.jit(function).lower(*arguments).compile()


def measured(
    compiled: jax.stages.Compiled, arguments: tuple, shortest_s: float
) -> tuple[float, int]:
    """Return (seconds of a call, bytes of its temporaries)."""
    jax.block_until_ready(compiled(*arguments))
    began = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    calls = max(1, min(50, round(shortest_s / (time.perf_counter() - began))))
    began = time.perf_counter()
    for _ in range(calls - 1):
        compiled(*arguments)
    jax.block_until_ready(compiled(*arguments))
    seconds = (time.perf_counter() - began) / calls
    memory = compiled.memory_analysis()
    return seconds, memory.temp_size_in_bytes if memory else 0


def cross_entropy_times(_: str, sizes: Sizes) -> Iterator[Row]:
    """Time loss and gradients of the head for several shares of trained tokens."""
    D, V, T = sizes.model["hidden_size"], sizes.model["vocab_size"], sizes.lengths[-1] // 4
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (1, T, D), sizes.dtype)
    head = INIT_STD * jax.random.normal(keys[1], (V, D))
    targets = jax.random.randint(keys[2], (1, T), 0, V)

    def loss(hidden, head, targets, weights):
        return cross_entropy(hidden, head, targets, weights)[0]

    step = jax.value_and_grad(loss, argnums=(0, 1))
    compiled = compile_here(step, (hidden, head, targets, jnp.ones((1, T))))
    for share in (1.0, 0.5, 0.1):
        weights = (jax.random.uniform(keys[3], (1, T)) < share).astype(jnp.float32)
        arguments = (hidden, head, targets, weights)
        seconds, memory = measured(compiled, arguments, sizes.shortest_s)
        trained = int(weights.sum())
        yield {
            "tokens": T,
            "trained": trained,
            "ms": 1e3 * seconds,
            "TFLOPs": 6 * trained * D * V / seconds / 1e12,
            "MiB": memory / 2**20,
        }


def model(_: str, sizes: Sizes) -> Iterator[Row]:
    """Compare the prediction of `plan` with a measured step, for a model that fills the GPU."""
    with tempfile.TemporaryDirectory() as folder:
        config_file = write_model(Path(folder), sizes, sizes.model)
        expected = gpu_step.predicted(config_file, Path(folder))
        yield {"predicted": expected}
        result = gpu_step.measured_step(config_file, sizes.steps)
        yield result
    for key in ("peak_bytes", "step_time_s"):
        if expected.get(key) and result.get(key):
            yield {"ratio_of": key, "measured_to_predicted": result[key] / expected[key]}


def flags(_: str, sizes: Sizes) -> Iterator[Row]:
    """Measure the step of a model of few layers under the compiler flags of this process."""
    with tempfile.TemporaryDirectory() as folder:
        raw = sizes.model | {"num_hidden_layers": sizes.flag_layers}
        yield {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
        yield gpu_step.measured_step(write_model(Path(folder), sizes, raw), sizes.steps)


def write_model(folder: Path, sizes: Sizes, raw: dict[str, Any]) -> Path:
    return gpu_step.write_config(
        folder,
        raw,
        sizes.rows,
        {
            "model.dtype": sizes.dtype,
            "model.attention": sizes.attention,
            "data.seq_len": sizes.seq_len,
        },
    )


CHECKS: dict[str, Callable[[str, Sizes], Iterator[Row]]] = {
    "versions": versions,
    "selftest": selftest,
    "model": model,
    "attention": attention_times,
    "cross_entropy": cross_entropy_times,
    "flags": flags,
}

if __name__ == "__main__":
    sys.exit(main())
