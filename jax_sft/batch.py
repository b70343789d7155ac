"""Define a batch: the arrays that the loader builds and the compiled step accepts.

All have the shape [micro-batches, rows per micro-batch, tokens]. `tokens` are the inputs and
`targets` the tokens that follow them. `weights` are the loss weights of the targets (0 = no loss).
`segment_ids` number the examples of a row from 1 (0 = padding). `positions` start at 0 in each
segment.
"""

import jax
import numpy as np

Batch = dict[str, jax.Array]
Row = dict[str, np.ndarray]  # arrays of one process, before they are put on devices
FIELDS = ("tokens", "targets", "weights", "segment_ids", "positions")


def fields(per_source: bool) -> tuple[str, ...]:
    """Return the names of a batch's arrays; the loss per source also needs `sources`."""
    return (*FIELDS, "sources") if per_source else FIELDS


def empty_rows(num_rows: int, num_tokens: int, per_source: bool = False) -> Row:
    """Return arrays [num_rows, num_tokens] that hold only padding."""
    dtypes = dict.fromkeys(fields(per_source), np.int32) | {"weights": np.float32}
    return {name: np.zeros((num_rows, num_tokens), dtype) for name, dtype in dtypes.items()}
