"""`BlockReader`s that wrap a frozen weight for export: checked, dequantized or merged.

`to_hf` makes one for each weight that the checkpoint does not store; `hf_writer` reads the blocks.
"""

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_sft.adapters import lora, nf4
from jax_sft.checkpoint import array_checksums, orbax_io
from jax_sft.nn.model_def import ModelDef
from jax_sft.weights.blocks import BlockReader
from jax_sft.weights.param_spec import ParamSpec

_OTHER = (
    "{} is frozen, but its weights differ from those that the run used: point --base at the base "
    "model of that run"
)


class Checked:
    """Blocks of a frozen weight, whose checksum must be the one that the run recorded."""

    def __init__(self, blocks: BlockReader, noted: Mapping[str, Any], path: str):
        self._blocks, self._noted, self._path = blocks, noted, path
        self.shape, self.dtype, self.chunk = blocks.shape, blocks.dtype, blocks.chunk
        self._computed, self._lock = 0, threading.Lock()

    def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray:
        block = self._blocks[slices]
        start = [part.indices(size)[0] for part, size in zip(slices, self.shape, strict=True)]
        held = block.astype(np.dtype(self._noted["dtype"]))
        checksum = array_checksums.checksum(held, start, self.shape)
        with self._lock:
            self._computed += checksum
        return block

    def finish(self) -> None:
        """Compare the checksum, after each element was read once.

        Raises:
            Failed: the weights differ from those of the run.
        """
        if array_checksums.problem(self._path, self._computed % 2**32, self._noted["sum"]):
            raise orbax_io.Failed(_OTHER.format(self._path))


class Packed:
    """Dequantized float32 blocks of a 4-bit kernel, whose codes must be those of the run."""

    dtype = np.dtype(np.float32)

    def __init__(
        self, blocks: BlockReader, model_def: ModelDef, path: str, noted: Mapping[str, Any]
    ):
        self._blocks, self._model_def, self._path = blocks, model_def, path
        self._noted = noted[f"{path}.codes"]["sum"]
        self.shape, self.chunk = blocks.shape, (1,) * len(blocks.shape)
        self._layers: dict[tuple[int, ...], np.ndarray] = {}
        self._computed, self._lock = 0, threading.Lock()

    def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray:
        codes, *_ = self._model_def.quantized[self._path]
        num_stacked = len(codes.stacked)
        layer = tuple(part.start for part in slices[:num_stacked])
        with self._lock:
            if layer not in self._layers:
                whole = (*slices[:num_stacked], *(slice(0, n) for n in self.shape[num_stacked:]))
                kernel = self._blocks[whole].reshape(self.shape[num_stacked:])
                quantized, dequantized = nf4.both_ways(self._model_def, self._path, kernel)
                start = (*layer, *(0 for _ in quantized.shape))
                quantized = quantized.reshape(*(1 for _ in layer), *quantized.shape)
                stacked_shape = codes.shape(self._model_def.axis_sizes)
                self._computed += array_checksums.checksum(quantized, start, stacked_shape)
                while len(self._layers) > 2:  # the blocks of a layer are read in succession
                    self._layers.pop(next(iter(self._layers)))
                self._layers[layer] = dequantized
            dequantized = self._layers[layer]
        block = dequantized[slices[num_stacked:]]
        return block.reshape(*(1 for _ in layer), *block.shape)

    def finish(self) -> None:
        """Compare the checksum of the codes, after each layer was quantized once.

        Raises:
            Failed: the weights differ from those of the run.
        """
        if self._computed % 2**32 != self._noted:
            raise orbax_io.Failed(_OTHER.format(self._path))


class Merged:
    """Float32 blocks of a kernel merged with its adapter."""

    dtype = np.dtype(np.float32)

    def __init__(
        self, kernel: BlockReader, spec: ParamSpec, adapter: tuple, settings: lora.AdapterSettings
    ):
        self._kernel, self._settings = kernel, settings
        self.shape, self.chunk = kernel.shape, kernel.chunk
        self._a, self._b, self._magnitude = adapter
        self._num_stacked = len(spec.stacked)
        # Number of output dimensions of the kernel (without the stacked ones), and whether they
        # come before the input dimensions.
        outputs, _ = spec.factors
        self._num_outputs, self._outputs_first = len(outputs), "embed" in outputs

    def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray:
        block = self._kernel[slices]
        layer, inner = slices[: self._num_stacked], slices[self._num_stacked :]
        n = self._num_outputs
        outputs = inner[:n] if self._outputs_first else inner[len(inner) - n :]
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
