"""The attention module of a decoder layer: projections, rotary embedding, packed attention.

Shape suffixes: B rows, T tokens, D model, N heads, K kv heads, H head dim.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jax_sft.nn import rope
from jax_sft.nn.compute import Compute
from jax_sft.nn.layers import Linear
from jax_sft.ops.attention.dispatch import packed_attention


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    angles: tuple[jax.Array, jax.Array],
    segment_ids_BT: jax.Array,
    positions_BT: jax.Array,
    compute: Compute,
    window: int | None = None,
    windowed: jax.Array | None = None,
    scale: float | None = None,
    soft_cap: float = 0.0,
) -> jax.Array:
    """Rotate queries and keys, then attend causally within each segment. Returns [B, T, N, H].

    Args:
        window: number of tokens that a token sees at most, itself included.
        windowed: bool scalar, whether this layer uses the window. None = it does.
        scale: factor on the scores; None = 1 / sqrt(H).
        soft_cap: bound of the scaled scores, see `packed_attention`; 0 = none.
    """
    q_BTNH, k_BTKH = rope.rotate(q_BTNH, angles), rope.rotate(k_BTKH, angles)
    q_BTNH, k_BTKH, v_BTKH = (checkpoint_name(x, "qkv") for x in (q_BTNH, k_BTKH, v_BTKH))
    return packed_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        segment_ids_BT,
        positions_BT,
        scale=1 / math.sqrt(q_BTNH.shape[-1]) if scale is None else scale,
        backend=compute.attention,
        max_segments=compute.max_segments,
        window=window,
        windowed=windowed,
        soft_cap=soft_cap,
    )


class Attention(nnx.Module):
    """Grouped-query attention.

    Args:
        cfg: a family's Config.
        bias, out_bias: whether q, k and v, and whether the output projection, have biases.
        norms: norms of q and of k before the rotation; empty = none.
        scale: factor on the scores; None = 1 / sqrt(H).
    """

    def __init__(
        self,
        cfg: Any,
        key,
        *,
        bias: bool = False,
        out_bias: bool = False,
        norms: Sequence[Any] = (),
        scale: float | None = None,
    ):
        q, k, v, out = jax.random.split(key, 4)
        features = {"embed": cfg.features}
        heads = {"heads": cfg.num_heads, "head_dim": cfg.head_dim}
        kv_heads = {"kv_heads": cfg.num_kv_heads, "head_dim": cfg.head_dim}
        self.q = Linear(features, heads, q, bias)
        self.k = Linear(features, kv_heads, k, bias)
        self.v = Linear(features, kv_heads, v, bias)
        self.out = Linear(heads, features, out, out_bias)
        if norms:
            self.q_norm, self.k_norm = norms
        self.scale, self.soft_cap, self.window = scale, cfg.attention_soft_cap, cfg.window

    def __call__(self, x_BTD: jax.Array, *context, windowed: jax.Array | None = None) -> jax.Array:
        """Return [B, T, D]. `context` holds the arguments of `attend` from `angles` on."""
        q_BTNH, k_BTKH = self.q(x_BTD), self.k(x_BTD)
        if hasattr(self, "q_norm"):
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        options: dict[str, Any] = dict(scale=self.scale, soft_cap=self.soft_cap, window=self.window)
        return self.out(
            attend(q_BTNH, k_BTKH, self.v(x_BTD), *context, windowed=windowed, **options)
        )
