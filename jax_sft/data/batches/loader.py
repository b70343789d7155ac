"""Build device batches from examples, for any step at any time; a process builds only its own rows.

`Schedule` decides which examples each row of each step holds, the same on any mesh. `Loader` builds
the rows as a dict of arrays [micro-batches, rows per micro-batch, tokens], sharded over the mesh.
"""

import functools
import itertools
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from jax_sft.batch import Batch, Row, empty_rows
from jax_sft.data.batches import mixture, packing
from jax_sft.data.batches.examples import Examples
from jax_sft.settings import Data, Source
from jax_sft.sharding import rules

SHORTEST_BUCKET = 128  # tokens; with its doublings, at most log2(seq_len / 64) shapes to compile


def fill_row(row: Row, examples: Examples, ids: np.ndarray) -> None:
    """Concatenate examples in an empty row [tokens]; segment ids count from 1, padding is 0."""
    if len(ids) == 0:
        return
    starts, stops, sources = examples.starts[ids], examples.stops[ids], examples.source_of[ids]
    lengths = stops - starts - 1
    ends = np.cumsum(lengths)
    used = slice(0, ends[-1])
    parts = list(zip(sources.tolist(), starts.tolist(), stops.tolist(), strict=True))
    arrays = examples.arrays
    row["tokens"][used] = np.concatenate([arrays[n][0][a : b - 1] for n, a, b in parts])
    row["targets"][used] = np.concatenate([arrays[n][0][a + 1 : b] for n, a, b in parts])
    row["weights"][used] = np.concatenate([arrays[n][1][a + 1 : b] for n, a, b in parts])
    row["segment_ids"][used] = np.repeat(np.arange(1, len(ids) + 1), lengths)
    row["positions"][used] = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    if "sources" in row:
        row["sources"][used] = np.repeat(sources, lengths)


