"""What an attention backend is: one device's forward and backward pass, without collectives.

Shape suffixes: B rows, T query tokens, S key tokens, N heads, K kv heads, H head dim.
`ops.attention.dispatch` gives the backends their part of the data and knows them all by name.
"""

import dataclasses
from typing import Protocol

import jax

# (segment ids, positions), both int32 [B, T] or [B, S]. Segment 0 is padding; positions count
# 0, 1, 2.. within a segment. A query sees the keys of its segment that are not after it. The tokens
# of a row may come in any order.
Ids = tuple[jax.Array, jax.Array]


class Forward(Protocol):
    """(q_BTNH, k_BSKH, v_BSKH, ...) -> (out_BTNH in the dtype of q, lse).

    lse is float32 [B, T, N]: the logarithm of the sum of exp(scaled scores) of each query and head;
    or whatever one array `Backward` needs instead, split over devices like it.
    """

    def __call__(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        query_ids: Ids,
        key_ids: Ids,
        *,
        scale: float,
        max_segments: int,
        window: int | jax.Array | None,
        soft_cap: float = 0.0,
    ) -> tuple[jax.Array, jax.Array]: ...


class Backward(Protocol):
    """The arguments and results of `Forward`, and d loss / d out -> (dq, dk, dv), each in the
    dtype of its input."""

    def __call__(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        out_BTNH: jax.Array,
        lse: jax.Array,
        grad_out_BTNH: jax.Array,
        query_ids: Ids,
        key_ids: Ids,
        *,
        scale: float,
        max_segments: int,
        window: int | jax.Array | None,
        soft_cap: float = 0.0,
    ) -> tuple[jax.Array, jax.Array, jax.Array]: ...


@dataclasses.dataclass(frozen=True)
class Backend:
    """`scale` multiplies the scores; `max_segments` bounds the segments of a row.

    With a `window`, a query at position p sees the keys of its segment at p - window < position.
    With a `soft_cap` above 0, a scaled score s becomes soft_cap tanh(s / soft_cap).

    Attributes:
        takes_traced_window: `window` may be an int32 scalar that only the device knows.
    """

    forward: Forward
    backward: Backward
    takes_traced_window: bool = True
