"""Weight rows of decoders: the parts of which a family builds its `weights`.

A family names its norms and layers here; `weights.param_spec` describes one parameter.
"""

import dataclasses
from collections.abc import Iterable

from jax_sft.weights.param_spec import Weight

LAYER = "model.layers.{layers}."
PRE_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
TO_HEADS = "(heads head_dim) embed -> embed heads head_dim"
TO_KV_HEADS = "(kv_heads head_dim) embed -> embed kv_heads head_dim"
FROM_HEADS = "embed (heads head_dim) -> embed heads head_dim"
TO_EXPERTS = "experts embed -> embed experts"
TO_MLP, FROM_MLP = "mlp embed -> embed mlp", "embed mlp -> embed mlp"


def linear(path: str, hf: str, layout: str, bias: bool = False) -> list[Weight]:
    """Return the rows of a linear layer: its kernel and, if it has one, its bias.

    Args:
        path, hf: of the layer, without ".kernel" and ".weight".
        layout: of the kernel. The bias has its first HF dimension, that of the outputs.
    """
    rows = [Weight(f"{path}.kernel", f"{hf}.weight", layout)]
    if bias:
        # The model dimension of a vector is called "norm".
        outputs = ["norm" if axis == "embed" else axis for axis in rows[0].factors[0]]
        ours = " ".join(outputs)
        rows.append(Weight(f"{path}.bias", f"{hf}.bias", f"({ours}) -> {ours}"))
    return rows


def fused(hf: str, layouts: dict[str, str]) -> list[Weight]:
    """Return the rows of linear layers whose kernels lie one after the other in one HF tensor.

    Args:
        hf: of the tensor, without ".weight".
        layouts: {path of a layer: layout of its kernel}, in their order there.
    """
    rows = [Weight(f"{path}.kernel", f"{hf}.weight", layout) for path, layout in layouts.items()]
    firsts = tuple(" ".join(row.factors[0]) for row in rows)
    return [dataclasses.replace(row, fused=firsts, place=place) for place, row in enumerate(rows)]


def decoder(rows: Iterable[Weight], tied: bool, norm: str = "scale") -> tuple[Weight, ...]:
    """Return the rows of a decoder: of its layers, and of embedding, final norm and, if any, head.

    Args:
        rows: of the layers.
        norm: the parameter of norms.
    """
    head = Weight("head.table", "lm_head.weight", "vocab embed -> embed vocab")
    return (
        Weight("embed.table", "model.embed_tokens.weight", "vocab embed -> vocab embed"),
        Weight(f"final_norm.{norm}", "model.norm.weight", "norm -> norm"),
        *rows,
        *([] if tied else [head]),
    )


def norms(names: dict[str, str], norm: str = "scale", layout: str = "norm -> norm") -> list[Weight]:
    """Return the rows of norms {path in a layer: name in a Hugging Face layer}."""
    return [
        Weight(f"layers.{ours}.{norm}", f"{LAYER}{theirs}.weight", layout)
        for ours, theirs in names.items()
    ]


def attention(bias: bool = False, out_bias: bool = False) -> list[Weight]:
    """Return the rows of `attention.Attention`, without norms."""
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
) -> list[Weight]:
    """Return the rows of a gated MLP, or of one per expert.

    Args:
        within: its place in a Hugging Face layer.
        names: of gate, up and down there.
    """
    gate, up, down = (f"{LAYER}{within}{name}" for name in names)
    return [
        *linear("layers.mlp.gate", gate, TO_MLP, bias),
        *linear("layers.mlp.up", up, TO_MLP, bias),
        *linear("layers.mlp.down", down, FROM_MLP, bias),
    ]
