"""cuDNN's fused attention on packed rows: memory O(T), work proportional to the segments.

For Hopper and newer GPUs. cuDNN gets the start and length of each segment, and the row is not
copied. The two JAX primitives for it are private; this file holds every private name.
Shape suffixes: B rows, T tokens, N heads, K kv heads, H head dim, M segments of a row, S slots and
L tokens of a slot (cuDNN's batch and sequence length).
"""

import dataclasses
import functools
import importlib
import inspect
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_sft.ops.attention.backend import Backend, Ids
from jax_sft.ops.attention.segments import in_natural_order, pad_tokens

_FORWARD = ("_dot_product_attention_fwd_p", "_dot_product_attention_fwd_cuda_lowering")
_BACKWARD = ("_dot_product_attention_bwd_p", "_dot_product_attention_bwd_cuda_lowering")
# Parameters of the primitives since jax 0.12, for a function of the scores. It is not used.
_NEWER = {"score_mod_name": None, "score_mod_jaxpr": None}

_FEWER = 4  # ratio of the slot lengths of consecutive length classes
_SHORTEST = 64  # smallest slot length in tokens, a tile of the kernel
_INT32 = 2**31


@dataclasses.dataclass(frozen=True)
class LengthClass:
    """Segments with `above` < length <= `longest`, in `slots` slots per `longest` batch tokens.

    XLA allocates a workspace of `longest` tokens per slot for cuDNN's backward pass. A single class
    would need (max_segments x T) tokens: 57 GiB for a row of 8192 tokens, 256 segments and 28 heads
    of 128. Since only few segments can be long, classes reduce it to about (4 x T): 0.9 GiB (sizes
    as reported by cuDNN 9.28 for H200 and B200).
    """

    above: int
    longest: int
    slots: int

    def num_slots(self, num_tokens: int) -> int:
        """Return the slots for a batch of `num_tokens` tokens."""
        return num_tokens // self.longest * self.slots


