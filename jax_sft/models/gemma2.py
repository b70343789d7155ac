"""Gemma 2 (arXiv:2408.00118): layers with and without a sliding window, norms on both sides of
attention and MLP, soft caps on attention scores and logits."""

import dataclasses
import math
from typing import Any

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
    rope: Rope
    windowed: tuple[bool, ...]  # for each layer: has it the window?
    window: int | None  # tokens that a token sees there, itself included; None = no layer has it
    query_scale: float  # factor on the attention scores
    attention_soft_cap: float  # of attention scores; 0 = none
    logit_soft_cap: float

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Config":
        """Read config.json; a field that this file does not implement raises ValueError."""
        fields = Fields(config)
        num_heads, num_kv_heads, head_dim = fields.heads(head_dim=256)  # as transformers has it
        fields.known(*Rope.FIELDS, "cache_implementation")
        fields.only("hidden_act", "gelu_pytorch_tanh")
        fields.only("hidden_activation", "gelu_pytorch_tanh")
        num_layers = fields.size("num_hidden_layers")
        windowed, window = fields.windows(
            # Every second layer sees whole segments.
            [LAYER_TYPES[(n + 1) % 2] for n in range(num_layers)],
            window=4096,
        )
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
            rope=Rope.from_hf(config, head_dim),
            windowed=windowed,
            window=window,
            query_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
            attention_soft_cap=fields.soft_cap("attn_logit_softcapping", 50.0),
            logit_soft_cap=fields.soft_cap("final_logit_softcapping", 30.0),
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
        *linear("layers.attn.out", attn + "o_proj", from_heads, cfg.attention_bias),
        *linear("layers.mlp.gate", mlp + "gate_proj", "mlp embed -> embed mlp"),
        *linear("layers.mlp.up", mlp + "up_proj", "mlp embed -> embed mlp"),
        *linear("layers.mlp.down", mlp + "down_proj", "embed mlp -> embed mlp"),
    ]
    if not cfg.tied:
        rows.append(Weight("head.table", "lm_head.weight", "vocab embed -> embed vocab"))
    return tuple(rows)


class Attention(nnx.Module):
    """Grouped-query attention with capped scores."""

    def __init__(self, cfg: Config, key):
        q, k, v, out = jax.random.split(key, 4)
        features = {"embed": cfg.features}
        heads = {"heads": cfg.num_heads, "head_dim": cfg.head_dim}
        kv_heads = {"kv_heads": cfg.num_kv_heads, "head_dim": cfg.head_dim}
        self.q = layers.Linear(features, heads, q, cfg.attention_bias)
        self.k = layers.Linear(features, kv_heads, k, cfg.attention_bias)
        self.v = layers.Linear(features, kv_heads, v, cfg.attention_bias)
        self.out = layers.Linear(heads, features, out, cfg.attention_bias)
        self.window = cfg.window
        self.scale, self.soft_cap = cfg.query_scale, cfg.attention_soft_cap

    def __call__(self, x_BTD, windowed, *context):
        qkv = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        window = {"window": self.window, "windowed": windowed}
        out_BTNH = layers.attend(*qkv, *context, **window, scale=self.scale, soft_cap=self.soft_cap)
        return self.out(out_BTNH)


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
        angles = self.cfg.rope.angles(positions_BT, segment_ids_BT, compute.max_segments)
        context = (angles, segment_ids_BT, positions_BT, compute)
        each = (jnp.array(self.cfg.windowed),)
        x_BTD = layers.run_stack(
            self.layers, x_BTD, *context, name="layers", compute=compute, each=each
        )
        return self.final_norm(x_BTD)

    @property
    def head_VD(self) -> jax.Array:
        """The output head [V, D], the master weight: the embedding table when tied."""
        return self.embed.table[...] if self.cfg.tied else self.head.table[...].T
