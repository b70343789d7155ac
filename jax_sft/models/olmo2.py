"""OLMo 2 (arXiv:2501.00656): norms after attention and MLP, one norm over all heads of q."""

import dataclasses
from typing import Any

import jax
from flax import nnx

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
        common = sizes.read(fields, norm_eps=1e-5)
        fields.known(*Rope.FIELDS)
        rope = Rope.from_hf(config, common["head_dim"])
        cfg = cls(**common, rope=rope, attention_bias=fields.flag("attention_bias"))
        fields.done()
        return cfg


def weights(cfg: Config) -> tuple[ParamSpec, ...]:
    """Return the parameter specs of the model."""
    norms = {
        "attn_norm": "post_attention_layernorm",
        "mlp_norm": "post_feedforward_layernorm",
    }
    specs = [
        *decoder_specs.norms(norms),
        *decoder_specs.attention(cfg.attention_bias, cfg.attention_bias),
        *decoder_specs.norms(
            {"attn.q_norm": "self_attn.q_norm"}, layout="(heads head_dim) -> heads head_dim"
        ),
        *decoder_specs.norms(
            {"attn.k_norm": "self_attn.k_norm"}, layout="(kv_heads head_dim) -> kv_heads head_dim"
        ),
        *decoder_specs.mlp(),
    ]
    return decoder_specs.decoder(specs, cfg.tied)


class Layer(nnx.Module):
    """Residual block: attention, then SwiGLU, each with a norm on its output."""

    def __init__(self, cfg: Config, key):
        attn, mlp = jax.random.split(key)
        norms = tuple(
            layers.RMSNorm(heads, cfg.head_dim, eps=cfg.norm_eps)
            for heads in (cfg.num_heads, cfg.num_kv_heads)
        )
        bias = cfg.attention_bias
        self.attn = attention.Attention(cfg, attn, bias=bias, out_bias=bias, norms=norms)
        self.attn_norm = layers.RMSNorm(cfg.features, eps=cfg.norm_eps)
        self.mlp = layers.SwiGLU(cfg.features, cfg.mlp, mlp)
        self.mlp_norm = layers.RMSNorm(cfg.features, eps=cfg.norm_eps)

    def __call__(self, x_BTD, *context):
        x_BTD += self.attn_norm(layers.residual(self.attn(layers.whole(x_BTD), *context)))
        return x_BTD + self.mlp_norm(layers.residual(self.mlp(layers.whole(x_BTD))))


def Model(cfg: Config, key) -> decoder.Decoder:
    """Return the model with newly initialized weights."""
    return decoder.Decoder(Layer, cfg, key)
