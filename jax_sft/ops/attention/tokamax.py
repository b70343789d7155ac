"""Attention by tokamax's Mosaic kernels (an optional package) on packed rows: memory O(T).

For Hopper and Blackwell data center GPUs. A query sees the keys `k_start` <= key < `k_end`, so the
keys must be sorted by (segment, position). The forward pass skips keys of other segments. The
backward pass computes all pairs (all causal pairs with mesh.sequence = 1) and is deterministic.
Shape suffixes: B rows, T query tokens, S key tokens, N heads, K kv heads, H head dim.
"""

import functools
import importlib
import importlib.util
import types
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from jax_sft.ops.attention.backend import Backend, Ids
from jax_sft.ops.attention.segments import in_natural_order, pad_tokens

IMPLEMENTATION = "mosaic_gpu"
_BLOCK = 128  # queries per block in which the forward kernel reads k_start and k_end


def problems(
    *,
    platform: str,
    dtype: str,
    head_dim: int,
    sequence: int,
    capability: tuple[int, ...] | None = None,
    has_soft_cap: bool = False,
) -> list[str]:
    """Return the reasons why tokamax cannot be used; empty if it can."""
    if platform != "gpu":
        return [f"tokamax needs an NVIDIA GPU, this runs on {platform}"]
    if importlib.util.find_spec("tokamax") is None:
        return ["tokamax is not installed: pip install tokamax"]
    try:
        _package()
    except (ImportError, AttributeError, TypeError) as error:
        return [f"tokamax cannot be used with jax {jax.__version__}: {error}"]
    if jax.default_backend() != "gpu":
        return ["tokamax compiles for the GPU at hand only, and there is none"]
    reasons = []
    device_capability = str(jax.local_devices()[0].compute_capability)
    if device_capability.split(".")[0] not in ("9", "10"):
        reasons.append(
            f"tokamax needs compute capability 9 or 10, this GPU has {device_capability}"
        )
    if dtype not in ("bfloat16", "float16"):
        reasons.append(f"tokamax attends in bfloat16 or float16, model.dtype is {dtype}")
    if head_dim % 8 or head_dim > 256:
        reasons.append(
            f"tokamax needs a head dim that is a multiple of 8 up to 256, not {head_dim}"
        )
    return reasons


@functools.cache
def _package() -> types.SimpleNamespace:
    """Import the private names of tokamax, whose public functions accept no key ranges.

    tokamax reads absl flags. Up to 0.0.12 it parses the command line if it is not parsed yet, and
    exits at unknown options, so the flags are marked as parsed first.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    base = importlib.import_module("tokamax._src.ops.attention.base")
    api = importlib.import_module("tokamax._src.ops.attention.api")
    return types.SimpleNamespace(
        Mask=base.Mask, XlaVjp=base.DotProductAttentionVjp, operations=api.IMPLEMENTATIONS
    )


def _forward(
    q_BTNH, k_BSKH, v_BSKH, query_ids, key_ids, *, scale, max_segments, window, soft_cap=0.0
):
    """`backend.Forward`; the second result holds the softmax maxima and sums, [B, T, 2 N].

    The output of padding is zero. With T = S the tokens must be in natural order. Any other row
    gives NaN, so that the run stops at its loss.
    """
    num_tokens = q_BTNH.shape[1]
    order_BS, ok_B = _order(query_ids, key_ids)
    (q,), query_ids = pad_tokens((q_BTNH,), query_ids, _BLOCK)
    (k, v), key_ids = _ordered((k_BSKH, v_BSKH), key_ids, order_BS)
    mask = _mask(query_ids, key_ids, is_natural=order_BS is None, window=window)
    operation = _package().operations[IMPLEMENTATION]
    out, residuals = operation(
        q, k, v, mask=mask, return_residuals=True, **_score_options(scale, soft_cap)
    )
    out = jnp.where(query_ids[0][..., None, None] > 0, out, 0)
    out = jnp.where(ok_B[:, None, None, None], out, jnp.nan)
    lse_BTN = jnp.moveaxis(jnp.concatenate(residuals, axis=1), 1, 2)
    return out[:, :num_tokens], lse_BTN[:, :num_tokens]


def _backward(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    out_BTNH,
    lse,
    grad_out_BTNH,
    query_ids,
    key_ids,
    *,
    scale,
    max_segments,
    window,
    soft_cap=0.0,
):
    """`backend.Backward`, with the operation that tokamax's own derivative calls."""
    num_tokens, num_keys = q_BTNH.shape[1], k_BSKH.shape[1]
    order_BS, _ = _order(query_ids, key_ids)
    grad_out_BTNH = jnp.where(query_ids[0][..., None, None] > 0, grad_out_BTNH, 0)
    (q, out, grad_out), query_ids = pad_tokens((q_BTNH, out_BTNH, grad_out_BTNH), query_ids, _BLOCK)
    # The softmax sum of added padding is 1, not 0.
    lse = jnp.pad(lse, ((0, 0), (0, q.shape[1] - num_tokens), (0, 0)), constant_values=1)
    residuals = tuple(jnp.split(jnp.moveaxis(lse, 2, 1), 2, axis=1))
    (k, v), key_ids = _ordered((k_BSKH, v_BSKH), key_ids, order_BS)
    mask = _mask(query_ids, key_ids, is_natural=order_BS is None, window=window)

    operation = _package().operations[IMPLEMENTATION]
    bound = operation.bind(q, k, v, mask=mask, **_score_options(scale, soft_cap))
    options: dict[str, Any] = {**bound.kwargs}
    del options["return_residuals"]
    derivative = operation.vjp or _package().XlaVjp()
    grads = derivative(residuals, out, grad_out, *bound.args, **options)
    dk, dv = (grads[name][:, :num_keys] for name in "kv")
    if order_BS is not None:
        back_BS = jnp.argsort(order_BS, axis=1)
        dk, dv = (_take(grad, back_BS) for grad in (dk, dv))
    return grads["q"][:, :num_tokens], dk, dv


