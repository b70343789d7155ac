"""Causal attention on packed rows: a token sees earlier tokens of its own segment, nothing else.

Shape suffixes: B rows, T query tokens, S key tokens, N heads, K kv heads, G = N / K, H head dim.
Called by the models inside jit, under the mesh set by `jax.set_mesh`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_sft import parallel


def packed_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    positions_BT: jax.Array,
    *,
    scale: float,
    backend: str,
) -> jax.Array:
    """Attend within segments, causally by position. Returns [B, T, N, H] in the dtype of q.

    An island of `shard_map`: rows are split over data x fsdp, heads over `tensor`, query tokens
    over `sequence`; keys and values are gathered over `sequence`. Since causality is decided by
    positions within a segment, the result does not depend on how tokens are laid out. Padding
    (segment 0) attends to padding, so that no softmax is empty.

    Args:
        segment_ids_BT: int; equal ids within a row belong together.
        positions_BT: int; strictly increasing within a segment.
        scale: factor on the scores.
        backend: a key of BACKENDS.
    """
    heads = parallel.spec("batch", "token", "heads", "head_dim")
    kv_heads = parallel.spec("batch", "token", "kv_heads", "head_dim")
    tokens = parallel.spec("batch", "token")
    island = jax.shard_map(
        functools.partial(_local, backend=BACKENDS[backend], scale=scale),
        in_specs=(heads, kv_heads, kv_heads, tokens, tokens),
        out_specs=heads,
    )
    out_BTNH = island(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, positions_BT)
    return checkpoint_name(out_BTNH, "attention")


def _local(q, k, v, segment_ids, positions, *, backend, scale):
    """One device's part: its rows and heads, its query tokens, the keys of all tokens."""
    gather = functools.partial(jax.lax.all_gather, axis_name="sequence", axis=1, tiled=True)
    keys = (k, v, segment_ids, positions)
    if jax.lax.axis_size("sequence") > 1:
        keys = tuple(map(gather, keys))
    return backend(q, *keys[:2], (segment_ids, positions), keys[2:], scale)


def reference(q_BTNH, k_BSKH, v_BSKH, query_ids, key_ids, scale: float) -> jax.Array:
    """Attention by the full score matrix [B, N, T, S] in float32: exact, and quadratic in memory.

    Args:
        query_ids: (segment ids [B, T], positions [B, T]) of the queries.
        key_ids: (segment ids [B, S], positions [B, S]) of the keys.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    (query_segments, query_positions), (key_segments, key_positions) = query_ids, key_ids
    visible_BTS = query_segments[:, :, None] == key_segments[:, None, :]
    visible_BTS &= query_positions[:, :, None] >= key_positions[:, None, :]
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS * scale, -jnp.inf)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH)
    return out_BTKGH.reshape(B, T, N, H)


# model.attention -> one device's attention.
BACKENDS = {"auto": reference, "reference": reference}