class Schedule:
    """The contents of each step of a run: mixture, packing plan and balanced order, by epoch.

    If the rows of an epoch do not fill its last batch, empty rows follow, so that no epoch shares a
    batch with the next. Without shuffling, the rows of a batch are not balanced, so that they keep
    the order of the files.

    Args: see `Loader`.
    """

    def __init__(
        self,
        examples: Examples,
        data: Data,
        sources: Mapping[str, Source] | None,
        *,
        rows: int,
        micro_rows: int,
        shuffle: bool,
        seed: int,
    ):
        self._data, self._rows, self._micro_rows = data, rows, micro_rows
        self._shuffle, self._seed = shuffle, seed
        self.lengths = examples.lengths
        self._work = self.lengths**2
        self._ranges = examples.sources
        sizes = {name: len(ids) for name, ids in examples.sources.items()}
        self._counts = mixture.counts(sizes, sources)
        # With packing "none" every example is a row, so the number of rows never changes.
        self._is_regular = data.packing == "none" or mixture.same_every_epoch(
            self._ranges, self._counts
        )
        self._lock = threading.RLock()  # keeps two threads from making the same plan
        self._cached_plan = functools.lru_cache(maxsize=2)(self._make_plan)
        # First step of each epoch known so far.
        self._first_steps = [0, self._count_steps(0)]

    def _make_plan(self, epoch: int) -> tuple[packing.PackPlan, np.ndarray]:
        ids = mixture.example_ids(
            self._ranges, self._counts, shuffle=self._shuffle, seed=self._seed, epoch=epoch
        )
        plan = packing.plan(
            self.lengths,
            ids,
            self._data.seq_len,
            packing=self._data.packing,
            max_segments=self._data.max_segments,
            shuffle=self._shuffle,
            seed=self._seed,
            epoch=epoch,
        )
        return plan, plan.sums(self._work)

    def plan(self, epoch: int) -> tuple[packing.PackPlan, np.ndarray]:
        """Return (rows of the epoch, sum of squared segment lengths of each row)."""
        with self._lock:
            return self._cached_plan(epoch)

    def first_step(self, epoch: int) -> int:
        """Return the number of steps before an epoch."""
        if self._is_regular:
            return epoch * self._first_steps[1]
        with self._lock:
            while len(self._first_steps) <= epoch:
                steps = self._count_steps(len(self._first_steps) - 1)
                self._first_steps.append(self._first_steps[-1] + steps)
            return self._first_steps[epoch]

    def _count_steps(self, epoch: int) -> int:
        return math.ceil(len(self.plan(epoch)[0]) / self._rows)

    def steps_in(self, epoch: int) -> int:
        """Return the number of steps of an epoch."""
        return self.first_step(epoch + 1) - self.first_step(epoch)

    def find(self, step: int) -> tuple[int, int]:
        """Return (epoch, step within the epoch) of a step, both from 0.

        Raises:
            ValueError: there are no examples, so no steps.
        """
        if not self.first_step(1):
            raise ValueError(f"there is no step {step}: the data set has no examples")
        if self._is_regular:
            return divmod(step, self.first_step(1))
        epoch = next(e for e in itertools.count() if self.first_step(e + 1) > step)
        return epoch, step - self.first_step(epoch)

    def num_steps(self, epochs: float) -> int:
        """Return the number of steps of `epochs` epochs; a partial step counts as one."""
        # Exact in the given decimals: 0.28 epochs of 25 steps are 7 steps, not 7.000000000000001.
        whole, part = divmod(Fraction(str(epochs)), 1)
        return self.first_step(whole) + (math.ceil(part * self.steps_in(whole)) if part else 0)

    def epoch_of(self, step: int) -> float:
        """Return the number of epochs that are done after `step` steps."""
        if step == 0:
            return 0.0
        epoch, last = self.find(step - 1)
        return epoch + (last + 1) / self.steps_in(epoch)

    def rows_of(self, step: int) -> list[np.ndarray]:
        """Return the example ids of each row of the global batch, in the order of the batch."""
        epoch, step_of_epoch = self.find(step)
        plan, work_of = self.plan(epoch)
        first = step_of_epoch * self._rows
        indices = range(first, min(first + self._rows, len(plan)))
        ids = [plan.row(index) for index in indices]
        ids += [np.zeros(0, np.int64)] * (self._rows - len(ids))
        if not self._shuffle:
            return ids
        work = np.zeros(self._rows, np.int64)
        work[: len(indices)] = work_of[indices.start : indices.stop]
        return [ids[index] for index in packing.balance(work, self._micro_rows)]


