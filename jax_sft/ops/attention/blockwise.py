"""Attention in blocks of tokens with a running softmax: memory O(T), forward and backward.

FlashAttention-2 (Dao 2023, arXiv:2307.08691, algorithms 1 and 2) in plain jnp: exact for any layout
of the tokens, and pairs of blocks that cannot see each other cost nothing. The default on CPU.
Shape suffixes: B rows, I query blocks, J key blocks, T queries, S keys (of the row, or of a block
when preceded by I or J or nothing), N heads, K kv heads, G = N / K, H head dim.
"""

import functools

import jax
import jax.numpy as jnp

from jax_sft.ops.attention.backend import Backend, Ids

# Tokens of a block. Measured on 2 CPU cores in float32: with many short segments per row, 128 gains
# a tenth and 512 loses a half; with one segment per row, 256 is the fastest.
BLOCK = 256
LOOP = "attention_blocks"  # `plan` looks for this name: loops whose trip count depends on data
_NEVER = jnp.iinfo(jnp.int32).max


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
    """`backend.Forward`. Rows run one by one; under vmap every row would run the longest loop."""
    row = functools.partial(_forward_row, scale=scale, window=window, soft_cap=soft_cap)
    return jax.lax.map(lambda x: row(*x), (q_BTNH, k_BSKH, v_BSKH, query_ids, key_ids))


def _forward_row(q_TNH, k_SKH, v_SKH, query_ids, key_ids, *, scale, window, soft_cap):
    T, K = len(q_TNH), k_SKH.shape[1]
    k_JKSH, v_JKSH = _kv_blocks(k_SKH), _kv_blocks(v_SKH)
    query_ids, key_ids = _id_blocks(query_ids), _id_blocks(key_ids)
    order_IJ, num_needed_I = _work_lists(_needed(query_ids, key_ids, window))

    def query_block(inputs):
        q_KGTH, ids, order_J, num_needed = inputs

        def key_block(step, sums):
            max_KGT, sum_KGT, out_KGTH = sums
            k_KSH, v_KSH, other_ids = _at(order_J[step], (k_JKSH, v_JKSH, key_ids))
            scores_KGTS, _ = _scores(q_KGTH, k_KSH, ids, other_ids, scale, window, soft_cap)
            # Finite even where nothing is visible yet, so that -inf - max is never nan.
            new_KGT = jnp.maximum(max_KGT, scores_KGTS.max(-1))
            weights_KGTS = jnp.exp(scores_KGTS - new_KGT[..., None])
            decay_KGT = jnp.exp(max_KGT - new_KGT)
            added_KGTH = _dot("KGTS,KSH->KGTH", weights_KGTS.astype(v_KSH.dtype), v_KSH)
            return (
                new_KGT,
                sum_KGT * decay_KGT + weights_KGTS.sum(-1),
                out_KGTH * decay_KGT[..., None] + added_KGTH,
            )

        zero_KGTH = jnp.zeros(q_KGTH.shape, jnp.float32)
        lowest_KGT = jnp.full(q_KGTH.shape[:-1], jnp.finfo(jnp.float32).min)
        sums = (lowest_KGT, zero_KGTH[..., 0], zero_KGTH)
        with jax.named_scope(LOOP):
            max_KGT, sum_KGT, out_KGTH = jax.lax.fori_loop(0, num_needed, key_block, sums)
        # Padding sees nothing: out and lse are 0.
        some_KGT = sum_KGT != 0
        sum_KGT = jnp.where(some_KGT, sum_KGT, 1.0)
        out_KGTH = (out_KGTH / sum_KGT[..., None]).astype(q_KGTH.dtype)
        return out_KGTH, jnp.where(some_KGT, max_KGT + jnp.log(sum_KGT), 0.0)

    q_IKGTH = _q_blocks(q_TNH, K)
    out_IKGTH, lse_IKGT = jax.lax.map(query_block, (q_IKGTH, query_ids, order_IJ, num_needed_I))
    return _q_tokens(out_IKGTH, T), _q_tokens(lse_IKGT, T)


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
    """`backend.Backward`. Rows run one by one."""
    row = functools.partial(_backward_row, scale=scale, window=window, soft_cap=soft_cap)
    inputs = (q_BTNH, k_BSKH, v_BSKH, out_BTNH, lse, grad_out_BTNH, query_ids, key_ids)
    return jax.lax.map(lambda x: row(*x), inputs)


