"""Load the weights that a run starts from: a model folder or a jax_sft checkpoint.

Headers or manifests are checked against the parameter specs before any weight is read. Each process
then reads only the shards of its own devices.
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
from jax_sft.weights.param_spec import ParamSpec

Load = Callable[[Mapping[str, NamedSharding], Any, bool], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights whose names and shapes were checked.

    Attributes:
        dtypes: {HF name: safetensors dtype}.
        load: ({parameter path: sharding}, dtype, progress) -> {parameter path: array}.
        blocks: parameter path -> reader of the array's blocks.
    """

    dtypes: Mapping[str, str]
    load: Load
    blocks: Callable[[str], BlockReader]


def find(
    folder: Path,
    specs: Iterable[ParamSpec],
    axis_sizes: dict[str, int],
    tied: bool,
    step: int | None = None,
    vocab_shards: int = 1,
) -> Weights:
    """Return the weights of a folder that `hf_folder.resolve` returned, reading only headers.

    Args:
        axis_sizes: size of each logical axis, without padding.
        step: step of a checkpoint folder; None = the newest.
        vocab_shards: `load` pads the vocabulary to a multiple of this.

    Raises:
        ValueError: the weights do not fit the specs; the message lists all problems.
    """
    specs = tuple(specs)
    if model_files.is_kept(folder):
        return _find_in_checkpoint(folder.parent, specs, axis_sizes, step, vocab_shards)
    tensors = hf_reader.check(folder, specs, axis_sizes, tied)

    def load(shardings, dtype, progress=True) -> dict[str, jax.Array]:
        loaded_specs = [spec for spec in specs if spec.path in shardings]
        return hf_reader.load(
            tensors, loaded_specs, axis_sizes, shardings, dtype, progress, vocab_shards
        )

    def blocks(path: str) -> hf_reader.Blocks:
        return hf_reader.Blocks(
            tensors, next(spec for spec in specs if spec.path == path), axis_sizes
        )

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
        paths: parameter paths to read.
        dtype: dtype of trainable weights; frozen ones have their own, see `ModelDef.frozen_dtypes`.

    Returns:
        {parameter path: array}; a quantized kernel is replaced by its parts (codes, scales, ...).
    """
    paths, arrays = list(paths), {}
    shardings = placement.shardings(model_def.specs, mesh)
    # Quantize one kernel at a time, so that only one is in memory unquantized. All processes use
    # the same order.
    kernels = [path for path in paths if path in model_def.quantized]
    for path in tqdm(kernels, "packing weights", unit="array", disable=not (progress and kernels)):
        source_dtype = weights.blocks(path).dtype
        kernel = weights.load({path: shardings[path]}, source_dtype, False).pop(path)
        arrays |= nf4.packed_arrays(model_def, path, kernel, mesh)
        del kernel
    rest = [path for path in paths if path not in model_def.quantized]
    dtypes = {path: np.dtype(model_def.frozen_dtypes.get(path, dtype)) for path in rest}
    for group_dtype in sorted(set(dtypes.values()), key=str):
        group = {path: shardings[path] for path in dtypes if dtypes[path] == group_dtype}
        arrays |= weights.load(group, group_dtype, progress)
    return arrays


def _find_in_checkpoint(
    folder: Path,
    specs: tuple[ParamSpec, ...],
    axis_sizes: dict[str, int],
    step: int | None,
    vocab_shards: int,
) -> Weights:
    """Return the weights of a checkpoint step."""
    model_files.verify(folder)
    step = step_folders.choose(folder, step)
    stored = step_folders.params(folder, step)
    shapes = {spec.path: spec.shape(axis_sizes) for spec in specs}
    vocab = vocabulary.Vocabulary.of(specs, axis_sizes["vocab"])
    if problems := step_folders.misfits(stored, shapes, vocab.cut):
        raise ValueError(f"{folder / str(step)} does not fit its config.json: {problems}")

    def load(shardings, dtype, progress=True) -> dict[str, jax.Array]:
        params = {}
        loaded_specs = [spec for spec in specs if spec.path in shardings]
        for spec in tqdm(loaded_specs, "reading weights", unit="array", disable=not progress):
            path, array = spec.path, stored[spec.path]
            as_stored = vocabulary.as_stored(
                array["shape"], np.dtype(array["dtype"]), shardings[path]
            )
            try:
                part = {"params": {path: as_stored}}
                values = orbax_io.load(folder / str(step), part, some=True)["params"][path]
            except orbax_io.Failed as error:
                raise ValueError(f"{folder / str(step)} cannot be read: {error}") from error
            sums = array_checksums.read([path], array_checksums.start({path: values}))
            if problem := array_checksums.problem(path, sums[path], array["sum"]):
                raise ValueError(f"{folder / str(step)}: {problem}")
            shape = spec.shape(vocabulary.padded(axis_sizes, vocab_shards))
            if values.shape != shape:
                values = vocabulary.resized(values, shape, shardings[path])
            params[path] = values.astype(dtype)
        return params

    def blocks(path: str) -> orbax_io.Stored:
        name = step_folders.PARAMS + path
        return orbax_io.Stored(folder / str(step), name, stored[path], shapes[path])

    return Weights(model_files.dtypes(folder), load, blocks)
