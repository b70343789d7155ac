"""Orbax: the arrays of a step, to files and back; in blocks, with TensorStore, on which it stands.

All that they can raise becomes one error.

A step holds two checkpointables, `params` and `optimizer`, and reads with plain Orbax:
`ocp.load_checkpointables(folder)`.
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
# Read or written at a time where arrays are streamed. Memory of this size is used again by the C
# library; larger pieces come from the kernel each time, page by page, at 0.6 s per GB.
_OCDBT = "manifest.ocdbt"  # is there where Orbax has put all arrays into one database
Response = Any  # of Orbax: the result of a save that goes on


class Failed(RuntimeError):
    """Orbax could not write or read; the message is that of the first cause."""


def _call(do: Callable[[], T]) -> T:
    """Return what `do` returns, and raise whatever it raises as one kind of error.

    Raises:
        TimeoutError: it was raised.
        Failed: anything else was.
    """
    try:
        return do()
    except TimeoutError:
        raise
    except Exception as error:  # Orbax raises any kind, at times a plain Exception for its cause
        raise Failed(_first_cause(error)) from error


def _first_cause(error: BaseException) -> str:
    """Return the kind and the message of the error that began a chain, in one line."""
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
        Failed: it could not be started on this process.
    """
    context = ocp.Context()
    context.async_options.timeout_secs = int(timeout_s)
    # Weights and moments in float32 shrink by 8%, and the save takes 5 times as long [2 CPU cores].
    context.array.saving.use_compression = False
    context.array.saving.scoped_storage_options_creator = _chunks
    # A name that is used once needs no look whether it exists, nor the two barriers around it.
    context.file_options.skip_sync_file_validations = True

    def start() -> Response:
        with context:
            return ocp.save_checkpointables_async(
                _named(path), {"params": params, "optimizer": optimizer}, custom_metadata=metadata
            )

    try:
        return _call(start)
    except TimeoutError as error:
        raise Failed(f"not started in time: {error}") from error


def _named(step_folder: Path) -> str:
    """The folder of a step, which need not exist, as Orbax and TensorStore have to be told."""
    return str(plain_paths.plain(step_folder.parent) / step_folder.name)


def _spec(step_folder: Path, name: str) -> dict[str, Any]:
    """TensorStore's description of a stored array, "params/PATH" or "optimizer/PATH"."""
    kind, _, path = name.partition("/")
    kvstore: dict[str, Any] = {"driver": "file", "path": f"{_named(step_folder)}/{kind}/"}
    if (step_folder / kind / _OCDBT).exists():
        kvstore = {"driver": "ocdbt", "base": kvstore, "path": f"{path}/"}
    else:
        kvstore["path"] += f"{path}/"
    return {"driver": "zarr3", "kvstore": kvstore}


def require_readable(step_folder: Path, arrays: Mapping[str, Mapping[str, Any]]) -> None:
    """Open every array of a step that Orbax has written, without reading its values.

    A save that is not found again is found out before it is published: Orbax reports success where
    it saw nothing to merge.

    Args:
        arrays: {"params/PATH" or "optimizer/PATH": {"shape", "dtype"}}.

    Raises:
        Failed: one cannot be opened, or has another shape or dtype.
    """
    for kind in sorted({name.partition("/")[0] for name in arrays}):
        if not (step_folder / kind / _OCDBT).is_file():
            raise Failed(f"Orbax has not written {kind}/{_OCDBT}: its arrays could not be read")

    def opened() -> list[ts.TensorStore]:
        begun = [ts.open(_spec(step_folder, name), read=True) for name in arrays]
        return [future.result() for future in begun]

    for (name, array), store in zip(arrays.items(), _call(opened), strict=True):
        found = (tuple(store.shape), store.dtype.numpy_dtype)
        if found != (tuple(array["shape"]), np.dtype(array["dtype"])):
            raise Failed(f"tensor {name} reads as {found[1]} {found[0]}, which it is not")


