"""Arrays that are read in blocks, so that none is in memory as a whole.

Files and checkpoints give readers (`hf_reader.Blocks`, `orbax_io.Stored`), the export composes
them, and `hf_writer` writes what they give.
"""

from typing import Any, Protocol

import numpy as np

# Approximate size of a block. The C library reuses memory of this size. Larger pieces come from the
# kernel each time, page by page, at 0.6 s per GB.
BLOCK_BYTES = 1 << 24


class BlockReader(Protocol):
    """One array, read in blocks that together are all of it, each once, by any threads.

    Attributes:
        chunk: shape of what is read whole if a part of it is needed; blocks are best multiples.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def chunk(self) -> tuple[int, ...]: ...

    def __getitem__(self, slices: tuple[slice, ...], /) -> np.ndarray:
        """Read a block: a slice of each dimension, of a stacked dimension one index."""
        ...

    def finish(self) -> None:
        """Check the array, now that every element was read once.

        Raises:
            orbax_io.Failed: it is not what was stored.
        """
        ...


class InMemory:
    """A `BlockReader` of an array that this process can read whole.

    Args:
        array: NumPy's or JAX's, any shape.
    """

    def __init__(self, array: Any):
        self._array = np.asarray(array)
        self.shape, self.dtype = self._array.shape, self._array.dtype
        self.chunk = (1,) * self._array.ndim

    def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray:
        return self._array[slices]

    def finish(self) -> None:
        """Do nothing: there is nothing to compare with."""
