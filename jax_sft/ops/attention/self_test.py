"""Test attention against NumPy at the start of a run, and choose the backend by the result.

Shape suffixes: B rows, T query tokens, N heads, K kv heads, G = N / K, H head dim.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_sft.hosts import cluster, consensus
from jax_sft.ops.attention.dispatch import (
    BACKENDS,
    array_specs,
    candidates,
    packed_attention,
)

_ADVICE = f". Nothing was trained: use another of {BACKENDS[1:]}"
# Largest error that passes the self-test, relative to the largest value. Rounding gives 1e-6 in
# float32, 8e-4 in float16 and 5e-3 in bfloat16 (blockwise, CPU). A GPU may multiply float32 in
# TF32, which has the mantissa of float16. A wrong mask or head gives 0.3 or more.
TOLERANCE = {"float32": 5e-3, "float16": 5e-3, "bfloat16": 3e-2}
_TEST_TOKENS = 384  # per device; several blocks of any backend
_TEST_CHUNKS = 2  # interleaved chunks per device of a sharded row
_TEST_WINDOW = 24  # for models with a window; shorter than most segments of the test
_TEST_SOFT_CAP = 1.5  # for models with a soft cap; the scores have a standard deviation of 1


def choose(
    name: str,
    *,
    say: Callable[[str], Any],
    mesh,
    dtype: str,
    head_dim: int,
    num_heads_per_kv: int,
    has_window: bool = False,
    has_soft_cap: bool = False,
) -> str:
    """Return the fastest backend that passes its self-test, the same one on all processes.

    Every process of `mesh` must call it. With "auto", `say` reports a backend that fails with the
    reason, and the next backend is tried.

    Args:
        name, dtype, head_dim, has_soft_cap: as in `resolve`.
        mesh, num_heads_per_kv, has_window: as in `self_test`.

    Raises:
        ValueError: the requested backend, or with "auto" every backend, cannot run or fails.
    """
    own_candidates = candidates(
        name,
        platform=mesh.devices.flat[0].platform,
        dtype=dtype,
        head_dim=head_dim,
        sequence=mesh.shape["sequence"],
        has_soft_cap=has_soft_cap,
    )
    all_candidates = [
        json.loads(text) for text in cluster.exchange("attention", json.dumps(own_candidates))
    ]
    failed = []
    for backend in (
        backend_name
        for backend_name in all_candidates[0]
        if all(backend_name in allowed for allowed in all_candidates)
    ):
        try:
            self_test(
                backend,
                dtype=dtype,
                num_heads_per_kv=num_heads_per_kv,
                head_dim=head_dim,
                mesh=mesh,
                has_window=has_window,
                has_soft_cap=has_soft_cap,
            )
        except ValueError as error:
            if name != "auto":
                raise
            failed.append(str(error).removesuffix(_ADVICE))
            say(f"WARNING {failed[-1]}. Trying the next backend")
        else:
            return backend
    raise ValueError(
        f"model.attention = {name!r}: no attention backend computes correctly on this machine: "
        + "; ".join(failed)
    )


@functools.cache  # once per process
def self_test(
    backend: str,
    *,
    dtype: str,
    num_heads_per_kv: int,
    head_dim: int,
    mesh,
    has_window: bool = False,
    has_soft_cap: bool = False,
) -> None:
    """Compare values and gradients of `packed_attention` with NumPy on a small packed batch.

    Every process of `mesh` must call it. Each shard of the batch gets the same two rows. There are
    two kv heads per device of `tensor`. A row that is sharded over `sequence` is interleaved.

    Args:
        has_window: test with a short sliding window, regardless of the model's window.
        has_soft_cap: test with a soft cap that is low enough to matter.

    Raises:
        ValueError: the backend failed or its results differ. The message says how, and is the same
            on all processes.
    """
    batch = _test_batch(
        _TEST_TOKENS * mesh.shape["sequence"],
        shards=mesh.shape["sequence"],
        num_kv_heads=2 * mesh.shape["tensor"],
        num_heads_per_kv=num_heads_per_kv,
        head_dim=head_dim,
        dtype=dtype,
    )
    window = _TEST_WINDOW if has_window else None
    soft_cap = _TEST_SOFT_CAP if has_soft_cap else 0.0
    problem, details = _problem(backend, batch, 1 / math.sqrt(head_dim), window, soft_cap, mesh)
    if problem:
        raise ValueError(
            f"model.attention = {backend!r} {problem} on this machine, in {dtype} with "
            f"{num_heads_per_kv} heads of {head_dim} per kv head"
            f"{' and a sliding window' * has_window}{' and a soft cap' * has_soft_cap}: "
            f"{details}{_ADVICE}"
        )


def _problem(backend, batch, scale, window, soft_cap, mesh) -> tuple[str, str]:
    """Return (problem of a backend or "", details), the same on all processes.

    Processes exchange messages after compiling and after running. Otherwise a process whose library
    fails would leave the others waiting in a collective.
    """
    options: dict[str, Any] = dict(scale=scale, window=window, soft_cap=soft_cap)
    with jax.set_mesh(mesh):
        run, problem = _attempt(lambda: _compiled(backend, batch, options, mesh))
        if problems := consensus.gather("attention, compiled", [problem] if problem else []):
            return "fails", "; ".join(problems)
        errors, problem = _attempt(lambda: _errors(run, batch, options))
    if problems := consensus.gather("attention, run", [problem] if problem else []):
        return "fails", "; ".join(problems)
    exchanged = cluster.exchange("attention, errors", json.dumps(errors))
    largest = np.array([json.loads(text) for text in exchanged]).max(axis=0)  # max propagates nan
    allowed = TOLERANCE[batch[0].dtype.name]
    wrong = [
        f"{name} by {error:.2g} of its largest value"
        for name, error in zip(("out", "dq", "dk", "dv"), largest, strict=True)
        if not error <= allowed  # true for nan too
    ]
    return "computes wrongly" * bool(wrong), f"{', '.join(wrong)}, where {allowed} is allowed"


def _attempt(function: Callable[[], Any]) -> tuple[Any, str]:
    """Return (result of `function`, "") or (None, error message)."""
    try:
        return function(), ""
    # Kernel libraries and their compilers raise any type. The failure is reported by name: a
    # backend that was asked for is refused, and "auto" tries the next one.
    except Exception as error:
        return None, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"


def _part(array, num_rows: int, index):
    """Return a slice of an array of `num_rows` rows that repeats the rows of `array`."""
    return array[np.arange(num_rows)[index[0]] % len(array)][:, *index[1:]]


def _compiled(backend, batch, options, mesh) -> Callable[[], Any]:
    """Compile the test. Return a function that runs it and returns (out, dq, dk, dv)."""
    heads, kv_heads, ids, _ = jax.tree.map(
        functools.partial(jax.NamedSharding, mesh), array_specs()
    )
    num_rows = len(batch[0]) * mesh.shape["data"] * mesh.shape["fsdp"]

    def spread(array, sharding):
        shape = (num_rows, *array.shape[1:])
        part = functools.partial(_part, array, num_rows)
        return jax.make_array_from_callback(shape, sharding, part)

    @functools.partial(jax.jit, out_shardings=(heads, heads, kv_heads, kv_heads))
    def run(q, k, v, grad_out, *ids):
        def attend(q, k, v):
            return packed_attention(q, k, v, *ids, backend=backend, **options)

        out, backward = jax.vjp(attend, q, k, v)
        # The output of padding must be finite; it is set to 0 for this comparison.
        out = jnp.where((ids[0] == 0)[..., None, None] & jnp.isfinite(out), 0, out)
        return out, *backward(grad_out)

    arrays = [*map(spread, batch, (heads, kv_heads, kv_heads, heads, *ids))]
    return functools.partial(run.lower(*arrays).compile(), *arrays)


def _errors(run, batch, options) -> list[float]:
    """Return the largest errors of (out, dq, dk, dv) here, relative to the largest values."""
    errors = []
    for result, expected in zip(run(), _expected(*batch, **options), strict=True):
        shard_errors = [
            np.abs(
                np.asarray(shard.data, np.float32) - _part(expected, len(result), shard.index)
            ).max()
            for shard in result.addressable_shards
        ]
        errors.append(float(np.max(shard_errors) / np.abs(expected).max()))
    return errors


def _test_batch(num_tokens, *, shards, num_kv_heads, num_heads_per_kv, head_dim, dtype):
    """Return two packed rows in NumPy: q, k, v, d loss / d out, segment ids, positions.

    Segments have one to some hundred tokens. Padding follows, where d loss / d out is 0.
    """
    rng = np.random.default_rng(0)
    segments, positions = np.zeros((2, 2, num_tokens), np.int32)
    for row in range(2):
        cuts = rng.choice(np.arange(1, num_tokens - 9), min(num_tokens // 64, 200), replace=False)
        bounds = sorted({0, 1, *cuts.tolist(), num_tokens - 3 - 4 * row})
        for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
            segments[row, start:stop] = n + 1
            positions[row, start:stop] = np.arange(stop - start)
    # Token t of the row is in chunk t // (tokens per chunk); chunks go to the shards in turn.
    order = np.arange(num_tokens).reshape(_TEST_CHUNKS, shards, -1).swapaxes(0, 1).reshape(-1)
    segments, positions = segments[:, order], positions[:, order]

    num_heads = num_kv_heads * num_heads_per_kv
    q, k, v, grad_out = (
        rng.standard_normal((2, num_tokens, n, head_dim), np.float32).astype(jnp.dtype(dtype))
        for n in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    )
    return q, k, v, np.where((segments > 0)[..., None, None], grad_out, 0), segments, positions


def _expected(q, k, v, grad_out, segments, positions, *, scale, window, soft_cap):
    """Return (out, dq, dk, dv) of `_test_batch` in float32, computed segment by segment."""
    q, k, v, grad_out = (np.moveaxis(np.asarray(x, np.float32), 2, 1) for x in (q, k, v, grad_out))
    results = [np.zeros_like(x) for x in (q, q, k, v)]  # [rows, heads, tokens, H]
    num_heads_per_kv = q.shape[1] // k.shape[1]
    for row, segment in itertools.product(range(len(q)), range(1, segments.max() + 1)):
        tokens = np.flatnonzero(segments[row] == segment)
        tokens = tokens[np.argsort(positions[row, tokens])]
        queries, grads = q[row][:, tokens], grad_out[row][:, tokens]
        keys, values = (np.repeat(x[row][:, tokens], num_heads_per_kv, axis=0) for x in (k, v))
        visible = np.tri(len(tokens), dtype=bool)
        if window is not None:
            visible &= ~np.tri(len(tokens), k=-window, dtype=bool)
        scores, slopes = scale * queries @ keys.swapaxes(1, 2), 1.0
        if soft_cap:
            scores = soft_cap * np.tanh(scores / soft_cap)
            slopes = 1.0 - (scores / soft_cap) ** 2
        scores = np.where(visible, scores, -np.inf)
        probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
        probs /= probs.sum(axis=-1, keepdims=True)
        grad_probs = grads @ values.swapaxes(1, 2)
        mean = (grad_probs * probs).sum(axis=-1, keepdims=True)
        grad_scores = scale * probs * (grad_probs - mean) * slopes
        head_grads = grad_scores.swapaxes(1, 2) @ queries, probs.swapaxes(1, 2) @ grads
        kv_grads = (x.reshape(-1, num_heads_per_kv, *x.shape[1:]).sum(axis=1) for x in head_grads)
        parts = (probs @ values, grad_scores @ keys, *kv_grads)
        for result, part in zip(results, parts, strict=True):
            result[row][:, tokens] = part
    return [np.moveaxis(x, 1, 2) for x in results]
