"""Orbax: the arrays of a step, to files and back. What it can raise is gathered here.

A step holds two checkpointables, `params` and `optimizer`, and reads with plain Orbax:
`ocp.load_checkpointables(folder)`.
"""

import concurrent.futures
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from jax_sft import fingerprint

# Of a full disk tensorstore says ValueError ("RESOURCE_EXHAUSTED: ..."), of a missing folder
# OSError; of a process that does not come to a barrier, JAX says RuntimeError. Damaged files are
# ValueError ("DATA_LOSS", "NOT_FOUND", "FAILED_PRECONDITION", ...), KeyError or TypeError where the
# JSON beside the arrays is damaged.
ERRORS = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError)
Response = Any  # of Orbax: the result of a save that goes on


def start_saving(
    path: Path, params: Any, optimizer: Any, metadata: dict[str, Any], timeout_s: float
) -> Response:
    """Start writing a step; returns once the arrays may be changed. All processes call it.

    Raises:
        storage.ERRORS: it could not be started on this process.
    """
    context = ocp.Context()
    context.async_options.timeout_secs = int(timeout_s)
    # Weights and moments in float32 shrink by 8%, and the save takes 5 times as long [2 CPU cores].
    context.array.saving.use_compression = False
    # A name that is used once needs no look whether it exists, nor the two barriers around it.
    context.file_options.skip_sync_file_validations = True
    with context:
        return ocp.save_checkpointables_async(
            str(path), {"params": params, "optimizer": optimizer}, custom_metadata=metadata
        )


def is_saved(response: Response, wait_s: float) -> bool:
    """Wait so long for a save; return whether it is done.

    Raises:
        storage.ERRORS: it failed.
    """
    try:
        response.result(timeout=wait_s)
        return True
    except concurrent.futures.TimeoutError:
        return False


def load(path: Path, wanted: Mapping[str, Any], some: bool = False) -> dict[str, Any]:
    """Read arrays with the dtypes and shardings of `wanted`: {"params": ..., "optimizer": ...}.

    Each process reads what its devices need and waits for no other, so that one that fails leaves
    none in a barrier.

    Args:
        some: `wanted` names only some of the arrays.

    Raises:
        storage.ERRORS: the files are damaged, or cannot be read here.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = some
    context.multiprocessing_options.active_processes = {jax.process_index()}
    context.multiprocessing_options.primary_host = jax.process_index()
    with context:
        return ocp.load_checkpointables(str(path), dict(wanted))


def read_one(folder: Path, name: str, stored: Mapping[str, Any]) -> tuple[np.ndarray, str]:
    """Read one array of a step into this process's memory; return it, and what is wrong with it.

    Args:
        name: "params/PATH" or "optimizer/PATH".
        stored: its `shape`, `dtype` and `sum`, as in the manifest.
    """
    kind, _, path = name.partition("/")
    cpu = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    wanted = jax.ShapeDtypeStruct(tuple(stored["shape"]), np.dtype(stored["dtype"]), sharding=cpu)
    try:
        array = np.asarray(load(folder, {kind: {path: wanted}}, some=True)[kind][path])
    except ERRORS as error:
        return np.empty(0), f"tensor {name} cannot be read: {type(error).__name__}: {error}"
    found = fingerprint.of_numpy(array)
    return array, fingerprint.problem(name, found, stored["sum"])
