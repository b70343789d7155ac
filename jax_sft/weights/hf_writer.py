"""Write the safetensors files of a Hugging Face folder block by block.

`layout` first assigns each tensor a file and an offset. The size is then known in advance, and
tensors can be written in any order, several at a time.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jax_sft.files import manifest
from jax_sft.files.disk import write_at
from jax_sft.sharding import rules
from jax_sft.weights import blocks
from jax_sft.weights.blocks import BlockReader, InMemory
from jax_sft.weights.hf_folder import INDEX, SINGLE
from jax_sft.weights.hf_reader import DTYPES
from jax_sft.weights.param_spec import ParamSpec

_HASHED_BYTES = 1 << 20  # read and hashed at a time
_MOST_THREADS = 4  # some threads wait for the disk
_BLOCKS_BYTES = 1 << 29  # limit of all blocks in progress


@dataclasses.dataclass(frozen=True)
class Place:
    """Target location of a tensor.

    Attributes:
        offset: position of its first byte in the file.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


@dataclasses.dataclass(frozen=True)
class Layout:
    """Layout of a folder's weight files.

    Attributes:
        tensors: {HF name: Place}, in the order of the files.
        headers: {file: its header}.
    """

    tensors: dict[str, Place]
    headers: dict[str, bytes]

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(place.nbytes for place in self.tensors.values())


