"""`BlockReader`s that an export puts around a frozen weight: compared, dequantized, or merged.

`to_hf` makes one for each kernel that the checkpoint does not store; `hf_writer` reads the blocks.
"""

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_sft.adapters import lora, nf4
from jax_sft.checkpoint import array_checksums, orbax_io
from jax_sft.nn.model_def import ModelDef
from jax_sft.weights.blocks import BlockReader
from jax_sft.weights.param_spec import Weight

_OTHER = (
    "{} did not train, and is not in the model what it was then: name the model of the run with "
    "--base"
)


class Checked:
    """Blocks of a weight that did not train, compared with what the run had."""

    def __init__(self, blocks: BlockReader, noted: Mapping[str, Any], path: str):
        self._blocks, self._noted, self._path = blocks, noted, path
        self.shape, self.dtype, self.chunk = blocks.shape, blocks.dtype, blocks.chunk
        self._found, self._lock = 0, threading.Lock()

    def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray:
        block = self._blocks[slices]
        start = [part.indices(size)[0] for part, size in zip(slices, self.shape, strict=True)]
        held = block.astype(np.dtype(self._noted["dtype"]))
        found = array_checksums.of_numpy(held, start, self.shape)
        with self._lock:
            self._found += found
        return block

    def finish(self) -> None:
        """Compare, now that each element was read once.

        Raises:
            Failed: the weights are others.
        """
        if array_checksums.problem(self._path, self._found % 2**32, self._noted["sum"]):
            raise orbax_io.Failed(_OTHER.format(self._path))


class Packed:
    """Blocks of a kernel as it was in 4 bits, compared with what the run had; float32."""

    dtype = np.dtype(np.float32)

    def __init__(
        self, blocks: BlockReader, model_def: ModelDef, path: str, noted: Mapping[str, Any]
    ):
        self._blocks, self._model_def, self._path = blocks, model_def, path
        self._noted = noted[f"{path}.codes"]["sum"]
        self.shape, self.chunk = blocks.shape, (1,) * len(blocks.shape)
        self._layers: dict[tuple[int, ...], np.ndarray] = {}
        self._found, self._lock = 0, threading.Lock()

    def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray:
        codes, *_ = self._model_def.packed[self._path]
        num_stacked = len(codes.stacked)
        layer = tuple(part.start for part in slices[:num_stacked])
        with self._lock:
            if layer not in self._layers:
                whole = (*slices[:num_stacked], *(slice(0, n) for n in self.shape[num_stacked:]))
                kernel = self._blocks[whole].reshape(self.shape[num_stacked:])
                packed, unpacked = nf4.both_ways(self._model_def, self._path, kernel)
                start = (*layer, *(0 for _ in packed.shape))
                packed = packed.reshape(*(1 for _ in layer), *packed.shape)
                of_all = codes.shape(self._model_def.dims)
                self._found += array_checksums.of_numpy(packed, start, of_all)
                while len(self._layers) > 2:  # blocks of a layer come one after another
                    self._layers.pop(next(iter(self._layers)))
                self._layers[layer] = unpacked
            unpacked = self._layers[layer]
        block = unpacked[slices[num_stacked:]]
        return block.reshape(*(1 for _ in layer), *block.shape)

    def finish(self) -> None:
        """Compare, now that each layer was packed once.

        Raises:
            Failed: the weights are others.
        """
        if self._found % 2**32 != self._noted:
            raise orbax_io.Failed(_OTHER.format(self._path))


class Merged:
    """Blocks of a kernel with its adapter, float32."""

    dtype = np.dtype(np.float32)

    def __init__(self, kernel: BlockReader, row: Weight, adapter: tuple, settings: lora.Settings):
        self._kernel, self._settings = kernel, settings
        self.shape, self.chunk = kernel.shape, kernel.chunk
        self._a, self._b, self._magnitude = adapter
        self._num_stacked = len(row.stacked)
        # How many dimensions of the kernel, after the stacked ones, are outputs, and where.
        outputs, _ = row.factors
        self._num_outputs, self._outputs_first = len(outputs), "embed" in outputs

    def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray:
        block = self._kernel[slices]
        layer, of_one = slices[: self._num_stacked], slices[self._num_stacked :]
        n = self._num_outputs
        outputs = of_one[:n] if self._outputs_first else of_one[len(of_one) - n :]
        a, b = self._a[layer], self._b[layer]
        magnitude = None if self._magnitude is None else self._magnitude[(*layer, *outputs)]
        rank = self._settings.rank
        b = b[(..., *outputs, slice(None))] if self._outputs_first else b[(..., *outputs)]
        size = int(np.prod(b.shape)) // rank
        shape = (size, -1) if self._outputs_first else (-1, size)
        return lora.merged(
            block.astype(np.float32).reshape(shape),
            a.reshape(-1, rank),
            b.reshape((-1, rank) if self._outputs_first else (rank, -1)),
            None if magnitude is None else magnitude.reshape(-1),
            self._settings,
            self._outputs_first,
        ).reshape(block.shape)

    def finish(self) -> None:
        self._kernel.finish()
