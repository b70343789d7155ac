"""Build the device mesh from the config, and set up devices before JAX starts.

Called by the commands and by code that creates arrays. Inside jit, `rules` names the axes.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jax_sft.sharding.rules import AXES

# Share of a GPU's memory for arrays. The rest is for the CUDA context, NCCL's buffers and cuBLAS's
# workspace.
GPU_MEMORY = 0.92


def mesh_shape(cfg_mesh, num_devices: int) -> dict[str, int]:
    """Resolve the four sizes of `cfg.mesh` against the number of devices.

    Raises:
        ValueError: the sizes do not multiply to the number of devices. The message has the remedy.
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
    """Build a mesh of these sizes over `devices`, by default all devices ordered by host.

    `tensor` varies fastest, then `sequence`, `fsdp` and `data`. So the axes that send the most data
    stay on the fast links within a host, and `data` is the first to cross hosts.

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


def use_gpu_memory() -> None:
    """Let JAX use GPU_MEMORY of each GPU instead of 75%, unless the environment sets a share.

    Call this before JAX initializes its devices.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY))


def simulate_cpu_devices(total: int) -> None:
    """Split the CPU into `total` simulated devices over all processes, before JAX starts.

    A process that has already initialized its devices keeps them. `mesh_shape` then reports a
    mismatch.
    """
    processes = int(os.environ.get("JAX_SFT_NUM_PROCESSES", 1))
    if total % processes:
        raise ValueError(f"mesh.cpu_devices = {total} is not divisible by {processes} processes")
    if total:
        try:
            jax.config.update("jax_num_cpu_devices", total // processes)
        except RuntimeError:  # JAX has already initialized its devices
            return
