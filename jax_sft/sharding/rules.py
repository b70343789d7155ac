"""Map logical axes to mesh axes.

The names of an array's dimensions and the table `RULES` decide its sharding. Unknown names raise.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Block = tuple[tuple[int, int], ...]  # (start, stop) of each dimension


AXES = ("data", "fsdp", "tensor", "sequence")

# logical axis -> mesh axes that it is sharded over; () = not sharded.
RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp"),
    "token": ("sequence",),
    "micro_batch": (),
    "residual": ("sequence", "tensor"),  # tokens of the residual stream, between the blocks
    "features": (),  # the model dimension of an activation
    # weights
    "layers": (),
    "embed": ("fsdp", "sequence"),  # the model dimension of a matrix
    "norm": (),  # the model dimension of a norm or bias: too small to be worth gathering
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "rank": ("tensor",),  # of adapters
    "whole_rank": (),  # of adapters, if another axis is sharded over `tensor`
    "experts": (),
    "chosen": (),  # the experts that a token is sent to
}


def rule(name: str) -> tuple[str, ...]:
    """Return the mesh axes of a logical axis. "NAME/64", parts of 64 of NAME, is sharded like NAME.

    Raises:
        ValueError: the name is not in RULES.
    """
    axes = RULES.get(name.partition("/")[0])
    if axes is None:
        raise ValueError(
            f"logical axis {name!r} has no rule: add it to rules.RULES ({sorted(RULES)})"
        )
    return axes


def spec(*logical_axes: str) -> PartitionSpec:
    """Return the PartitionSpec of an array whose dimensions have these logical names.

    Raises:
        ValueError: a name is not in RULES.
    """
    mesh_axes = [rule(name) for name in logical_axes]
    return PartitionSpec(*(axes[0] if len(axes) == 1 else (axes or None) for axes in mesh_axes))


def sharding(mesh: Mesh, *logical_axes: str) -> NamedSharding:
    """Return the NamedSharding of an array whose dimensions have these logical names."""
    return NamedSharding(mesh, spec(*logical_axes))


def local_blocks(sharding: NamedSharding, shape: tuple[int, ...]) -> dict[Any, Block]:
    """Return {device of this process: block of an array of this shape that it holds}."""
    indices = sharding.addressable_devices_indices_map(shape)
    return {
        device: tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        for device, index in indices.items()
    }


def constrain(x: jax.Array, *logical_axes: str) -> jax.Array:
    """Constrain the sharding of `x` inside jit, under the mesh set by `jax.set_mesh`."""
    return jax.lax.with_sharding_constraint(x, spec(*logical_axes))


def gathered(logical_axes: Sequence[str]) -> tuple[str, ...]:
    """Return the logical axes of a weight after `embed` is gathered for use."""
    return tuple("features" if axis.partition("/")[0] == "embed" else axis for axis in logical_axes)


def size_problems(arrays: dict[str, tuple[tuple[str, ...], tuple[int, ...]]], sizes) -> list[str]:
    """List the dimensions that the mesh does not divide, except vocabularies, which are padded.

    Args:
        arrays: {name: (logical axes, shape)}.
        sizes: {mesh axis: size}, as returned by `mesh_shape`.
    """
    problems: dict[tuple[str, int], str] = {}
    for name, (logical_axes, shape) in arrays.items():
        for logical, size in zip(logical_axes, shape, strict=True):
            axes = rule(logical)
            shards = math.prod(sizes[axis] for axis in axes)
            if size % shards and (logical, size) not in problems and logical != "vocab":
                fits = [n for n in range(1, shards + 1) if size % n == 0]
                what = " x ".join(f"mesh.{axis}" for axis in axes if sizes[axis] > 1)
                problems[logical, size] = (
                    f"{logical} = {size} (of {name}) is not divisible by {what} = {shards}: "
                    f"use one of {fits}"
                )
    return list(problems.values())
