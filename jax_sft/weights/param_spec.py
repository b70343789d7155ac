"""Weight rows: one row describes one parameter, and everything about it follows from the row.

Shape here and in the Hugging Face file, the way in and its exact inverse, sharding, and whether it
is a matrix (decayed, cast to the compute dtype) or not. Model families return a tuple of rows.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

import numpy as np


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter: ours, Hugging Face's, and the layout between them.

    Attributes:
        path: dotted attribute path in the NNX model.
        hf: name in the safetensors files. A logical axis in braces stands for its index and means
            that our array stacks one such tensor per index along a leading axis.
        layout: `"hf dims -> our dims"` over logical axes, parentheses joining the factors of one
            HF dimension: `"(heads head_dim) embed -> embed heads head_dim"`.
        fused: where the HF tensor holds several parameters one after the other: the factors of the
            first HF dimension of each, e.g. ("heads head_dim", "kv_heads head_dim", ...).
        place: of this one among them.
    """

    path: str
    hf: str
    layout: str
    fused: tuple[str, ...] = ()
    place: int = 0

    @property
    def stacked(self) -> tuple[str, ...]:
        """Leading logical axes of our array that are indices in the HF name."""
        return tuple(re.findall(r"{(\w+)}", self.hf))

    @property
    def factors(self) -> list[list[str]]:
        """Logical axes that make up each dimension of one HF tensor."""
        left = self.layout.split("->")[0]
        groups = re.findall(r"\(([^)]*)\)|(\S+)", left)
        return [(inner or single).split() for inner, single in groups]

    @property
    def _ours(self) -> list[str]:
        return self.layout.split("->")[1].split()

    @property
    def _theirs(self) -> list[str]:
        return [axis for group in self.factors for axis in group]

    @property
    def axes(self) -> tuple[str, ...]:
        """Logical axis of each dimension of our array."""
        return self.stacked + tuple(self._ours)

    @property
    def is_matrix(self) -> bool:
        """Whether it multiplies activations: a matrix decays and takes the compute dtype."""
        return len(self.factors) > 1

    def shape(self, dims: dict[str, int]) -> tuple[int, ...]:
        """Shape of our array, stacked."""
        return tuple(dims[axis] for axis in self.axes)

    def active_size(self, dims: dict[str, int]) -> float:
        """Elements that a token meets: of one matrix per expert, those that it takes."""
        size = math.prod(self.shape(dims))
        return size * dims["chosen"] / dims["experts"] if "experts" in self.stacked else size

    def hf_shape(self, dims: dict[str, int]) -> tuple[int, ...]:
        """Shape of one tensor in the HF file, with all parameters that it holds."""
        first, *rest = (math.prod(dims[axis] for axis in group) for group in self.factors)
        return sum(self._fused_sizes(dims)) or first, *rest

    def _fused_sizes(self, dims: dict[str, int]) -> list[int]:
        return [math.prod(dims[axis] for axis in part.split()) for part in self.fused]

    def hf_tensors(self, dims: dict[str, int]) -> Iterator[tuple[tuple[int, ...], str]]:
        """Yield (index along the stacked axes, HF name) for each tensor of the row."""
        for index in itertools.product(*(range(dims[axis]) for axis in self.stacked)):
            yield index, self.hf.format(**dict(zip(self.stacked, index, strict=True)))

    def hf_index(
        self, block: tuple[tuple[int, int], ...], dims: dict[str, int]
    ) -> tuple[slice, ...]:
        """Return the part of the HF tensor that holds a block of our unstacked array.

        Args:
            block: (start, stop) of each of our dimensions.

        Within a joined dimension only the first factor may be a part; the others must be whole.
        """
        ours = dict(zip(self._ours, block, strict=True))
        parts = []
        for first, *rest in self.factors:
            if any(ours[axis] != (0, dims[axis]) for axis in rest):
                raise ValueError(f"{self.path}: cannot read a part of {rest} from {self.hf}")
            unit = math.prod(dims[axis] for axis in rest)
            start, stop = ours[first]
            before = 0 if parts else sum(self._fused_sizes(dims)[: self.place])
            parts.append(slice(before + start * unit, before + stop * unit))
        return tuple(parts)

    def parts(
        self, dims: dict[str, int], most: int, multiple: int = 1
    ) -> Iterator[tuple[tuple[int, int], ...]]:
        """Cut our unstacked array into blocks, each a contiguous part of the HF tensor.

        Args:
            most: elements of a block, unless one index of the dimension that is cut has more.
            multiple: of indices of that dimension, in all blocks but the last.

        Yields:
            (start, stop) of each of our dimensions.
        """
        whole = {axis: (0, dims[axis]) for axis in self._ours}
        cut = self._ours[self.cut]
        each = math.prod(dims[axis] for axis in self._ours if axis != cut)
        step = max(most // each // multiple, 1) * multiple
        for start in range(0, dims[cut], step):
            block = whole | {cut: (start, min(start + step, dims[cut]))}
            yield tuple(block.values())

    @property
    def cut(self) -> int:
        """Our unstacked dimension that makes the first HF one: where `parts` cuts."""
        return self._ours.index(self.factors[0][0])

    def from_hf(self, block: np.ndarray, dims: dict[str, int]) -> np.ndarray:
        """Turn a block of an HF tensor into the same block of our unstacked array (a view)."""
        factors: list[int] = []
        for size, (_, *rest) in zip(block.shape, self.factors, strict=True):
            inner = [dims[axis] for axis in rest]
            factors += [size // math.prod(inner), *inner]
        return block.reshape(factors).transpose([self._theirs.index(axis) for axis in self._ours])

    def to_hf(self, array: np.ndarray, dims: dict[str, int]) -> np.ndarray:
        """Turn a block of our unstacked array into that of the HF tensor: undoes `from_hf`."""
        theirs = contiguous(array.transpose([self._ours.index(axis) for axis in self._theirs]))
        sizes = iter(theirs.shape)
        return theirs.reshape([math.prod(next(sizes) for _ in group) for group in self.factors])


def contiguous(view: np.ndarray) -> np.ndarray:
    """Do what np.ascontiguousarray does, for transposed matrices 5 times as fast.

    NumPy copies them row by row, and waits for memory at each element; so many columns at a time
    share what is fetched.
    """
    columns = 32
    first = next(
        (
            dim
            for dim in range(1, view.ndim)
            if view.transpose(_rotated(view, dim)).flags.c_contiguous
        ),
        0,
    )
    if not first:
        return np.ascontiguousarray(view)
    flat = view.transpose(_rotated(view, first)).reshape(math.prod(view.shape[first:]), -1)
    out = np.empty(flat.shape[::-1], view.dtype)
    for start in range(0, len(flat), columns):
        out[:, start : start + columns] = flat[start : start + columns].T
    return out.reshape(view.shape)


def _rotated(view: np.ndarray, first: int) -> list[int]:
    """The dimensions from `first` on, then those before it."""
    return [*range(first, view.ndim), *range(first)]
