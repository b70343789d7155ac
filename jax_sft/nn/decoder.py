"""Residual blocks and whole decoders, whose layers are stacked and run by a scan.

Shape suffixes: B rows, T tokens, D model.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jax_sft.nn.compute import Compute
from jax_sft.nn.layers import CenteredRMSNorm, Embedding, Head, RMSNorm, residual, whole


class PreNorm(nnx.Module):
    """Residual block of attention and MLP, with a norm before each."""

    def __init__(self, cfg: Any, attn: Any, mlp: Any):
        self.attn_norm = RMSNorm(cfg.features, eps=cfg.norm_eps)
        self.attn = attn
        self.mlp_norm = RMSNorm(cfg.features, eps=cfg.norm_eps)
        self.mlp = mlp

    def __call__(self, x_BTD, *context):
        x_BTD += residual(self.attn(whole(self.attn_norm(x_BTD)), *context))
        return x_BTD + residual(self.mlp(whole(self.mlp_norm(x_BTD))))


class PrePostNorm(nnx.Module):
    """Residual block of attention and MLP, with a norm before and after each."""

    def __init__(self, cfg: Any, attn: Any, mlp: Any):
        self.attn_norm = CenteredRMSNorm(cfg.features, eps=cfg.norm_eps)
        self.attn = attn
        self.attn_out_norm = CenteredRMSNorm(cfg.features, eps=cfg.norm_eps)
        self.mlp_norm = CenteredRMSNorm(cfg.features, eps=cfg.norm_eps)
        self.mlp = mlp
        self.mlp_out_norm = CenteredRMSNorm(cfg.features, eps=cfg.norm_eps)

    def __call__(self, x_BTD, windowed, *context):
        attended_BTD = self.attn(whole(self.attn_norm(x_BTD)), *context, windowed=windowed)
        x_BTD += self.attn_out_norm(residual(attended_BTD))
        return x_BTD + self.mlp_out_norm(residual(self.mlp(whole(self.mlp_norm(x_BTD)))))


class Decoder(nnx.Module):
    """Token ids to final hidden states: embedding, equal layers, norm.

    The loss or `inference` applies the head.

    Args:
        make_layer: (cfg, key) -> a module. The module is called with (x_BTD, angles,
            segment_ids_BT, positions_BT, compute) and returns the next x_BTD, or (x_BTD, Routing)
            for a layer with experts.
        cfg: a family's Config.
    """

    def __init__(self, make_layer: Callable[[Any, jax.Array], Any], cfg: Any, key):
        embed, layers, head = jax.random.split(key, 3)
        self.cfg = cfg
        self.embed = Embedding(cfg.vocab, cfg.features, embed)
        self.layers = stack(functools.partial(make_layer, cfg), cfg.num_layers, layers)
        self.final_norm = RMSNorm(cfg.features, eps=cfg.norm_eps)
        if not cfg.tied:
            self.head = Head(cfg.vocab, cfg.features, head)

    def __call__(self, tokens_BT, segment_ids_BT, positions_BT, compute: Compute) -> jax.Array:
        """Return the final, normalized hidden states [B, T, D] in `compute.dtype`."""
        return self.routed(tokens_BT, segment_ids_BT, positions_BT, compute)[0]

    def routed(self, tokens_BT, segment_ids_BT, positions_BT, compute: Compute):
        """Return (hidden states, Routing of all layers or None without experts)."""
        x_BTD = self.embed(tokens_BT, compute.dtype)
        angles = self.cfg.rope.angles(positions_BT, segment_ids_BT, compute.max_segments)
        context = (angles, segment_ids_BT, positions_BT, compute)
        x_BTD, routing = run_routed_stack(
            self.layers, x_BTD, *context, name="layers", compute=compute
        )
        return self.final_norm(x_BTD), routing

    @property
    def head_VD(self) -> jax.Array:
        """The master weight of the output head [V, D], the embedding table if tied."""
        return self.embed.table[...] if self.cfg.tied else self.head.table[...].T


class GemmaDecoder(Decoder):
    """A Decoder with embeddings scaled by sqrt(D), centered norms and two kinds of layers.

    Args:
        make_layer: (cfg, key) -> a module. The module is called with (x_BTD, windowed, *angles,
            segment_ids_BT, positions_BT, compute): `windowed` is whether the layer has the window,
            and `angles` are those of each of `cfg.ropes`.
        cfg: a family's Config, with `windowed`, a bool per layer, and `ropes`.
    """

    def __init__(self, make_layer: Callable[[Any, jax.Array], Any], cfg: Any, key):
        super().__init__(make_layer, cfg, key)
        self.final_norm = CenteredRMSNorm(cfg.features, eps=cfg.norm_eps)

    def routed(self, tokens_BT, segment_ids_BT, positions_BT, compute: Compute):
        x_BTD = self.embed(tokens_BT, compute.dtype)
        # The factor is rounded as in transformers: in bfloat16, sqrt(3584) = 59.87 becomes 59.75.
        x_BTD *= jnp.asarray(math.sqrt(self.cfg.features), compute.dtype)
        angles = [
            rope.angles(positions_BT, segment_ids_BT, compute.max_segments)
            for rope in self.cfg.ropes
        ]
        context = (*angles, segment_ids_BT, positions_BT, compute)
        per_layer = (jnp.array(self.cfg.windowed),)
        x_BTD = run_stack(
            self.layers, x_BTD, *context, name="layers", compute=compute, each=per_layer
        )
        return self.final_norm(x_BTD), None


def stack(make_layer: Callable[[jax.Array], Any], num_layers: int, key) -> Any:
    """Create `num_layers` equal layers as one module whose arrays have a leading layer axis."""
    return jax.vmap(make_layer)(jax.random.split(key, num_layers))


def run_stack(
    layers: Any,
    x_BTD: jax.Array,
    *inputs: Any,
    name: str,
    compute: Compute,
    each: tuple[jax.Array, ...] = (),
) -> jax.Array:
    """Apply stacked layers in order, as one compiled loop body.

    Layer i computes `x = layer_i(x, *(array[i] for array in each), *inputs)`.

    Args:
        name: path of `layers` in the model, as in the paths of the parameter specs.
        each: per-layer inputs, arrays [layers, ...] indexed by the scan.
    """
    return run_routed_stack(layers, x_BTD, *inputs, name=name, compute=compute, each=each)[0]


def run_routed_stack(
    layers: Any,
    x_BTD: jax.Array,
    *inputs: Any,
    name: str,
    compute: Compute,
    each: tuple[jax.Array, ...] = (),
) -> tuple[jax.Array, Any]:
    """Apply stacked layers like `run_stack`, and also return the Routing of layers that have one.

    Returns:
        (x, Routing with a leading layer dimension), or (x, None).
    """

    def body(x_BTD, layer_and_inputs):
        layer, *layer_inputs = layer_and_inputs
        x_BTD = checkpoint_name(x_BTD, "residual")
        result = compute.gathered(layer, name)(x_BTD, *layer_inputs, *inputs)
        x_BTD, routing = result if isinstance(result, tuple) else (result, None)
        return residual(x_BTD), routing

    body = jax.checkpoint(body, policy=compute.policy, prevent_cse=False)
    return jax.lax.scan(body, x_BTD, (layers, *each))
