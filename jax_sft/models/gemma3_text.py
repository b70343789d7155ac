"""Gemma 3's language model (arXiv:2503.19786): like Gemma 2, with three differences.

Each head of q and k has a norm, layers with the sliding window have their own RoPE frequencies, and
attention scores are not capped.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_sft.models import decoder_specs, sizes
from jax_sft.models.sizes import Sizes
from jax_sft.nn import attention, decoder, layers
from jax_sft.nn.rope import Rope
from jax_sft.weights.hf_config import LAYER_TYPES, Fields, shown
from jax_sft.weights.param_spec import ParamSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Sizes):
    """Sizes and constants of one model, read from its config.json."""

    attention_bias: bool  # on q, k, v and out
    window_rope: Rope  # rotation of windowed layers; `rope` is that of the other layers
    windowed: tuple[bool, ...]  # whether each layer uses the sliding window
    window: int | None  # tokens visible to a token, including itself; None = no windowed layer
    query_scale: float  # factor on the attention scores
    logit_soft_cap: float

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Config":
        """Read config.json; a field that this file does not implement raises ValueError."""
        fields = Fields(config)
        gelu = "gelu_pytorch_tanh"
        common = sizes.read(fields, head_dim=256, tied=True, act=gelu)
        fields.only("hidden_activation", gelu)
        # Only the last layer of the pattern attends to whole segments.
        pattern = fields.size("sliding_window_pattern", 6)
        windowed, window = fields.windows(
            [LAYER_TYPES[(n + 1) % pattern > 0] for n in range(common["num_layers"])], window=4096
        )
        rope, window_rope = _ropes(fields, common["head_dim"])
        cfg = cls(
            **common,
            rope=rope,
            window_rope=window_rope,
            attention_bias=fields.flag("attention_bias"),
            windowed=windowed,
            window=window,
            query_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
            logit_soft_cap=fields.soft_cap("final_logit_softcapping"),
        )
        fields.done()
        return cfg

    @property
    def ropes(self) -> tuple[Rope, Rope]:
        """Rotations of layers without and with the window."""
        return self.rope, self.window_rope


def _ropes(fields: Fields, head_dim: int) -> tuple[Rope, Rope]:
    """Read the rotations of layers without and with the window.

    In transformers 5, rope_parameters has one object per layer type. In older versions, rope_theta
    and rope_scaling apply to layers without the window, rope_local_base_freq to those with it.

    Raises:
        ValueError: rope_parameters is one flat object, or `Rope.from_hf` refuses the fields.
    """
    newer = fields.get("rope_parameters", {})
    if not isinstance(newer, dict) or newer.keys() - set(LAYER_TYPES):
        raise ValueError(
            f"config.json: rope_parameters = {shown(newer)} must have one object for each of "
            f"{LAYER_TYPES}"
        )

    def rope(kind: str, **older) -> Rope:
        older["max_position_embeddings"] = fields.size("max_position_embeddings")
        rope = Rope.from_hf(older | {"rope_parameters": newer.get(kind)}, head_dim)
        # Gemma 3 scales by 8, and max_position_embeddings already is the scaled length.
        return dataclasses.replace(rope, reach=0)

    scaling, theta = fields.get("rope_scaling"), fields.number("rope_theta", 1e6)
    window_theta = fields.number("rope_local_base_freq", 1e4)
    return (
        rope("full_attention", rope_scaling=scaling, rope_theta=theta),
        rope("sliding_attention", rope_theta=window_theta),
    )


def weights(cfg: Config) -> tuple[ParamSpec, ...]:
    """Return the parameter specs of the model."""
    norms = {
        "attn_norm": "input_layernorm",
        "attn_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    }
    qk_norms = {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
    specs = [
        *decoder_specs.norms(norms, "offset"),
        *decoder_specs.attention(cfg.attention_bias, cfg.attention_bias),
        *decoder_specs.norms(qk_norms, "offset", "head_dim -> head_dim"),
        *decoder_specs.mlp(),
    ]
    return decoder_specs.decoder(specs, cfg.tied, "offset")


class Layer(decoder.PrePostNorm):
    """Attention, with the rotation of the layer's type, then GeGLU."""

    def __init__(self, cfg: Config, key):
        attn, mlp = jax.random.split(key)
        norms = tuple(layers.CenteredRMSNorm(cfg.head_dim, eps=cfg.norm_eps) for _ in "qk")
        options = {"bias": cfg.attention_bias, "out_bias": cfg.attention_bias}
        super().__init__(
            cfg,
            attention.Attention(cfg, attn, **options, norms=norms, scale=cfg.query_scale),
            layers.GeGLU(cfg.features, cfg.mlp, mlp),
        )

    def __call__(self, x_BTD, windowed, full_angles, window_angles, *context):
        angles = jax.tree.map(functools.partial(jnp.where, windowed), window_angles, full_angles)
        return super().__call__(x_BTD, windowed, angles, *context)


def Model(cfg: Config, key) -> decoder.GemmaDecoder:
    """Return the model with newly initialized weights."""
    return decoder.GemmaDecoder(Layer, cfg, key)
