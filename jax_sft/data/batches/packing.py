"""Plan which examples share a row, for a whole epoch before its first step.

A plan is a pure function of lengths, options, seed and epoch. So the number of steps is known, any
row can be built at any time on any host, and the position of a run is one integer. `balance` then
orders the rows of each batch, so that ranks with contiguous blocks of rows have equal attention
work.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np


@dataclasses.dataclass(frozen=True)
class PackPlan:
    """Rows of example ids.

    Attributes:
        example_ids: int64 [segments], row after row.
        row_starts: int64 [rows + 1]; row r holds example_ids[row_starts[r] : row_starts[r + 1]].
    """

    example_ids: np.ndarray
    row_starts: np.ndarray

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    def row(self, index: int) -> np.ndarray:
        """Return the example ids of one row, in order."""
        return self.example_ids[self.row_starts[index] : self.row_starts[index + 1]]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of an int value per example over each row's examples, int64 [rows]."""
        if len(self) == 0:
            return np.zeros(0, np.int64)
        return np.add.reduceat(values[self.example_ids], self.row_starts[:-1], dtype=np.int64)


def plan(
    lengths: np.ndarray,
    ids: np.ndarray,
    seq_len: int,
    *,
    packing: str,
    max_segments: int,
    shuffle: bool,
    seed: int,
    epoch: int,
) -> PackPlan:
    """Plan one epoch. Every id is placed as often as it occurs in `ids`.

    The number of rows depends only on the lengths of the ids.

    Args:
        lengths: int [examples], each in 1..seq_len.
        ids: int64 [segments], the examples of the epoch.
        packing: "best_fit" or "none" (one example per row).
        max_segments: maximum number of examples per row.
        shuffle: permute ids and rows by (seed, epoch); otherwise rows are in the order of their
            first id.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(ids) if shuffle else ids
    lengths = lengths[order]
    assert len(ids) == 0 or 0 < lengths.min() <= lengths.max() <= seq_len
    if packing == "none":
        return PackPlan(order, np.arange(len(ids) + 1))
    longest_first = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(ids), np.int64)
    row_of[longest_first] = pack(lengths[longest_first], seq_len, max_segments)
    num_rows = int(row_of.max(initial=-1)) + 1
    # Number the rows at random, or by their first id.
    if shuffle:
        row_number = rng.permutation(num_rows)
    else:
        _, first = np.unique(row_of, return_index=True)
        row_number = np.empty(num_rows, np.int64)
        row_number[np.argsort(first)] = np.arange(num_rows)
    row_of = row_number[row_of]
    by_row = np.argsort(row_of, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))])
    return PackPlan(order[by_row], starts)


def pack(lengths: np.ndarray, seq_len: int, max_segments: int) -> np.ndarray:
    """Return the row of each example, int64 [examples], from the better of two heuristics.

    Best-fit decreasing is all but perfect if short examples can fill the rest of any row, and it is
    the better one if rows hold two or three examples. Where lengths are much alike (GSM8K) it
    leaves 1% empty, and exact ends leave nothing. If both need as many rows, exact ends win: their
    rows are more alike in attention work.

    Args:
        lengths: int [examples], descending.
    """
    plans = _exact_ends(lengths, seq_len, max_segments), _best_fit(lengths, seq_len, max_segments)
    # Of equal numbers of rows, min returns the first: exact ends.
    return min(plans, key=lambda row_of: row_of.max(initial=-1))


def _best_fit(lengths: np.ndarray, seq_len: int, max_segments: int) -> np.ndarray:
    """Best-fit decreasing (Johnson 1973): longest first, each into the fullest row that fits it.

    Equal rows are handled as one block. An example that fits the fullest row and leaves room for
    more of the same length is followed there by those, so a length is dealt out to a block of rows
    at once. Blocks are kept in stacks by free space; a bit mask of the non-empty stacks finds the
    tightest.
    """
    row_of = np.empty(len(lengths), np.int64)
    num_rows = 0
    # stacks[f]: blocks (rows, segments in each of them so far) with f free tokens in each row.
    stacks: list[list[tuple[np.ndarray, int]]] = [[] for _ in range(seq_len + 1)]
    nonempty = 0  # bit f is set if stacks[f] has a block

    def keep(rows: np.ndarray, free: int, segments: int) -> None:
        nonlocal nonempty
        if len(rows) and free and segments < max_segments:
            stacks[free].append((rows, segments))
            nonempty |= 1 << free

    edges = np.flatnonzero(np.diff(lengths, prepend=0, append=0)).tolist()
    for start, stop in itertools.pairwise(edges):
        length = int(lengths[start])
        while start < stop:
            fitting = nonempty >> length
            if fitting:
                free = length + (fitting & -fitting).bit_length() - 1
                rows, segments = stacks[free].pop()
                if not stacks[free]:
                    nonempty &= ~(1 << free)
            else:
                free, segments = seq_len, 0
                per_row = min(seq_len // length, max_segments)
                rows = np.arange(num_rows, num_rows - (start - stop) // per_row)
                num_rows += len(rows)
            per_row = min(free // length, max_segments - segments)
            needed = -(-(stop - start) // per_row)
            placed = np.repeat(rows[:needed], per_row)[: stop - start]
            row_of[start : start + len(placed)] = placed
            start += len(placed)
            num_full, rest = divmod(len(placed), per_row)
            keep(rows[needed:], free, segments)
            keep(rows[num_full:needed], free - rest * length, segments + rest)
            keep(rows[:num_full], free - per_row * length, segments + per_row)
    return row_of


def _exact_ends(lengths: np.ndarray, seq_len: int, max_segments: int) -> np.ndarray:
    """Fill row by row: the longest length left, random draws, and an end that fits exactly.

    The draws keep the remaining lengths as varied as they were, so that nearly every row finds one
    or two that fill it to the last token. Only lengths are used and the draws have a fixed seed, so
    the number of rows depends on the lengths alone.
    """
    pool = _Pool(lengths, seq_len)
    draws = iter(np.random.default_rng(0).permutation(lengths).tolist())
    placed, row_of, num_rows = [], [], 0
    while pool.num_left:
        free, room, length = seq_len, max_segments, pool.longest(seq_len)
        while length:
            pool.take(length)
            placed.append(length)
            row_of.append(num_rows)
            free, room = free - length, room - 1
            length = _next_length(pool, draws, free, room) if free and room else 0
        num_rows += 1
    # Equal lengths are interchangeable: hand them out in the order of `lengths`.
    return np.array(row_of, np.int64)[np.argsort(-np.array(placed, np.int64), kind="stable")]


def _next_length(pool: "_Pool", draws: Iterator[int], free: int, room: int) -> int:
    """Return the next length for a row with `free` tokens and `room` segments; 0 = none fits."""
    longest = pool.longest(pool.seq_len)
    if free <= 2 * longest and (length := pool.exact(free, room)):
        return length
    num_ahead = round(free * pool.num_left / pool.total) if pool.total else 0
    if num_ahead > 2 and free <= 5 * longest:
        # Leaves an end for two of ordinary length. The nearest length fits: some length is not
        # above the mean, so the nearest is below twice the target, or the shortest of all.
        return pool.nearest(free // num_ahead)
    if free >= longest:
        return next((length for length in draws if pool.count[length]), pool.longest(free))
    return pool.longest(free)


class _Pool:
    """The lengths still to be placed: the count of each, and bit masks of those that remain."""

    def __init__(self, lengths: np.ndarray, seq_len: int):
        self.count = np.bincount(lengths, minlength=seq_len + 1).tolist()
        self.num_left, self.total = len(lengths), int(lengths.sum())
        self.seq_len = seq_len
        # Bit l: length l remains.
        self._there = sum(1 << length for length in set(lengths.tolist()))
        self._mirrored = sum(1 << (seq_len - length) for length in set(lengths.tolist()))

    def take(self, length: int) -> None:
        """Remove one example of a length that remains."""
        self.count[length] -= 1
        self.num_left -= 1
        self.total -= length
        if not self.count[length]:
            self._there ^= 1 << length
            self._mirrored ^= 1 << (self.seq_len - length)

    def longest(self, limit: int) -> int:
        """Return the longest length up to a limit; 0 = none."""
        return max((self._there & ((2 << limit) - 1)).bit_length() - 1, 0)

    def nearest(self, wanted: int) -> int:
        """Return the length closest to `wanted`, the shorter of two; 0 = none."""
        shorter, longer = self.longest(wanted), self._there >> wanted
        if not longer:
            return shorter
        above = (longer & -longer).bit_length() - 1
        return shorter if shorter and wanted - shorter <= above else wanted + above

    def exact(self, free: int, room: int) -> int:
        """Return a length that fills `free` tokens, or the longer of two that do; 0 = none."""
        if self._there >> free & 1:
            return free
        if room < 2:
            return 0
        # Bit l of the shifted mirrored mask is set if a length of free - l remains.
        pairs = self._there & (self._mirrored >> (self.seq_len - free))
        length = pairs.bit_length() - 1
        if 2 * length == free and self.count[length] < 2:
            return 0  # the only pair is one length twice, and only one remains
        return max(length, 0)


def balance(work: np.ndarray, micro_rows: int) -> np.ndarray:
    """Order the rows of a global batch so that data-parallel ranks have about equal work.

    Ranks process contiguous blocks of each micro-batch and wait for the slowest in each. So rows of
    similar work share a micro-batch. Within it, every contiguous half has about equal work, as have
    the halves of the halves, and so on: the order serves any number of ranks, and the global batch
    does not depend on the mesh. (If the number of ranks is not a power of two, the blocks are equal
    only as far as its rows are similar or its prime factors come first.)

    Args:
        work: int [rows], such as the sum of squared segment lengths; 0 for an empty row.
        micro_rows: rows per micro-batch; divides the number of rows.

    Returns:
        int64 [rows], the row in each place; ties keep their order.
    """
    heaviest_first = np.argsort(-work, kind="stable").reshape(-1, micro_rows)
    row_work = work.tolist()
    return np.array([_spread(rows, row_work) for rows in heaviest_first.tolist()]).reshape(-1)


def _spread(rows: list[int], work: list[int]) -> list[int]:
    """Split rows, heaviest first, into equal parts of about equal work; split the parts again.

    Each part gets one row of every group of neighbors in weight, so the parts stay equal in number.
    Groups with the largest differences are dealt first, the heavier row to the lighter part. This
    is Karmarkar & Karp's (1982) idea of placing differences instead of values, in its greedy form.
    """
    num_parts = next((n for n in range(2, len(rows)) if len(rows) % n == 0), 0)
    if not num_parts:  # the number of rows is prime, or 1: one row per part
        return rows
    groups = [rows[i : i + num_parts] for i in range(0, len(rows), num_parts)]
    groups.sort(key=lambda some: work[some[-1]] - work[some[0]])
    totals = [0] * num_parts
    parts: list[list[int]] = [[] for _ in totals]
    for group in groups:
        lightest_first = sorted(range(num_parts), key=totals.__getitem__)
        for part, row in zip(lightest_first, group, strict=True):
            totals[part] += work[row]
            parts[part].append(row)
    for part in parts:
        part.sort(key=lambda row: (-work[row], row))
    return [row for part in parts for row in _spread(part, work)]


def imbalance(work: np.ndarray, num_ranks: int) -> float:
    """Return the highest over the mean work of ranks with contiguous blocks of the rows.

    Args:
        work: int [rows] of one micro-batch, or of several [micro-batches, rows]: a rank waits for
            the slowest in each, so the highest ones are added up.
    """
    rank_work = (
        np.asarray(work, np.float64).reshape(-1, num_ranks, work.shape[-1] // num_ranks).sum(2)
    )
    total = rank_work.sum()
    return float(rank_work.max(1).sum() * num_ranks / total) if total else 1.0
