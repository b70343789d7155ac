"""Rotary position embedding: frequencies of every supported variant, and the rotation.

Formulas follow transformers' `modeling_rope_utils.py`; sources are named at each variant.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

TYPES = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Inverse frequencies [head_dim / 2] (as a tuple, so that it hashes) and the cos/sin factor."""

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0
    FIELDS: ClassVar[tuple[str, ...]] = (  # of config.json
        *("rope_parameters", "rope_scaling", "rope_theta"),
        "original_max_position_embeddings",
    )

    @classmethod
    def from_hf(cls, config: dict[str, Any], head_dim: int) -> "Rope":
        """Read `rope_parameters` (transformers 5) or `rope_scaling` with `rope_theta` (older).

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
        if scaling.pop("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("config.json: partial_rotary_factor other than 1 is not implemented")
        for name, value in {"rope_theta": theta, **scaling}.items():
            if isinstance(value, bool) != (name == "truncate") or not (
                isinstance(value, int | float) and (value > 0 or name == "truncate")
            ):
                raise ValueError(f"config.json: rope field {name} = {value!r} is not usable")
        inv_freq = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        factor = 1.0
        max_positions = config["max_position_embeddings"]
        if kind in ("llama3", "yarn"):  # a value beside rope_parameters goes first, as there
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
            elif kind == "default":
                scaling.clear()  # transformers leaves the fields of no-op scalings in place
            else:
                raise ValueError(f"config.json: rope type {kind!r} is not one of {TYPES}")
        except KeyError as missing:
            raise ValueError(f"config.json: rope type {kind!r} needs the field {missing}") from None
        if scaling:
            raise ValueError(f"config.json: rope type {kind!r} does not implement {scaling}")
        return cls(tuple(inv_freq.astype(np.float32).tolist()), factor)

    def angles(self, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return (cos, sin), each float32 [B, T, 1, H/2], for int positions [B, T]."""
        # float32 whatever the compute dtype: bfloat16 rounds position 257 to 256.
        angles_BTH = positions_BT[..., None].astype(jnp.float32) * jnp.array(self.inv_freq)
        cos, sin = jnp.cos(angles_BTH), jnp.sin(angles_BTH)
        return (cos * self.attention_factor)[:, :, None], (sin * self.attention_factor)[:, :, None]


def rotate(x_BTNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate each head's halves (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), in float32.

    The halves are contiguous, as in Hugging Face's weights (not interleaved, as in Meta's).
    """
    cos, sin = angles
    x1, x2 = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


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
