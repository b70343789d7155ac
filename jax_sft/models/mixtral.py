"""Mixtral: the attention of Mistral, and in every layer experts instead of the MLP."""

import dataclasses
from typing import Any, ClassVar

import jax
from flax import nnx

from jax_sft.models import experts, layers
from jax_sft.models.rope import Rope
from jax_sft.models.spec import Fields, Weight, linear

DEFAULT_THETA = 1e6  # transformers' rope_theta for a config.json without one


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
    router_aux: float  # weight of the load-balancing loss
    norm_eps: float
    tied: bool
    max_positions: int
    rope: Rope
    window: int | None  # tokens that a token sees, itself included; None = its whole segment
    attention_soft_cap: ClassVar[float] = 0.0
    logit_soft_cap: ClassVar[float] = 0.0

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Config":
        """Read config.json; a field that this file does not implement raises ValueError."""
        fields = Fields(config)
        num_heads, num_kv_heads, head_dim = fields.heads()
        fields.known(*Rope.FIELDS)
        fields.only("hidden_act", "silu")
        fields.only("router_jitter_noise", 0.0)
        num_experts, num_chosen, router_aux = experts.read(fields, default=(8, 2))
        given = fields.get("sliding_window")
        window = None if given is None else fields.size("sliding_window")
        theta = {"rope_theta": config.get("rope_theta") or DEFAULT_THETA}
        cfg = cls(
            vocab=fields.size("vocab_size"),
            features=fields.size("hidden_size"),
            num_layers=fields.size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            mlp=fields.size("intermediate_size"),
            num_experts=num_experts,
            num_chosen=num_chosen,
            router_aux=router_aux,
            norm_eps=fields.number("rms_norm_eps", 1e-5),
            tied=fields.flag("tie_word_embeddings"),
            max_positions=fields.size("max_position_embeddings"),
            rope=Rope.from_hf(config | theta, head_dim),
            window=window,
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
    attn, mlp = layer + "self_attn.", layer + "block_sparse_moe."
    expert = mlp + "experts.{experts}."
    to_heads = "(heads head_dim) embed -> embed heads head_dim"
    to_kv_heads = "(kv_heads head_dim) embed -> embed kv_heads head_dim"
    from_heads = "embed (heads head_dim) -> embed heads head_dim"
    rows = [
        Weight("embed.table", "model.embed_tokens.weight", "vocab embed -> vocab embed"),
        Weight("final_norm.scale", "model.norm.weight", "norm -> norm"),
        Weight("layers.attn_norm.scale", layer + "input_layernorm.weight", "norm -> norm"),
        Weight("layers.mlp_norm.scale", layer + "post_attention_layernorm.weight", "norm -> norm"),
        *linear("layers.attn.q", attn + "q_proj", to_heads),
        *linear("layers.attn.k", attn + "k_proj", to_kv_heads),
        *linear("layers.attn.v", attn + "v_proj", to_kv_heads),
        *linear("layers.attn.out", attn + "o_proj", from_heads),
        *linear("layers.mlp.router", mlp + "gate", "experts embed -> embed experts"),
        *linear("layers.mlp.gate", expert + "w1", "mlp embed -> embed mlp"),
        *linear("layers.mlp.up", expert + "w3", "mlp embed -> embed mlp"),
        *linear("layers.mlp.down", expert + "w2", "embed mlp -> embed mlp"),
    ]
    if not cfg.tied:
        rows.append(Weight("head.table", "lm_head.weight", "vocab embed -> embed vocab"))
    return tuple(rows)


class Attention(nnx.Module):
    """Grouped-query attention, within a sliding window where the model has one."""

    def __init__(self, cfg: Config, key):
        q, k, v, out = jax.random.split(key, 4)
        features = {"embed": cfg.features}
        heads = {"heads": cfg.num_heads, "head_dim": cfg.head_dim}
        kv_heads = {"kv_heads": cfg.num_kv_heads, "head_dim": cfg.head_dim}
        self.q = layers.Linear(features, heads, q)
        self.k = layers.Linear(features, kv_heads, k)
        self.v = layers.Linear(features, kv_heads, v)
        self.out = layers.Linear(heads, features, out)
        self.window = cfg.window

    def __call__(self, x_BTD, *context):
        qkv = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        return self.out(layers.attend(*qkv, *context, window=self.window))


class Layer(nnx.Module):
    """Pre-norm residual block: attention, then the experts."""

    def __init__(self, cfg: Config, key):
        attn, mlp = jax.random.split(key)
        self.attn_norm = layers.RMSNorm(cfg.features, eps=cfg.norm_eps)
        self.attn = Attention(cfg, attn)
        self.mlp_norm = layers.RMSNorm(cfg.features, eps=cfg.norm_eps)
        sizes = cfg.features, cfg.mlp, cfg.num_experts, cfg.num_chosen
        self.mlp = experts.MoE(*sizes, normalise=True, key=mlp)

    def __call__(self, x_BTD, angles, segment_ids_BT, *context):
        context = angles, segment_ids_BT, *context
        x_BTD += layers.residual(self.attn(layers.whole(self.attn_norm(x_BTD)), *context))
        y_BTD, routing = self.mlp(layers.whole(self.mlp_norm(x_BTD)), segment_ids_BT)
        return x_BTD + layers.residual(y_BTD), routing


def Model(cfg: Config, key) -> layers.Decoder:
    """Return the model, its weights made from scratch."""
    return layers.Decoder(Layer, cfg, key)
