"""Embedding lookup in a table sharded over both dimensions, without gathering the table.

Shape suffixes: B rows, T tokens, V vocabulary, D model, S shards of the model dimension.
Called by `nn.layers` inside jit, under the mesh set by `jax.set_mesh`.
"""

import functools

import jax
import jax.numpy as jnp

from jax_sft.sharding import collectives, rules

_EMBED = rules.RULES["embed"]  # mesh axes that shard the model dimension; they shard tokens too


def lookup(table_VD: jax.Array, tokens_BT: jax.Array, dtype) -> jax.Array:
    """Return table_VD[tokens_BT] as [B, T, D] in `dtype`.

    The token ids go to all shards of the model dimension, and the features come back in one
    all-to-all. That moves about tokens x D elements per device each way; gathering the table and
    scattering its gradient would move V x D three times. Over `tensor`, which shards the
    vocabulary, each device looks up the ids it has and the results are summed.

    Args:
        table_VD: master weight, sharded over (vocab, embed). Its gradient is summed in float32.
        tokens_BT: int token ids in 0..V-1.
    """
    with jax.named_scope("part.embedding"):
        return _lookup(table_VD, tokens_BT, jnp.dtype(dtype), table_VD.shape[0], table_VD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _lookup(table_VD, tokens_BT, dtype, vocab, table_dtype):
    find = _shard_map_region(
        functools.partial(_find, dtype=dtype),
        rules.spec("batch", "token", "features"),
        rules.spec("vocab", "embed"),
    )
    return find(tokens_BT, table_VD)


def _lookup_fwd(table_VD, tokens_BT, *static):
    return _lookup(table_VD, tokens_BT, *static), tokens_BT


def _lookup_bwd(dtype, vocab, table_dtype, tokens_BT, grad_BTD):
    add = _shard_map_region(
        functools.partial(_add, vocab=vocab),
        rules.spec("vocab", "embed"),
        rules.spec("batch", "token", "features"),
    )
    return add(tokens_BT, grad_BTD).astype(table_dtype), None


_lookup.defvjp(_lookup_fwd, _lookup_bwd)


def _shard_map_region(local, out_spec, *in_specs):
    return collectives.shard_map_region(
        local,
        in_specs=(rules.spec("batch", "token"), *in_specs),
        out_specs=out_spec,
    )


def _local_ids(tokens_BT, num_local):
    """Return the ids of all shards [S, B, T], relative to this device's part of the vocabulary."""
    tokens_SBT = collectives.all_gather(tokens_BT, _EMBED)
    return tokens_SBT - jax.lax.axis_index("tensor") * num_local


def _find(tokens_BT, table_VD, *, dtype):
    ids_SBT = _local_ids(tokens_BT, table_VD.shape[0])
    is_here = (ids_SBT >= 0) & (ids_SBT < table_VD.shape[0])
    features_SBTD = jnp.take(table_VD, jnp.where(is_here, ids_SBT, 0), axis=0).astype(dtype)
    features_SBTD = jnp.where(is_here[..., None], features_SBTD, 0)
    features_SBTD = jax.lax.all_to_all(features_SBTD, _EMBED, 0, 0, tiled=True)
    features_BTD = jnp.moveaxis(features_SBTD, 0, 2).reshape(*tokens_BT.shape, -1)
    return collectives.psum(features_BTD, "tensor")


def _add(tokens_BT, grad_BTD, *, vocab):
    """Return the table's gradient. Rows of equal ids are added in a fixed order, not by atomics."""
    num_local = vocab // jax.lax.axis_size("tensor")
    ids_SBT = _local_ids(tokens_BT, num_local)
    # The last dimension is split manually: an all-to-all over it would leave the table's gradient
    # transposed in memory, and the optimizer would copy it.
    grad_SBTD = jnp.moveaxis(grad_BTD.reshape(*grad_BTD.shape[:2], len(ids_SBT), -1), 2, 0)
    grad_SBTD = jax.lax.all_to_all(grad_SBTD, _EMBED, 0, 0, tiled=True)
    ids_N, order_N = jax.lax.sort_key_val(ids_SBT.ravel(), jnp.arange(ids_SBT.size))
    rows_ND = grad_SBTD.reshape(ids_N.size, -1)[order_N].astype(jnp.float32)
    is_first_N = jnp.concatenate([jnp.ones(1, bool), ids_N[1:] != ids_N[:-1]])
    _, sums_ND = jax.lax.associative_scan(_add_within, (is_first_N, rows_ND))
    # The last row of each id holds its sum. Other rows and ids of other devices are dropped.
    is_last_N = jnp.roll(is_first_N, -1) & (ids_N >= 0) & (ids_N < num_local)
    places_N = jnp.where(is_last_N, ids_N, num_local + jnp.arange(ids_N.size))
    sum_VD = jnp.zeros((num_local, rows_ND.shape[1]), jnp.float32)
    sum_VD = sum_VD.at[places_N].set(sums_ND, mode="drop", unique_indices=True)
    return collectives.psum(sum_VD, "data")


def _add_within(left, right):
    """Add running sums that restart at each first row (a segmented scan, Blelloch 1990)."""
    first_left, sum_left = left
    first_right, sum_right = right
    total = jnp.where(first_right[:, None], sum_right, sum_left + sum_right)
    return first_left | first_right, total
