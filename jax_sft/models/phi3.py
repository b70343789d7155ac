"""Phi-3, Phi-3.5 and Phi-4 (arXiv:2404.14219): LongRoPE.

The files fuse q, k, v into one tensor and gate, up into another; the model keeps them separate.
"""

import dataclasses
from typing import Any

import jax

from jax_sft.models import decoder_specs, sizes
from jax_sft.models.sizes import Sizes
from jax_sft.nn import attention, decoder, layers
from jax_sft.nn.rope import Rope
from jax_sft.weights.hf_config import Fields
from jax_sft.weights.param_spec import ParamSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Sizes):
    """Sizes and constants of one model, read from its config.json."""

    window: int | None  # tokens visible to a token, including itself; None = its whole segment

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Config":
        """Read config.json; a field that this file does not implement raises ValueError."""
        fields = Fields(config)
        common = sizes.read(fields, norm_eps=1e-5)
        for dropout in ("resid_pdrop", "embd_pdrop"):
            fields.only(dropout, 0.0)
        for neutral in ("full_attn_mod", "interpolate_factor"):  # unused fields of Phi-4-mini
            fields.only(neutral, 1)
        cfg = cls(
            **common,
            rope=_rope(fields, config, common["head_dim"]),
            window=None if fields.get("sliding_window") is None else fields.size("sliding_window"),
        )
        fields.done()
        return cfg


def _rope(fields: Fields, config: dict[str, Any], head_dim: int) -> Rope:
    """Read the rotation as transformers does, with 4096 as default of the original length."""
    fields.known(*Rope.FIELDS)
    original = fields.size("original_max_position_embeddings", 4096)
    return Rope.from_hf(
        config | {"original_max_position_embeddings": original},
        head_dim,
        types={"default": "default", **dict.fromkeys(("longrope", "su", "yarn"), "longrope")},
        partial_rotary_factor=fields.get("partial_rotary_factor", 1.0),
    )


def weights(cfg: Config) -> tuple[ParamSpec, ...]:
    """Return the parameter specs of the model."""
    qkv = {
        "layers.attn.q": decoder_specs.TO_HEADS,
        "layers.attn.k": decoder_specs.TO_KV_HEADS,
        "layers.attn.v": decoder_specs.TO_KV_HEADS,
    }
    gate_up = {"layers.mlp.gate": decoder_specs.TO_MLP, "layers.mlp.up": decoder_specs.TO_MLP}
    attn, mlp = f"{decoder_specs.LAYER}self_attn.", f"{decoder_specs.LAYER}mlp."
    specs = [
        *decoder_specs.norms(decoder_specs.PRE_NORMS),
        *decoder_specs.fused(attn + "qkv_proj", qkv),
        *decoder_specs.linear("layers.attn.out", attn + "o_proj", decoder_specs.FROM_HEADS),
        *decoder_specs.fused(mlp + "gate_up_proj", gate_up),
        *decoder_specs.linear("layers.mlp.down", mlp + "down_proj", decoder_specs.FROM_MLP),
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
