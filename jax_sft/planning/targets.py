"""Describe absent GPUs to compile for, and check the packages that it needs. Called by `plan`.

JAX's CUDA plugin compiles for a described chip without a GPU and without a driver.
"""

import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from jax_sft.hardware import Chip

REMEDY = "pip install -r requirements-plan.txt"


def keep_off_gpus() -> None:
    """Make JAX run on the CPU only. Call this before JAX initializes its devices.

    With the plugin installed on a machine without a GPU, JAX would log a traceback ("Unable to load
    cuDNN") and then use the CPU; on a machine with GPUs it would allocate most of their memory.
    """
    jax.config.update("jax_platforms", "cpu")


def compiler_options() -> dict[str, Any]:
    """Return the `compiler_options` for `jax.jit` or `lowered.compile` on these devices.

    XLA cannot autotune without a device, so it cannot choose between Triton and cuBLAS kernels.
    The options force cuBLAS, which large matrix products get anyway.
    """
    options: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False}
    if folder := cuda_folder():
        options["xla_gpu_cuda_data_dir"] = str(folder)
    return options


def topology(chip: Chip, hosts: int, gpus_per_host: int) -> list[Any]:
    """Return the devices of `hosts` hosts, for a mesh to compile for. None of them need exist.

    Raises:
        ValueError: the plugin is not installed, or a number is not positive.
    """
    if hosts < 1 or gpus_per_host < 1:
        raise ValueError(f"--hosts={hosts} --gpus-per-host={gpus_per_host}: use positive numbers")
    if problem := plugin_problem():
        raise ValueError(problem)
    return topologies.get_topology_desc(
        platform="cuda",
        target_config=target_config(chip),
        topology=f"1x{hosts}x{gpus_per_host}",  # islands x hosts x GPUs
    ).devices


def target_config(chip: Chip) -> str:
    """Return XLA's description of the chip: a GpuTargetConfigProto in text format.

    cuDNN 9.12 is the oldest version that JAX's plugin for CUDA 13 accepts.
    """
    major, minor = chip.capability
    accelerated = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} {accelerated} }}
          core_count: {chip.cores}
          fpus_per_core: {chip.fpus_per_core}
          clock_rate_ghz: {chip.clock_ghz}
          threads_per_warp: 32
          threads_per_block_limit: 1024
          threads_per_core_limit: 2048
          shared_memory_per_block: 49152
          shared_memory_per_core: {chip.shared_bytes_per_core}
          shared_memory_per_block_optin: {chip.shared_bytes_per_block}
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          memory_bandwidth: {chip.hbm_bytes_per_s:.0f}
          l2_cache_size: {chip.l2_bytes}
          device_memory_size: {chip.memory_bytes}
          pcie_bandwidth: {chip.pcie_bytes_per_s}
          device_vendor: "NVIDIA Corporation"
          name: "{chip.kind}"
          driver_version: "13.0.0"
          runtime_version: "13.0.0"
          compile_time_toolkit_version: "13.0.0"
          dnn_version: "9.12.0"
          device_interconnect_info {{ active_links: {chip.nvlinks} }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 12 }}
        device_description_str: "{chip.kind}"
    """


# ---- installation ----------------------------------------------------------------------------


def plugin_problem() -> str | None:
    """Return why this installation cannot compile for GPUs, with the remedy, or None."""
    plugin, jaxlib = _version("jax-cuda13-pjrt"), _version("jaxlib")
    if plugin is None:
        return f"JAX's CUDA plugin is not installed: {REMEDY}"
    if plugin != jaxlib:
        return f"jax-cuda13-pjrt {plugin} does not fit jaxlib {jaxlib}: {REMEDY}"
    if cuda_folder() is None:
        return f"no ptxas and libdevice, of NVIDIA's wheels or of a CUDA toolkit: {REMEDY}"
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cuda_folder() -> Path | None:
    """Return the folder with ptxas and libdevice, from NVIDIA's wheels or a CUDA toolkit.

    The wheels are searched first, then $CUDA_ROOT, $CUDA_HOME and /usr/local/cuda.
    """
    named = [Path(os.environ[name]) for name in ("CUDA_ROOT", "CUDA_HOME") if name in os.environ]
    for folder in [*_wheels(), *named, Path("/usr/local/cuda")]:
        needed = (folder / "bin/ptxas", folder / "nvvm/libdevice/libdevice.10.bc")
        if all(file.exists() for file in needed):
            return folder
    return None


def _wheels() -> list[Path]:
    """Return the folders of NVIDIA's installed wheels for CUDA 13."""
    package = importlib.util.find_spec("nvidia")
    return [Path(path) / "cu13" for path in (package and package.submodule_search_locations) or ()]
