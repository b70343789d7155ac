"""Read the weights of a Hugging Face folder: check the headers, stream tensors to their shards.

Reads safetensors only. The specs of a family (`weights.param_spec`) describe name, shape and
layout of every tensor; this module is independent of the families.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from jax_sft.runtime.text import at_most
from jax_sft.sharding import rules
from jax_sft.weights import vocabulary
from jax_sft.weights.hf_folder import INDEX, SINGLE, pickles, read_json
from jax_sft.weights.param_spec import ParamSpec

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

MOST_MISSING = 20_000  # limit of missing tensors that `check` names individually

# Buffers that old exports contain, and that the architecture computes.
_COMPUTED = re.compile(r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Location of one tensor of a folder."""

    file: Path
    dtype: str  # safetensors' name, a key of DTYPES
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


def _weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of a model folder, from its index if it has one."""
    index, single = folder / INDEX, folder / SINGLE
    if index.exists() and not single.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) for name in weight_map.values()
        ):
            raise ValueError(f"{index} has no weight_map from tensor names to file names")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{index} names {name!r}, a path outside the folder")
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ValueError(f"{index} names files that do not exist: {missing}")
        return [folder / name for name in names]
    if single.exists():
        return [single]
    if files := sorted(folder.glob("*.safetensors")):
        return files
    if pickle_files := pickles(folder):
        raise ValueError(
            f"{folder} holds weights only as pickle files {pickle_files}, which can run code "
            "when read: convert them with transformers' save_pretrained(safe_serialization=True)"
        )
    raise ValueError(f"{folder} has no *.safetensors file")


def read_headers(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read the headers of all weight files. Returns ({HF name: Tensor}, problems)."""
    tensors: dict[str, Tensor] = {}
    problems = []
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():
                    part = opened.get_slice(name)
                    if name in tensors:
                        problems.append(f"{name} is in {tensors[name].file.name} and {file.name}")
                    tensors[name] = Tensor(file, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            problems.append(f"{file.name} cannot be read: {error}")
    return tensors, problems


def check(
    folder: Path, specs: Iterable[ParamSpec], axis_sizes: dict[str, int], tied: bool
) -> dict[str, Tensor]:
    """Check a folder's tensors against the parameter specs, reading only headers.

    Returns:
        {HF name: Tensor} of exactly the tensors of the specs.

    Raises:
        ValueError: a tensor is unknown, missing, duplicate, misshapen or not floating-point. The
            message lists all of them, with file, name and both shapes.
    """
    specs = list(specs)
    tensors, problems = read_headers(folder)
    # Check the number first: the sizes may be anything, and each tensor gets a name below.
    num_tensors = sum(math.prod(axis_sizes[axis] for axis in spec.stacked) for spec in specs)
    if num_tensors > len(tensors) + MOST_MISSING:
        sizes = {
            axis: axis_sizes[axis]
            for axis in sorted({axis for spec in specs for axis in spec.stacked})
        }
        raise ValueError(
            f"{folder} does not fit its config.json: {sizes} need {num_tensors:,} tensors, its "
            f"files have {len(tensors):,}" + "".join(f"; {problem}" for problem in problems[:3])
        )
    shapes = {
        name: spec.hf_shape(axis_sizes) for spec in specs for _, name in spec.hf_tensors(axis_sizes)
    }
    for name, tensor in tensors.items():
        location = f"{tensor.file.name}: {name}"
        if name not in shapes:
            if tied and name == "lm_head.weight":
                problems += _tied_copy_problems(tensors)
            elif not _COMPUTED.match(name):
                problems.append(f"{location} {tensor.shape} is not part of this architecture")
        elif tensor.shape != shapes[name]:
            problems.append(
                f"{location} has shape {tensor.shape}, config.json needs {shapes[name]}"
            )
        elif tensor.dtype not in DTYPES:
            problems.append(f"{location} has dtype {tensor.dtype}, which is not one of {[*DTYPES]}")
    for name in sorted(shapes.keys() - tensors.keys()):
        hint = " (set tie_word_embeddings in config.json if it is tied)"
        problems.append(
            f"{name} {shapes[name]} is missing{hint if name == 'lm_head.weight' else ''}"
        )
    if problems:
        lines = "\n  ".join(at_most(problems, 50))
        raise ValueError(f"{folder} does not fit its config.json:\n  {lines}")
    return {name: tensors[name] for name in shapes}


def _tied_copy_problems(tensors: dict[str, Tensor]) -> list[str]:
    """Return a problem if a tied model stores a head that is not a copy of the embedding."""
    head, embedding = tensors["lm_head.weight"], tensors.get("model.embed_tokens.weight")
    if embedding is None or embedding.dtype not in DTYPES:
        return []  # `check` reports it
    comparable = head.dtype in DTYPES and head.shape == embedding.shape and len(head.shape) == 2
    if comparable and _are_equal(head, embedding):
        return []
    return [
        f"{head.file.name}: lm_head.weight differs from the embedding, yet config.json says "
        "tie_word_embeddings = true: set it to false, or remove the tensor"
    ]


def _are_equal(head: Tensor, embedding: Tensor) -> bool:
    """Whether two tensors are equal. Compares 4096 rows at a time, as both may be large."""
    with safe_open(head.file, "numpy") as a, safe_open(embedding.file, "numpy") as b:
        head_rows, table = a.get_slice("lm_head.weight"), b.get_slice("model.embed_tokens.weight")
        for start in range(0, head.shape[0], 4096):
            rows = slice(start, min(start + 4096, head.shape[0]))
            if not np.array_equal(head_rows[rows], table[rows]):
                return False
    return True


def load(
    tensors: Mapping[str, Tensor],
    specs: Iterable[ParamSpec],
    axis_sizes: dict[str, int],
    shardings: Mapping[str, NamedSharding],
    dtype: Any,
    progress: bool = True,
    vocab_shards: int = 1,
) -> dict[str, jax.Array]:
    """Read every weight straight into its shards.

    Each process reads only the blocks that its devices hold, one HF tensor at a time. Host memory
    peaks at this process's shards of one parameter.

    Args:
        tensors: result of `check`.
        shardings: {parameter path: sharding}.
        dtype: dtype of the returned arrays.
        vocab_shards: the vocabulary is padded to a multiple of this.

    Returns:
        {parameter path: array}.
    """
    specs, padded = list(specs), vocabulary.padded(axis_sizes, vocab_shards)
    opened = {
        file: safe_open(file, framework="numpy") for file in {t.file for t in tensors.values()}
    }
    params = {}
    total = sum(1 for spec in specs for _ in spec.hf_tensors(axis_sizes))
    bar = tqdm(total=total, desc="reading weights", unit="tensor", disable=not progress)
    with bar:
        for spec in specs:
            num_stacked = len(spec.stacked)
            shape, sharding = spec.shape(padded), shardings[spec.path]
            ends = spec.shape(axis_sizes)
            names = dict(spec.hf_tensors(axis_sizes))
            arrays: dict[rules.Block, np.ndarray] = {}
            shards = []
            for device, block in rules.local_blocks(sharding, shape).items():
                if block not in arrays:  # devices with the same block share one read
                    array = np.empty([stop - start for start, stop in block], dtype)
                    stored = tuple(
                        (min(start, end), min(stop, end))
                        for (start, stop), end in zip(block, ends, strict=True)
                    )
                    filled = tuple(slice(0, stop - start) for start, stop in stored)[num_stacked:]
                    if stored != block:
                        array[...] = 0
                    is_padding = any(start == stop for start, stop in stored)
                    hf_block = spec.hf_index(stored[num_stacked:], axis_sizes)
                    for stack_index, name in () if is_padding else names.items():
                        part = opened[tensors[name].file].get_slice(name)[hf_block]
                        array[*stack_index, *filled] = spec.from_hf(part, axis_sizes).astype(dtype)
                    arrays[block] = array
                shards.append(jax.device_put(arrays[block], device))
            # device_put is asynchronous and holds its block until it is done, so wait here to bound
            # host memory.
            jax.block_until_ready(shards)
            params[spec.path] = jax.make_array_from_single_device_arrays(shape, sharding, shards)
            bar.update(len(names))
    return params


class Blocks:
    """A `BlockReader` of one parameter, from the tensors of a folder."""

    def __init__(self, tensors: Mapping[str, Tensor], spec: ParamSpec, axis_sizes: dict[str, int]):
        self._spec, self._axis_sizes = spec, axis_sizes
        self.shape = spec.shape(axis_sizes)
        self.chunk = (1,) * len(self.shape)
        self._names = dict(spec.hf_tensors(axis_sizes))
        parts = {tensors[name] for name in self._names.values()}
        self.dtype = np.dtype(jnp.result_type(*(DTYPES[tensor.dtype] for tensor in parts)))
        opened = {file: safe_open(file, "numpy") for file in {tensor.file for tensor in parts}}
        self._slices = {
            name: opened[tensors[name].file].get_slice(name) for name in self._names.values()
        }

    def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray:
        block = [part.indices(n)[:2] for part, n in zip(slices, self.shape, strict=True)]
        num_stacked = len(self._spec.stacked)
        index = tuple(start for start, _ in block[:num_stacked])
        inner = tuple(block[num_stacked:])
        part = self._slices[self._names[index]][self._spec.hf_index(inner, self._axis_sizes)]
        return self._spec.from_hf(part, self._axis_sizes).reshape(
            [stop - start for start, stop in block]
        )

    def finish(self) -> None:
        """Do nothing: a safetensors file has no checksum."""
