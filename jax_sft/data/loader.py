"""Packed rows to device batches: any row at any time, each process reading only its own.

A batch is a dict of arrays [micro-batches, rows per micro-batch, seq_len], sharded over the mesh.
"""

import functools
import math
from collections.abc import Iterator

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from jax_sft import parallel
from jax_sft.data import packing
from jax_sft.data.prepare import Examples

Batch = dict[str, jax.Array]
FIELDS = ("tokens", "targets", "weights", "segment_ids", "positions")


def build_row(examples: Examples, ids: np.ndarray, seq_len: int) -> dict[str, np.ndarray]:
    """Lay examples end to end in one row [seq_len]; segment ids count from 1, padding is 0."""
    row: dict[str, np.ndarray] = {name: np.zeros(seq_len, np.int32) for name in FIELDS}
    row["weights"] = np.zeros(seq_len, np.float32)
    start = 0
    for segment, example_id in enumerate(ids, start=1):
        example = examples[example_id]
        part = slice(start, start + len(example))
        row["tokens"][part] = example.tokens
        row["targets"][part] = example.targets
        row["weights"][part] = example.weights
        row["segment_ids"][part] = segment
        row["positions"][part] = np.arange(len(example))
        start += len(example)
    return row


class RowSource:
    """Random access to the rows that this process needs, over all steps of a run.

    The rows of an epoch that do not fill its last batch are followed by empty rows, so that
    every example is seen once an epoch and no epoch shares a batch with the next.
    """

    def __init__(self, loader: "Loader", num_steps: int):
        self._loader = loader
        self._num_steps = num_steps

    def __len__(self) -> int:
        return self._num_steps * len(self._loader.local_rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        step, local = divmod(int(index), len(self._loader.local_rows))
        return self._loader.row(step, self._loader.local_rows[local])


class Loader:
    """Batches of one data set, addressed by step.

    Args:
        examples: the data set.
        data: `cfg.data`.
        rows: rows per batch over all processes.
        micro_rows: rows per micro-batch; divides `rows`.
        mesh: the batch is split over it.
        shuffle: a new order each epoch.
        seed: of that order.
    """

    def __init__(
        self, examples: Examples, data, *, rows: int, micro_rows: int, mesh: Mesh, shuffle, seed
    ):
        self._examples, self._data, self._rows = examples, data, rows
        self._shuffle, self._seed = shuffle, seed
        self._shape = (rows // micro_rows, micro_rows, data.seq_len)
        self._sharding = parallel.sharding(mesh, "micro_batch", "batch", "token")
        self._plan = functools.lru_cache(maxsize=2)(self._plan_epoch)
        self.num_rows = len(self._plan(0))
        self.steps_per_epoch = math.ceil(self.num_rows / rows)
        blocks = parallel.local_blocks(self._sharding, self._shape).values()
        self._micro_rows_here = sorted({r for block in blocks for r in range(*block[1])})
        self.local_rows = [
            micro_batch * micro_rows + row
            for micro_batch in range(rows // micro_rows)
            for row in self._micro_rows_here
        ]

    @property
    def fill(self) -> float:
        """Share of the planned rows' tokens that are not padding."""
        return len(self._examples.tokens) / (self.num_rows * self._data.seq_len)

    def _plan_epoch(self, epoch: int) -> packing.PackPlan:
        return packing.plan(
            self._examples.lengths,
            self._data.seq_len,
            packing=self._data.packing,
            max_segments=self._data.max_segments,
            shuffle=self._shuffle,
            seed=self._seed,
            epoch=epoch,
        )

    def row(self, step: int, row: int) -> dict[str, np.ndarray]:
        """Build row `row` of the global batch of `step`; empty past the end of the epoch."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        index = step_of_epoch * self._rows + row
        ids = self._plan(epoch).row(index) if index < self.num_rows else np.array([], np.int64)
        return build_row(self._examples, ids, self._data.seq_len)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of steps start..stop-1, built ahead of time by background threads."""
        rows = grain.MapDataset.source(RowSource(self, stop))[start * len(self.local_rows) :]
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2 * len(self.local_rows))
        ready: Batch | None = None
        for local in rows.to_iter_dataset(options).batch(len(self.local_rows)):
            following = {name: self._to_devices(array) for name, array in local.items()}
            if ready is not None:
                yield ready
            ready = following  # its transfer overlaps the step on the batch just yielded
        if ready is not None:
            yield ready

    def _to_devices(self, local: np.ndarray) -> jax.Array:
        local = local.reshape(self._shape[0], len(self._micro_rows_here), self._shape[2])

        def block(index):
            micro_batches, rows, tokens = index
            first = range(self._shape[1])[rows][0]
            here = self._micro_rows_here.index(first)
            count = len(range(self._shape[1])[rows])
            return local[micro_batches, here : here + count, tokens]

        return jax.make_array_from_callback(self._shape, self._sharding, block)
