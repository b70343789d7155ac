"""Attention with the full score matrix in float32: exact, simple, and quadratic in memory.

The other backends are compared with this one. Shape suffixes: B rows, T query tokens, S key tokens,
N heads, K kv heads, G = N / K, H head dim.
"""

import functools

import jax
import jax.numpy as jnp

from jax_sft.ops.attention.backend import Backend


def problems(
    *,
    platform: str,
    dtype: str,
    head_dim: int,
    sequence: int,
    capability: tuple[int, ...] | None = None,
    has_soft_cap: bool = False,
) -> list[str]:
    """Return no problems: this backend runs everywhere."""
    return []


def _forward(
    q_BTNH, k_BSKH, v_BSKH, query_ids, key_ids, *, scale, max_segments, window, soft_cap=0.0
):
    """`backend.Forward`. Padding attends to padding, so that no softmax is empty."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    (query_segments, query_positions), (key_segments, key_positions) = query_ids, key_ids
    visible_BTS = query_segments[:, :, None] == key_segments[:, None, :]
    visible_BTS &= query_positions[:, :, None] >= key_positions[:, None, :]
    if window is not None:
        visible_BTS &= query_positions[:, :, None] - window < key_positions[:, None, :]
    scores_BKGTS *= scale
    if soft_cap:
        scores_BKGTS = soft_cap * jnp.tanh(scores_BKGTS / soft_cap)
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, -jnp.inf)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH)
    lse_BKGT = jax.nn.logsumexp(scores_BKGTS, axis=-1)
    return out_BTKGH.reshape(B, T, N, H), jnp.moveaxis(lse_BKGT, 3, 1).reshape(B, T, N)


def _backward(q_BTNH, k_BSKH, v_BSKH, out_BTNH, lse, grad_out_BTNH, query_ids, key_ids, **options):
    """`backend.Backward`, by differentiating the forward pass; `out` and `lse` are not read."""
    forward = functools.partial(_forward, query_ids=query_ids, key_ids=key_ids, **options)
    _, backward, _ = jax.vjp(forward, q_BTNH, k_BSKH, v_BSKH, has_aux=True)
    return backward(grad_out_BTNH)


BACKEND = Backend(_forward, _backward)
