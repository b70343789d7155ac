"""Qwen3 (dense): like Qwen2, but with a norm per head of q and k, and no bias on q, k, v."""

import dataclasses
from typing import Any

import jax

from jax_sft.models import decoder_specs, sizes
from jax_sft.models.sizes import Sizes
from jax_sft.nn import attention, decoder, layers
from jax_sft.nn.rope import Rope
from jax_sft.weights.hf_config import Fields
from jax_sft.weights.param_spec import ParamSpec


@dataclasses.dataclass(frozen=True)
class Config(Sizes):
    """Sizes and constants of one model, read from its config.json."""

    attention_bias: bool  # on q, k, v and out

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Config":
        """Read config.json; a field that this file does not implement raises ValueError."""
        fields = Fields(config)
        common = sizes.read(fields, head_dim=128)
        fields.known(*Rope.FIELDS)
        rope = Rope.from_hf(config, common["head_dim"])
        fields.only("use_qk_norm", True)  # Qwen3-Coder has this field
        fields.unused("sliding_window", "max_window_layers")  # used only with use_sliding_window
        cfg = cls(**common, rope=rope, attention_bias=fields.flag("attention_bias"))
        fields.done()
        return cfg


def weights(cfg: Config) -> tuple[ParamSpec, ...]:
    """Return the parameter specs of the model."""
    qk_norms = {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
    specs = [
        *decoder_specs.norms(decoder_specs.PRE_NORMS),
        *decoder_specs.attention(cfg.attention_bias, cfg.attention_bias),
        *decoder_specs.norms(qk_norms, layout="head_dim -> head_dim"),
        *decoder_specs.mlp(),
    ]
    return decoder_specs.decoder(specs, cfg.tied)


def Layer(cfg: Config, key) -> decoder.PreNorm:
    """Return a layer: attention, then SwiGLU."""
    attn, mlp = jax.random.split(key)
    norms = tuple(layers.RMSNorm(cfg.head_dim, eps=cfg.norm_eps) for _ in "qk")
    bias = cfg.attention_bias
    return decoder.PreNorm(
        cfg,
        attention.Attention(cfg, attn, bias=bias, out_bias=bias, norms=norms),
        layers.SwiGLU(cfg.features, cfg.mlp, mlp),
    )


def Model(cfg: Config, key) -> decoder.Decoder:
    """Return the model with newly initialized weights."""
    return decoder.Decoder(Layer, cfg, key)
