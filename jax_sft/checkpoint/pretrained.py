"""The weights that a run starts from: those of a model folder, or of a checkpoint of ours.

Both are checked against the weight rows by what is known without reading them, and each process
then reads only what its devices hold.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from jax_sft.adapters import nf4
from jax_sft.checkpoint import array_checksums, model_files, orbax_io
from jax_sft.files import step_folders
from jax_sft.nn.model_def import ModelDef
from jax_sft.weights import hf_reader, placement, vocabulary
from jax_sft.weights.blocks import BlockReader
from jax_sft.weights.param_spec import Weight

Load = Callable[[Mapping[str, NamedSharding], Any, bool], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights that were found and fit.

    Attributes:
        dtypes: {HF name: safetensors dtype}.
        load: ({our path: sharding}, dtype, progress) -> {our path: array} of these paths.
        blocks: our path -> reader of the array's blocks.
    """

    dtypes: Mapping[str, str]
    load: Load
    blocks: Callable[[str], BlockReader]


def find(
    folder: Path,
    rows: Iterable[Weight],
    dims: dict[str, int],
    tied: bool,
    step: int | None = None,
    vocab_shards: int = 1,
) -> Weights:
    """Return the weights of a folder that `hf_folder.resolve` returned, reading only headers.

    Args:
        dims: of the model, without padding.
        step: of a checkpoint folder; None = the newest.
        vocab_shards: `load` pads the vocabulary to a multiple.

    Raises:
        ValueError: they do not fit the rows: everything that is wrong at once.
    """
    rows = tuple(rows)
    if model_files.is_kept(folder):
        return _of_checkpoint(folder.parent, rows, dims, step, vocab_shards)
    tensors = hf_reader.check(folder, rows, dims, tied)

    def load(shardings, dtype, progress=True) -> dict[str, jax.Array]:
        wanted = [row for row in rows if row.path in shardings]
        return hf_reader.load(tensors, wanted, dims, shardings, dtype, progress, vocab_shards)

    def blocks(path: str) -> hf_reader.Blocks:
        return hf_reader.Blocks(tensors, next(row for row in rows if row.path == path), dims)

    return Weights({name: tensor.dtype for name, tensor in tensors.items()}, load, blocks)


def read(
    weights: Weights,
    model_def: ModelDef,
    paths: Iterable[str],
    mesh: Mesh,
    dtype,
    progress: bool = True,
) -> dict[str, jax.Array]:
    """Read pretrained weights into their shards.

    Args:
        paths: ours, of the rows that are read.
        dtype: of what trains; what is frozen has its own.

    Returns:
        {our path: array}, of packed ones the parts.
    """
    paths, found = list(paths), {}
    shardings = placement.shardings(model_def.rows, mesh)
    # One after another, so that none stays whole; on all processes in the same order.
    packed = [path for path in paths if path in model_def.packed]
    for path in tqdm(packed, "packing weights", unit="array", disable=not (progress and packed)):
        dtype_there = weights.blocks(path).dtype
        kernel = weights.load({path: shardings[path]}, dtype_there, False).pop(path)
        found |= nf4.packed_arrays(model_def, path, kernel, mesh)
        del kernel
    rest = [path for path in paths if path not in model_def.packed]
    dtypes = {path: np.dtype(model_def.frozen.get(path, dtype)) for path in rest}
    for one in sorted(set(dtypes.values()), key=str):
        wanted = {path: shardings[path] for path in dtypes if dtypes[path] == one}
        found |= weights.load(wanted, one, progress)
    return found


def _of_checkpoint(
    folder: Path,
    rows: tuple[Weight, ...],
    dims: dict[str, int],
    step: int | None,
    vocab_shards: int,
) -> Weights:
    """The parameters of a step."""
    model_files.verify(folder)
    step = step_folders.choose(folder, step)
    stored = step_folders.params(folder, step)
    shapes = {row.path: row.shape(dims) for row in rows}
    vocab = vocabulary.Vocabulary.of(rows, dims["vocab"])
    if problems := step_folders.misfits(stored, shapes, vocab.cut):
        raise ValueError(f"{folder / str(step)} does not fit its config.json: {problems}")

    def load(shardings, dtype, progress=True) -> dict[str, jax.Array]:
        params = {}
        wanted = [row for row in rows if row.path in shardings]
        for row in tqdm(wanted, "reading weights", unit="array", disable=not progress):
            path, array = row.path, stored[row.path]
            as_stored = vocabulary.as_stored(
                array["shape"], np.dtype(array["dtype"]), shardings[path]
            )
            try:
                part = {"params": {path: as_stored}}
                found = orbax_io.load(folder / str(step), part, some=True)["params"][path]
            except orbax_io.Failed as error:
                raise ValueError(f"{folder / str(step)} cannot be read: {error}") from error
            sums = array_checksums.read([path], array_checksums.start({path: found}))
            if problem := array_checksums.problem(path, sums[path], array["sum"]):
                raise ValueError(f"{folder / str(step)}: {problem}")
            shape = row.shape(vocabulary.padded(dims, vocab_shards))
            if found.shape != shape:
                found = vocabulary.resized(found, shape, shardings[path])
            params[path] = found.astype(dtype)
        return params

    def blocks(path: str) -> orbax_io.Stored:
        name = step_folders.PARAMS + path
        return orbax_io.Stored(folder / str(step), name, stored[path], shapes[path])

    return Weights(model_files.dtypes(folder), load, blocks)
