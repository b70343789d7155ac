"""Convert a Hugging Face folder to a checkpoint of its parameters, block by block.

The result is a checkpoint folder with one step, 0, without an optimizer. `model.path` may name it,
and each process then reads only its own shards. `hf_export` converts it back to a model folder.
"""

import concurrent.futures
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from tqdm import tqdm

from jax_sft import models
from jax_sft.checkpoint import array_checksums, model_files, orbax_io
from jax_sft.checkpoint.resume import FORMAT_VERSION
from jax_sft.files import manifest, outputs, paths, sums
from jax_sft.hosts import preflight
from jax_sft.sharding import rules
from jax_sft.weights import blocks, hf_folder, hf_reader, hf_writer
from jax_sft.weights.param_spec import ParamSpec, contiguous

STEP = 0
_MOST_PIECES = 64  # independently readable pieces of a block; more fsdp shards share pieces
_LEAST_PIECE_BYTES = 1 << 18
_ALIGNED = 64  # blocks begin at multiples of this many indices, so that pieces divide them


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion's inputs and outputs, determined from headers alone.

    Attributes:
        tensors: {HF name: its location in a file}.
        dtypes: {parameter path: dtype in the checkpoint}.
    """

    folder: Path
    specs: tuple[ParamSpec, ...]
    axis_sizes: dict[str, int]
    tensors: Mapping[str, hf_reader.Tensor]
    dtypes: Mapping[str, np.dtype]

    @property
    def nbytes(self) -> int:
        """Size of the arrays that are written."""
        return sum(
            math.prod(spec.shape(self.axis_sizes)) * self.dtypes[spec.path].itemsize
            for spec in self.specs
        )

    def lines(self) -> Iterator[str]:
        """Yield a line per tensor (dtype, shape, file, target array), then the totals."""
        for spec in self.specs:
            for index, name in spec.hf_tensors(self.axis_sizes):
                tensor = self.tensors[name]
                target = f"{spec.path}{[*index] if index else ''}"
                shape = spec.shape(self.axis_sizes)[len(index) :]
                yield (
                    f"{name} {tensor.dtype} {[*tensor.shape]} in {tensor.file.name}"
                    f" -> {target} {self.dtypes[spec.path]} {[*shape]}"
                )
        read = sum(tensor.nbytes for tensor in self.tensors.values())
        files = {tensor.file for tensor in self.tensors.values()}
        yield (
            f"{len(self.tensors)} tensors, {read / 1e9:.3f} GB in {len(files)} files -> "
            f"{len(self.specs)} arrays, {self.nbytes / 1e9:.3f} GB"
        )


def plan(model: str | Path, *, revision: str = "", dtype: str = "") -> Plan:
    """Check a model folder against its config.json, and plan its conversion.

    Args:
        model: a folder, or a hub id, which is downloaded.
        dtype: see `convert`.

    Raises:
        ValueError: the folder cannot be converted; the message lists all problems.
    """
    folder = hf_folder.resolve(str(model), revision)
    if model_files.is_kept(folder):
        raise ValueError(f"{model} is a checkpoint folder already: model.path may name it as it is")
    config = hf_folder.read_json(folder / "config.json")
    family, cfg = models.read(config)
    specs = family.weights(cfg)
    tensors = hf_reader.check(folder, specs, cfg.axis_sizes, cfg.tied)
    if dtype and dtype not in hf_reader.NAMES:
        raise ValueError(f"dtype {dtype!r} is not one of {list(hf_reader.NAMES)}")
    dtypes = {}
    for spec in specs:
        source_dtypes = {
            np.dtype(hf_reader.DTYPES[tensors[name].dtype])
            for _, name in spec.hf_tensors(cfg.axis_sizes)
        }
        if any(source.itemsize > 4 for source in source_dtypes) and not dtype:
            raise ValueError(f"{spec.path} is float64 in {folder}: choose a dtype")
        # If layers differ in dtype, use one that represents the values of all.
        dtypes[spec.path] = np.dtype(dtype) if dtype else np.dtype(jnp.result_type(*source_dtypes))
    return Plan(folder, specs, cfg.axis_sizes, tensors, dtypes)


def convert(
    model: str | Path,
    out: str | Path,
    *,
    revision: str = "",
    dtype: str = "",
    overwrite: bool = False,
    progress: bool = True,
    say: Callable[[str], object] = print,
) -> Path:
    """Write a model folder as a checkpoint of its parameters.

    Args:
        model: a folder, or a hub id, which is downloaded.
        out: the folder to write; it appears only when complete.
        dtype: "float32", "bfloat16" or "float16" for all arrays; "" = that of the tensors.
        overwrite: replace an older conversion in `out` if nobody changed it.
        say: called with a line about the leftovers of killed conversions.

    Returns:
        `out`.

    Raises:
        ValueError: the folder cannot be converted (the message lists all problems), or `out` may
            not be written or lacks space.
        OSError, orbax_io.Failed: a file operation failed.
    """
    planned = plan(model, revision=revision, dtype=dtype)
    place = outputs.check(out, outputs.CONVERSION, overwrite=overwrite, reads=[planned.folder])
    outputs.check_room(place.out, planned.nbytes)
    with outputs.unfinished(place.out, say) as folder:
        hashes = _write_step(planned, folder / str(STEP), progress)
        hf_dtypes = {name: tensor.dtype for name, tensor in planned.tensors.items()}
        model_files.keep(folder, model_files.Model(planned.folder, hf_dtypes))
        sums.write(folder, outputs.CONVERSION, {"step": STEP}, hashes)
        outputs.put_in_place(folder, place)
    return paths.local(out, "--out")


def _write_step(planned: Plan, folder: Path, progress: bool) -> dict[str, str]:
    """Write the step folder: arrays, and a manifest of files and checksums.

    Returns:
        {path relative to the folder's parent: sha256} of the array files.
    """
    axis_sizes = planned.axis_sizes
    metadata = {
        "format_version": FORMAT_VERSION,
        "step": STEP,
        "versions": preflight.versions(),
    }
    begun = {spec.path: (len(spec.axes), planned.dtypes[spec.path]) for spec in planned.specs}
    orbax_io.start_params(folder, begun, metadata)
    arrays, hashes = {}, {}
    bar = tqdm(
        total=planned.nbytes, desc="converting", unit="B", unit_scale=True, disable=not progress
    )
    with bar:
        for spec in planned.specs:
            total = 0
            for file, sha256, checksum, nbytes in _write_spec(planned, spec, folder / "params"):
                hashes[f"params/{file}"] = sha256
                total += checksum
                bar.update(nbytes)
            arrays[f"params/{spec.path}"] = {
                "shape": spec.shape(axis_sizes),
                "dtype": str(planned.dtypes[spec.path]),
                "sum": total % 2**32,
            }
    manifest.write(folder, arrays=arrays, hashes=hashes)
    return {f"{folder.name}/{path}": sha256 for path, sha256 in hashes.items()}


def _write_spec(
    planned: Plan, spec: ParamSpec, folder: Path
) -> Iterator[tuple[str, str, int, int]]:
    """Write one array; yield file, sha256 of the file, array checksum and bytes of each block."""
    axis_sizes, dtype, shape = (
        planned.axis_sizes,
        planned.dtypes[spec.path],
        spec.shape(planned.axis_sizes),
    )
    ones = (1,) * len(spec.stacked)
    parts = [*spec.parts(axis_sizes, blocks.BLOCK_BYTES // dtype.itemsize, _ALIGNED)]
    block_shape = ones + tuple(stop - start for start, stop in parts[0])
    array = orbax_io.Blocks(
        folder, spec.path, shape, dtype, block_shape, _piece(spec, block_shape, dtype.itemsize)
    )

    def write(index: tuple[int, ...], tensor: hf_reader.Tensor, name: str, block: rules.Block):
        # Opened for each block, as an open file's memory grows with everything read from it.
        with safe_open(tensor.file, framework="numpy") as opened:
            hf_block = opened.get_slice(name)[spec.hf_index(block, axis_sizes)]
        values = contiguous(spec.from_hf(hf_block, axis_sizes)).astype(dtype, copy=False)
        start = (*index, *(first for first, _ in block))
        values = values.reshape(ones + values.shape)
        checksum = array_checksums.checksum(values, start, shape)
        file = array.write(start, values)
        return file, manifest.sha256_of(folder, [file])[file], checksum, values.nbytes

    tasks = [
        (index, planned.tensors[name], name, block)
        for index, name in spec.hf_tensors(axis_sizes)
        for block in parts
    ]
    num_threads = hf_writer.threads(math.prod(block_shape) * dtype.itemsize)
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        yield from pool.map(write, *zip(*tasks, strict=True))


def _piece(spec: ParamSpec, block: tuple[int, ...], itemsize: int) -> list[int]:
    """Return the shape of a block's pieces: split in the dim sharded over `fsdp` (across hosts)."""
    piece = [*block]
    for dim, axis in enumerate(spec.axes):
        if "fsdp" in rules.RULES[axis]:
            most = min(_MOST_PIECES, math.prod(block) * itemsize // _LEAST_PIECE_BYTES)
            count = max((n for n in range(1, most + 1) if block[dim] % n == 0), default=1)
            piece[dim] //= count
    return piece
