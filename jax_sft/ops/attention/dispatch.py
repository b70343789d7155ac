"""Causal attention on packed rows: a token sees earlier tokens of its own segment, nothing else.

Shape suffixes: B rows, T query tokens, N heads, K kv heads, G = N / K, H head dim.
Called by the models inside jit, under the mesh set by `jax.set_mesh`; `resolve` by `validate`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_sft.ops.attention import blockwise, cudnn, reference, tokamax
from jax_sft.sharding import rules

# In the order in which "auto" tries them on a GPU; elsewhere it begins with blockwise.
_MODULES: dict[str, Any] = {
    "cudnn": cudnn,
    "tokamax": tokamax,
    "blockwise": blockwise,
    "reference": reference,
}
BACKENDS = ("auto", *_MODULES)  # model.attention
_EVERYWHERE = ("blockwise", "reference")  # what "auto" ends with

_NO_WINDOW = 2**30  # as a traced window: longer than any row, and no position overflows with it


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
    """Return the backend that runs for this value of model.attention.

    Args:
        name: one of BACKENDS. "auto": on a GPU the first that can run, blockwise elsewhere.
        platform: "gpu" or "cpu", of the devices of the mesh.
        dtype: of the activations, e.g. "bfloat16".
        sequence: devices that a row is split over, mesh.sequence.
        capability: CUDA compute capability of GPUs that are not at hand.
        has_soft_cap: the model caps its attention scores.

    Raises:
        ValueError: not a backend, or one that cannot run here; with what to do.
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
    """Return the backends that this value of model.attention allows, the fastest first.

    Args:
        name, platform, situation: as of `resolve`.

    Raises:
        ValueError: as of `resolve`.
    """
    if name not in BACKENDS:
        raise ValueError(f"model.attention = {name!r} is unknown: use one of {list(BACKENDS)}")

    def problems(name: str) -> list[str]:
        return _MODULES[name].problems(platform=platform, **situation)

    if name == "auto":
        fast = ("cudnn", "tokamax") if platform == "gpu" else ()
        return [*(name for name in fast if not problems(name)), *_EVERYWHERE]
    if found := problems(name):
        raise ValueError(
            f"model.attention = {name!r} cannot be used: {'; '.join(found)}. Or use "
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

    Rows are split over data x fsdp, heads over `tensor`, query tokens over `sequence`; keys and
    values are gathered over `sequence`. Since what a token sees is decided by segment and position,
    the result does not depend on how the tokens of a row are laid out.

    The output and the log-sum-exp carry the checkpoint names "attention" and "attention_lse": a
    backward pass that kept both does not attend again.

    Args:
        segment_ids_BT: int32; equal ids within a row belong together, 0 is padding, whose output
            is finite and whose gradients are zero.
        positions_BT: int32; 0, 1, 2.. within a segment.
        scale: factor on the scores.
        backend: one of BACKENDS.
        max_segments: no row has more; the packer sees to it.
        window: a token sees this many tokens of its segment at most, itself and those just before
            it (Beltagy et al. 2020, arXiv:2004.05150; as `sliding_window` of transformers counts).
        windowed: bool scalar, does the window hold? So one loop runs layers with and without it.
            None = it does.
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
    """What is known when attention is compiled."""

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
    heads, kv_heads, tokens, of_heads = array_specs()

    def local(q, k, v, ids, windowed):
        all_k, all_v, all_ids = _gathered((k, v, ids))
        return options.call("forward", q, all_k, all_v, ids, all_ids, windowed=windowed)

    region = _shard_map_region(
        local, (heads, kv_heads, kv_heads, tokens, jax.P()), (heads, of_heads)
    )
    out_BTNH, lse = region(q_BTNH, k_BTKH, v_BTKH, ids, windowed)
    # Named outside of the region, where the policies of `jax.checkpoint` see names.
    out_BTNH = checkpoint_name(out_BTNH, "attention")
    lse = checkpoint_name(lse, "attention_lse")
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, ids, windowed, out_BTNH, lse)


def _attention_bwd(options, residuals, grad_out_BTNH):
    heads, kv_heads, tokens, of_heads = array_specs()

    def local(q, k, v, ids, windowed, out, lse, grad_out):
        all_k, all_v, all_ids = _gathered((k, v, ids))
        arrays = (q, all_k, all_v, out, lse, grad_out, ids, all_ids)
        dq, *grads = options.call("backward", *arrays, windowed=windowed)
        if jax.lax.axis_size("sequence") > 1:
            grads = jax.lax.psum_scatter(grads, "sequence", scatter_dimension=1, tiled=True)
        return dq, *grads

    specs = (heads, kv_heads, kv_heads, tokens, jax.P(), heads, of_heads, heads)
    grads = _shard_map_region(local, specs, (heads, kv_heads, kv_heads))(*residuals, grad_out_BTNH)
    return *grads, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def array_specs():
    """Shardings of q and out; of k and v; of ids; of lse."""
    tokens = rules.spec("batch", "token")
    return (
        rules.spec("batch", "token", "heads", "head_dim"),
        rules.spec("batch", "token", "kv_heads", "head_dim"),
        (tokens, tokens),
        rules.spec("batch", "token", "heads"),
    )


def _shard_map_region(local, in_specs, out_specs):
    # Nothing is differentiated through the region, so that JAX need not track along which axes
    # values vary, which kernels of other libraries cannot tell it.
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _gathered(arrays):
    """The tokens of the whole row, one shard after the other."""
    if jax.lax.axis_size("sequence") == 1:
        return arrays
    return jax.lax.all_gather(arrays, "sequence", axis=1, tiled=True)
