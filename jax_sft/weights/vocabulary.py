"""Padding where `mesh.tensor` does not divide the vocabulary: zeros at the end of its tables.

They are in arrays and in what a run stores of them, never in a model folder. The loss leaves their
logits out, so they get no gradient: they stay zero, and so do their moments.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jax_sft.weights.param_spec import Weight

AXIS = "vocab"


def padded(dims: Mapping[str, int], shards: int) -> dict[str, int]:
    """Return the sizes of the logical axes, the vocabulary's rounded up to a multiple."""
    return {**dims, AXIS: -(-dims[AXIS] // shards) * shards}


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """How many token ids a model has, and where.

    Attributes:
        size: without padding.
        dims: {our path: dimension of the ids} of the arrays that have one.
    """

    size: int
    dims: Mapping[str, int]

    @classmethod
    def of(cls, rows: Iterable[Weight], size: int) -> "Vocabulary":
        """Find it in the weight rows."""
        return cls(size, {row.path: row.axes.index(AXIS) for row in rows if AXIS in row.axes})

    def cut(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape without padding.

        Args:
            name: ends with our path; those of moments do too.
        """
        dim = next((self.dims[path] for path in self.dims if name.endswith(path)), None)
        return tuple(min(n, self.size) if i == dim else n for i, n in enumerate(shape))


def as_stored(shape: Sequence[int], dtype: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """Return what to read of an array that was padded for another mesh: whole where it must be."""

    def shards(axes: Any) -> int:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return math.prod(sharding.mesh.shape[name] for name in names)

    split = [*zip(shape, sharding.spec, strict=False)]
    if any(size % shards(axes) for size, axes in split):
        kept = [None if size % shards(axes) else axes for size, axes in split]
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*kept))
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)


def resized(array: jax.Array, shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """Return an array with as much padding as `shape` has."""

    def resize(array: jax.Array) -> jax.Array:
        kept = array[tuple(slice(0, size) for size in shape)]
        return jnp.pad(kept, [(0, size - n) for size, n in zip(shape, kept.shape, strict=True)])

    return jax.jit(resize, out_shardings=sharding)(array)
