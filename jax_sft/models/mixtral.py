"""Mixtral: the attention of Mistral, with experts instead of the MLP in every layer."""

import dataclasses
from typing import Any

import jax

from jax_sft.models import decoder_specs, sizes
from jax_sft.models.sizes import Sizes
from jax_sft.nn import attention, decoder, experts
from jax_sft.nn.rope import Rope
from jax_sft.weights.hf_config import Fields
from jax_sft.weights.param_spec import ParamSpec

DEFAULT_THETA = 1e6  # transformers' rope_theta for a config.json without one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Sizes):
    """Sizes and constants of one model, read from its config.json."""

    num_experts: int
    num_chosen: int  # experts per token
    router_aux: float  # weight of the load-balancing loss
    window: int | None  # tokens visible to a token, including itself; None = its whole segment

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Config":
        """Read config.json; a field that this file does not implement raises ValueError."""
        fields = Fields(config)
        theta = {"rope_theta": fields.get("rope_theta", DEFAULT_THETA)}
        common = sizes.read(fields, norm_eps=1e-5)
        fields.known(*Rope.FIELDS)
        fields.only("router_jitter_noise", 0.0)
        num_experts, num_chosen, router_aux = experts.read(fields, default=(8, 2))
        cfg = cls(
            **common,
            rope=Rope.from_hf(config | theta, common["head_dim"]),
            num_experts=num_experts,
            num_chosen=num_chosen,
            router_aux=router_aux,
            window=None if fields.get("sliding_window") is None else fields.size("sliding_window"),
        )
        fields.done()
        return cfg

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Size of each logical axis."""
        return super().axis_sizes | {"experts": self.num_experts, "chosen": self.num_chosen}


def weights(cfg: Config) -> tuple[ParamSpec, ...]:
    """Return the parameter specs of the model."""
    specs = [
        *decoder_specs.norms(decoder_specs.PRE_NORMS),
        *decoder_specs.attention(),
        *decoder_specs.linear(
            "layers.mlp.router",
            f"{decoder_specs.LAYER}block_sparse_moe.gate",
            decoder_specs.TO_EXPERTS,
        ),
        *decoder_specs.mlp(within="block_sparse_moe.experts.{experts}.", names=("w1", "w3", "w2")),
    ]
    return decoder_specs.decoder(specs, cfg.tied)


def Layer(cfg: Config, key) -> experts.Layer:
    """Return a layer: attention, then the experts."""
    attn, mlp = jax.random.split(key)
    sizes = cfg.features, cfg.mlp, cfg.num_experts, cfg.num_chosen
    return experts.Layer(
        cfg, attention.Attention(cfg, attn), experts.MoE(*sizes, normalize=True, key=mlp)
    )


def Model(cfg: Config, key) -> decoder.Decoder:
    """Return the model with newly initialized weights."""
    return decoder.Decoder(Layer, cfg, key)