def _backward_row(
    q_TNH, k_SKH, v_SKH, out_TNH, lse_TN, grad_TNH, query_ids, key_ids, *, scale, window, soft_cap
):
    """Visit the key blocks one by one and sum dq over them, so each block pair is computed once."""
    T, S, K = len(q_TNH), len(k_SKH), k_SKH.shape[1]
    delta_TN = (out_TNH.astype(jnp.float32) * grad_TNH.astype(jnp.float32)).sum(-1)
    query_blocks = tuple(_q_blocks(x, K) for x in (q_TNH, grad_TNH, lse_TN, delta_TN))
    query_ids, key_ids = _id_blocks(query_ids), _id_blocks(key_ids)
    order_JI, num_needed_J = _work_lists(_needed(query_ids, key_ids, window).T)

    def key_block(dq_IKGTH, inputs):
        k_KSH, v_KSH, ids, order_I, num_needed = inputs

        def query_block(step, grads):
            dq_IKGTH, dk_KHS, dv_KHS = grads
            index = order_I[step]
            (q_KGTH, grad_KGTH, lse_KGT, delta_KGT), other_ids = _at(
                index, (query_blocks, query_ids)
            )
            scores_KGTS, slopes_KGTS = _scores(
                q_KGTH, k_KSH, other_ids, ids, scale, window, soft_cap
            )
            probs_KGTS = jnp.exp(scores_KGTS - lse_KGT[..., None])
            dv_KHS += _dot("KGTH,KGTS->KHS", grad_KGTH, probs_KGTS.astype(grad_KGTH.dtype))
            grad_probs_KGTS = _dot("KGTH,KSH->KGTS", grad_KGTH, v_KSH)
            grad_scores_KGTS = probs_KGTS * (grad_probs_KGTS - delta_KGT[..., None]) * slopes_KGTS
            grad_scores_KGTS = grad_scores_KGTS.astype(q_KGTH.dtype)
            dk_KHS += _dot("KGTH,KGTS->KHS", q_KGTH, grad_scores_KGTS)
            dq_KGTH = _dot("KGTS,KSH->KGTH", grad_scores_KGTS, k_KSH)
            return dq_IKGTH.at[index].add(dq_KGTH), dk_KHS, dv_KHS

        # Summed as [H, S]: as [S, H], XLA transposes the [T, S] factor instead of the [T, H] one,
        # which on CPU doubles the time of the whole backward pass.
        zero_KHS = jnp.zeros(k_KSH.mT.shape, jnp.float32)
        with jax.named_scope(LOOP):
            dq_IKGTH, dk_KHS, dv_KHS = jax.lax.fori_loop(
                0, num_needed, query_block, (dq_IKGTH, zero_KHS, zero_KHS)
            )
        return dq_IKGTH, ((scale * dk_KHS.mT).astype(k_KSH.dtype), dv_KHS.mT.astype(v_KSH.dtype))

    dq_IKGTH = jnp.zeros(query_blocks[0].shape, jnp.float32)
    key_inputs = (_kv_blocks(k_SKH), _kv_blocks(v_SKH), key_ids, order_JI, num_needed_J)
    dq_IKGTH, (dk_JKSH, dv_JKSH) = jax.lax.scan(key_block, dq_IKGTH, key_inputs)
    dq_TNH = _q_tokens((scale * dq_IKGTH).astype(q_TNH.dtype), T)
    return dq_TNH, _kv_tokens(dk_JKSH, S), _kv_tokens(dv_JKSH, S)


def _dot(equation, *operands):
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def _scores(q_KGTH, k_KSH, query_ids, key_ids, scale, window, soft_cap):
    """Return (scaled scores [K, G, T, S] of two blocks in float32, derivatives of the soft cap).

    Scores are -inf for keys that the query must not see.
    """
    scores_KGTS, slopes_KGTS = scale * _dot("KGTH,KSH->KGTS", q_KGTH, k_KSH), 1.0
    if soft_cap:
        tanh_KGTS = jnp.tanh(scores_KGTS / soft_cap)
        scores_KGTS, slopes_KGTS = soft_cap * tanh_KGTS, 1.0 - tanh_KGTS**2
    (query_segments, query_positions), (key_segments, key_positions) = query_ids, key_ids
    visible_TS = query_segments[:, None] == key_segments
    visible_TS &= (query_positions[:, None] >= key_positions) & (key_segments != 0)
    if window is not None:
        visible_TS &= query_positions[:, None] - window < key_positions
    return jnp.where(visible_TS, scores_KGTS, -jnp.inf), slopes_KGTS


