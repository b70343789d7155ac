"""Divide the GPUs of a machine over the processes that share them."""

import shutil
import subprocess
from collections.abc import Mapping

VARIABLE = "JAX_SFT_LOCAL_DEVICE_IDS"
_TIMEOUT_S = 120  # nvidia-smi is slow on a node that has just booted


def visible(environ: Mapping[str, str]) -> tuple[int, ...]:
    """Return the numbers of the GPUs that JAX would use on this machine; () without GPUs.

    Raises:
        ValueError: nvidia-smi is installed but fails.
    """
    # Order of precedence: JAX's platforms, this project's variable, CUDA's variable, nvidia-smi.
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return ()
    if chosen := environ.get(VARIABLE):
        return tuple(int(number) for number in chosen.split(","))
    if (cuda := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        # JAX numbers the visible GPUs from 0. CUDA hides -1 and everything after it.
        shown = [part for part in cuda.partition("-1")[0].split(",") if part.strip()]
        return tuple(range(len(shown)))
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    try:
        listed = subprocess.run(
            [command, "-L"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(f"nvidia-smi -L fails, so the GPUs are not usable: {error}") from error
    return tuple(range(sum(line.startswith("GPU ") for line in listed.stdout.splitlines())))


def bound_by_slurm(environ: Mapping[str, str]) -> bool:
    """Return whether srun has given each task its own GPUs (--gpus-per-task, --gpu-bind)."""
    return (
        "SLURM_GPUS_PER_TASK" in environ
        or "gpu" in environ.get("SLURM_TRES_PER_TASK", "")
        or environ.get("SLURM_GPU_BIND", "none") != "none"
    )


def divide(gpus: tuple[int, ...], parts: int) -> list[tuple[int, ...]]:
    """Divide the GPUs of a machine over its processes; each gets consecutive GPUs.

    Raises:
        ValueError: the GPUs cannot be divided evenly.
    """
    if len(gpus) % parts:
        fits = [n for n in range(1, len(gpus) + 1) if len(gpus) % n == 0]
        raise ValueError(
            f"{len(gpus)} GPUs cannot be divided evenly over {parts} processes of this machine: "
            f"use one of {fits} (one process drives all of them)"
        )
    num_each = len(gpus) // parts
    return [gpus[n * num_each : (n + 1) * num_each] for n in range(parts)]
