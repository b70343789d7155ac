"""Read and write the arrays of a checkpoint step with Orbax, or block by block with TensorStore.

Every exception of either library becomes one error, `Failed`. A step holds two checkpointables,
`params` and `optimizer`. Plain Orbax can read it: `ocp.load_checkpointables(folder)`.
"""

import math
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from jax_sft.checkpoint import array_checksums
from jax_sft.files import plain_paths
from jax_sft.weights import blocks

T = TypeVar("T")
_OCDBT = "manifest.ocdbt"  # exists if Orbax has put all arrays into one database
Response = Any  # Orbax's handle of a save in progress


class Failed(RuntimeError):
    """Orbax or TensorStore failed; the message is that of the first cause."""


def _call(do: Callable[[], T]) -> T:
    """Return the result of `do`, and convert its exceptions to `Failed`.

    Raises:
        TimeoutError: `do` raised it.
        Failed: `do` raised any other exception.
    """
    try:
        return do()
    except TimeoutError:
        raise
    # Orbax can raise any type, even a bare Exception, and none may end the training: a failed save
    # is reported and tried again, and a run whose last state is not stored ends with 74.
    except Exception as error:
        raise Failed(_first_cause(error)) from error


def _first_cause(error: BaseException) -> str:
    """Return the type and message of the first error of a chain, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(f"{type(error).__name__}: {error}".split("[tensorstore_spec")[0].split())
    text = plain_paths.shown(text)
    return text if len(text) <= 500 else text[:500] + " ..."


def start_saving(
    path: Path, params: Any, optimizer: Any, metadata: dict[str, Any], timeout_s: float
) -> Response:
    """Start writing a step; returns once the arrays may be changed. All processes call it.

    Raises:
        Failed: the save could not be started on this process.
    """
    context = ocp.Context()
    context.async_options.timeout_secs = int(timeout_s)
    # Weights and moments in float32 shrink by 8%, and the save takes 5 times as long [2 CPU cores].
    context.array.saving.use_compression = False
    context.array.saving.scoped_storage_options_creator = _chunks
    # The name is used only once, so Orbax need not check whether it exists. The check has two
    # barriers.
    context.file_options.skip_sync_file_validations = True

    def start() -> Response:
        with context:
            return ocp.save_checkpointables_async(
                _named(path), {"params": params, "optimizer": optimizer}, custom_metadata=metadata
            )

    try:
        return _call(start)
    except TimeoutError as error:
        raise Failed(f"reading did not start in time: {error}") from error


def _named(step_folder: Path) -> str:
    """Return the path of a step folder in a form that Orbax and TensorStore read as plain.

    The step folder need not exist; its parent must.
    """
    return str(plain_paths.plain(step_folder.parent) / step_folder.name)


def _spec(step_folder: Path, name: str) -> dict[str, Any]:
    """Return TensorStore's spec of a stored array, "params/PATH" or "optimizer/PATH"."""
    kind, _, path = name.partition("/")
    kvstore: dict[str, Any] = {"driver": "file", "path": f"{_named(step_folder)}/{kind}/"}
    if (step_folder / kind / _OCDBT).exists():
        kvstore = {"driver": "ocdbt", "base": kvstore, "path": f"{path}/"}
    else:
        kvstore["path"] += f"{path}/"
    return {"driver": "zarr3", "kvstore": kvstore}


def require_readable(step_folder: Path, arrays: Mapping[str, Mapping[str, Any]]) -> None:
    """Open every array of a step that Orbax has written, without reading its values.

    This detects an unreadable save before it is published: Orbax reports success even when it saw
    no files to merge.

    Args:
        arrays: {"params/PATH" or "optimizer/PATH": {"shape", "dtype"}}.

    Raises:
        Failed: an array cannot be opened, or has another shape or dtype.
    """
    for kind in sorted({name.partition("/")[0] for name in arrays}):
        if not (step_folder / kind / _OCDBT).is_file():
            raise Failed(f"Orbax has not written {kind}/{_OCDBT}: its arrays would not be readable")

    def opened() -> list[ts.TensorStore]:
        futures = [ts.open(_spec(step_folder, name), read=True) for name in arrays]
        return [future.result() for future in futures]

    for (name, array), store in zip(arrays.items(), _call(opened), strict=True):
        actual = (tuple(store.shape), store.dtype.numpy_dtype)
        if actual != (tuple(array["shape"]), np.dtype(array["dtype"])):
            raise Failed(f"tensor {name} reads as {actual[1]} {actual[0]}, unlike its description")


