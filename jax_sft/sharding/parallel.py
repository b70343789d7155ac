"""The device mesh, and the one table from logical axes to mesh axes.

Every array's sharding follows from the names of its dimensions and `RULES`. An unknown name raises.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Block = tuple[tuple[int, int], ...]  # (start, stop) of each dimension

# Share of a GPU's memory that arrays may take; the rest is for the CUDA context, NCCL's buffers
# and cuBLAS's workspace.
GPU_MEMORY = 0.92

AXES = ("data", "fsdp", "tensor", "sequence")

# logical axis -> mesh axes it is split over; () = not split.
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
    "whole_rank": (),  # where another axis is split over `tensor`
    "experts": (),
    "chosen": (),  # the experts that a token takes
}


def rule(name: str) -> tuple[str, ...]:
    """Return the mesh axes of a logical axis; "NAME/64", parts of 64 of it, goes as NAME does.

    Raises:
        ValueError: a name that is not in RULES.
    """
    found = RULES.get(name.partition("/")[0])
    if found is None:
        raise ValueError(
            f"logical axis {name!r} has no rule: add it to parallel.RULES ({sorted(RULES)})"
        )
    return found


def spec(*logical_axes: str) -> PartitionSpec:
    """Return the PartitionSpec of an array whose dimensions have these logical names.

    Raises:
        ValueError: a name that is not in RULES.
    """
    mesh_axes = [rule(name) for name in logical_axes]
    return PartitionSpec(*(axes[0] if len(axes) == 1 else (axes or None) for axes in mesh_axes))


def sharding(mesh: Mesh, *logical_axes: str) -> NamedSharding:
    """Return the NamedSharding of an array whose dimensions have these logical names."""
    return NamedSharding(mesh, spec(*logical_axes))


def local_blocks(sharding: NamedSharding, shape: tuple[int, ...]) -> dict[Any, Block]:
    """Return {device of this process: its block of an array of this shape}."""
    indices = sharding.addressable_devices_indices_map(shape)
    return {
        device: tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        for device, index in indices.items()
    }


def constrain(x: jax.Array, *logical_axes: str) -> jax.Array:
    """Pin the sharding of `x` inside a jitted function, under the mesh set by `jax.set_mesh`."""
    return jax.lax.with_sharding_constraint(x, spec(*logical_axes))


def platform() -> str:
    """Return "cpu" or "gpu", inside jit under the mesh set by `jax.set_mesh`."""
    return jax.sharding.get_abstract_mesh().abstract_device.platform


STRIPE_TOKENS = 512  # per stripe of a row that is split over `sequence`


def stripe(x_BT: jax.Array) -> jax.Array:
    """Deal the tokens of rows out over `sequence` in stripes instead of contiguous parts.

    Shard r of R gets stripes r, r + R, r + 2R, ... of STRIPE_TOKENS tokens (fewer where rows are
    short), so that each has early and late tokens of the long segments: causal attention is work
    that grows with the position. Called inside jit on every array of a batch [B, T]; further
    dimensions stay as they are.
    """
    shards = jax.sharding.get_abstract_mesh().shape["sequence"]
    if shards == 1:
        return x_BT
    num_rows, num_tokens, *rest = x_BT.shape
    stripe_tokens = math.gcd(STRIPE_TOKENS, num_tokens // shards)
    striped = x_BT.reshape(num_rows, -1, shards, stripe_tokens, *rest).swapaxes(1, 2)
    return constrain(striped.reshape(x_BT.shape), "batch", "token", *["features"] * len(rest))


def gathered(logical_axes: Sequence[str]) -> tuple[str, ...]:
    """Return the logical axes of a weight once `embed` is gathered for use."""
    return tuple("features" if axis.partition("/")[0] == "embed" else axis for axis in logical_axes)


def gather(weight: jax.Array, logical_axes: Sequence[str]) -> jax.Array:
    """Gather a weight over the mesh axes of `embed`, inside a jitted function."""
    dim = tuple(logical_axes).index("embed") if "embed" in logical_axes else 0
    if dim == 0:
        return constrain(weight, *gathered(logical_axes))
    # The shards go first, and behind the gather to their place, by a copy of this layer. Gathered
    # over `dim` itself, the parameter would need another layout, and XLA copy all layers of it.
    shards = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in RULES["embed"])
    parts = jnp.moveaxis(_split(weight, dim, shards), dim, 0)
    parts = constrain(parts, "embed", *gathered(logical_axes))
    parts = constrain(parts, "features", *gathered(logical_axes))
    return jnp.moveaxis(parts, 0, dim).reshape(weight.shape)


def all_gather(local: jax.Array, axes: str | Sequence[str], **options: Any) -> jax.Array:
    """`jax.lax.all_gather`, inside `shard_map`, that leaves alone what is whole already.

    With one shard there is nothing to gather, yet XLA copies the array on CPUs, and wants its
    memory in order for it: a second copy of a transposed head.
    """
    shards = jax.lax.axis_size(axes)
    if shards > 1:
        return jax.lax.all_gather(local, axes, **options)
    return local if options.get("tiled") else local[None]


def island(local: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`jax.shard_map` over the mesh set by `jax.set_mesh`, with its check of what `psum` adds up;
    on one device, where `psum` adds up nothing, without.
    """
    is_checked = not is_one_device()
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=is_checked)


