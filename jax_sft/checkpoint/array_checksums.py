"""Checksums of arrays that are the same on every mesh, in JAX and in NumPy.

They are saved with a checkpoint and compared after it is read. A storage layer's checksums cover
only its files. These cover the arrays, so they detect a flipped bit anywhere in between and name
the tensor.

Each element's bits and position are mixed to 32 bits, and the results are summed modulo 2^32. The
mixing is one-to-one in the bits at a position, so one changed element always changes the sum.
Several changed elements stay undetected with probability 2^-32. (A sum of bits times position,
which is simpler, misses two flipped signs.)
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

_PLACE = 0x9E3779B1  # odd, so positions in an array below 2^32 elements stay distinct
# Shift and multiply, as in the finalizer of MurmurHash3 (Austin Appleby, public domain).
_ROUNDS = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))
_LAST_SHIFT = 16
_BITS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_CHUNK = 1 << 17  # elements that NumPy mixes at once: 512 KB fit in a core's cache


def start(
    arrays: Mapping[str, jax.Array], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> jax.Array:
    """Start computing the checksums of arrays that may be donated right after.

    All processes of a mesh call it at the same point.

    Args:
        shapes: {name: shape of the leading part that is summed}; arrays not named are whole.

    Returns:
        [number of arrays] uint32, in the order of `arrays`, readable on every process.
    """
    sharding = next((a.sharding for a in arrays.values() if a.sharding.num_devices > 1), None)
    whole = None
    if isinstance(sharding, NamedSharding):
        whole = NamedSharding(sharding.mesh, PartitionSpec())
    summed_shapes = tuple((shapes or {}).get(name, array.shape) for name, array in arrays.items())
    return _sums(tuple(arrays.values()), summed_shapes, whole)


def read(names: Iterable[str], sums: jax.Array) -> dict[str, int]:
    """Wait for the result of `start`; return {name: checksum}."""
    return dict(zip(names, np.asarray(sums).tolist(), strict=True))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _sums(
    arrays: Sequence[jax.Array], shapes: tuple[tuple[int, ...], ...], whole: NamedSharding | None
) -> jax.Array:
    sums = jnp.stack([_sum(*pair) for pair in zip(arrays, shapes, strict=True)])
    return sums if whole is None else jax.lax.with_sharding_constraint(sums, whole)


def _sum(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(array, _bits_dtype(array.dtype)).astype(jnp.uint32)
    place, stride, counts = jnp.zeros((), jnp.uint32), 1, np.uint32(1)
    for dim in reversed(range(array.ndim)):
        iota = jax.lax.broadcasted_iota(jnp.uint32, array.shape, dim)
        place = place + iota * np.uint32(stride * _PLACE % 2**32)
        stride *= shape[dim]
        if shape[dim] < array.shape[dim]:
            counts = counts * (iota < shape[dim]).astype(jnp.uint32)
    return jnp.sum(_mixed(bits ^ place) * counts, dtype=jnp.uint32)


def checksum(
    array: np.ndarray, start: Sequence[int] | None = None, shape: Sequence[int] | None = None
) -> int:
    """Return the checksum of an array, or the contribution of a block to its array's checksum.

    Args:
        start: first index of the block in each dimension; None = the whole array.
        shape: shape of the whole array.
    """
    if array.dtype == bool:
        array = array.astype(np.uint8)
    shape = array.shape if shape is None else tuple(shape)
    start = (0,) * array.ndim if start is None else tuple(start)
    # Trailing dimensions that are complete, and the one before them, are contiguous positions.
    run = max(array.ndim - 1, 0)
    while run > 0 and array.shape[run] == shape[run]:
        run -= 1
    first = np.zeros(1, np.uint64)  # position of the first element of each run
    for dim in range(array.ndim):
        stride = math.prod(shape[dim + 1 :])
        inner = array.shape[dim] if dim < run else 1
        first = np.add.outer(first, (start[dim] + np.arange(inner, dtype=np.uint64)) * stride)
    first = first.reshape(-1, 1)
    bits = np.ascontiguousarray(array).view(_bits_dtype(array.dtype)).reshape(len(first), -1)
    ramp = np.arange(min(bits.shape[1], _CHUNK), dtype=np.uint32) * np.uint32(_PLACE)
    total = 0
    runs = max(_CHUNK // max(bits.shape[1], 1), 1)
    for i in range(0, len(bits), runs):
        for j in range(0, bits.shape[1], _CHUNK):
            chunk = bits[i : i + runs, j : j + _CHUNK].astype(np.uint32)
            begin = ((first[i : i + runs] + np.uint64(j)) * np.uint64(_PLACE)).astype(np.uint32)
            chunk ^= begin + ramp[: chunk.shape[1]]
            for shift, factor in _ROUNDS:
                chunk ^= chunk >> shift
                chunk *= np.uint32(factor)
            chunk ^= chunk >> _LAST_SHIFT
            total += int(chunk.sum(dtype=np.uint32))
    return total % 2**32


def problem(name: str, computed: int, stored: int) -> str:
    """Return what is wrong with an array, or "" if its checksum is the stored one."""
    if computed == stored:
        return ""
    return f"tensor {name} is damaged: its checksum is {computed:08x}, not {stored:08x}"


def _mixed(x: jax.Array) -> jax.Array:
    for shift, factor in _ROUNDS:
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return x ^ (x >> _LAST_SHIFT)


def _bits_dtype(dtype) -> Any:
    size = np.dtype(dtype).itemsize
    assert size in _BITS, f"{dtype} has {size} bytes"
    return _BITS[size]
