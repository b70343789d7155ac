"""Pad the vocabulary with zeros at the end of its tables if `mesh.tensor` does not divide it.

Arrays and checkpoints have the padding; model folders never do. The loss ignores the logits of
padding, so it gets no gradient: padding and its moments stay zero.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jax_sft.weights.param_spec import ParamSpec

AXIS = "vocab"


def padded(axis_sizes: Mapping[str, int], shards: int) -> dict[str, int]:
    """Return the sizes of the logical axes, with the vocabulary a multiple of `shards`."""
    return {**axis_sizes, AXIS: -(-axis_sizes[AXIS] // shards) * shards}


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Number of token ids of a model, and their dimension in each parameter.

    Attributes:
        size: number of token ids, without padding.
        dims: {parameter path: dimension of the ids} of the arrays that have one.
    """

    size: int
    dims: Mapping[str, int]

    @classmethod
    def of(cls, specs: Iterable[ParamSpec], size: int) -> "Vocabulary":
        """Return the vocabulary of a model with these parameter specs."""
        return cls(size, {spec.path: spec.axes.index(AXIS) for spec in specs if AXIS in spec.axes})

    def cut(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape without padding.

        Args:
            name: name of an array, ending with the parameter path, as those of moments also do.
        """
        dim = next((self.dims[path] for path in self.dims if name.endswith(path)), None)
        return tuple(min(n, self.size) if i == dim else n for i, n in enumerate(shape))


def as_stored(shape: Sequence[int], dtype: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """Return the description to read an array with that was padded for another mesh.

    A dimension that the mesh does not divide is read whole.
    """

    def shards(axes: Any) -> int:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return math.prod(sharding.mesh.shape[name] for name in names)

    split = [*zip(shape, sharding.spec, strict=False)]
    if any(size % shards(axes) for size, axes in split):
        kept = [None if size % shards(axes) else axes for size, axes in split]
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*kept))
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)


def resized(array: jax.Array, shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """Return an array with its padding cut or extended to `shape`."""

    def resize(array: jax.Array) -> jax.Array:
        kept = array[tuple(slice(0, size) for size in shape)]
        return jnp.pad(kept, [(0, size - n) for size, n in zip(shape, kept.shape, strict=True)])

    return jax.jit(resize, out_shardings=sharding)(array)