def _chunks(key: Any, value: Any) -> ocp.options.ArrayOptions.Saving.StorageOptions | None:
    """Cut a large array into chunks that are within one layer, so that an export reads few."""
    if value.nbytes <= blocks.BLOCK_BYTES or value.ndim < 3:
        return None  # Orbax would cut tables across their rows, which an export reads
    return ocp.options.ArrayOptions.Saving.StorageOptions(
        chunk_byte_size=blocks.BLOCK_BYTES, shard_axes=(0,)
    )


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
            return ocp.load_checkpointables(_named(path), dict(wanted))

    try:
        return _call(read)
    except TimeoutError as error:
        raise Failed(f"not read in time: {error}") from error


class Stored:
    """One array of a step, read in blocks that together are all of it, by any threads.

    `stored[slices]`, a slice of each dimension, is a block. Their checksums add up to that of the
    array: see `finish`.

    Args:
        name: "params/PATH" or "optimizer/PATH".
        manifest: its `shape`, `dtype` and `sum`, as in the manifest of the step.
        shape: of what is asked for; the rest, at the end of one dimension, is padding.

    Attributes:
        chunk: its shape; what is read whole if a part of it is needed.

    Raises:
        Failed: it cannot be read; or it is not what the manifest says.
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
        self._sum, self._found = manifest["sum"], 0
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
            # Every block needs many chunks, or a part of one: they are kept, so as to be read once.
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
        found = array_checksums.of_numpy(block, start, self._whole)
        with self._lock:
            self._found, self._size = self._found + found, self._size + block.size
        return block

    def finish(self) -> None:
        """Compare the checksum, now that each element that was asked for was read once.

        Raises:
            Failed: it is another one.
        """
        if self.shape != self._whole:
            ends = zip(self.shape, self._whole, strict=True)
            self[tuple(slice(size if size < whole else 0, whole) for size, whole in ends)]
        assert self._size == math.prod(self._whole), f"{self._size} elements of {self.name} read"
        if problem := array_checksums.problem(self.name, self._found % 2**32, self._sum):
            raise Failed(problem)

    def read_through(self) -> None:
        """Read all of it, in blocks of about BLOCK_BYTES, for the checksum alone.

        Raises:
            Failed: it is damaged.
        """
        whole = tuple(slice(0, size) for size in self.shape[1:])
        if self.shape:
            each = max(self.nbytes // max(self.shape[0], 1), 1)  # bytes of an index
            step = max(blocks.BLOCK_BYTES // each // self.chunk[0], 1) * self.chunk[0]
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
    """Read one array of a step; say what is wrong with it, "" = nothing.

    Args: as of `Stored`.
    """
    try:
        Stored(folder, name, manifest).read_through()
    except Failed as error:
        return str(error)
    return ""


def start_params(path: Path, dtypes: Mapping[str, tuple[int, Any]], metadata: dict[str, Any]):
    """Write a step without an optimizer, whose arrays `Blocks` then writes.

    Orbax writes arrays that are in memory as a whole. So it writes a tree of the same names with
    one element each, and these are removed again.

    Args:
        dtypes: {our path: (number of dimensions, dtype)}.

    Raises:
        Failed: it could not be written.
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
        block: shape of a block: a file.
        piece: shape of what can be read alone of one; divides it.

    Raises:
        Failed: the file system refused something.
    """

    def __init__(self, folder: Path, name: str, shape, dtype, block, piece):
        self._folder, self._block = f"{name}/c", tuple(block)
        pieces = {"chunk_shape": [*piece], "codecs": [{"name": "bytes"}]}
        spec = {
            "driver": "zarr3",
            # Not synced file by file: `manifest.write` does it when all are written.
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
        """Write the block that begins there; return its file's path within the step's folder."""
        slices = tuple(slice(i, i + n) for i, n in zip(start, array.shape, strict=True))
        _call(lambda: self._store[slices].write(array).result())
        number = (str(i // n) for i, n in zip(start, self._block, strict=True))
        return "/".join((self._folder, *number))
