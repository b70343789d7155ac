"""The interface of an attention backend: forward and backward pass of one device.

Shape suffixes: B rows, T query tokens, S key tokens, N heads, K kv heads, H head dim.
Backends contain no collectives. `ops.attention.dispatch` passes them their shard of the data and
maps names to backends.
"""

import dataclasses
from typing import Protocol

import jax

# (segment ids, positions), both int32 [B, T] or [B, S]. Segment 0 is padding; positions count
# 0, 1, 2.. within a segment. A query sees the keys of its segment up to its own position. The
# tokens of a row may be in any order.
Ids = tuple[jax.Array, jax.Array]


class Forward(Protocol):
    """(q_BTNH, k_BSKH, v_BSKH, ...) -> (out_BTNH in the dtype of q, lse).

    lse is float32 [B, T, N]: the log-sum-exp of the scaled scores of each query and head. A backend
    may return any other array that its `Backward` needs instead, sharded in the same way.
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
    """(arguments and results of `Forward`, d loss / d out) -> (dq, dk, dv).

    Each gradient has the dtype of its input.
    """

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
    """The forward and backward pass of a backend.

    `scale` multiplies the scores; `max_segments` bounds the number of segments of a row.
    With a `window`, a query at position p sees the keys of its segment at p - window < position.
    With a `soft_cap` above 0, a scaled score s becomes soft_cap tanh(s / soft_cap).

    Attributes:
        takes_traced_window: whether `window` may be a traced int32 scalar.
    """

    forward: Forward
    backward: Backward
    takes_traced_window: bool = True
