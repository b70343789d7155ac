"""Qwen3-MoE: the attention of Qwen3, with experts instead of the MLP in every layer."""

import dataclasses
from typing import Any

import jax

from jax_sft.models import decoder_specs, sizes
from jax_sft.models.sizes import Sizes
from jax_sft.nn import attention, decoder, experts, layers
from jax_sft.nn.rope import Rope
from jax_sft.weights.hf_config import Fields
from jax_sft.weights.param_spec import ParamSpec


@dataclasses.dataclass(frozen=True)
class Config(Sizes):
    """Sizes and constants of one model, read from its config.json."""

    attention_bias: bool  # on q, k, v and out
    num_experts: int
    num_chosen: int  # experts per token
    router_aux: float  # weight of the load-balancing loss
    normalize: bool  # whether the weights of the chosen experts sum to 1

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Config":
        """Read config.json; a field that this file does not implement raises ValueError."""
        fields = Fields(config)
        common = sizes.read(fields, mlp=("moe_intermediate_size", 768))
        fields.known(*Rope.FIELDS)
        fields.only("use_qk_norm", True)  # Qwen3-Coder has this field
        fields.unused("sliding_window", "max_window_layers")  # used only with use_sliding_window
        # Other values mix sparse and dense layers; only dense layers use intermediate_size.
        fields.only("decoder_sparse_step", 1)
        fields.only("mlp_only_layers", [])
        fields.unused("intermediate_size")
        num_experts, num_chosen, router_aux = experts.read(fields, default=(128, 8))
        cfg = cls(
            **common,
            rope=Rope.from_hf(config, common["head_dim"]),
            attention_bias=fields.flag("attention_bias"),
            num_experts=num_experts,
            num_chosen=num_chosen,
            normalize=fields.flag("norm_topk_prob"),
            router_aux=router_aux,
        )
        fields.done()
        return cfg

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Size of each logical axis."""
        return super().axis_sizes | {"experts": self.num_experts, "chosen": self.num_chosen}


def weights(cfg: Config) -> tuple[ParamSpec, ...]:
    """Return the parameter specs of the model."""
    qk_norms = {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
    specs = [
        *decoder_specs.norms(decoder_specs.PRE_NORMS),
        *decoder_specs.attention(cfg.attention_bias, cfg.attention_bias),
        *decoder_specs.norms(qk_norms, layout="head_dim -> head_dim"),
        *decoder_specs.linear(
            "layers.mlp.router", f"{decoder_specs.LAYER}mlp.gate", decoder_specs.TO_EXPERTS
        ),
        *decoder_specs.mlp(within="mlp.experts.{experts}."),
    ]
    return decoder_specs.decoder(specs, cfg.tied)


def Layer(cfg: Config, key) -> experts.Layer:
    """Return a layer: attention, then the experts."""
    attn, mlp = jax.random.split(key)
    norms = tuple(layers.RMSNorm(cfg.head_dim, eps=cfg.norm_eps) for _ in "qk")
    bias = cfg.attention_bias
    sizes = cfg.features, cfg.mlp, cfg.num_experts, cfg.num_chosen
    return experts.Layer(
        cfg,
        attention.Attention(cfg, attn, bias=bias, out_bias=bias, norms=norms),
        experts.MoE(*sizes, normalize=cfg.normalize, key=mlp),
    )


def Model(cfg: Config, key) -> decoder.Decoder:
    """Return the model with newly initialized weights."""
    return decoder.Decoder(Layer, cfg, key)
