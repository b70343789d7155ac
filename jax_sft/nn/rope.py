"""Rotary position embedding: frequencies of every supported variant, and the rotation.

Formulas follow transformers' `modeling_rope_utils.py`; sources are named at each variant.
"""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jax_sft.weights.hf_config import NUMBERS, is_number, number, same, shown, size

_TABLES = ("short_factor", "long_factor")  # lists among the rope parameters
TYPES = ("default", "linear", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Inverse frequencies (tuples, so that a Rope is hashable) and the cos/sin factor.

    Attributes:
        inv_freq: [rotated dimensions of a head / 2].
        long_inv_freq: inv_freq for segments of more than `longest_short` tokens; empty = inv_freq.
        reach: longest segment in tokens that the scaling is for; 0 = max_position_embeddings.
    """

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0
    long_inv_freq: tuple[float, ...] = ()
    longest_short: int = 0
    reach: int = 0
    FIELDS: ClassVar[tuple[str, ...]] = (  # of config.json
        *("rope_parameters", "rope_scaling", "rope_theta"),
        "original_max_position_embeddings",
    )

    @classmethod
    def from_hf(
        cls,
        config: dict[str, Any],
        head_dim: int,
        types: Mapping[str, str] = MappingProxyType({name: name for name in TYPES}),
        partial_rotary_factor: Any = None,
    ) -> "Rope":
        """Read `rope_parameters` (transformers 5) or `rope_scaling` with `rope_theta` (older).

        Args:
            types: {type in config.json: one of TYPES}.
            partial_rotary_factor: share of a head's dimensions, the first ones, that is rotated.
                The rope parameters may override it. None = only full rotation is supported.

        Raises:
            ValueError: a rope type is unknown, or one of its fields is missing, unknown or out of
                range.
        """
        scaling = _scaling(config)
        kind = _kind(scaling, types)
        inside = scaling.pop("rope_theta", None)
        theta = config.get("rope_theta") if inside is None else inside
        theta = number("rope_theta", 10000.0 if theta is None else theta)
        share = scaling.pop("partial_rotary_factor", partial_rotary_factor)
        if partial_rotary_factor is not None:
            head_dim = _rotated(head_dim, share)
        elif share is not None and not same(share, 1):
            raise ValueError(
                f"config.json: partial_rotary_factor = {shown(share)} is not supported: use 1"
            )
        for name, value in scaling.items():
            _check(name, value)
        max_positions = size("max_position_embeddings", config["max_position_embeddings"])
        original = _original(config, scaling)
        reach = _reach(kind, scaling, max_positions, original)
        if kind in ("llama3", "yarn", "longrope"):
            scaling["original_max_position_embeddings"] = original or max_positions
        inv_freq = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        factor, long_inv_freq, longest_short = 1.0, np.array(()), 0
        try:
            if kind == "linear":  # Chen et al. 2023, arXiv:2306.15595
                inv_freq = inv_freq / scaling.pop("factor")
            elif kind == "llama3":
                inv_freq = _llama3(inv_freq, scaling)
            elif kind == "yarn":
                inv_freq, factor = _yarn(inv_freq, scaling, theta, head_dim, max_positions)
            elif kind == "longrope":
                longest_short = scaling["original_max_position_embeddings"]
                short, long = (_divisors(name, scaling, head_dim) for name in _TABLES)
                inv_freq, long_inv_freq = inv_freq / short, inv_freq / long
                factor = _longrope_factor(scaling, max_positions)
            else:  # transformers leaves the fields of no-op scalings in place
                scaling = {k: v for k, v in scaling.items() if k not in {*NUMBERS, "truncate"}}
        except KeyError as missing:
            raise ValueError(f"config.json: rope type {kind!r} needs the field {missing}") from None
        if scaling:
            raise ValueError(f"config.json: rope type {kind!r} does not implement {shown(scaling)}")
        short, long = (tuple(x.astype(np.float32).tolist()) for x in (inv_freq, long_inv_freq))
        return cls(short, factor, long, longest_short, reach)

    def angles(
        self, positions_BT: jax.Array, segment_ids_BT: jax.Array, max_segments: int
    ) -> tuple[jax.Array, jax.Array]:
        """Return (cos, sin), each float32 [B, T, 1, R/2] for R rotated dimensions.

        For LongRoPE, transformers uses the longest sequence of the batch. This function uses the
        length of each segment, so that the result does not depend on the rest of the row or batch.

        Args:
            positions_BT: int, positions within the segments.
            segment_ids_BT: int, in 0..max_segments.
        """
        inv_freq = jnp.array(self.inv_freq)
        if self.long_inv_freq:
            is_long_BT = _has_position(
                self.longest_short, positions_BT, segment_ids_BT, max_segments
            )
            inv_freq = jnp.where(is_long_BT[..., None], jnp.array(self.long_inv_freq), inv_freq)
        # Always float32, since bfloat16 rounds position 257 to 256.
        angles_BTH = positions_BT[..., None].astype(jnp.float32) * inv_freq
        cos, sin = jnp.cos(angles_BTH), jnp.sin(angles_BTH)
        return (cos * self.attention_factor)[:, :, None], (sin * self.attention_factor)[:, :, None]


def rotate(x_BTNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate each head's halves (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), in float32.

    The halves are contiguous, as in Hugging Face's weights (not interleaved, as in Meta's). Only
    the first dimensions, those that have angles, are rotated. The others are unchanged.
    """
    cos, sin = angles
    half = cos.shape[-1]
    x1, x2, rest = jnp.split(x_BTNH.astype(jnp.float32), [half, 2 * half], axis=-1)
    rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def _has_position(position: int, positions_BT, segment_ids_BT, max_segments: int) -> jax.Array:
    """Return whether the segment of each token has a token at or after this position, [B, T]."""
    is_after_BT = positions_BT >= position
    # A comparison with every segment, which XLA fuses, instead of a scatter.
    is_of_BST = segment_ids_BT[:, None] == jnp.arange(max_segments + 1)[:, None]
    reaches_BS = (is_of_BST & is_after_BT[:, None]).any(axis=-1)
    return jnp.take_along_axis(reaches_BS, segment_ids_BT, axis=1)


def _scaling(config: dict[str, Any]) -> dict[str, Any]:
    """Return the rope parameters that are not null, from either of the two fields."""
    given = [config.get(name) for name in ("rope_parameters", "rope_scaling")]
    for name, scaling in zip(("rope_parameters", "rope_scaling"), given, strict=True):
        is_flat = isinstance(scaling, dict) and not any(
            isinstance(value, dict) for value in scaling.values()
        )
        if scaling is not None and not is_flat:
            raise ValueError(
                f"config.json: rope parameters {name} = {shown(scaling)} must be one flat object"
            )
    newer, older = given
    if newer and older and newer != older:
        raise ValueError("config.json has both rope_parameters and rope_scaling: keep one")
    return {key: value for key, value in (newer or older or {}).items() if value is not None}


def _kind(scaling: dict[str, Any], types: Mapping[str, str]) -> str:
    """Pop the type from the rope parameters; it has an older and a newer name."""
    kinds = [scaling.pop(name) for name in ("rope_type", "type") if name in scaling]
    for kind in kinds:
        if not isinstance(kind, str) or kind not in types:
            raise ValueError(f"config.json: rope type {shown(kind)} is not one of {[*types]}")
    if len({types[kind] for kind in kinds}) > 1:
        raise ValueError(
            f"config.json: rope_type = {kinds[0]!r}, but type = {kinds[1]!r}: keep the right one"
        )
    return types[kinds[0]] if kinds else "default"


def _check(name: str, value: Any) -> None:
    """Raise ValueError for a rope parameter out of range; `_divisors` checks lists."""
    if name == "original_max_position_embeddings":
        size(name, value)
    elif name == "truncate":
        if not isinstance(value, bool):
            raise ValueError(f"config.json: truncate = {shown(value)} must be true or false")
    elif name in NUMBERS and name not in _TABLES:
        number(name, value)


def _original(config: dict[str, Any], scaling: dict[str, Any]) -> int | None:
    """Pop the length before scaling. A top-level field takes precedence, as in transformers."""
    name = "original_max_position_embeddings"
    nested, top_level = scaling.pop(name, None), config.get(name)
    return nested if top_level is None else size(name, top_level)


def _reach(kind: str, scaling: dict[str, Any], max_positions: int, original: int | None) -> int:
    """Return the longest segment that the scaling is for; 0 = max_position_embeddings.

    Instructions for long inputs (Qwen's model cards) add a scaling without changing
    max_position_embeddings, so the limit is the factor times the original length. LLaMA 3's factor
    is not a ratio of lengths if max_position_embeddings was raised.
    """
    was_raised = kind == "llama3" and original is not None and original < max_positions
    if kind == "default" or was_raised or "factor" not in scaling:
        return 0
    reach = int(scaling["factor"] * (original or max_positions))
    return reach if reach > max_positions else 0


def _rotated(head_dim: int, share: Any) -> int:
    """Return the number of dimensions of a head that are rotated."""
    rotated = int(head_dim * number("partial_rotary_factor", share))
    if not rotated or rotated % 2:
        raise ValueError(
            f"config.json: partial_rotary_factor = {share!r} of head_dim = {head_dim} must be an "
            "even number of dimensions"
        )
    return rotated


def _divisors(name: str, scaling: dict[str, Any], rotated: int) -> np.ndarray:
    """Pop and check a table of LongRoPE: one positive number per frequency."""
    table = scaling.pop(name)
    low, high = NUMBERS[name]
    if not isinstance(table, list) or not all(is_number(x) and low <= x <= high for x in table):
        raise ValueError(
            f"config.json: {name} = {shown(table)} must be a list of numbers from {low:g} to "
            f"{high:g}"
        )
    if len(table) != rotated // 2:
        raise ValueError(
            f"config.json: {name} has {len(table)} numbers, {rotated} rotated dimensions need "
            f"{rotated // 2}"
        )
    return np.array(table, np.float64)


def _longrope_factor(scaling: dict[str, Any], max_positions: int) -> float:
    """Return LongRoPE's factor on cos and sin (Ding et al. 2024, arXiv:2402.13753)."""
    context = scaling.pop("original_max_position_embeddings")
    factor = scaling.pop("factor", max_positions / context)
    default = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
    return float(scaling.pop("attention_factor", default))


def _llama3(inv_freq: np.ndarray, scaling: dict[str, Any]) -> np.ndarray:
    """Scale as Llama 3.1: stretch long wavelengths, keep short ones, blend those between."""
    factor = scaling.pop("factor")
    low, high = scaling.pop("low_freq_factor"), scaling.pop("high_freq_factor")
    if low >= high:
        raise ValueError(f"config.json: low_freq_factor = {low} must be below high_freq_factor")
    context = scaling.pop("original_max_position_embeddings")
    wavelength = 2 * math.pi / inv_freq
    smooth = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * inv_freq / factor + smooth * inv_freq


def _yarn(
    inv_freq: np.ndarray, scaling: dict[str, Any], theta: float, head_dim: int, max_positions: int
) -> tuple[np.ndarray, float]:
    """Scale as YaRN (Peng et al. 2023, arXiv:2309.00071): interpolate only slow dimensions."""
    context = scaling.pop("original_max_position_embeddings")
    if "factor" not in scaling and context == max_positions:
        raise KeyError("factor")
    factor = scaling.pop("factor", max_positions / context)  # missing in DeepSeek-like configs
    beta_fast = scaling.pop("beta_fast", 32)
    beta_slow = scaling.pop("beta_slow", 1)
    if beta_fast < beta_slow:
        raise ValueError(f"config.json: beta_fast = {beta_fast} is below beta_slow = {beta_slow}")
    if factor < 1:
        raise ValueError(
            f"config.json: original_max_position_embeddings = {context} is over "
            f"max_position_embeddings = {max_positions}"
        )
    truncate = scaling.pop("truncate", True)
    scaling.pop(
        "finetuned", None
    )  # in the models of YaRN's authors; it matters for dynamic scaling only
    mscale, mscale_all = scaling.pop("mscale", None), scaling.pop("mscale_all_dim", None)

    def dimension(rotations: float) -> float:
        """Return the dimension that rotates `rotations` times within the original context."""
        turns = context / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(theta))

    def attention_scale(by: float, weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(by) + 1.0 if by > 1 else 1.0

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0.0  # no division by zero
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    default = attention_scale(factor)
    if mscale and mscale_all:
        default = attention_scale(factor, mscale) / attention_scale(factor, mscale_all)
    attention_factor = scaling.pop("attention_factor", default)
    # As in DeepSeek-R1-0528-Qwen3-8B: engines would compute different models.
    expected = default * scaling.pop("attn_factor", attention_factor / default)
    if not math.isclose(attention_factor, expected, rel_tol=1e-3):
        raise ValueError(
            f"config.json: vLLM multiplies by the attn_factor of rope type 'yarn', transformers by "
            f"attention_factor = {attention_factor:.4g}: add attention_factor = {expected:.4g}, or "
            "leave attn_factor out"
        )
    return ramp * inv_freq / factor + (1 - ramp) * inv_freq, float(attention_factor)
