"""Qwen3-MoE: the attention of Qwen3, and in every layer experts instead of the MLP."""

import dataclasses
from typing import Any, ClassVar

import jax
from flax import nnx

from jax_sft.models import experts, layers
from jax_sft.models.rope import Rope
from jax_sft.models.spec import Fields, Weight, linear


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and constants of one model, read from its config.json."""

    vocab: int
    features: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp: int  # of one expert
    num_experts: int
    num_chosen: int  # experts that a token takes
    normalise: bool  # their weights add up to 1
    router_aux: float  # weight of the load-balancing loss
    norm_eps: float
    tied: bool
    attention_bias: bool  # on q, k, v and out
    max_positions: int
    rope: Rope
    window: ClassVar[None] = None  # every layer sees whole segments
    attention_soft_cap: ClassVar[float] = 0.0
    logit_soft_cap: ClassVar[float] = 0.0

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Config":
        """Read config.json; a field that this file does not implement raises ValueError."""
        fields = Fields(config)
        num_heads, num_kv_heads, head_dim = fields.heads()
        fields.known(*Rope.FIELDS)
        fields.known("sliding_window", "max_window_layers")  # used with use_sliding_window only
        fields.only("hidden_act", "silu")
        # A mix of sparse and dense layers, whose inner size is intermediate_size.
        fields.only("decoder_sparse_step", 1)
        fields.only("mlp_only_layers", [])
        fields.known("intermediate_size")
        num_experts, num_chosen, router_aux = experts.read(fields, default=(128, 8))
        cfg = cls(
            vocab=fields.size("vocab_size"),
            features=fields.size("hidden_size"),
            num_layers=fields.size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            mlp=fields.size("moe_intermediate_size", 768),
            num_experts=num_experts,
            num_chosen=num_chosen,
            normalise=fields.flag("norm_topk_prob"),
            router_aux=router_aux,
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            tied=fields.flag("tie_word_embeddings"),
            attention_bias=fields.flag("attention_bias"),
            max_positions=fields.size("max_position_embeddings"),
            rope=Rope.from_hf(config, head_dim),
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
            "experts": self.num_experts,
            "chosen": self.num_chosen,
        }


def weights(cfg: Config) -> tuple[Weight, ...]:
    """Return the weight rows of the model."""
    layer = "model.layers.{layers}."
    attn, mlp = layer + "self_attn.", layer + "mlp."
    expert = mlp + "experts.{experts}."
    to_heads = "(heads head_dim) embed -> embed heads head_dim"
    to_kv_heads = "(kv_heads head_dim) embed -> embed kv_heads head_dim"
    from_heads = "embed (heads head_dim) -> embed heads head_dim"
    rows = [
        Weight("embed.table", "model.embed_tokens.weight", "vocab embed -> vocab embed"),
        Weight("final_norm.scale", "model.norm.weight", "norm -> norm"),
        Weight("layers.attn_norm.scale", layer + "input_layernorm.weight", "norm -> norm"),
        Weight("layers.mlp_norm.scale", layer + "post_attention_layernorm.weight", "norm -> norm"),
        *linear("layers.attn.q", attn + "q_proj", to_heads, cfg.attention_bias),
        *linear("layers.attn.k", attn + "k_proj", to_kv_heads, cfg.attention_bias),
        *linear("layers.attn.v", attn + "v_proj", to_kv_heads, cfg.attention_bias),
        Weight("layers.attn.q_norm.scale", attn + "q_norm.weight", "head_dim -> head_dim"),
        Weight("layers.attn.k_norm.scale", attn + "k_norm.weight", "head_dim -> head_dim"),
        *linear("layers.attn.out", attn + "o_proj", from_heads, cfg.attention_bias),
        *linear("layers.mlp.router", mlp + "gate", "experts embed -> embed experts"),
        *linear("layers.mlp.gate", expert + "gate_proj", "mlp embed -> embed mlp"),
        *linear("layers.mlp.up", expert + "up_proj", "mlp embed -> embed mlp"),
        *linear("layers.mlp.down", expert + "down_proj", "embed mlp -> embed mlp"),
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
        self.q_norm = layers.RMSNorm(cfg.head_dim, eps=cfg.norm_eps)
        self.k_norm = layers.RMSNorm(cfg.head_dim, eps=cfg.norm_eps)

    def __call__(self, x_BTD, *context):
        q_BTNH, k_BTKH = self.q_norm(self.q(x_BTD)), self.k_norm(self.k(x_BTD))
        return self.out(layers.attend(q_BTNH, k_BTKH, self.v(x_BTD), *context))


class Layer(nnx.Module):
    """Pre-norm residual block: attention, then the experts."""

    def __init__(self, cfg: Config, key):
        attn, mlp = jax.random.split(key)
        self.attn_norm = layers.RMSNorm(cfg.features, eps=cfg.norm_eps)
        self.attn = Attention(cfg, attn)
        self.mlp_norm = layers.RMSNorm(cfg.features, eps=cfg.norm_eps)
        sizes = cfg.features, cfg.mlp, cfg.num_experts, cfg.num_chosen
        self.mlp = experts.MoE(*sizes, normalise=cfg.normalise, key=mlp)

    def __call__(self, x_BTD, angles, segment_ids_BT, *context):
        context = angles, segment_ids_BT, *context
        x_BTD += layers.residual(self.attn(layers.whole(self.attn_norm(x_BTD)), *context))
        y_BTD, routing = self.mlp(layers.whole(self.mlp_norm(x_BTD)), segment_ids_BT)
        return x_BTD + layers.residual(y_BTD), routing


def Model(cfg: Config, key) -> layers.Decoder:
    """Return the model, its weights made from scratch."""
    return layers.Decoder(Layer, cfg, key)
