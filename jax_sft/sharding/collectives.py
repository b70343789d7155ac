"""Collectives inside a jitted step: gathers, sums over devices, and `shard_map` regions.

Called by layers, losses and the step, under the mesh set by `jax.set_mesh`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_sft.sharding.rules import RULES, constrain, gathered


def platform() -> str:
    """Return "cpu" or "gpu", inside jit under the mesh set by `jax.set_mesh`."""
    return jax.sharding.get_abstract_mesh().abstract_device.platform


INTERLEAVED_TOKENS = 512  # per chunk of a row that is sharded over `sequence`


def interleave(x_BT: jax.Array) -> jax.Array:
    """Interleave chunks of tokens over `sequence` instead of splitting rows into contiguous parts.

    Shard r of R gets chunks r, r + R, r + 2R, ... of INTERLEAVED_TOKENS tokens (fewer if rows are
    short). Each shard then has early and late tokens of long segments, which balances the work of
    causal attention, as it grows with the position. Called inside jit on every array [B, T, ...] of
    a batch.
    """
    shards = jax.sharding.get_abstract_mesh().shape["sequence"]
    if shards == 1:
        return x_BT
    num_rows, num_tokens, *rest = x_BT.shape
    chunk_tokens = math.gcd(INTERLEAVED_TOKENS, num_tokens // shards)
    interleaved = x_BT.reshape(num_rows, -1, shards, chunk_tokens, *rest).swapaxes(1, 2)
    return constrain(interleaved.reshape(x_BT.shape), "batch", "token", *["features"] * len(rest))


def gather(weight: jax.Array, logical_axes: Sequence[str]) -> jax.Array:
    """Gather a weight over the mesh axes of `embed`, inside a jitted function."""
    dim = tuple(logical_axes).index("embed") if "embed" in logical_axes else 0
    if dim == 0:
        return constrain(weight, *gathered(logical_axes))
    # The shard dimension is moved first, and back after the gather, which copies this layer. A
    # gather over `dim` itself would need another layout, and XLA would copy all layers.
    shards = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in RULES["embed"])
    parts = jnp.moveaxis(_split(weight, dim, shards), dim, 0)
    parts = constrain(parts, "embed", *gathered(logical_axes))
    parts = constrain(parts, "features", *gathered(logical_axes))
    return jnp.moveaxis(parts, 0, dim).reshape(weight.shape)


def all_gather(local: jax.Array, axes: str | Sequence[str], **options: Any) -> jax.Array:
    """Call `jax.lax.all_gather` inside `shard_map`, but skip it for one shard.

    For one shard XLA on CPUs would still copy the array, and first make it contiguous: a second
    copy of a transposed head.
    """
    shards = jax.lax.axis_size(axes)
    if shards > 1:
        return jax.lax.all_gather(local, axes, **options)
    return local if options.get("tiled") else local[None]


def shard_map_region(
    local: Callable[..., Any], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """Call `jax.shard_map` over the mesh set by `jax.set_mesh`.

    Replication checking is off on one device, where `psum` is skipped.
    """
    is_checked = not is_one_device()
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=is_checked)


def is_one_device() -> bool:
    """Whether the mesh set by `jax.set_mesh` has one device."""
    return jax.sharding.get_abstract_mesh().size == 1


def psum(local: Any, axes: str | Sequence[str]) -> Any:
    """Call `jax.lax.psum` inside `shard_map_region`, but skip it on one device.

    XLA on CPUs copies the operands of a psum even on one device: all gradients of a step.
    """
    return local if is_one_device() else jax.lax.psum(local, axes)


def psum_scatter(local: jax.Array, axes: str | Sequence[str], **options: Any) -> jax.Array:
    """Call `jax.lax.psum_scatter` inside `shard_map`, but skip it for one shard."""
    if jax.lax.axis_size(axes) > 1:
        return jax.lax.psum_scatter(local, axes, **options)
    if options.get("tiled"):
        return local
    return jax.lax.squeeze(local, [options.get("scatter_dimension", 0)])


def _split(array: jax.Array, dim: int, parts: int) -> jax.Array:
    """[..., N, ...] -> [..., parts, N / parts, ...]."""
    return array.reshape(*array.shape[:dim], parts, -1, *array.shape[dim + 1 :])


def sum_over_tokens(local: jax.Array, logical_axes: Sequence[str]) -> jax.Array:
    """Sum a weight's gradient over the tokens of all devices, inside `shard_map`.

    The sum is reduce-scattered to the sharding of the weight. Only the scattered part is then
    all-reduced, over the axes that shard tokens but not weights.

    Args:
        local: this device's sum over its tokens, with a whole `embed` dimension.
        logical_axes: logical axes of the weight's dimensions.
    """
    scattered = RULES["embed"] if "embed" in logical_axes else ()
    if scattered:
        dim = tuple(logical_axes).index("embed")
        if dim == 0:
            local = psum_scatter(local, scattered, scatter_dimension=0, tiled=True)
        else:
            # As in `gather`; otherwise XLA would copy the gradient of all layers.
            shards = math.prod(jax.lax.axis_size(axis) for axis in scattered)
            parts = jnp.moveaxis(_split(local, dim, shards), dim, 0)
            local = psum_scatter(parts, scattered, scatter_dimension=0)
    others = [axis for axis in (*RULES["batch"], *RULES["token"]) if axis not in scattered]
    return psum(local, others)