class Loader:
    """Batches of one data set, addressed by step.

    With packing "none", the arrays of a step have the length of the smallest bucket that fits the
    longest example of the global batch. Buckets are 128 tokens, its doublings, and seq_len.

    Args:
        examples: the data set.
        sources: {name: source}, for their epochs and weights; None = every example once.
        rows: rows per batch over all processes.
        micro_rows: rows per micro-batch; divides `rows`.
        mesh: the mesh over which the batch is sharded.
        shuffle: use a new order each epoch.
        seed: of that order.
        per_source: add "sources" to the batches: for each token, the position of its source in
            `examples.sources`.

    Raises:
        ValueError: see `mixture.counts`.
    """

    def __init__(
        self,
        examples: Examples,
        data: Data,
        sources: Mapping[str, Source] | None,
        *,
        rows: int,
        micro_rows: int,
        mesh: Mesh,
        shuffle: bool,
        seed: int,
        per_source: bool = False,
    ):
        self._examples, self._per_source = examples, per_source
        self._max_segments = data.max_segments
        self.schedule = Schedule(
            examples, data, sources, rows=rows, micro_rows=micro_rows, shuffle=shuffle, seed=seed
        )
        self._grid = (rows // micro_rows, micro_rows)
        self._sharding = rules.sharding(mesh, "micro_batch", "batch", "token")
        self._buckets = _buckets(data, mesh.shape["sequence"] * mesh.shape["tensor"])
        self._waited_s = 0.0
        self.num_rows = len(self.schedule.plan(0)[0])
        self.steps_per_epoch = self.schedule.steps_in(0)
        blocks = rules.local_blocks(self._sharding, (*self._grid, data.seq_len)).values()
        self._micro_rows_here = sorted({r for block in blocks for r in range(*block[1])})
        self.local_rows = [
            micro_batch * micro_rows + row
            for micro_batch in range(rows // micro_rows)
            for row in self._micro_rows_here
        ]

    def num_steps(self, epochs: float) -> int:
        """Return the number of steps of `epochs` epochs; a partial step counts as one."""
        return self.schedule.num_steps(epochs)

    def epoch_of(self, step: int) -> float:
        """Return the number of epochs that are done after `step` steps."""
        return self.schedule.epoch_of(step)

    @property
    def fill(self) -> float:
        """Share of non-padding tokens in the rows of the first epoch; 0 without rows.

        The empty rows at the end of the epoch do not count.
        """
        if not self.num_rows:
            return 0.0
        plan, _ = self.schedule.plan(0)
        lengths = plan.sums(self.schedule.lengths)
        firsts = np.arange(0, self.num_rows, self._grid[0] * self._grid[1])
        buckets = self._buckets[
            np.searchsorted(self._buckets, np.maximum.reduceat(lengths, firsts))
        ]
        return float(lengths.sum() / (buckets * np.diff(firsts, append=self.num_rows)).sum())

    @property
    def wait_ms(self) -> float:
        """Milliseconds spent waiting for `batches` since this property was last read.

        The time before the first batch is left out, since nothing can overlap it.
        """
        waited, self._waited_s = self._waited_s, 0.0
        return 1000 * waited

    def _num_tokens(self, ids: Sequence[np.ndarray]) -> int:
        """Return the tokens per row of a global batch: the bucket that fits its longest row."""
        if len(self._buckets) == 1:
            return int(self._buckets[0])
        longest = self.schedule.lengths[np.concatenate(ids)].max()  # one example per row
        return int(self._buckets[np.searchsorted(self._buckets, longest)])

    def build(self, step: int, rows: Sequence[int]) -> Row:
        """Build some rows of the global batch of a step, arrays [len(rows), tokens]."""
        ids = self.schedule.rows_of(step)
        # Attention kernels have room for at most max_segments segments of a row.
        assert max(map(len, ids)) <= self._max_segments
        built = empty_rows(len(rows), self._num_tokens(ids), self._per_source)
        for place, row in enumerate(rows):
            fill_row({n: array[place] for n, array in built.items()}, self._examples, ids[row])
        return built

    def row(self, step: int, row: int) -> Row:
        """Build one row of the global batch of a step, arrays [tokens]."""
        return {name: built[0] for name, built in self.build(step, [row]).items()}

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of steps start..stop-1.

        Background threads build them and send them to the devices ahead of time.
        """
        steps = grain.MapDataset.source(_Batches(self, stop))[start:]
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
        began = math.inf  # counts no wait before the first batch
        for batch in steps.to_iter_dataset(options):
            self._waited_s += max(time.perf_counter() - began, 0.0)
            yield batch
            began = time.perf_counter()

    def _to_devices(self, local: np.ndarray) -> jax.Array:
        local = local.reshape(self._grid[0], len(self._micro_rows_here), -1)
        shape = (*self._grid, local.shape[2])

        def block(index):
            micro_batches, rows, tokens = index
            row_range = range(shape[1])[rows]
            first = self._micro_rows_here.index(row_range[0])
            return local[micro_batches, first : first + len(row_range), tokens]

        return jax.make_array_from_callback(shape, self._sharding, block)


class _Batches:
    """Random access to the batches, for grain."""

    def __init__(self, loader: Loader, num_steps: int):
        self._loader, self._num_steps = loader, num_steps

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, index: int) -> Batch:
        built = self._loader.build(int(index), self._loader.local_rows)
        return {name: self._loader._to_devices(array) for name, array in built.items()}


def _buckets(data: Data, multiple: int) -> np.ndarray:
    """Return the row lengths in use, in tokens, ascending; `multiple` is what the mesh divides."""
    lengths = [data.seq_len]
    if data.packing == "none":
        doublings = (SHORTEST_BUCKET << n for n in range(data.seq_len.bit_length()))
        lengths += [
            tokens for tokens in doublings if tokens < data.seq_len and tokens % multiple == 0
        ]
    return np.array(sorted(lengths))
