"""Orbax: the arrays of a step, to files and back. All that it can raise becomes one error.

A step holds two checkpointables, `params` and `optimizer`, and reads with plain Orbax:
`ocp.load_checkpointables(folder)`.
"""

import concurrent.futures
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from jax_sft import fingerprint

T = TypeVar("T")
Response = Any  # of Orbax: the result of a save that goes on


class Failed(RuntimeError):
    """Orbax could not write or read; the message is that of the first cause."""


def _call(do: Callable[[], T]) -> T:
    """Return what `do` returns.

    Orbax raises whatever comes, at times a plain Exception in the place of what it was. A future
    takes it all, and everything is handed on as one kind.

    Raises:
        TimeoutError: it was raised.
        Failed: anything else was.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(do)
        error = future.exception()
    if error is None or isinstance(error, TimeoutError):
        return future.result()
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = " ".join(f"{type(cause).__name__}: {cause}".split("[tensorstore_spec")[0].split())
    raise Failed(text if len(text) <= 500 else text[:500] + " ...") from error


def start_saving(
    path: Path, params: Any, optimizer: Any, metadata: dict[str, Any], timeout_s: float
) -> Response:
    """Start writing a step; returns once the arrays may be changed. All processes call it.

    Raises:
        Failed: it could not be started on this process.
    """
    context = ocp.Context()
    context.async_options.timeout_secs = int(timeout_s)
    # Weights and moments in float32 shrink by 8%, and the save takes 5 times as long [2 CPU cores].
    context.array.saving.use_compression = False
    # A name that is used once needs no look whether it exists, nor the two barriers around it.
    context.file_options.skip_sync_file_validations = True

    def start() -> Response:
        with context:
            return ocp.save_checkpointables_async(
                str(path), {"params": params, "optimizer": optimizer}, custom_metadata=metadata
            )

    try:
        return _call(start)
    except TimeoutError as error:
        raise Failed(f"not started in time: {error}") from error


def is_saved(response: Response, wait_s: float) -> bool:
    """Wait so long for a save; return whether it is done.

    Raises:
        Failed: it failed.
    """
    try:
        _call(lambda: response.result(timeout=wait_s))
        return True
    except TimeoutError:
        return False


def load(path: Path, wanted: Mapping[str, Any], some: bool = False) -> dict[str, Any]:
    """Read arrays with the dtypes and shardings of `wanted`: {"params": ..., "optimizer": ...}.

    Each process reads what its devices need and waits for no other, so that one that fails leaves
    none in a barrier.

    Args:
        some: `wanted` names only some of the arrays.

    Raises:
        Failed: the files are damaged, or cannot be read here.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = some
    context.multiprocessing_options.active_processes = {jax.process_index()}
    context.multiprocessing_options.primary_host = jax.process_index()

    def read() -> dict[str, Any]:
        with context:
            return ocp.load_checkpointables(str(path), dict(wanted))

    try:
        return _call(read)
    except TimeoutError as error:
        raise Failed(f"not read in time: {error}") from error


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
    except Failed as error:
        return np.empty(0), f"tensor {name} cannot be read: {error}"
    found = fingerprint.of_numpy(array)
    return array, fingerprint.problem(name, found, stored["sum"])
