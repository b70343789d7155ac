"""Build the parameter specs of decoders from parts that the families' `weights` share.

A family combines specs of norms and layers, see `weights.param_spec`.
"""

import dataclasses
from collections.abc import Iterable

from jax_sft.weights.param_spec import ParamSpec

LAYER = "model.layers.{layers}."
PRE_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
TO_HEADS = "(heads head_dim) embed -> embed heads head_dim"
TO_KV_HEADS = "(kv_heads head_dim) embed -> embed kv_heads head_dim"
FROM_HEADS = "embed (heads head_dim) -> embed heads head_dim"
TO_EXPERTS = "experts embed -> embed experts"
TO_MLP, FROM_MLP = "mlp embed -> embed mlp", "embed mlp -> embed mlp"


def linear(path: str, hf: str, layout: str, bias: bool = False) -> list[ParamSpec]:
    """Return the specs of a linear layer: its kernel and, if it has one, its bias.

    Args:
        path, hf: path and HF name of the layer, without ".kernel" and ".weight".
        layout: layout of the kernel. The bias has its first HF dimension, which is the output.
    """
    specs = [ParamSpec(f"{path}.kernel", f"{hf}.weight", layout)]
    if bias:
        # The model dimension of a vector is called "norm".
        outputs = ["norm" if axis == "embed" else axis for axis in specs[0].factors[0]]
        axes = " ".join(outputs)
        specs.append(ParamSpec(f"{path}.bias", f"{hf}.bias", f"({axes}) -> {axes}"))
    return specs


def fused(hf: str, layouts: dict[str, str]) -> list[ParamSpec]:
    """Return the specs of linear layers whose kernels are concatenated in one HF tensor.

    Args:
        hf: name of the tensor, without ".weight".
        layouts: {path of a layer: layout of its kernel}, in the order of the tensor.
    """
    specs = [
        ParamSpec(f"{path}.kernel", f"{hf}.weight", layout) for path, layout in layouts.items()
    ]
    firsts = tuple(" ".join(spec.factors[0]) for spec in specs)
    return [
        dataclasses.replace(spec, fused=firsts, place=place) for place, spec in enumerate(specs)
    ]


def decoder(specs: Iterable[ParamSpec], tied: bool, norm: str = "scale") -> tuple[ParamSpec, ...]:
    """Return the specs of a decoder: embedding, final norm, layers and, unless tied, the head.

    Args:
        specs: specs of the layers.
        norm: name of the parameter of norms.
    """
    head = ParamSpec("head.table", "lm_head.weight", "vocab embed -> embed vocab")
    return (
        ParamSpec("embed.table", "model.embed_tokens.weight", "vocab embed -> vocab embed"),
        ParamSpec(f"final_norm.{norm}", "model.norm.weight", "norm -> norm"),
        *specs,
        *([] if tied else [head]),
    )


def norms(
    names: dict[str, str], norm: str = "scale", layout: str = "norm -> norm"
) -> list[ParamSpec]:
    """Return the specs of norms {path in a layer: name in a Hugging Face layer}."""
    return [
        ParamSpec(f"layers.{path}.{norm}", f"{LAYER}{name}.weight", layout)
        for path, name in names.items()
    ]


def attention(bias: bool = False, out_bias: bool = False) -> list[ParamSpec]:
    """Return the specs of `attention.Attention`, without norms."""
    return [
        *linear("layers.attn.q", f"{LAYER}self_attn.q_proj", TO_HEADS, bias),
        *linear("layers.attn.k", f"{LAYER}self_attn.k_proj", TO_KV_HEADS, bias),
        *linear("layers.attn.v", f"{LAYER}self_attn.v_proj", TO_KV_HEADS, bias),
        *linear("layers.attn.out", f"{LAYER}self_attn.o_proj", FROM_HEADS, out_bias),
    ]


def mlp(
    bias: bool = False,
    within: str = "mlp.",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> list[ParamSpec]:
    """Return the specs of a gated MLP, or of an MLP per expert.

    Args:
        within: prefix of the MLP in a Hugging Face layer.
        names: Hugging Face names of gate, up and down.
    """
    gate, up, down = (f"{LAYER}{within}{name}" for name in names)
    return [
        *linear("layers.mlp.gate", gate, TO_MLP, bias),
        *linear("layers.mlp.up", up, TO_MLP, bias),
        *linear("layers.mlp.down", down, FROM_MLP, bias),
    ]
