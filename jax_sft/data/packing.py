"""The packing plan: which examples share a row, decided for the whole epoch before its first step.

A plan is a pure function of lengths, options, seed and epoch. So the number of steps is known, any
row can be built at any time on any host, and the position of a run is one integer.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class PackPlan:
    """Rows of example ids.

    Attributes:
        example_ids: int64 [examples], row after row.
        row_starts: int64 [rows + 1]; row r holds example_ids[row_starts[r] : row_starts[r + 1]].
    """

    example_ids: np.ndarray
    row_starts: np.ndarray

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    def row(self, index: int) -> np.ndarray:
        """Return the example ids of one row, in order."""
        return self.example_ids[self.row_starts[index] : self.row_starts[index + 1]]


def plan(
    lengths: np.ndarray,
    seq_len: int,
    *,
    packing: str,
    max_segments: int,
    shuffle: bool,
    seed: int,
    epoch: int,
) -> PackPlan:
    """Plan one epoch. Every example appears exactly once.

    The number of rows depends only on the lengths, so it is the same in every epoch.

    Args:
        lengths: int [examples], each in 1..seq_len.
        packing: "best_fit" or "none" (one example per row).
        max_segments: examples per row at most.
        shuffle: permute examples and rows by (seed, epoch); otherwise rows come in the order of
            their first example.
    """
    assert len(lengths) == 0 or 0 < lengths.min() <= lengths.max() <= seq_len
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths)) if shuffle else np.arange(len(lengths))
    if packing == "none":
        return PackPlan(order, np.arange(len(lengths) + 1))
    row_of = _best_fit(lengths[order], seq_len, max_segments)
    # Number the rows: at random, or by their first example.
    num_rows = int(row_of.max(initial=-1)) + 1
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


def _best_fit(lengths: np.ndarray, seq_len: int, max_segments: int) -> np.ndarray:
    """Best-fit decreasing (Johnson 1973): the longest first, each into the fullest row it fits.

    Open rows are kept in stacks by free space; a bit mask of the non-empty stacks finds the
    tightest one in a few machine instructions.

    Returns:
        int64 [examples], the row of each example.
    """
    row_of = np.empty(len(lengths), np.int64)
    stacks: list[list[int]] = [[] for _ in range(seq_len + 1)]
    segments: list[int] = []
    nonempty = 0  # bit f is set when stacks[f] has a row
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        fitting = nonempty >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = stacks[free].pop()
            if not stacks[free]:
                nonempty &= ~(1 << free)
        else:
            free, row = seq_len, len(segments)
            segments.append(0)
        row_of[example] = row
        segments[row] += 1
        left = free - length
        if left and segments[row] < max_segments:
            stacks[left].append(row)
            nonempty |= 1 << left
    return row_of
