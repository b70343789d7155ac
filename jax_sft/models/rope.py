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

_TABLES = ("short_factor", "long_factor")  # lists among the rope parameters
TYPES = ("default", "linear", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Inverse frequencies (as tuples, so that it hashes) and the cos/sin factor.

    Attributes:
        inv_freq: [rotated dimensions of a head / 2].
        long_inv_freq: for segments of more than `longest_short` tokens; empty = the same.
    """

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0
    long_inv_freq: tuple[float, ...] = ()
    longest_short: int = 0
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
            types: {type as config.json writes it: one of TYPES}.
            partial_rotary_factor: the share of a head's dimensions, its first ones, that is rotated
                unless the rope parameters have another. None = only all of them is implemented.

        Raises:
            ValueError: an unknown rope type, or a field of it missing or unknown.
        """
        newer, old = config.get("rope_parameters"), config.get("rope_scaling")
        if newer and old and newer != old:
            raise ValueError("config.json has both rope_parameters and rope_scaling: keep one")
        scaling = newer or old or {}
        if not isinstance(scaling, dict) or any(isinstance(v, dict) for v in scaling.values()):
            raise ValueError(f"config.json: rope parameters {scaling!r} must be one flat object")
        scaling = {key: value for key, value in scaling.items() if value is not None}
        theta = scaling.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
        older, kind = scaling.pop("type", None), scaling.pop("rope_type", None)
        kind = kind or older or "default"
        share = scaling.pop("partial_rotary_factor", partial_rotary_factor)
        if partial_rotary_factor is not None:
            head_dim = _rotated(head_dim, share)
        elif share not in (None, 1.0):
            raise ValueError("config.json: partial_rotary_factor other than 1 is not implemented")
        for name, value in {"rope_theta": theta, **scaling}.items():
            if name in _TABLES:
                continue
            if isinstance(value, bool) != (name == "truncate") or not (
                isinstance(value, int | float) and (value > 0 or name == "truncate")
            ):
                raise ValueError(f"config.json: rope field {name} = {value!r} is not usable")
        inv_freq = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        factor, long_inv_freq, longest_short = 1.0, np.array(()), 0
        max_positions = config["max_position_embeddings"]
        if kind not in types:
            raise ValueError(f"config.json: rope type {kind!r} is not one of {[*types]}")
        kind = types[kind]
        # A value beside rope_parameters goes first, as there.
        if kind in ("llama3", "yarn", "longrope"):
            original = config.get("original_max_position_embeddings")
            inside = scaling.get("original_max_position_embeddings")
            scaling["original_max_position_embeddings"] = original or inside or max_positions
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
            else:
                scaling.clear()  # transformers leaves the fields of no-op scalings in place
        except KeyError as missing:
            raise ValueError(f"config.json: rope type {kind!r} needs the field {missing}") from None
        if scaling:
            raise ValueError(f"config.json: rope type {kind!r} does not implement {scaling}")
        short, long = (tuple(x.astype(np.float32).tolist()) for x in (inv_freq, long_inv_freq))
        return cls(short, factor, long, longest_short)

    def angles(
        self, positions_BT: jax.Array, segment_ids_BT: jax.Array, max_segments: int
    ) -> tuple[jax.Array, jax.Array]:
        """Return (cos, sin), each float32 [B, T, 1, R/2] of R rotated dimensions.

        transformers looks for the longest sequence of the whole batch; here each segment decides
        for itself, as it would alone, so that nothing depends on what shares a row or a batch.

        Args:
            positions_BT: int, within the segments.
            segment_ids_BT: int, in 0..max_segments.
        """
        inv_freq = jnp.array(self.inv_freq)
        if self.long_inv_freq:
            is_long_BT = _reaches(self.longest_short, positions_BT, segment_ids_BT, max_segments)
            inv_freq = jnp.where(is_long_BT[..., None], jnp.array(self.long_inv_freq), inv_freq)
        # float32 whatever the compute dtype: bfloat16 rounds position 257 to 256.
        angles_BTH = positions_BT[..., None].astype(jnp.float32) * inv_freq
        cos, sin = jnp.cos(angles_BTH), jnp.sin(angles_BTH)
        return (cos * self.attention_factor)[:, :, None], (sin * self.attention_factor)[:, :, None]


def rotate(x_BTNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate each head's halves (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), in float32.

    The halves are contiguous, as in Hugging Face's weights (not interleaved, as in Meta's). They
    are those of the first dimensions, as many as there are angles for; the others stay as they are.
    """
    cos, sin = angles
    half = cos.shape[-1]
    x1, x2, rest = jnp.split(x_BTNH.astype(jnp.float32), [half, 2 * half], axis=-1)
    rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def _reaches(position: int, positions_BT, segment_ids_BT, max_segments: int) -> jax.Array:
    """Whether the segment of each token has a token at this position or behind it."""
    is_there_BT = positions_BT >= position
    # A comparison with every segment, which XLA fuses, not a scatter.
    is_of_BST = segment_ids_BT[:, None] == jnp.arange(max_segments + 1)[:, None]
    reaches_BS = (is_of_BST & is_there_BT[:, None]).any(axis=-1)
    return jnp.take_along_axis(reaches_BS, segment_ids_BT, axis=1)


def _rotated(head_dim: int, share: Any) -> int:
    """Dimensions of a head that are rotated."""
    is_number = isinstance(share, int | float) and not isinstance(share, bool)
    rotated = int(head_dim * share) if is_number and 0 < share <= 1 else 0
    if not rotated or rotated % 2:
        raise ValueError(
            f"config.json: partial_rotary_factor = {share!r} of head_dim = {head_dim} must be an "
            "even number of dimensions"
        )
    return rotated


def _divisors(name: str, scaling: dict[str, Any], rotated: int) -> np.ndarray:
    """A table of LongRoPE, one positive number per frequency."""
    table = scaling.pop(name)
    if not isinstance(table, list) or not all(
        isinstance(x, int | float) and not isinstance(x, bool) and x > 0 for x in table
    ):
        raise ValueError(f"config.json: {name} = {table!r} must be a list of positive numbers")
    if len(table) != rotated // 2:
        raise ValueError(
            f"config.json: {name} has {len(table)} numbers, {rotated} rotated dimensions need "
            f"{rotated // 2}"
        )
    return np.array(table, np.float64)


def _longrope_factor(scaling: dict[str, Any], max_positions: int) -> float:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): factor on cos and sin, long or not."""
    context = scaling.pop("original_max_position_embeddings")
    factor = scaling.pop("factor", max_positions / context)
    default = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
    return float(scaling.pop("attention_factor", default))


def _llama3(inv_freq: np.ndarray, scaling: dict[str, Any]) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between blended."""
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
    """YaRN (Peng et al. 2023, arXiv:2309.00071): interpolate slow dimensions, keep fast ones."""
    context = scaling.pop("original_max_position_embeddings")
    if "factor" not in scaling and context == max_positions:
        raise KeyError("factor")
    factor = scaling.pop("factor", max_positions / context)  # left out by DeepSeek-like configs
    beta_fast = scaling.pop("beta_fast", 32)
    beta_slow = scaling.pop("beta_slow", 1)
    truncate = scaling.pop("truncate", True)
    mscale, mscale_all = scaling.pop("mscale", None), scaling.pop("mscale_all_dim", None)

    def dimension(rotations: float) -> float:
        """The dimension that turns `rotations` times within the original context."""
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
    attention_factor = scaling.pop("attention_factor", None)
    if attention_factor is None:
        if mscale and mscale_all:
            attention_factor = attention_scale(factor, mscale) / attention_scale(factor, mscale_all)
        else:
            attention_factor = attention_scale(factor)
    return ramp * inv_freq / factor + (1 - ramp) * inv_freq, float(attention_factor)