def length_classes(num_tokens: int, max_segments: int) -> tuple[LengthClass, ...]:
    """Return the classes for rows of `num_tokens`, a multiple of `_multiple`, longest first."""
    longest = [num_tokens // _FEWER**n for n in range(_num_classes(num_tokens, max_segments))]
    classes = []
    for length, above in zip(longest, [*longest[1:], 0], strict=True):
        per_row = min(max_segments, num_tokens // (above + 1))
        # At least two slots: cuDNN treats one sequence per row as unpacked input.
        slots = max(2, math.ceil(per_row * length / num_tokens))
        classes.append(LengthClass(above, length, slots))
    return tuple(classes)


def workspace_bytes(
    *,
    rows: int,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_segments: int,
    deterministic: bool = False,
) -> int:
    """Return the workspace bytes per device of cuDNN's backward pass.

    XLA adds the workspace only when it compiles on a GPU. It holds dq in float32, a number per
    query and head and, for grouped queries, dk and dv of each head.

    Args:
        deterministic: whether xla_gpu_deterministic_ops or xla_gpu_exclude_nondeterministic_ops is
            set. Hopper then needs all scores of a slot instead of dq, quadratic in the slot length:
            11 GiB for a row of 8192 tokens at 28 heads, 169 GiB for one of 32768. Newer chips do
            not need them.
    """
    num_tokens += -num_tokens % _multiple(num_tokens, max_segments)
    grouped = 4 * head_dim if num_heads > num_kv_heads else 0

    def class_bytes(c: LengthClass) -> int:
        dq = 2 * c.longest if deterministic else 4 * head_dim
        return c.num_slots(rows * num_tokens) * c.longest * num_heads * (dq + grouped + 4)

    return max(map(class_bytes, length_classes(num_tokens, max_segments)))


def problems(
    *,
    platform: str,
    dtype: str,
    head_dim: int,
    sequence: int,
    capability: tuple[int, ...] | None = None,
    has_soft_cap: bool = False,
) -> list[str]:
    """Return the reasons why cuDNN cannot be used; empty if it can.

    Args:
        capability: CUDA compute capability. Defaults to that of the local GPU. Without a GPU, a
            supported one is assumed.
    """
    if platform != "gpu":
        return [f"cuDNN needs an NVIDIA GPU, this runs on {platform}"]
    reasons = _missing_names()
    if reasons:
        return reasons
    largest = 256
    if capability or jax.default_backend() == "gpu":
        version = _NEWEST if capability else _cudnn_version()
        capability = capability or _compute_capability()
        largest = 256 if capability[0] == 9 else 128  # newer GPUs support gradients up to 128 only
        reasons = _device_problems(capability, version)
    if dtype not in ("bfloat16", "float16"):
        reasons.append(f"cuDNN attends in bfloat16 or float16, model.dtype is {dtype}")
    if head_dim % 8 or head_dim > largest:
        reasons.append(
            f"cuDNN needs a head dim that is a multiple of 8 up to {largest}, not {head_dim}"
        )
    if has_soft_cap:
        reasons.append("cuDNN supports no soft cap of attention scores, which this model has")
    if sequence > 1:
        reasons.append(
            f"cuDNN cannot start in the middle of a segment, as mesh.sequence = {sequence} needs: "
            "use mesh.sequence = 1, or another attention"
        )
    return reasons


@functools.cache
def _private() -> Any:
    """Return JAX's module for cuDNN's attention, or None if this version of JAX has none."""
    try:
        return importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    except ImportError:
        return None


def _missing_names() -> list[str]:
    """Return a problem if a private name or parameter of JAX that this file uses has changed."""
    requirement = "this jax_sft was written for jax 0.10.2 to 0.12"
    names = (*_FORWARD, *_BACKWARD, "MaskType", "AttentionLayout", "check_cudnn_version")
    missing = [name for name in names if not hasattr(_private(), name)]
    if missing:
        return [
            f"jax {jax.__version__} has no {missing[0]} for cuDNN's packed attention: {requirement}"
        ]
    for (_, lowering), extra in ((_FORWARD, {"is_training"}), (_BACKWARD, set())):
        known = {*_parameters(1.0), *_NEWER, *extra}
        given = inspect.signature(getattr(_private(), lowering)).parameters
        # The operands come first; the parameters start at `scale`.
        new = set(list(given)[list(given).index("scale") :]) - known if "scale" in given else {"?"}
        if new:
            return [f"jax {jax.__version__} changed {lowering} ({sorted(new)[0]}): {requirement}"]
    return []


_NEWEST = 91100  # cuDNN version assumed for a planned run


def _compute_capability() -> tuple[int, ...]:
    """Return that of the first local GPU: (9, 0) for an H200, (0,) if it is not from NVIDIA."""
    numbers = str(jax.local_devices()[0].compute_capability).split(".")
    return tuple(map(int, numbers)) if all(n.isdigit() for n in numbers) else (0,)


def _cudnn_version() -> int:
    """Return the version of the loaded library, 92801 for 9.28.1; 0 if there is none."""
    try:
        return _private().check_cudnn_version()
    except RuntimeError:  # raised if jaxlib does not find cuDNN
        return 0


def _device_problems(capability: tuple[int, ...], version: int) -> list[str]:
    reasons = []
    if capability < (9, 0):
        reasons.append(
            f"cuDNN's packed attention needs compute capability 9.0 (Hopper) or newer, this GPU "
            f"has {'.'.join(map(str, capability))}"
        )
    oldest = 91100 if capability == (10, 3) else 90600
    if version < oldest:
        reasons.append(
            f"cuDNN {oldest // 10000}.{oldest // 100 % 100} or newer is needed, but the version "
            f"is {version}: install nvidia-cudnn-cu13"
        )
    return reasons


def _forward(
    q_BTNH, k_BSKH, v_BSKH, query_ids, key_ids, *, scale, max_segments, window, soft_cap=0.0
):
    """`backend.Forward` for rows in natural order with T = S: segments 1, 2.. are contiguous.

    The output of a row in another order, or with more than `max_segments` segments, is NaN, so that
    the run stops at its loss. The packer creates neither. The output of padding is zero.
    """
    assert not soft_cap, "see `problems`"
    multiple = _multiple(q_BTNH.shape[1], max_segments)
    (q, k, v), ids = pad_tokens((q_BTNH, k_BSKH, v_BSKH), query_ids, multiple)
    _check_size(q)
    ok_B, layouts = _layouts(ids, max_segments)
    out, lse = jnp.zeros_like(q), jnp.zeros(q.shape[:3], jnp.float32)
    for layout in layouts:
        class_out, stats_SNL = _call_forward(q, k, v, layout, scale, window)
        out = jnp.where(layout.is_in_BT[..., None, None], class_out, out)
        # Advanced indices on both sides of the heads put the heads last.
        class_lse = stats_SNL.at[layout.slot_BT, :, ids[1]].get(mode="clip")
        lse = jnp.where(layout.is_in_BT[..., None], class_lse, lse)
    out = jnp.where(ok_B[:, None, None, None], out, jnp.nan)
    num_tokens = q_BTNH.shape[1]
    return out[:, :num_tokens], lse[:, :num_tokens]


def _backward(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    out_BTNH,
    lse,
    grad_out_BTNH,
    query_ids,
    key_ids,
    *,
    scale,
    max_segments,
    window,
    soft_cap=0.0,
):
    """`backend.Backward`. cuDNN adds to dq from many blocks in a nondeterministic order.

    XLA's determinism options prevent that at a high cost in memory: see `workspace_bytes`.
    """
    assert not soft_cap, "see `problems`"
    arrays = (q_BTNH, k_BSKH, v_BSKH, out_BTNH, lse, grad_out_BTNH)
    multiple = _multiple(q_BTNH.shape[1], max_segments)
    (q, k, v, out, lse, grad_out), ids = pad_tokens(arrays, query_ids, multiple)
    lse_XN = lse.reshape(-1, lse.shape[-1])  # X: all tokens of the batch
    grads = tuple(map(jnp.zeros_like, (q, k, v)))
    for layout in _layouts(ids, max_segments)[1]:
        token_SL = layout.first_S[:, None] + jnp.arange(layout.length_class.longest)
        stats_SNL = jnp.moveaxis(lse_XN.at[token_SL].get(mode="clip"), 2, 1)
        class_grads = _call_backward(q, k, v, out, stats_SNL, grad_out, layout, scale, window)
        is_in = layout.is_in_BT[..., None, None]
        grads = tuple(
            jnp.where(is_in, new, old) for new, old in zip(class_grads, grads, strict=True)
        )
    dq, dk, dv = (grad[:, : q_BTNH.shape[1]] for grad in grads)
    return dq, dk, dv


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The positions of the segments of one length class in the flattened batch.

    Attributes:
        lengths_S: tokens of the segment in each slot, 0 in unused slots.
        first_S: first token of the segment; unused slots start past the last token.
        slot_BT: slot of each token's segment, valid where `is_in_BT`.
        is_in_BT: whether the token belongs to a segment of this class.
    """

    length_class: LengthClass
    lengths_S: jax.Array
    first_S: jax.Array
    slot_BT: jax.Array
    is_in_BT: jax.Array


def _layouts(ids: Ids, max_segments: int) -> tuple[jax.Array, list[_Layout]]:
    """Return (whether the row is in natural order with at most max_segments [B], layouts).

    Uses comparisons and sums, which XLA fuses, instead of scatters, whose order is not defined.
    """
    segments_BT, positions_BT = ids
    B, T = segments_BT.shape
    is_real_BT = segments_BT > 0
    is_first_BT = is_real_BT & (positions_BT == 0)
    nth_BT = jnp.cumsum(is_first_BT, axis=1, dtype=jnp.int32) - 1
    ok_B = in_natural_order(ids)
    ok_B &= is_first_BT.sum(axis=1) <= max_segments

    is_of_BMT = is_real_BT[:, None] & (nth_BT[:, None] == jnp.arange(max_segments)[:, None])
    lengths_BM = is_of_BMT.sum(axis=-1, dtype=jnp.int32)
    token_BT = jnp.arange(B * T, dtype=jnp.int32).reshape(B, T)
    first_BM = jnp.where(is_of_BMT & is_first_BT[:, None], token_BT[:, None], 0).sum(axis=-1)
    nth_BT = jnp.clip(nth_BT, 0, max_segments - 1)

    layouts = []
    for length_class in length_classes(T, max_segments):
        is_in_BM = (lengths_BM > length_class.above) & (lengths_BM <= length_class.longest)
        slot_BM = jnp.cumsum(is_in_BM.reshape(-1), dtype=jnp.int32).reshape(is_in_BM.shape) - 1
        slots_S = jnp.arange(length_class.num_slots(B * T))
        is_at_SBM = is_in_BM & (slot_BM == slots_S[:, None, None])
        lengths_S = jnp.where(is_at_SBM, lengths_BM, 0).sum(axis=(1, 2))
        first_S = jnp.where(is_at_SBM, first_BM, 0).sum(axis=(1, 2))
        layouts.append(
            _Layout(
                length_class,
                lengths_S,
                jnp.where(lengths_S > 0, first_S, B * T),
                jnp.take_along_axis(slot_BM, nth_BT, axis=1),
                is_real_BT & jnp.take_along_axis(is_in_BM, nth_BT, axis=1),
            )
        )
    return ok_B, layouts


def _call_forward(q_BTNH, k_BTKH, v_BTKH, layout: _Layout, scale: float, window: int | None):
    """Return (out [B, T, N, H], softmax stats [S, N, L]); values of other tokens are undefined."""
    primitive, lowering = (getattr(_private(), name) for name in _FORWARD)
    operands, unpack = _operands((q_BTNH, k_BTKH, v_BTKH), layout)
    out, stats_SNL = primitive.bind(
        *operands,
        **_parameters(scale, _window_of(layout, window)),
        **_newer_parameters(lowering),
        is_training=True,
    )
    return unpack(out, q_BTNH), stats_SNL


def _call_backward(q_BTNH, k_BTKH, v_BTKH, out, stats_SNL, grad_out, layout, scale, window):
    """Return (dq, dk, dv); values of tokens of other classes are undefined."""
    primitive, lowering = (getattr(_private(), name) for name in _BACKWARD)
    operands, unpack = _operands((q_BTNH, k_BTKH, v_BTKH), layout)
    longest = layout.length_class.longest
    out, grad_out = (x.reshape(-1, longest, *x.shape[2:]) for x in (out, grad_out))
    grads = primitive.bind(
        *operands,
        *(stats_SNL, out, grad_out),
        **_parameters(scale, _window_of(layout, window)),
        **_newer_parameters(lowering),
    )
    return tuple(map(unpack, grads, (q_BTNH, k_BTKH, v_BTKH)))


def _operands(qkv: Sequence[jax.Array], layout: _Layout):
    """Return (the first operands of both primitives, a function that restores a result's shape).

    The batch is viewed as rows of `longest` tokens. Offsets count elements from the start of the
    array. A slot may start anywhere, so it may extend past the end of such a row. JAX's own wrapper
    computes the offsets too, but incorrectly for grouped queries up to jax 0.11.0.
    """
    length_class = layout.length_class
    q, k, v = (x.reshape(-1, length_class.longest, *x.shape[2:]) for x in qkv)
    num_rows, _, num_heads, head_dim = q.shape
    lengths = layout.lengths_S.reshape(num_rows, length_class.slots)
    ends = jnp.full(num_rows, num_rows * length_class.longest, jnp.int32)
    firsts = jnp.concatenate([layout.first_S, ends]).reshape(num_rows, length_class.slots + 1)
    none = jnp.zeros(0, q.dtype)  # no bias, no page tables
    q_offsets, kv_offsets = firsts * num_heads * head_dim, firsts * k.shape[2] * head_dim
    operands = (q, k, v, none, lengths, lengths, q_offsets, kv_offsets, none, none)
    return operands, lambda result, like: result.reshape(like.shape)


def _window_of(layout: _Layout, window: int | None) -> int | None:
    """Return the window if segments of the class can be longer, else None.

    cuDNN counts it in the same way: a query at position p sees p - window < key <= p.
    """
    longest = layout.length_class.longest
    return window if window is not None and window < longest else None


def _parameters(scale: float, window: int | None = None) -> dict[str, Any]:
    return dict(
        scale=scale,
        seed=0,
        dropout_rate=0.0,
        variadic_args=(False, False),  # (has a bias, computes its gradient)
        mask_type=_private().MaskType.PADDING_CAUSAL,
        layout=_private().AttentionLayout.BTNH.value,
        sliding_window_length=window,
    )


def _newer_parameters(lowering) -> dict[str, Any]:
    known = inspect.signature(lowering).parameters
    return {name: value for name, value in _NEWER.items() if name in known}


def _num_classes(num_tokens: int, max_segments: int) -> int:
    count = 1
    while max_segments > _FEWER**count and num_tokens >= _SHORTEST * _FEWER**count:
        count += 1
    return count


def _multiple(num_tokens: int, max_segments: int) -> int:
    """Return the number that must divide the row length, so that all classes divide it."""
    return _FEWER ** (_num_classes(num_tokens, max_segments) - 1)


def _check_size(q_BTNH: jax.Array) -> None:
    if q_BTNH.size >= _INT32:
        B, T, N, H = q_BTNH.shape
        raise ValueError(
            f"cuDNN counts the elements of a batch in 32 bits: {B} rows of {T} tokens with {N} "
            f"heads of {H} per device are too many: lower batch.micro_rows or data.seq_len, raise "
            "mesh.fsdp, mesh.data or mesh.tensor, or set model.attention to another backend"
        )


BACKEND = Backend(_forward, _backward, takes_traced_window=False)
