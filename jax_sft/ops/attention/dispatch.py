"""Causal attention on packed rows: a token sees itself and earlier tokens of its segment only.

Shape suffixes: B rows, T query tokens, N heads, K kv heads, G = N / K, H head dim.
Models call `packed_attention` inside jit, under the mesh of `jax.set_mesh`; `validate` calls
`resolve`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_sft.ops.attention import blockwise, cudnn, reference, tokamax
from jax_sft.sharding import rules

# In the order in which "auto" tries them on a GPU. On other platforms it starts at blockwise.
_MODULES: dict[str, Any] = {
    "cudnn": cudnn,
    "tokamax": tokamax,
    "blockwise": blockwise,
    "reference": reference,
}
BACKENDS = ("auto", *_MODULES)  # model.attention
_EVERYWHERE = ("blockwise", "reference")  # run on any platform; the last ones that "auto" tries

_NO_WINDOW = 2**30  # a traced window longer than any row, small enough that no position overflows


def resolve(
    name: str,
    *,
    platform: str,
    dtype: str,
    head_dim: int,
    sequence: int,
    capability: tuple[int, ...] | None = None,
    has_soft_cap: bool = False,
) -> str:
    """Return the backend for this value of model.attention.

    Args:
        name: one of BACKENDS. "auto" is the first that can run on a GPU, blockwise elsewhere.
        platform: "gpu" or "cpu", the platform of the mesh's devices.
        dtype: dtype of the activations, e.g. "bfloat16".
        sequence: number of devices that a row is sharded over, mesh.sequence.
        capability: CUDA compute capability of the target GPUs if they are absent.
        has_soft_cap: whether the model caps its attention scores.

    Raises:
        ValueError: the name is unknown or the backend cannot run; the message has the remedy.
    """
    return candidates(
        name,
        platform=platform,
        dtype=dtype,
        head_dim=head_dim,
        sequence=sequence,
        capability=capability,
        has_soft_cap=has_soft_cap,
    )[0]


def candidates(name: str, *, platform: str, **situation: Any) -> list[str]:
    """Return the backends that this value of model.attention allows, fastest first.

    Args:
        name, platform, situation: as in `resolve`.

    Raises:
        ValueError: as in `resolve`.
    """
    if name not in BACKENDS:
        raise ValueError(f"model.attention = {name!r} is unknown: use one of {list(BACKENDS)}")

    def problems(name: str) -> list[str]:
        return _MODULES[name].problems(platform=platform, **situation)

    if name == "auto":
        fast = ("cudnn", "tokamax") if platform == "gpu" else ()
        return [*(name for name in fast if not problems(name)), *_EVERYWHERE]
    if reasons := problems(name):
        raise ValueError(
            f"model.attention = {name!r} cannot be used: {'; '.join(reasons)}. Or use "
            'model.attention = "auto", which takes the fastest that can'
        )
    return [name]


def packed_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    positions_BT: jax.Array,
    *,
    scale: float,
    backend: str = "auto",
    max_segments: int = 256,
    window: int | None = None,
    windowed: jax.Array | None = None,
    soft_cap: float = 0.0,
) -> jax.Array:
    """Attend within segments, causally by position. Returns [B, T, N, H] in the dtype of q.

    Rows are sharded over data x fsdp, heads over `tensor`, query tokens over `sequence`; keys and
    values are gathered over `sequence`. Segment and position decide which keys a token sees, so the
    result does not depend on the order of the tokens in a row.

    The output and the log-sum-exp have the checkpoint names "attention" and "attention_lse". If
    both are kept, the backward pass does not recompute attention.

    Args:
        segment_ids_BT: int32; equal ids within a row are one segment. 0 is padding, whose output
            is finite and whose gradients are zero.
        positions_BT: int32; 0, 1, 2.. within a segment.
        scale: factor on the scores.
        backend: one of BACKENDS.
        max_segments: upper bound on the segments of a row, guaranteed by the packer.
        window: number of tokens of its segment that a token sees at most, itself included (Beltagy
            et al. 2020, arXiv:2004.05150; counted as `sliding_window` of transformers).
        windowed: bool scalar, whether the window applies, so that one loop can run layers with and
            without it. None = it applies.
        soft_cap: above 0, a scaled score s becomes soft_cap tanh(s / soft_cap) (Gemma 2,
            arXiv:2408.00118, section 2).
    """
    window = None if window is None or window >= q_BTNH.shape[1] else window
    windowed = None if window is None else windowed
    if backend == "auto":
        mesh = jax.sharding.get_abstract_mesh()
        backend = resolve(
            "auto",
            platform=mesh.abstract_device.platform,
            dtype=q_BTNH.dtype.name,
            head_dim=q_BTNH.shape[-1],
            sequence=mesh.shape["sequence"],
            has_soft_cap=soft_cap > 0,
        )
    ids = (segment_ids_BT, positions_BT)
    options = _Options(backend, scale, max_segments, window, soft_cap)
    with jax.named_scope("part.attention"):
        return _attention(q_BTNH, k_BTKH, v_BTKH, ids, windowed, options)


@dataclasses.dataclass(frozen=True)
class _Options:
    """The options that are static when attention is compiled."""

    backend: str
    scale: float
    max_segments: int
    window: int | None
    soft_cap: float

    def call(self, name: str, *arrays, windowed: jax.Array | None):
        """Call "forward" or "backward" of the backend."""
        backend = _MODULES[self.backend].BACKEND
        function = functools.partial(
            getattr(backend, name),
            scale=self.scale,
            max_segments=self.max_segments,
            soft_cap=self.soft_cap,
        )
        if self.window is None or windowed is None:
            return function(*arrays, window=self.window)
        if backend.takes_traced_window:
            return function(*arrays, window=jnp.where(windowed, self.window, _NO_WINDOW))
        branches = (functools.partial(function, window=w) for w in (self.window, None))
        return jax.lax.cond(windowed, *branches, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q_BTNH, k_BTKH, v_BTKH, ids, windowed, options):
    return _attention_fwd(q_BTNH, k_BTKH, v_BTKH, ids, windowed, options)[0]


def _attention_fwd(q_BTNH, k_BTKH, v_BTKH, ids, windowed, options):
    heads, kv_heads, tokens, lse_spec = array_specs()

    def local(q, k, v, ids, windowed):
        all_k, all_v, all_ids = _gathered((k, v, ids))
        return options.call("forward", q, all_k, all_v, ids, all_ids, windowed=windowed)

    region = _shard_map_region(
        local, (heads, kv_heads, kv_heads, tokens, jax.P()), (heads, lse_spec)
    )
    out_BTNH, lse = region(q_BTNH, k_BTKH, v_BTKH, ids, windowed)
    # Named outside the region, since the policies of `jax.checkpoint` do not see names inside.
    out_BTNH = checkpoint_name(out_BTNH, "attention")
    lse = checkpoint_name(lse, "attention_lse")
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, ids, windowed, out_BTNH, lse)


def _attention_bwd(options, residuals, grad_out_BTNH):
    heads, kv_heads, tokens, lse_spec = array_specs()

    def local(q, k, v, ids, windowed, out, lse, grad_out):
        all_k, all_v, all_ids = _gathered((k, v, ids))
        arrays = (q, all_k, all_v, out, lse, grad_out, ids, all_ids)
        dq, *grads = options.call("backward", *arrays, windowed=windowed)
        if jax.lax.axis_size("sequence") > 1:
            grads = jax.lax.psum_scatter(grads, "sequence", scatter_dimension=1, tiled=True)
        return dq, *grads

    specs = (heads, kv_heads, kv_heads, tokens, jax.P(), heads, lse_spec, heads)
    grads = _shard_map_region(local, specs, (heads, kv_heads, kv_heads))(*residuals, grad_out_BTNH)
    return *grads, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def array_specs():
    """Return the shardings of (q and out, k and v, ids, lse)."""
    tokens = rules.spec("batch", "token")
    return (
        rules.spec("batch", "token", "heads", "head_dim"),
        rules.spec("batch", "token", "kv_heads", "head_dim"),
        (tokens, tokens),
        rules.spec("batch", "token", "heads"),
    )


def _shard_map_region(local, in_specs, out_specs):
    # Nothing is differentiated through the region, so JAX need not track the axes along which
    # values vary. Kernels of other libraries do not declare them.
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _gathered(arrays):
    """Return the tokens of the whole row, the shards concatenated in order."""
    if jax.lax.axis_size("sequence") == 1:
        return arrays
    return jax.lax.all_gather(arrays, "sequence", axis=1, tiled=True)
