"""Llama 2, Llama 3.x, SmolLM2, Yi and other models of type llama: biases are optional."""

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
    mlp_bias: bool

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Config":
        """Read config.json; a field that this file does not implement raises ValueError."""
        fields = Fields(config)
        common = sizes.read(fields)
        fields.known(*Rope.FIELDS)
        rope = Rope.from_hf(config, common["head_dim"])
        # Number of slices of each matmul in older versions of transformers, with the same result.
        fields.unused("pretraining_tp")
        attention_bias, mlp_bias = fields.flag("attention_bias"), fields.flag("mlp_bias")
        cfg = cls(**common, rope=rope, attention_bias=attention_bias, mlp_bias=mlp_bias)
        fields.done()
        return cfg


def weights(cfg: Config) -> tuple[ParamSpec, ...]:
    """Return the parameter specs of the model."""
    specs = [
        *decoder_specs.norms(decoder_specs.PRE_NORMS),
        *decoder_specs.attention(cfg.attention_bias, cfg.attention_bias),
        *decoder_specs.mlp(cfg.mlp_bias),
    ]
    return decoder_specs.decoder(specs, cfg.tied)


def Layer(cfg: Config, key) -> decoder.PreNorm:
    """Return a layer: attention, then SwiGLU."""
    attn, mlp = jax.random.split(key)
    return decoder.PreNorm(
        cfg,
        attention.Attention(cfg, attn, bias=cfg.attention_bias, out_bias=cfg.attention_bias),
        layers.SwiGLU(cfg.features, cfg.mlp, mlp, cfg.mlp_bias),
    )


def Model(cfg: Config, key) -> decoder.Decoder:
    """Return the model with newly initialized weights."""
    return decoder.Decoder(Layer, cfg, key)
