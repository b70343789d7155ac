"""Phi-3, Phi-3.5 and Phi-4 (arXiv:2404.14219): LongRoPE; q, k, v and gate, up are one tensor each
in the files, but stay apart here."""

import dataclasses
from typing import Any, ClassVar

import jax
from flax import nnx

from jax_sft.models import layers
from jax_sft.models.rope import Rope
from jax_sft.models.spec import Fields, Weight, fused, linear


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
        fields.only("hidden_act", "silu")
        for dropout in ("resid_pdrop", "embd_pdrop"):
            fields.only(dropout, 0.0)
        for neutral in ("full_attn_mod", "interpolate_factor"):  # of Phi-4-mini, read by nobody
            fields.only(neutral, 1)
        cfg = cls(
            vocab=fields.size("vocab_size"),
            features=fields.size("hidden_size"),
            num_layers=fields.size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            mlp=fields.size("intermediate_size"),
            norm_eps=fields.number("rms_norm_eps", 1e-5),
            tied=fields.flag("tie_word_embeddings"),
            max_positions=fields.size("max_position_embeddings"),
            rope=_rope(fields, config, head_dim),
            window=None if fields.get("sliding_window") is None else fields.size("sliding_window"),
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


def _rope(fields: Fields, config: dict[str, Any], head_dim: int) -> Rope:
    """Read the rotation as transformers does, by whose default the original length is 4096."""
    fields.known(*Rope.FIELDS)
    original = fields.size("original_max_position_embeddings", 4096)
    return Rope.from_hf(
        config | {"original_max_position_embeddings": original},
        head_dim,
        types={"default": "default", **dict.fromkeys(("longrope", "su", "yarn"), "longrope")},
        partial_rotary_factor=fields.get("partial_rotary_factor", 1.0),
    )


def weights(cfg: Config) -> tuple[Weight, ...]:
    """Return the weight rows of the model."""
    layer = "model.layers.{layers}."
    attn, mlp = layer + "self_attn.", layer + "mlp."
    to_heads = "(heads head_dim) embed -> embed heads head_dim"
    to_kv_heads = "(kv_heads head_dim) embed -> embed kv_heads head_dim"
    to_kv = {"layers.attn.k": to_kv_heads, "layers.attn.v": to_kv_heads}
    to_mlp = "mlp embed -> embed mlp"
    gate_up = {"layers.mlp.gate": to_mlp, "layers.mlp.up": to_mlp}
    from_heads = "embed (heads head_dim) -> embed heads head_dim"
    rows = [
        Weight("embed.table", "model.embed_tokens.weight", "vocab embed -> vocab embed"),
        Weight("final_norm.scale", "model.norm.weight", "norm -> norm"),
        Weight("layers.attn_norm.scale", layer + "input_layernorm.weight", "norm -> norm"),
        Weight("layers.mlp_norm.scale", layer + "post_attention_layernorm.weight", "norm -> norm"),
        *fused(attn + "qkv_proj", {"layers.attn.q": to_heads} | to_kv),
        *linear("layers.attn.out", attn + "o_proj", from_heads),
        *fused(mlp + "gate_up_proj", gate_up),
        *linear("layers.mlp.down", mlp + "down_proj", "embed mlp -> embed mlp"),
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
    """Pre-norm residual block: attention, then SwiGLU."""

    def __init__(self, cfg: Config, key):
        attn, mlp = jax.random.split(key)
        self.attn_norm = layers.RMSNorm(cfg.features, eps=cfg.norm_eps)
        self.attn = Attention(cfg, attn)
        self.mlp_norm = layers.RMSNorm(cfg.features, eps=cfg.norm_eps)
        self.mlp = layers.SwiGLU(cfg.features, cfg.mlp, mlp)

    def __call__(self, x_BTD, *context):
        x_BTD += layers.residual(self.attn(layers.whole(self.attn_norm(x_BTD)), *context))
        return x_BTD + layers.residual(self.mlp(layers.whole(self.mlp_norm(x_BTD))))


def Model(cfg: Config, key) -> layers.Decoder:
    """Return the model, its weights made from scratch."""
    return layers.Decoder(Layer, cfg, key)