def _score_options(scale: float, soft_cap: float) -> dict[str, float]:
    return {"logits_scale": scale} | ({"logits_soft_cap": soft_cap} if soft_cap else {})


def _order(query_ids: Ids, key_ids: Ids) -> tuple[jax.Array | None, jax.Array]:
    """Return (order of the keys by (segment, position) or None, whether each row is valid [B]).

    None means as many queries as keys, already sorted by position, so that the mask is causal.
    """
    segments_BS, positions_BS = key_ids
    if query_ids[0].shape == segments_BS.shape:
        return None, in_natural_order(query_ids)
    token_BS = jax.lax.broadcasted_iota(jnp.int32, segments_BS.shape, 1)
    *_, order_BS = jax.lax.sort((segments_BS, positions_BS, token_BS), dimension=1, num_keys=2)
    return order_BS, jnp.full(len(order_BS), True)


def _ordered(arrays, ids: Ids, order_BS: jax.Array | None):
    """Sort the keys by this order and pad them to whole blocks."""
    if order_BS is not None:
        arrays = tuple(_take(x, order_BS) for x in arrays)
        ids = (_take(ids[0], order_BS), _take(ids[1], order_BS))
    return pad_tokens(arrays, ids, _BLOCK)


def _take(x, order_BS):
    return jnp.take_along_axis(x, order_BS.reshape(order_BS.shape + (1,) * (x.ndim - 2)), axis=1)


def _mask(query_ids: Ids, key_ids: Ids, is_natural: bool, window: int | jax.Array | None):
    """Return the tokamax Mask: each query sees its segment, or the window, up to itself."""
    k_start_BT, k_end_BT = visible_keys(query_ids, key_ids, is_natural, window)
    if is_natural:
        return _package().Mask(k_start=k_start_BT[:, None], is_causal=True)
    return _package().Mask(k_start=k_start_BT[:, None], k_end=k_end_BT[:, None])


def visible_keys(
    query_ids: Ids, key_ids: Ids, is_natural: bool, window: int | jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return the start and the end (exclusive) of the keys that each query sees.

    Both are [B, T], indices of keys in natural order, or else sorted by (segment, position).
    Padding sees at least one key, so that its softmax is not empty.
    """
    segments_BT, positions_BT = query_ids
    # Number of visible keys of the query's segment before the query.
    before_BT = positions_BT if window is None else jnp.minimum(positions_BT, window - 1)
    if is_natural:
        token_BT = jax.lax.broadcasted_iota(jnp.int32, segments_BT.shape, 1)
        return token_BT - jnp.where(segments_BT > 0, before_BT, 0), token_BT + 1
    first = functools.partial(jnp.searchsorted, side="left")
    # Raise the zeros padded at the end of the keys, so that segment ids stay sorted.
    in_order_BS = jax.lax.cummax(key_ids[0], axis=1)
    k_start_BT = jax.vmap(first)(in_order_BS, segments_BT).astype(jnp.int32)
    last_BT = k_start_BT + positions_BT
    return last_BT - before_BT, last_BT + 1


BACKEND = Backend(_forward, _backward)
