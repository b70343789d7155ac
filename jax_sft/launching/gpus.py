"""Which GPUs of a machine a process takes, where several processes share them."""

import shutil
import subprocess
from collections.abc import Mapping

VARIABLE = "JAX_SFT_LOCAL_DEVICE_IDS"
_TIMEOUT_S = 120  # nvidia-smi of a node that has just booted takes a while


def visible(environ: Mapping[str, str]) -> tuple[int, ...]:
    """Return the numbers of the GPUs that JAX would use here; none without GPUs.

    Raises:
        ValueError: nvidia-smi is there, but fails.
    """
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return ()
    if chosen := environ.get(VARIABLE):
        return tuple(int(number) for number in chosen.split(","))
    if (cuda := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        # JAX counts what CUDA shows it from 0 on; -1 and what follows it is hidden.
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
    """Whether srun has given each task its own GPUs (--gpus-per-task, --gpu-bind)."""
    return (
        "SLURM_GPUS_PER_TASK" in environ
        or "gpu" in environ.get("SLURM_TRES_PER_TASK", "")
        or environ.get("SLURM_GPU_BIND", "none") != "none"
    )


def divide(gpus: tuple[int, ...], parts: int) -> list[tuple[int, ...]]:
    """Divide the GPUs of a machine over its processes, neighbours together.

    Raises:
        ValueError: they cannot be divided evenly.
    """
    if len(gpus) % parts:
        fits = [n for n in range(1, len(gpus) + 1) if len(gpus) % n == 0]
        raise ValueError(
            f"{len(gpus)} GPUs cannot be divided evenly over {parts} processes of this machine: "
            f"use one of {fits} (one process drives all of them)"
        )
    each = len(gpus) // parts
    return [gpus[n * each : (n + 1) * each] for n in range(parts)]
