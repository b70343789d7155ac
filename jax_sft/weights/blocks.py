"""Read arrays in blocks, so that none is in memory as a whole.

Files and checkpoints provide readers (`hf_reader.Blocks`, `orbax_io.Stored`), the export composes
them, and `hf_writer` writes their blocks.
"""

from typing import Any, Protocol

import numpy as np

# Approximate size of a block. The C library reuses memory of this size. Larger pieces come from the
# kernel each time, page by page, at 0.6 s per GB.
BLOCK_BYTES = 1 << 24


class BlockReader(Protocol):
    """One array, read completely in blocks, each block once, from any threads.

    Attributes:
        chunk: shape of a chunk, which is read whole even if only a part is needed. Blocks should
            be multiples of it.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def chunk(self) -> tuple[int, ...]: ...

    def __getitem__(self, slices: tuple[slice, ...], /) -> np.ndarray:
        """Read a block, given a slice per dimension; that of a stacked dimension has one index."""
        ...

    def finish(self) -> None:
        """Check the array, after every element was read once.

        Raises:
            orbax_io.Failed: the array differs from what was stored.
        """
        ...


class InMemory:
    """A `BlockReader` of an array that this process can read whole.

    Args:
        array: a NumPy or JAX array of any shape.
    """

    def __init__(self, array: Any):
        self._array = np.asarray(array)
        self.shape, self.dtype = self._array.shape, self._array.dtype
        self.chunk = (1,) * self._array.ndim

    def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray:
        return self._array[slices]

    def finish(self) -> None:
        """Do nothing: an array in memory has no stored checksum."""