def layout(
    specs: Iterable[ParamSpec],
    axis_sizes: dict[str, int],
    dtypes: Mapping[str, str],
    shard_bytes: int,
    single: str = SINGLE,
) -> Layout:
    """Distribute the tensors of the specs over one or several files.

    Args:
        dtypes: {HF name: safetensors dtype} of the tensors that are written.
        shard_bytes: limit of tensor bytes per file; a larger tensor gets a file of its own.
        single: file name if there is only one file.
    """
    shapes = {
        name: spec.hf_shape(axis_sizes)
        for spec in specs
        for _, name in spec.hf_tensors(axis_sizes)
        if name in dtypes
    }
    shards: list[dict[str, Place]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        place = Place("", dtypes[name], shape, filled)
        if shards[-1] and filled + place.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = dataclasses.replace(place, offset=filled)
        filled += place.nbytes
    count = len(shards)
    tensors, headers = {}, {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else single
        headers[file] = _header(shard)
        for name, place in shard.items():
            offset = len(headers[file]) + place.offset
            tensors[name] = dataclasses.replace(place, file=file, offset=offset)
    return Layout(tensors, headers)


def _header(shard: Mapping[str, Place]) -> bytes:
    """Return a safetensors header: its length as little-endian u64, then JSON padded to 8 bytes.

    Args:
        shard: places whose offsets count from the end of the header.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, place in shard.items():
        header[name] = {
            "dtype": place.dtype,
            "shape": list(place.shape),
            "data_offsets": [place.offset, place.offset + place.nbytes],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def save(
    params: Mapping[str, BlockReader | np.ndarray | jax.Array],
    specs: Iterable[ParamSpec],
    axis_sizes: dict[str, int],
    dtypes: Mapping[str, str],
    out: Path,
    shard_bytes: int,
    progress: bool = True,
    single: str = SINGLE,
) -> dict[str, str]:
    """Write the weights as safetensors files, block by block.

    Args:
        params: {parameter path: reader of its blocks, or an array that this process can read
            whole}.
        out: an existing folder.
        dtypes, shard_bytes, single: see `layout`.

    Returns:
        {file name: sha256} of the only file, or of all files and their index.

    Raises:
        orbax_io.Failed: a stored array is damaged.
    """
    specs = list(specs)
    plan = layout(specs, axis_sizes, dtypes, shard_bytes, single)
    bar = tqdm(
        total=plan.nbytes, desc="writing weights", unit="B", unit_scale=True, disable=not progress
    )
    names = begin(plan, out)
    with contextlib.ExitStack() as stack:
        stack.enter_context(bar)
        files = {name: stack.enter_context(open(out / name, "r+b")) for name in plan.headers}
        descriptors = {name: file.fileno() for name, file in files.items()}
        hashes = {
            name: _Hash(files[name].fileno(), header) for name, header in plan.headers.items()
        }
        for spec in specs:
            for name, offset, nbytes in _save_spec(
                params[spec.path], spec, axis_sizes, plan, descriptors
            ):
                hashes[name].add(offset, nbytes)
                bar.update(nbytes)
        for descriptor in descriptors.values():
            os.fsync(descriptor)
    written = {name: hashes[name].result() for name in plan.headers}
    other_hashes = manifest.sha256_of(out, [name for name in names if not written.get(name)])
    return {name: written.get(name) or other_hashes[name] for name in names}


class _Hash:
    """Incremental sha256 of a file whose blocks are written in order.

    Blocks are read back while others are written and they are still in the page cache. The parts of
    a tensor that holds several parameters (phi3) are written out of order, which gives no sha256.
    """

    def __init__(self, descriptor: int, header: bytes):
        self._descriptor, self._end = descriptor, len(header)
        self._sha256, self._in_order = hashlib.sha256(header), True

    def add(self, offset: int, nbytes: int) -> None:
        """Hash a block that was written."""
        self._in_order = self._in_order and offset == self._end
        if not self._in_order:
            return
        self._end += nbytes
        while offset < self._end:
            part = os.pread(self._descriptor, min(_HASHED_BYTES, self._end - offset), offset)
            if not part:
                raise OSError(f"the file ends at byte {offset}, and {self._end} were written")
            self._sha256.update(part)
            offset += len(part)

    def result(self) -> str:
        """Return the sha256; "" = the blocks were not in order."""
        return self._sha256.hexdigest() if self._in_order else ""


def begin(plan: Layout, out: Path) -> list[str]:
    """Write all headers and the index, and extend files to their size without allocating space.

    Returns:
        Name of the only file, or names of all files and their index.
    """
    for name, header in plan.headers.items():
        ends = [p.offset + p.nbytes for p in plan.tensors.values() if p.file == name]
        with open(out / name, "wb") as file:
            file.write(header)
            file.truncate(max(ends))
    if len(plan.headers) == 1:
        return [*plan.headers]
    index = {
        "metadata": {"total_size": plan.nbytes},
        "weight_map": {name: place.file for name, place in plan.tensors.items()},
    }
    (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return [*plan.headers, INDEX]


def _save_spec(
    array: BlockReader | np.ndarray | jax.Array,
    spec: ParamSpec,
    axis_sizes: dict[str, int],
    plan: Layout,
    descriptors: Mapping[str, int],
) -> Iterator[tuple[str, int, int]]:
    """Write the tensors of a spec, several blocks at a time; yield (file, offset, bytes)."""
    reader = InMemory(array) if isinstance(array, np.ndarray | jax.Array) else array
    multiple = reader.chunk[len(spec.stacked) + spec.cut]

    def write(index: tuple[int, ...], place: Place, block: rules.Block):
        ranges = (*((i, i + 1) for i in index), *block)
        part = reader[tuple(slice(*ends) for ends in ranges)]
        part = spec.to_hf(part.reshape(part.shape[len(index) :]), axis_sizes)
        content = part.astype(DTYPES[place.dtype], copy=False).reshape(-1).view(np.uint8)
        first, *rest = spec.hf_index(block, axis_sizes)
        assert all(part == slice(0, n) for part, n in zip(rest, place.shape[1:], strict=True))
        offset = place.offset + first.start * (place.nbytes // place.shape[0])
        write_at(descriptors[place.file], content.data, offset)
        return place.file, offset, content.nbytes

    tasks = [
        (index, plan.tensors[name], block)
        for index, name in spec.hf_tensors(axis_sizes)
        if name in plan.tensors
        for block in spec.parts(axis_sizes, blocks.BLOCK_BYTES // reader.dtype.itemsize, multiple)
    ]
    largest = reader.dtype.itemsize * max(
        math.prod(stop - start for start, stop in block) for *_, block in tasks
    )
    with concurrent.futures.ThreadPoolExecutor(threads(largest)) as pool:
        yield from pool.map(write, *zip(*tasks, strict=True))
    reader.finish()


def threads(block_bytes: int) -> int:
    """Return the number of blocks to process at a time. Each is in memory about three times."""
    return max(1, min(_MOST_THREADS, _BLOCKS_BYTES // block_bytes))
