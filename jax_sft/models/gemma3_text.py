"""Gemma 3's language model (arXiv:2503.19786): like Gemma 2, but each head of q and k is normed,
layers with the sliding window rotate by frequencies of their own, and scores are not capped."""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jax_sft.compute import Compute
from jax_sft.models import layers
from jax_sft.models.rope import Rope
from jax_sft.models.spec import LAYER_TYPES, Fields, Weight, linear


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and constants of one model, read from its config.json."""

    vocab: int
    features: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp: int
    norm_eps: float
    tied: bool
    attention_bias: bool  # on q, k, v and out
    max_positions: int
    rope: Rope  # of layers that see whole segments
    window_rope: Rope  # of layers with the window
    windowed: tuple[bool, ...]  # for each layer: has it the window?
    window: int | None  # tokens that a token sees there, itself included; None = no layer has it
    query_scale: float  # factor on the attention scores
    logit_soft_cap: float  # 0 = none
    attention_soft_cap: ClassVar[float] = 0.0

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Config":
        """Read config.json; a field that this file does not implement raises ValueError."""
        fields = Fields(config)
        num_heads, num_kv_heads, head_dim = fields.heads(head_dim=256)  # as transformers has it
        fields.known("cache_implementation")
        fields.only("hidden_act", "gelu_pytorch_tanh")
        fields.only("hidden_activation", "gelu_pytorch_tanh")
        num_layers = fields.size("num_hidden_layers")
        pattern = fields.size("sliding_window_pattern", 6)  # its last layer sees whole segments
        windowed, window = fields.windows(
            [LAYER_TYPES[(n + 1) % pattern > 0] for n in range(num_layers)], window=4096
        )
        rope, window_rope = _ropes(fields, head_dim)
        cfg = cls(
            vocab=fields.size("vocab_size"),
            features=fields.size("hidden_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            mlp=fields.size("intermediate_size"),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            tied=fields.flag("tie_word_embeddings", True),
            attention_bias=fields.flag("attention_bias"),
            max_positions=fields.size("max_position_embeddings"),
            rope=rope,
            window_rope=window_rope,
            windowed=windowed,
            window=window,
            query_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
            logit_soft_cap=fields.soft_cap("final_logit_softcapping"),
        )
        fields.done()
        return cfg

    @property
    def dims(self) -> dict[str, int]:
        """Size of each logical axis."""
        return {
            "vocab": self.vocab,
            "embed": self.features,
            "norm": self.features,
            "layers": self.num_layers,
            "heads": self.num_heads,
            "kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "mlp": self.mlp,
        }


def _ropes(fields: Fields, head_dim: int) -> tuple[Rope, Rope]:
    """Read the rotations of layers without and with the window.

    Either rope_parameters has one object per layer type (transformers 5), or rope_theta and
    rope_scaling are of the layers without, and rope_local_base_freq is of those with it (older).

    Raises:
        ValueError: one flat object of rope_parameters, or what `Rope.from_hf` refuses.
    """
    newer = fields.get("rope_parameters", {})
    if not isinstance(newer, dict) or newer.keys() - set(LAYER_TYPES):
        raise ValueError(
            f"config.json: rope_parameters = {newer!r} must have one object for each of "
            f"{LAYER_TYPES}"
        )

    def rope(kind: str, **older) -> Rope:
        older["max_position_embeddings"] = fields.size("max_position_embeddings")
        return Rope.from_hf(older | {"rope_parameters": newer.get(kind)}, head_dim)

    scaling, theta = fields.get("rope_scaling"), fields.get("rope_theta", 1e6)
    window_theta = fields.get("rope_local_base_freq", 1e4)
    return (
        rope("full_attention", rope_scaling=scaling, rope_theta=theta),
        rope("sliding_attention", rope_theta=window_theta),
    )


def weights(cfg: Config) -> tuple[Weight, ...]:
    """Return the weight rows of the model."""
    layer = "model.layers.{layers}."
    attn, mlp = layer + "self_attn.", layer + "mlp."
    to_heads = "(heads head_dim) embed -> embed heads head_dim"
    to_kv_heads = "(kv_heads head_dim) embed -> embed kv_heads head_dim"
    from_heads = "embed (heads head_dim) -> embed heads head_dim"
    norms = {
        "attn_norm": "input_layernorm",
        "attn_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    }
    rows = [
        Weight("embed.table", "model.embed_tokens.weight", "vocab embed -> vocab embed"),
        Weight("final_norm.offset", "model.norm.weight", "norm -> norm"),
        *(
            Weight(f"layers.{ours}.offset", f"{layer}{theirs}.weight", "norm -> norm")
            for ours, theirs in norms.items()
        ),
        *linear("layers.attn.q", attn + "q_proj", to_heads, cfg.attention_bias),
        *linear("layers.attn.k", attn + "k_proj", to_kv_heads, cfg.attention_bias),
        *linear("layers.attn.v", attn + "v_proj", to_kv_heads, cfg.attention_bias),
        Weight("layers.attn.q_norm.offset", attn + "q_norm.weight", "head_dim -> head_dim"),
        Weight("layers.attn.k_norm.offset", attn + "k_norm.weight", "head_dim -> head_dim"),
        *linear("layers.attn.out", attn + "o_proj", from_heads, cfg.attention_bias),
        *linear("layers.mlp.gate", mlp + "gate_proj", "mlp embed -> embed mlp"),
        *linear("layers.mlp.up", mlp + "up_proj", "mlp embed -> embed mlp"),
        *linear("layers.mlp.down", mlp + "down_proj", "embed mlp -> embed mlp"),
    ]
    if not cfg.tied:
        rows.append(Weight("head.table", "lm_head.weight", "vocab embed -> embed vocab"))
    return tuple(rows)


class Attention(nnx.Module):
    """Grouped-query attention; each head of q and k is normed before it is rotated."""

    def __init__(self, cfg: Config, key):
        q, k, v, out = jax.random.split(key, 4)
        features = {"embed": cfg.features}
        heads = {"heads": cfg.num_heads, "head_dim": cfg.head_dim}
        kv_heads = {"kv_heads": cfg.num_kv_heads, "head_dim": cfg.head_dim}
        self.q = layers.Linear(features, heads, q, cfg.attention_bias)
        self.k = layers.Linear(features, kv_heads, k, cfg.attention_bias)
        self.v = layers.Linear(features, kv_heads, v, cfg.attention_bias)
        self.out = layers.Linear(heads, features, out, cfg.attention_bias)
        self.q_norm = layers.CenteredRMSNorm(cfg.head_dim, eps=cfg.norm_eps)
        self.k_norm = layers.CenteredRMSNorm(cfg.head_dim, eps=cfg.norm_eps)
        self.window, self.scale = cfg.window, cfg.query_scale

    def __call__(self, x_BTD, windowed, of_full, of_window, *context):
        qkv = self.q_norm(self.q(x_BTD)), self.k_norm(self.k(x_BTD)), self.v(x_BTD)
        angles = jax.tree.map(functools.partial(jnp.where, windowed), of_window, of_full)
        window = {"window": self.window, "windowed": windowed}
        return self.out(layers.attend(*qkv, angles, *context, **window, scale=self.scale))


class Layer(nnx.Module):
    """Residual block: attention, then GeGLU, the input and the output of each normed."""

    def __init__(self, cfg: Config, key):
        attn, mlp = jax.random.split(key)
        self.attn_norm = layers.CenteredRMSNorm(cfg.features, eps=cfg.norm_eps)
        self.attn = Attention(cfg, attn)
        self.attn_out_norm = layers.CenteredRMSNorm(cfg.features, eps=cfg.norm_eps)
        self.mlp_norm = layers.CenteredRMSNorm(cfg.features, eps=cfg.norm_eps)
        self.mlp = layers.GeGLU(cfg.features, cfg.mlp, mlp)
        self.mlp_out_norm = layers.CenteredRMSNorm(cfg.features, eps=cfg.norm_eps)

    def __call__(self, x_BTD, *context):
        attended_BTD = self.attn(layers.whole(self.attn_norm(x_BTD)), *context)
        x_BTD += self.attn_out_norm(layers.residual(attended_BTD))
        mlp_BTD = self.mlp(layers.whole(self.mlp_norm(x_BTD)))
        return x_BTD + self.mlp_out_norm(layers.residual(mlp_BTD))


class Model(nnx.Module):
    """Like `layers.Decoder`, with embeddings of norm sqrt(D) and layers of two kinds."""

    def __init__(self, cfg: Config, key):
        embed, stack, head = jax.random.split(key, 3)
        self.cfg = cfg
        self.embed = layers.Embedding(cfg.vocab, cfg.features, embed)
        self.layers = layers.stack(lambda key: Layer(cfg, key), cfg.num_layers, stack)
        self.final_norm = layers.CenteredRMSNorm(cfg.features, eps=cfg.norm_eps)
        if not cfg.tied:
            self.head = layers.Head(cfg.vocab, cfg.features, head)

    def __call__(self, tokens_BT, segment_ids_BT, positions_BT, compute: Compute) -> jax.Array:
        """Return hidden states [B, T, D] in `compute.dtype`, normed and ready for the head."""
        x_BTD = self.embed(tokens_BT, compute.dtype)
        # The factor is rounded too, as in transformers: in bfloat16, sqrt(3584) = 59.87 is 59.75.
        x_BTD *= jnp.asarray(math.sqrt(self.cfg.features), compute.dtype)
        angles = (
            rope.angles(positions_BT, segment_ids_BT, compute.max_segments)
            for rope in (self.cfg.rope, self.cfg.window_rope)
        )
        context = (*angles, segment_ids_BT, positions_BT, compute)
        each = (jnp.array(self.cfg.windowed),)
        x_BTD = layers.run_stack(
            self.layers, x_BTD, *context, name="layers", compute=compute, each=each
        )
        return self.final_norm(x_BTD)

    @property
    def head_VD(self) -> jax.Array:
        """The output head [V, D], the master weight: the embedding table when tied."""
        return self.embed.table[...] if self.cfg.tied else self.head.table[...].T
