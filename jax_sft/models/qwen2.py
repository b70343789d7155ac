"""Qwen2, Qwen2.5 and their Coder and Math versions: biases on q, k, v only."""

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

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Config":
        """Read config.json; a field that this file does not implement raises ValueError."""
        fields = Fields(config)
        common = sizes.read(fields)
        fields.known(*Rope.FIELDS)
        rope = Rope.from_hf(config, common["head_dim"])
        fields.unused("sliding_window", "max_window_layers")  # used only with use_sliding_window
        cfg = cls(**common, rope=rope)
        fields.done()
        return cfg


def weights(cfg: Config) -> tuple[ParamSpec, ...]:
    """Return the parameter specs of the model."""
    specs = [
        *decoder_specs.norms(decoder_specs.PRE_NORMS),
        *decoder_specs.attention(bias=True),
        *decoder_specs.mlp(),
    ]
    return decoder_specs.decoder(specs, cfg.tied)


def Layer(cfg: Config, key) -> decoder.PreNorm:
    """Return a layer: attention, then SwiGLU."""
    attn, mlp = jax.random.split(key)
    return decoder.PreNorm(
        cfg,
        attention.Attention(cfg, attn, bias=True),
        layers.SwiGLU(cfg.features, cfg.mlp, mlp),
    )


def Model(cfg: Config, key) -> decoder.Decoder:
    """Return the model with newly initialized weights."""
    return decoder.Decoder(Layer, cfg, key)