def _needed(query_ids, key_ids, window):
    """Return whether any query of block i may see a key of block j, bool [I, J].

    A block pair may be True without a visible pair, but is never False with one.

    If a query sees a key of its segment s, then lowest query <= s <= highest key, and
    lowest key <= (s, position of the key) <= (s, position of the query) <= highest query, where
    tokens are ordered by (segment, position). With a window, position of the key > position of the
    query - window. Hence the positions of the lowest query and the highest key satisfy this too if
    both belong to the same segment.
    """
    low_query_I, low_query_position_I, high_query_I, high_query_position_I = _extent(query_ids)
    low_key_J, low_key_position_J, high_key_J, high_key_position_J = _extent(key_ids)
    needed_IJ = low_key_J < high_query_I[:, None]
    same_IJ = low_key_J == high_query_I[:, None]
    needed_IJ |= same_IJ & (low_key_position_J <= high_query_position_I[:, None])
    if window is None:
        return needed_IJ & (low_query_I[:, None] <= high_key_J)
    in_window_IJ = high_key_position_J > low_query_position_I[:, None] - window
    in_window_IJ &= low_query_I[:, None] == high_key_J
    return needed_IJ & (in_window_IJ | (low_query_I[:, None] < high_key_J))


def _extent(ids):
    """Return the lowest and highest (segment, position) of each block as four [I] arrays.

    For a block of only padding, the lowest segment is above and the highest below all others.
    """
    segments, positions = ids
    low = jnp.where(segments != 0, segments, _NEVER).min(-1)
    high = jnp.where(segments != 0, segments, -_NEVER).max(-1)
    low_position = jnp.where(segments == low[:, None], positions, _NEVER).min(-1)
    high_position = jnp.where(segments == high[:, None], positions, -_NEVER).max(-1)
    return low, low_position, high, high_position


def _work_lists(needed_IJ):
    """Return for each i a permutation of all j with the needed ones first, and their number."""
    return jnp.argsort(~needed_IJ, axis=1, stable=True), needed_IJ.sum(axis=1)


def _at(index, blocks):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), blocks)


def _split(x):
    """[T, ...] -> [I, T of a block, ...]; the last block is filled with 0, which means padding."""
    block = min(BLOCK, len(x))
    x = jnp.pad(x, [(0, -len(x) % block)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, block, *x.shape[1:])


def _id_blocks(ids: Ids) -> Ids:
    return _split(ids[0]), _split(ids[1])


def _q_blocks(x_TN, num_kv_heads):
    """[T, N, ...] -> [I, K, G, T, ...]: the queries of a kv head are the rows of one matrix."""
    x_ITN = _split(x_TN)
    x_ITKG = x_ITN.reshape(*x_ITN.shape[:2], num_kv_heads, -1, *x_ITN.shape[3:])
    return jnp.moveaxis(x_ITKG, 1, 3)


def _q_tokens(x_IKGT, num_tokens):
    """Invert `_q_blocks`."""
    x_ITKG = jnp.moveaxis(x_IKGT, 3, 1)
    num_blocks, block, K, G, *rest = x_ITKG.shape
    return x_ITKG.reshape(num_blocks * block, K * G, *rest)[:num_tokens]


def _kv_blocks(x_SKH):
    """[S, K, H] -> [J, K, S, H]."""
    return jnp.moveaxis(_split(x_SKH), 1, 2)


def _kv_tokens(x_JKSH, num_tokens):
    """Invert `_kv_blocks`."""
    x_JSKH = jnp.moveaxis(x_JKSH, 2, 1)
    return x_JSKH.reshape(-1, *x_JSKH.shape[2:])[:num_tokens]


BACKEND = Backend(_forward, _backward)
