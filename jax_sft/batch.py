"""A batch: the arrays that the loader builds and the compiled step takes.

All are [micro-batches, rows per micro-batch, tokens]. `tokens` are the inputs, `targets` the tokens
that follow them, `weights` the loss weight of each target (0 = it carries no loss), `segment_ids`
count the examples of a row from 1 (0 = padding), and `positions` start at 0 in each segment.
"""

import jax
import numpy as np

Batch = dict[str, jax.Array]
Row = dict[str, np.ndarray]  # of one process, before it is put on devices
FIELDS = ("tokens", "targets", "weights", "segment_ids", "positions")


def fields(per_source: bool) -> tuple[str, ...]:
    """Return the names of a batch's arrays; `sources` is there for the loss of each source."""
    return (*FIELDS, "sources") if per_source else FIELDS


def empty_rows(num_rows: int, num_tokens: int, per_source: bool = False) -> Row:
    """Return arrays [num_rows, num_tokens] of padding alone."""
    dtypes = dict.fromkeys(fields(per_source), np.int32) | {"weights": np.float32}
    return {name: np.zeros((num_rows, num_tokens), dtype) for name, dtype in dtypes.items()}
