"""Gemma 2 (arXiv:2408.00118).

Layers with and without a sliding window, norms before and after attention and MLP, soft caps on
attention scores and logits.
"""

import dataclasses
from typing import Any

import jax

from jax_sft.models import decoder_specs, sizes
from jax_sft.models.sizes import Sizes
from jax_sft.nn import attention, decoder, layers
from jax_sft.nn.rope import Rope
from jax_sft.weights.hf_config import LAYER_TYPES, Fields
from jax_sft.weights.param_spec import ParamSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Sizes):
    """Sizes and constants of one model, read from its config.json."""

    attention_bias: bool  # on q, k, v and out
    windowed: tuple[bool, ...]  # whether each layer uses the sliding window
    window: int | None  # tokens visible to a token, including itself; None = no windowed layer
    query_scale: float  # factor on the attention scores
    attention_soft_cap: float
    logit_soft_cap: float

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Config":
        """Read config.json; a field that this file does not implement raises ValueError."""
        fields = Fields(config)
        gelu = "gelu_pytorch_tanh"
        common = sizes.read(fields, head_dim=256, tied=True, act=gelu)
        fields.only("hidden_activation", gelu)
        fields.known(*Rope.FIELDS)
        windowed, window = fields.windows(
            # Every second layer attends to whole segments.
            [LAYER_TYPES[(n + 1) % 2] for n in range(common["num_layers"])],
            window=4096,
        )
        # Published config.json files also have this older name.
        fields.only("sliding_window_size", fields.get("sliding_window", 4096))
        cfg = cls(
            **common,
            rope=Rope.from_hf(config, common["head_dim"]),
            attention_bias=fields.flag("attention_bias"),
            windowed=windowed,
            window=window,
            query_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
            attention_soft_cap=fields.soft_cap("attn_logit_softcapping", 50.0),
            logit_soft_cap=fields.soft_cap("final_logit_softcapping", 30.0),
        )
        fields.done()
        return cfg

    @property
    def ropes(self) -> tuple[Rope]:
        """Rotation of all layers, as a tuple of one."""
        return (self.rope,)


def weights(cfg: Config) -> tuple[ParamSpec, ...]:
    """Return the parameter specs of the model."""
    norms = {
        "attn_norm": "input_layernorm",
        "attn_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    }
    specs = [
        *decoder_specs.norms(norms, "offset"),
        *decoder_specs.attention(cfg.attention_bias, cfg.attention_bias),
        *decoder_specs.mlp(),
    ]
    return decoder_specs.decoder(specs, cfg.tied, "offset")


def Layer(cfg: Config, key) -> decoder.PrePostNorm:
    """Return a layer: attention with capped scores, then GeGLU."""
    attn, mlp = jax.random.split(key)
    bias = cfg.attention_bias
    return decoder.PrePostNorm(
        cfg,
        attention.Attention(cfg, attn, bias=bias, out_bias=bias, scale=cfg.query_scale),
        layers.GeGLU(cfg.features, cfg.mlp, mlp),
    )


def Model(cfg: Config, key) -> decoder.GemmaDecoder:
    """Return the model with newly initialized weights."""
    return decoder.GemmaDecoder(Layer, cfg, key)
