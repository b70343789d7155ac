"""Sizes of a decoder, which every family's Config has, read from config.json."""

import dataclasses
from typing import Any, ClassVar

from jax_sft.nn.rope import Rope
from jax_sft.weights.hf_config import MAX_PARAMETERS, Fields


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes and constants of one model; a family's Config adds its own.

    Attributes:
        window: tokens visible to a token, including itself, in layers with a sliding window; None
            = every layer attends to whole segments.
        attention_soft_cap, logit_soft_cap: bounds of attention scores and logits; 0 = none.
    """

    vocab: int
    features: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp: int
    norm_eps: float
    tied: bool
    max_positions: int
    rope: Rope
    window: ClassVar[Any] = None
    attention_soft_cap: ClassVar[Any] = 0.0
    logit_soft_cap: ClassVar[Any] = 0.0

    def __post_init__(self):
        axis_sizes = self.axis_sizes
        heads = 2 * (axis_sizes["heads"] + axis_sizes["kv_heads"]) * axis_sizes["head_dim"]
        layer_size = heads + 3 * axis_sizes["mlp"] * axis_sizes.get("experts", 1)
        total = axis_sizes["embed"] * (axis_sizes["layers"] * layer_size + 2 * axis_sizes["vocab"])
        if total > MAX_PARAMETERS:
            raise ValueError(
                f"config.json: its sizes make {total:.1e} parameters, over {MAX_PARAMETERS:.1e}"
            )

    @property
    def longest(self) -> int:
        """Maximum tokens of an example: max_positions, or the longer reach of RoPE scaling."""
        return self.rope.reach or self.max_positions

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Size of each logical axis."""
        return {
            "vocab": self.vocab,
            "embed": self.features,
            "norm": self.features,
            "layers": self.num_layers,
            "heads": self.num_heads,
            "kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "mlp": self.mlp,
        }


def read(
    fields: Fields,
    *,
    head_dim: int | None = None,
    norm_eps: float = 1e-6,
    tied: bool = False,
    act: str = "silu",
    mlp: tuple[str, int | None] = ("intermediate_size", None),
) -> dict[str, Any]:
    """Return the arguments of `Sizes` except `rope`.

    Args:
        head_dim, norm_eps, tied: defaults of transformers if config.json lacks the field.
        act: activation of the MLP; any other is refused.
        mlp: (field of the MLP's inner size, its default).
    """
    fields.only("hidden_act", act)
    num_heads, num_kv_heads, head_dim = fields.heads(head_dim)
    return {
        "vocab": fields.size("vocab_size"),
        "features": fields.size("hidden_size"),
        "num_layers": fields.size("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "mlp": fields.size(*mlp),
        "norm_eps": fields.number("rms_norm_eps", norm_eps),
        "tied": fields.flag("tie_word_embeddings", tied),
        "max_positions": fields.size("max_position_embeddings"),
    }