def is_one_device() -> bool:
    """Whether the mesh set by `jax.set_mesh` has one device."""
    return jax.sharding.get_abstract_mesh().size == 1


def psum(local: Any, axes: str | Sequence[str]) -> Any:
    """`jax.lax.psum`, inside `island`, that leaves alone what one device has.

    XLA on CPUs copies what it adds up, on one device too: all gradients of a step.
    """
    return local if is_one_device() else jax.lax.psum(local, axes)


def psum_scatter(local: jax.Array, axes: str | Sequence[str], **options: Any) -> jax.Array:
    """`jax.lax.psum_scatter`, inside `shard_map`, that leaves alone what one shard has."""
    if jax.lax.axis_size(axes) > 1:
        return jax.lax.psum_scatter(local, axes, **options)
    if options.get("tiled"):
        return local
    return jax.lax.squeeze(local, [options.get("scatter_dimension", 0)])


def _split(array: jax.Array, dim: int, parts: int) -> jax.Array:
    """[..., N, ...] -> [..., parts, N / parts, ...]."""
    return array.reshape(*array.shape[:dim], parts, -1, *array.shape[dim + 1 :])


def sum_over_tokens(local: jax.Array, logical_axes: Sequence[str]) -> jax.Array:
    """Add up what each device has for its own tokens: a gradient of a weight, inside `shard_map`.

    Reduce-scattered to the sharding of the weight; only the scattered part is all-reduced, over
    the axes that split tokens but not weights.

    Args:
        local: this device's sum over its tokens; its `embed` dimension is whole.
        logical_axes: of the weight's dimensions.
    """
    scattered = RULES["embed"] if "embed" in logical_axes else ()
    if scattered:
        dim = tuple(logical_axes).index("embed")
        if dim == 0:
            local = psum_scatter(local, scattered, scatter_dimension=0, tiled=True)
        else:
            # As in `gather`: else all layers' gradient would be copied.
            shards = math.prod(jax.lax.axis_size(axis) for axis in scattered)
            parts = jnp.moveaxis(_split(local, dim, shards), dim, 0)
            local = psum_scatter(parts, scattered, scatter_dimension=0)
    others = [axis for axis in (*RULES["batch"], *RULES["token"]) if axis not in scattered]
    return psum(local, others)


def mesh_shape(cfg_mesh, num_devices: int) -> dict[str, int]:
    """Resolve the four sizes of `cfg.mesh` against the number of devices.

    Raises:
        ValueError: sizes that do not multiply to the number of devices, with the remedy.
    """
    sizes = {axis: int(getattr(cfg_mesh, axis)) for axis in AXES}
    given = ", ".join(f"mesh.{axis} = {size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size == 0 or size < -1 for size in sizes.values()):
        raise ValueError(f"{given}: use positive sizes, at most one of them -1 (what is left)")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and num_devices % fixed == 0:
        sizes[free[0]] = num_devices // fixed
    elif fixed != num_devices:
        hint = f"make the sizes multiply to {num_devices}, or set one of them to -1"
        if jax.default_backend() == "cpu":
            hint += f"; on CPU, mesh.cpu_devices = {fixed} simulates the devices"
        raise ValueError(f"{given} need {fixed} devices, there are {num_devices}: {hint}")
    return sizes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Build a mesh of these sizes over `devices`, by default all of them, host after host.

    `tensor` neighbours are next to each other, then `sequence`, `fsdp` and `data`: the axes that
    send most stay on the fast links within a host, and `data` crosses hosts first.

    Args:
        sizes: {axis: size}; an axis that is missing has size 1.
    """
    if devices is None:
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    data, fsdp, tensor, sequence = (sizes.get(axis, 1) for axis in AXES)
    grid = np.array(devices).reshape(data, fsdp, sequence, tensor).swapaxes(2, 3)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def single_device_mesh() -> Mesh:
    """Return the mesh (1, 1, 1, 1) on this process's first device."""
    devices = np.array(jax.local_devices()[:1]).reshape(1, 1, 1, 1)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def size_problems(arrays: dict[str, tuple[tuple[str, ...], tuple[int, ...]]], sizes) -> list[str]:
    """List the dimensions that the mesh does not divide; a vocabulary is padded instead.

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


def use_gpu_memory() -> None:
    """Let JAX have GPU_MEMORY of each GPU, unless the environment says how much; 75% otherwise.

    Called before the first device is asked for.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY))


def simulate_cpu_devices(total: int) -> None:
    """Split the CPU into `total` simulated devices over all processes, before JAX starts.

    A process whose devices already exist keeps them: `mesh_shape` then says what does not fit.
    """
    processes = int(os.environ.get("JAX_SFT_NUM_PROCESSES", 1))
    if total % processes:
        raise ValueError(f"mesh.cpu_devices = {total} is not divisible by {processes} processes")
    if total:
        try:
            jax.config.update("jax_num_cpu_devices", total // processes)
        except RuntimeError:  # JAX already runs in this process, with the devices it has
            return
