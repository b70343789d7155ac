"""Parameter specs: each describes one parameter, and everything about the parameter follows.

A spec gives the shape in the model and in the Hugging Face file, the conversion and its exact
inverse, the sharding, and whether the parameter is a matrix (decayed, cast to the compute dtype).
Model families return a tuple of specs.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

import numpy as np


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: its path in the model, its HF name, and the layout of both.

    Attributes:
        path: dotted attribute path in the NNX model.
        hf: name in the safetensors files. A logical axis in braces is replaced by its index. The
            parameter then stacks one HF tensor per index along a leading axis.
        layout: `"HF axes -> model axes"` over logical axes. Parentheses join the factors of one HF
            dimension: `"(heads head_dim) embed -> embed heads head_dim"`.
        fused: if the HF tensor concatenates several parameters: the factors of the first HF
            dimension of each, e.g. ("heads head_dim", "kv_heads head_dim", ...).
        place: index of this parameter in `fused`.
    """

    path: str
    hf: str
    layout: str
    fused: tuple[str, ...] = ()
    place: int = 0

    @property
    def stacked(self) -> tuple[str, ...]:
        """Leading logical axes of the parameter that are indices in the HF name."""
        return tuple(re.findall(r"{(\w+)}", self.hf))

    @property
    def factors(self) -> list[list[str]]:
        """Logical axes that make up each dimension of an HF tensor."""
        left = self.layout.split("->")[0]
        groups = re.findall(r"\(([^)]*)\)|(\S+)", left)
        return [(inner or single).split() for inner, single in groups]

    @property
    def _model_axes(self) -> list[str]:
        return self.layout.split("->")[1].split()

    @property
    def _hf_axes(self) -> list[str]:
        return [axis for group in self.factors for axis in group]

    @property
    def axes(self) -> tuple[str, ...]:
        """Logical axis of each dimension of the parameter."""
        return self.stacked + tuple(self._model_axes)

    @property
    def is_matrix(self) -> bool:
        """Whether it multiplies activations. Matrices decay and are cast to the compute dtype."""
        return len(self.factors) > 1

    def shape(self, axis_sizes: dict[str, int]) -> tuple[int, ...]:
        """Return the shape of the parameter, including stacked axes."""
        return tuple(axis_sizes[axis] for axis in self.axes)

    def active_size(self, axis_sizes: dict[str, int]) -> float:
        """Return the number of elements that a token uses; of experts, those of the chosen ones."""
        size = math.prod(self.shape(axis_sizes))
        return (
            size * axis_sizes["chosen"] / axis_sizes["experts"]
            if "experts" in self.stacked
            else size
        )

    def hf_shape(self, axis_sizes: dict[str, int]) -> tuple[int, ...]:
        """Return the shape of a tensor in the HF file, with all parameters fused in it."""
        first, *rest = (math.prod(axis_sizes[axis] for axis in group) for group in self.factors)
        return sum(self._fused_sizes(axis_sizes)) or first, *rest

    def _fused_sizes(self, axis_sizes: dict[str, int]) -> list[int]:
        return [math.prod(axis_sizes[axis] for axis in part.split()) for part in self.fused]

    def hf_tensors(self, axis_sizes: dict[str, int]) -> Iterator[tuple[tuple[int, ...], str]]:
        """Yield (index along the stacked axes, HF name) for each tensor of the spec."""
        for index in itertools.product(*(range(axis_sizes[axis]) for axis in self.stacked)):
            yield index, self.hf.format(**dict(zip(self.stacked, index, strict=True)))

    def hf_index(
        self, block: tuple[tuple[int, int], ...], axis_sizes: dict[str, int]
    ) -> tuple[slice, ...]:
        """Return the slices of the HF tensor that hold a block of the unstacked parameter.

        Within a joined dimension, only the first factor may be partial; the others must be whole.

        Args:
            block: (start, stop) of each dimension of the unstacked parameter.
        """
        ranges = dict(zip(self._model_axes, block, strict=True))
        parts = []
        for first, *rest in self.factors:
            if any(ranges[axis] != (0, axis_sizes[axis]) for axis in rest):
                raise ValueError(f"{self.path}: cannot read a part of {rest} from {self.hf}")
            unit = math.prod(axis_sizes[axis] for axis in rest)
            start, stop = ranges[first]
            before = 0 if parts else sum(self._fused_sizes(axis_sizes)[: self.place])
            parts.append(slice(before + start * unit, before + stop * unit))
        return tuple(parts)

    def parts(
        self, axis_sizes: dict[str, int], most: int, multiple: int = 1
    ) -> Iterator[tuple[tuple[int, int], ...]]:
        """Split the unstacked parameter into blocks, each a contiguous part of the HF tensor.

        Args:
            most: limit of elements per block; a block has at least `multiple` indices, though.
            multiple: each block except the last has a multiple of this many indices in the split
                dimension.

        Yields:
            (start, stop) of each dimension of the unstacked parameter.
        """
        whole = {axis: (0, axis_sizes[axis]) for axis in self._model_axes}
        cut = self._model_axes[self.cut]
        index_size = math.prod(axis_sizes[axis] for axis in self._model_axes if axis != cut)
        step = max(most // index_size // multiple, 1) * multiple
        for start in range(0, axis_sizes[cut], step):
            block = whole | {cut: (start, min(start + step, axis_sizes[cut]))}
            yield tuple(block.values())

    @property
    def cut(self) -> int:
        """Unstacked dimension that leads the first HF dimension; `parts` splits it."""
        return self._model_axes.index(self.factors[0][0])

    def from_hf(self, block: np.ndarray, axis_sizes: dict[str, int]) -> np.ndarray:
        """Convert a block of an HF tensor to that block of the unstacked parameter (a view)."""
        factors: list[int] = []
        for size, (_, *rest) in zip(block.shape, self.factors, strict=True):
            inner = [axis_sizes[axis] for axis in rest]
            factors += [size // math.prod(inner), *inner]
        return block.reshape(factors).transpose(
            [self._hf_axes.index(axis) for axis in self._model_axes]
        )

    def to_hf(self, array: np.ndarray, axis_sizes: dict[str, int]) -> np.ndarray:
        """Convert a block of the unstacked parameter to one of the HF tensor; inverts `from_hf`."""
        factored = contiguous(
            array.transpose([self._model_axes.index(axis) for axis in self._hf_axes])
        )
        sizes = iter(factored.shape)
        return factored.reshape([math.prod(next(sizes) for _ in group) for group in self.factors])


def contiguous(view: np.ndarray) -> np.ndarray:
    """Return np.ascontiguousarray(view), 5 times as fast for transposed matrices.

    NumPy copies these row by row, and waits for memory at each element. Copying 32 columns at a
    time shares each fetched cache line between them.
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
    """Return the dimensions from `first` on, then those before it."""
    return [*range(first, view.ndim), *range(first)]