def _chunks(key: Any, value: Any) -> ocp.options.ArrayOptions.Saving.StorageOptions | None:
    """Split a large array into chunks within one layer, so that an export reads few at a time."""
    if value.nbytes <= blocks.BLOCK_BYTES or value.ndim < 3:
        return None  # Orbax would split tables across the rows that an export reads
    return ocp.options.ArrayOptions.Saving.StorageOptions(
        chunk_byte_size=blocks.BLOCK_BYTES, shard_axes=(0,)
    )


def is_saved(response: Response, wait_s: float) -> bool:
    """Wait up to `wait_s` for a save, and return whether it is done.

    Raises:
        Failed: the save failed.
    """
    try:
        _call(lambda: response.result(timeout=wait_s))
        return True
    except TimeoutError:
        return False


def load(path: Path, wanted: Mapping[str, Any], some: bool = False) -> dict[str, Any]:
    """Read arrays with the dtypes and shardings of `wanted`: {"params": ..., "optimizer": ...}.

    Each process reads the shards of its devices and waits for no other process. A process that
    fails therefore leaves no other in a barrier.

    Args:
        some: `wanted` names only some of the arrays.

    Raises:
        Failed: the files are damaged, or this process cannot read them.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = some
    context.multiprocessing_options.active_processes = {jax.process_index()}
    context.multiprocessing_options.primary_host = jax.process_index()

    def read() -> dict[str, Any]:
        with context:
            return ocp.load_checkpointables(_named(path), dict(wanted))

    try:
        return _call(read)
    except TimeoutError as error:
        raise Failed(f"reading did not end in time: {error}") from error


class Stored:
    """One array of a step, read completely in blocks, from any threads.

    `stored[slices]`, with a slice per dimension, reads a block. The checksums of all blocks add up
    to that of the array, see `finish`.

    Args:
        name: "params/PATH" or "optimizer/PATH".
        manifest: `shape`, `dtype` and `sum` of the array, from the manifest of the step.
        shape: shape without the padding at the end of one dimension; None = no padding.

    Attributes:
        chunk: shape of a chunk, which is read whole even if only a part is needed.

    Raises:
        Failed: the array cannot be read, or its shape or dtype is not that of the manifest.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        manifest: Mapping[str, Any],
        shape: Sequence[int] | None = None,
    ):
        self.name, self._whole = name, tuple(manifest["shape"])
        self.shape = self._whole if shape is None else tuple(shape)
        self._sum, self._computed = manifest["sum"], 0
        self._size = 0
        self._lock = threading.Lock()
        spec = self._call(lambda: _spec(folder, name))
        store = self._call(lambda: ts.open(spec, read=True).result())
        self.dtype = store.dtype.numpy_dtype
        self.chunk = tuple(size or 1 for size in store.chunk_layout.read_chunk.shape or ())
        if (store.shape, self.dtype) != (self._whole, np.dtype(manifest["dtype"])):
            raise Failed(f"tensor {name} is {self.dtype} {store.shape}, not as in the manifest")
        across = [part == size for part, size in zip(self.chunk, self._whole, strict=True)]
        is_table = len(self.shape) == 2 and any(across) and self.nbytes > blocks.BLOCK_BYTES
        if is_table or (len(self.shape) > 2 and self.chunk[0] > 1):
            # Every block needs many chunks, or a part of one. A cache keeps chunks, so that each is
            # read once.
            context = ts.Context({"cache_pool": {"total_bytes_limit": self.nbytes}})
            store = self._call(lambda: ts.open(spec, read=True, context=context).result())
            self.chunk = (1,) * len(self.shape)
        self._store = store

    @property
    def nbytes(self) -> int:
        return math.prod(self._whole) * self.dtype.itemsize

    def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray:
        block = np.asarray(self._call(lambda: self._store[slices].read().result()))
        start = [part.indices(size)[0] for part, size in zip(slices, self._whole, strict=True)]
        checksum = array_checksums.checksum(block, start, self._whole)
        with self._lock:
            self._computed, self._size = self._computed + checksum, self._size + block.size
        return block

    def finish(self) -> None:
        """Compare the checksum, after each element of `shape` was read once. Reads the padding.

        Raises:
            Failed: the checksum differs from the manifest's.
        """
        if self.shape != self._whole:
            ends = zip(self.shape, self._whole, strict=True)
            self[tuple(slice(size if size < whole else 0, whole) for size, whole in ends)]
        assert self._size == math.prod(self._whole), f"{self._size} elements of {self.name} read"
        if problem := array_checksums.problem(self.name, self._computed % 2**32, self._sum):
            raise Failed(problem)

    def read_through(self) -> None:
        """Read the array in blocks of about BLOCK_BYTES, to compare its checksum.

        Raises:
            Failed: the array is damaged.
        """
        whole = tuple(slice(0, size) for size in self.shape[1:])
        if self.shape:
            index_bytes = max(self.nbytes // max(self.shape[0], 1), 1)  # bytes per index of dim 0
            step = max(blocks.BLOCK_BYTES // index_bytes // self.chunk[0], 1) * self.chunk[0]
            for start in range(0, self.shape[0], step):
                self[slice(start, min(start + step, self.shape[0])), *whole]
        else:
            self[()]
        self.finish()

    def _call(self, do: Callable[[], T]) -> T:
        try:
            return _call(do)
        except Failed as error:
            raise Failed(f"tensor {self.name} cannot be read: {error}") from error


def problem(folder: Path, name: str, manifest: Mapping[str, Any]) -> str:
    """Read one array of a step, and return what is wrong with it, or "".

    Args: see `Stored`.
    """
    try:
        Stored(folder, name, manifest).read_through()
    except Failed as error:
        return str(error)
    return ""


def start_params(path: Path, dtypes: Mapping[str, tuple[int, Any]], metadata: dict[str, Any]):
    """Write the metadata of a step without an optimizer, whose arrays `Blocks` then writes.

    Orbax can only write arrays that are in memory as a whole. It writes arrays of one element under
    the same names, and these are then removed.

    Args:
        dtypes: {parameter path: (number of dimensions, dtype)}.

    Raises:
        Failed: the step could not be written.
    """
    context = ocp.Context()
    context.array.saving.use_ocdbt = False  # an array is a folder, a block a file
    context.array.saving.array_metadata_store = None
    context.array.saving.enable_write_sharding_file = False
    params = {name: np.zeros((1,) * ndim, dtype) for name, (ndim, dtype) in dtypes.items()}

    def write() -> None:
        with context:
            ocp.save_checkpointables(_named(path), {"params": params}, custom_metadata=metadata)
        for name in params:
            shutil.rmtree(path / "params" / name)

    _call(write)


class Blocks:
    """A new array of a step begun with `start_params`, written in blocks by any threads.

    Args:
        block: shape of a block, which is one file.
        piece: shape of the smallest readable part of a block; must divide `block`.

    Raises:
        Failed: a file operation failed.
    """

    def __init__(self, folder: Path, name: str, shape, dtype, block, piece):
        self._folder, self._block = f"{name}/c", tuple(block)
        pieces = {"chunk_shape": [*piece], "codecs": [{"name": "bytes"}]}
        spec = {
            "driver": "zarr3",
            # Not synced file by file: `manifest.write` syncs all files at the end.
            "kvstore": {
                "driver": "file",
                "path": f"{_call(lambda: _named(folder))}/{name}/",
                "file_io_sync": False,
            },
            "metadata": {
                "shape": [*shape],
                "data_type": np.dtype(dtype).name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [*block]}},
                "codecs": [{"name": "sharding_indexed", "configuration": pieces}],
            },
            "store_data_equal_to_fill_value": True,
        }
        self._store = _call(lambda: ts.open(spec, create=True).result())

    def write(self, start: Sequence[int], array: np.ndarray) -> str:
        """Write the block that begins at `start`; return its file's path in the params folder."""
        slices = tuple(slice(i, i + n) for i, n in zip(start, array.shape, strict=True))
        _call(lambda: self._store[slices].write(array).result())
        number = (str(i // n) for i, n in zip(start, self._block, strict=True))
        return "/".join((self._folder, *number))
