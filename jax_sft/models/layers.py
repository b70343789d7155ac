"""Primitives that model families are written from: linear, norm, embedding, attention, MLP, scan.

Shape suffixes: B rows, T tokens, D model, N heads, K kv heads, H head dim, F mlp, V vocabulary.
Modules are plain pytrees (NNX tree mode): no shared submodules, parameters created from a key.
Parameters multiply in the dtype of the activation; what loses precision runs in float32.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_sft import parallel
from jax_sft.models import rope
from jax_sft.ops.attention import packed_attention

INIT_STD = 0.02  # of matrices made from scratch, as in Hugging Face's initializer_range

# model.remat: what the backward pass keeps of a layer instead of computing it again.
REMAT: dict[str, Any] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attn": jax.checkpoint_policies.save_only_these_names("attention"),
}


class Linear(nnx.Module):
    """y = x W (+ b), contracting the last dimensions of x with the first dimensions of W.

    Args:
        inputs: sizes that are contracted, e.g. (D,) or (N, H).
        outputs: sizes that appear, e.g. (N, H) or (D,).
        key: random key of the normal initialisation; the bias starts at zero.
    """

    def __init__(self, inputs: tuple[int, ...], outputs: tuple[int, ...], key, bias: bool = False):
        self.num_inputs = len(inputs)
        self.kernel = nnx.Param(INIT_STD * jax.random.normal(key, inputs + outputs))
        if bias:
            self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        contract = self.num_inputs
        kernel = self.kernel[...].astype(x.dtype)
        y = jax.lax.dot_general(
            x, kernel, ((range(x.ndim - contract, x.ndim), range(contract)), ((), ()))
        )
        return y + self.bias[...].astype(x.dtype) if hasattr(self, "bias") else y


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last dimension, in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * self.scale[...]).astype(x.dtype)


class Embedding(nnx.Module):
    """A [V, D] table: looked up for tokens, and read whole as the output head."""

    def __init__(self, vocab: int, features: int, key):
        self.table = nnx.Param(INIT_STD * jax.random.normal(key, (vocab, features)))

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        # Gather the model dimension first: the partitioner turns a lookup in a table split over
        # both dimensions into a full copy of the activations.
        table_VD = parallel.constrain(self.table[...], "vocab", "features")
        return jnp.take(table_VD, tokens_BT, axis=0)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020). Gate and up stay separate: less memory."""

    def __init__(self, features: int, mlp: int, key, bias: bool = False):
        gate, up, down = jax.random.split(key, 3)
        self.gate = Linear((features,), (mlp,), gate, bias)
        self.up = Linear((features,), (mlp,), up, bias)
        self.down = Linear((mlp,), (features,), down, bias)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        hidden_BTF = jax.nn.silu(self.gate(x_BTD)) * self.up(x_BTD)
        return self.down(parallel.constrain(hidden_BTF, "batch", "token", "mlp"))


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    angles: tuple[jax.Array, jax.Array],
    segment_ids_BT: jax.Array,
    positions_BT: jax.Array,
    backend: str,
) -> jax.Array:
    """Rotate queries and keys, then attend causally within each segment. Returns [B, T, N, H]."""
    q_BTNH, k_BTKH = rope.rotate(q_BTNH, angles), rope.rotate(k_BTKH, angles)
    scale = 1 / math.sqrt(q_BTNH.shape[-1])
    return packed_attention(
        q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, positions_BT, scale=scale, backend=backend
    )


def stack(make_layer: Callable[[jax.Array], Any], num_layers: int, key) -> Any:
    """Create `num_layers` equal layers as one module whose arrays have a leading layer axis."""
    return jax.vmap(make_layer)(jax.random.split(key, num_layers))


def run_stack(layers: Any, x_BTD: jax.Array, *inputs: Any, remat: str) -> jax.Array:
    """Apply stacked layers in turn, `x = layer(x, *inputs)`, as one compiled loop body.

    The residual stream is pinned to (batch, token) sharding between layers.
    """

    def body(x_BTD, layer):
        x_BTD = layer(x_BTD, *inputs)
        return parallel.constrain(x_BTD, "batch", "token", "features"), None

    if remat != "none":
        body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
    x_BTD, _ = jax.lax.scan(body, x_BTD, layers)
    return x_BTD
