"""Mistral 7B, Nemo and Small: no biases; the first versions have a sliding window."""

import dataclasses
from typing import Any

import jax

from jax_sft.models import decoder_specs, sizes
from jax_sft.models.sizes import Sizes
from jax_sft.nn import attention, decoder, layers
from jax_sft.nn.rope import Rope
from jax_sft.weights.hf_config import Fields, shown
from jax_sft.weights.param_spec import ParamSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Sizes):
    """Sizes and constants of one model, read from its config.json."""

    window: int | None  # tokens visible to a token, including itself; None = its whole segment

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Config":
        """Read config.json; a field that this file does not implement raises ValueError."""
        fields = Fields(config)
        common = sizes.read(fields)
        fields.known(*Rope.FIELDS)
        rope = Rope.from_hf(config, common["head_dim"])
        cfg = cls(**common, rope=rope, window=_window(fields, config))
        fields.done()
        return cfg


def _window(fields: Fields, config: dict[str, Any]) -> int | None:
    """Read sliding_window as transformers does: the default is 4096, null means no window."""
    none = "sliding_window" in config and config["sliding_window"] is None
    window = None if none else fields.size("sliding_window", 4096)
    kind = "full_attention" if none else "sliding_attention"
    kinds = fields.get("layer_types", [])
    if not isinstance(kinds, list) or any(entry != kind for entry in kinds):
        raise ValueError(
            f"config.json: layer_types = {shown(kinds)} does not go with sliding_window = "
            f"{window}, which alone decides in mistral: leave it out, or write {kind!r} for every "
            "layer"
        )
    return window


def weights(cfg: Config) -> tuple[ParamSpec, ...]:
    """Return the parameter specs of the model."""
    specs = [
        *decoder_specs.norms(decoder_specs.PRE_NORMS),
        *decoder_specs.attention(),
        *decoder_specs.mlp(),
    ]
    return decoder_specs.decoder(specs, cfg.tied)


def Layer(cfg: Config, key) -> decoder.PreNorm:
    """Return a layer: attention, then SwiGLU."""
    attn, mlp = jax.random.split(key)
    return decoder.PreNorm(
        cfg,
        attention.Attention(cfg, attn),
        layers.SwiGLU(cfg.features, cfg.mlp, mlp),
    )


def Model(cfg: Config, key) -> decoder.Decoder:
    """Return the model with newly initialized weights."""
    return decoder.Decoder(Layer, cfg, key)
