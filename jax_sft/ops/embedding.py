"""Embedding lookup in a table that is sharded in both dimensions, without gathering the table.

Shape suffixes: B rows, T tokens, V vocabulary, D model, S shards of the model dimension.
Called by `nn.layers` inside jit, under the mesh set by `jax.set_mesh`.
"""

import functools

import jax
import jax.numpy as jnp

from jax_sft.sharding import collectives, rules

_EMBED = rules.RULES["embed"]  # mesh axes that split the model dimension; they split tokens too


def lookup(table_VD: jax.Array, tokens_BT: jax.Array, dtype) -> jax.Array:
    """Return table_VD[tokens_BT] as [B, T, D] in `dtype`.

    The tokens go to the shards of the model dimension and the features found come back in one
    all-to-all: per device about tokens x D elements each way, where gathering the table and
    scattering its gradient would move V x D three times. Over `tensor`, which splits the
    vocabulary, each device looks up what it has and the parts are added.

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
    """Ids of the tokens of all shards [S, B, T] within this device's part of the vocabulary."""
    tokens_SBT = collectives.all_gather(tokens_BT, _EMBED)
    return tokens_SBT - jax.lax.axis_index("tensor") * num_local


def _find(tokens_BT, table_VD, *, dtype):
    ids_SBT = _local_ids(tokens_BT, table_VD.shape[0])
    is_here = (ids_SBT >= 0) & (ids_SBT < table_VD.shape[0])
    found_SBTD = jnp.take(table_VD, jnp.where(is_here, ids_SBT, 0), axis=0).astype(dtype)
    found_SBTD = jnp.where(is_here[..., None], found_SBTD, 0)
    found_SBTD = jax.lax.all_to_all(found_SBTD, _EMBED, 0, 0, tiled=True)
    found_BTD = jnp.moveaxis(found_SBTD, 0, 2).reshape(*tokens_BT.shape, -1)
    return collectives.psum(found_BTD, "tensor")


def _add(tokens_BT, grad_BTD, *, vocab):
    """Gradient of the table: rows of equal ids are added in a fixed order, never by atomics."""
    num_local = vocab // jax.lax.axis_size("tensor")
    ids_SBT = _local_ids(tokens_BT, num_local)
    # Split by hand: an all-to-all over the last dimension would leave the table's gradient
    # transposed in memory, and the optimizer with a copy of it.
    grad_SBTD = jnp.moveaxis(grad_BTD.reshape(*grad_BTD.shape[:2], len(ids_SBT), -1), 2, 0)
    grad_SBTD = jax.lax.all_to_all(grad_SBTD, _EMBED, 0, 0, tiled=True)
    ids_N, order_N = jax.lax.sort_key_val(ids_SBT.ravel(), jnp.arange(ids_SBT.size))
    rows_ND = grad_SBTD.reshape(ids_N.size, -1)[order_N].astype(jnp.float32)
    is_first_N = jnp.concatenate([jnp.ones(1, bool), ids_N[1:] != ids_N[:-1]])
    _, sums_ND = jax.lax.associative_scan(_add_within, (is_first_N, rows_ND))
    # The last row of each id has its sum; all others, and ids of other devices, are dropped.
    is_last_N = jnp.roll(is_first_N, -1) & (ids_N >= 0) & (ids_N < num_local)
    places_N = jnp.where(is_last_N, ids_N, num_local + jnp.arange(ids_N.size))
    sum_VD = jnp.zeros((num_local, rows_ND.shape[1]), jnp.float32)
    sum_VD = sum_VD.at[places_N].set(sums_ND, mode="drop", unique_indices=True)
    return collectives.psum(sum_VD, "data")


def _add_within(left, right):
    """Running sums that start anew at each first row (Blelloch 1990, a segmented scan)."""
    first_left, sum_left = left
    first_right, sum_right = right
    total = jnp.where(first_right[:, None], sum_right, sum_left + sum_right)
    return first_left | first_right, total
