"""How much memory JAX takes of a GPU, and what a process on CPUs keeps of what it once had."""

import ctypes
import os

from jax_sft.launching import gpus

# Share of a GPU's memory that arrays may take; the rest is for the CUDA context, NCCL's buffers
# and cuBLAS's workspace.
GPU_MEMORY = 0.92

# A process on CPUs keeps freed memory if the machine has so many bytes per parameter: its state
# takes 16, and what it keeps was seen to be up to 5 times as much (BUILD.md).
KEEP_BYTES_PER_PARAMETER = 128

# Parameters of mallopt(3), from the malloc.h of the GNU C library.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def prepare() -> None:
    """Called before JAX starts its devices.

    JAX may have GPU_MEMORY of each GPU, unless the environment says how much; 75% otherwise. On
    CPUs, all threads share one arena: `keep_freed` can keep nothing of others.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY))
    if not gpus.visible(os.environ):
        _mallopt(_ARENA_MAX, 1)


def keep_freed(num_params: int) -> bool:
    """On CPUs, have the C library keep freed memory for the next step; called after `prepare`.

    XLA allocates the temporaries of each step anew. By default the GNU C library takes large blocks
    from the system and gives them back, and the system clears their pages each time: a fifth to a
    third of a step (BUILD.md). Kept, they are there already; but holes between them add up, so that
    a large model, for which the machine is small, goes without. Nothing happens with another C
    library.

    Returns:
        Whether it is kept.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if gpus.visible(os.environ) or num_params * KEEP_BYTES_PER_PARAMETER > total:
        return False
    return _mallopt(_MMAP_MAX, 0) and _mallopt(_TRIM_THRESHOLD, -1)  # never


def _mallopt(parameter: int, value: int) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(parameter, value) == 1
