"""Count the FLOPs and bytes of a training step from parameter specs and the data's lengths.

Arithmetic only. Called by `plan` and `search`; `roofline` turns the counts into times.
"""

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence

from jax_sft.nn.flops import model_flops
from jax_sft.nn.remat_names import KEPT, NAMES
from jax_sft.ops.head_chunks import CHUNKS
from jax_sft.weights.param_spec import ParamSpec

# Attention's backward pass has five matrix products for the two of the forward pass, because a
# flash kernel recomputes the scores. The model's backward pass, which MFU counts, has four.
_KERNEL_BACKWARD = 2.5
# Largest and smallest number of tokens per device whose logits are in memory at once.
HEAD_CHUNK, *_, LAST_HEAD_CHUNK = CHUNKS["gpu"]
# Tokens of the busiest expert over the mean. All experts compute as many: see ops.grouped.
LARGEST_GROUP = 2.0


# ---- the mean row ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RowWork:
    """The mean row of the data.

    Attributes:
        slots: length of the row, padding included.
        tokens: tokens that are not padding.
        pairs: visible query-key pairs: causal, within segments. Sliding windows are ignored, so
            this is too high when segments are longer than the window.
        trained: tokens with a weight in the loss.
        source: origin of these figures, in words.
    """

    slots: float
    tokens: float
    pairs: float
    trained: float
    source: str


def full_row(seq_len: int) -> RowWork:
    """Return a row that is one segment of trained tokens, the most work a row can be."""
    pairs = seq_len * (seq_len + 1) / 2
    source = f"no data report: rows of one segment of {seq_len:,} trained tokens, an upper bound"
    return RowWork(seq_len, seq_len, pairs, seq_len, source)


def segment_pairs(report: Mapping[str, Mapping] | None, seq_len: int) -> RowWork:
    """Return the mean row of packed data, from the `train` part of a run's data_report.json.

    The report has the number of examples, the sum of their lengths, a few percentiles and the
    longest lengths. The logarithm of the length is interpolated linearly between these. Lengths are
    then cut or dropped at `seq_len` as the report says, and the mean square is scaled to the exact
    mean. On real lengths the result is up to 8% too high. It can be wrong by a factor of two for a
    source with two kinds of examples of very different lengths. Sources count by their number of
    examples, regardless of weight and epochs. Rows are assumed to be full, as best-fit packing
    leaves less than 1% padding.

    Args:
        report: {source: counts}, see data.tokens.prepare.describe. None returns `full_row`.
    """
    sources = [counts for counts in (report or {}).values() if counts["kept"]]
    if not sources:
        return full_row(seq_len)
    tokens = sum(counts["tokens"] for counts in sources)
    trained = sum(counts["trained_tokens"] for counts in sources)
    pairs = sum(counts["kept"] * _mean_pairs(counts, seq_len) for counts in sources)
    most = seq_len * (seq_len + 1) / 2
    return RowWork(
        slots=seq_len,
        tokens=seq_len,
        pairs=min(pairs / tokens * seq_len, most),
        trained=trained / tokens * seq_len,
        source=(
            f"data report: {sum(counts['kept'] for counts in sources):,} examples of "
            f"{tokens:,} tokens, {trained / tokens:.1%} trained; pairs estimated from the "
            "percentiles of their lengths; rows taken to be full"
        ),
    )


def _mean_pairs(counts: Mapping, seq_len: int) -> float:
    """Estimate the mean of n (n + 1) / 2 over the examples of a source that are kept."""
    mean = counts["tokens"] / counts["kept"]
    sample = _sample(counts)
    if counts["dropped"]["overlong"]:
        sample = [(length, share) for length, share in sample if length <= seq_len]
    sample = [(min(length, seq_len), share) for length, share in sample]
    mass, first, second = (
        sum(share * length**power for length, share in sample) for power in range(3)
    )
    if not mass:  # every sampled length is dropped
        return (mean * seq_len + mean) / 2
    mean_square = second * mass / first**2 * mean**2
    return (min(max(mean_square, mean**2), mean * seq_len) + mean) / 2


def _sample(counts: Mapping) -> list[tuple[float, float]]:
    """Return (length, share of examples) before `data.overlong` applies; shares sum to 1."""
    longest = [example["tokens"] for example in counts["longest"]]
    dropped = counts["dropped"]["overlong"] + counts["dropped"]["no_trained_token"]
    rest = 1 - len(longest) / (counts["kept"] + dropped)
    lengths = counts["lengths"]
    knots = [(0.0, max(lengths["p5"] / 2, 1.0))]
    for share, key in ((0.05, "p5"), (0.5, "p50"), (0.95, "p95"), (0.99, "p99")):
        if share < rest:
            knots.append((share, max(lengths[key], 1.0)))
    knots.append((rest, float(min(longest))))
    sample = [(float(length), (1 - rest) / len(longest)) for length in longest]
    for (left, low), (right, high) in itertools.pairwise(knots):
        parts = 200
        for part in range(parts):
            length = low * (high / low) ** ((part + 0.5) / parts)
            sample.append((length, (right - left) / parts))
    return sample


# ---- FLOPs -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StepCost:
    """The work of all devices in one optimizer step.

    Attributes:
        tokens: tokens that are not padding.
        model: model FLOPs of these tokens, by part.
        causal_flops: model FLOPs as published figures count them: the head for every token.
        hardware: FLOPs that are computed, by part, with attention_scores split into forward and
            backward. Includes padding, recomputation and pairs that the attention kernel does not
            skip.
        elementwise_bytes: bytes read and written between matrix products.
        optimizer_bytes: bytes read and written by accumulation, clipping and update.
        attention: name of the attention backend.
        has_experts: whether the MLP has experts.
    """

    tokens: float
    model: dict[str, float]
    causal_flops: float
    hardware: dict[str, float]
    elementwise_bytes: float
    optimizer_bytes: float
    attention: str
    has_experts: bool = False


def step_cost(
    specs: Sequence[ParamSpec],
    axis_sizes: Mapping[str, int],
    tied: bool,
    row: RowWork,
    *,
    num_rows: int,
    micro_batches: int,
    remat: str,
    attention: str,
    sizes: Mapping[str, int],
    offload: Sequence[str] = (),
    param_bytes: int = 4,
    moment_bytes: int = 4,
    frozen: Collection[str] = (),
) -> StepCost:
    """Return the cost of a step of `num_rows` rows in `micro_batches` passes.

    Args:
        remat, offload: see `recomputed`.
        attention: name of the backend, a key of roofline.ATTENTION_EFFICIENCY.
        sizes: {mesh axis: size}.
        param_bytes, moment_bytes: bytes of a master weight and of each of its two moments.
        frozen: paths of the frozen weights.
    """
    tokens, pairs, trained = (num_rows * n for n in (row.tokens, row.pairs, row.trained))
    model = model_flops(specs, axis_sizes, tied, tokens, pairs, trained, frozen)
    slots = num_rows * row.slots
    visited = computed_pairs(attention, num_rows, row)
    in_chunks = _in_chunks(trained, slots, micro_batches, sizes)
    padded, forward = (
        model_flops(specs, axis_sizes, tied, slots, pairs, in_chunks, frozen, only)
        for only in (False, True)
    )
    hardware = hardware_flops(padded, forward, axis_sizes, remat, offload)
    for name, computed in zip(("attention_forward", "attention_backward"), visited, strict=True):
        hardware[name] *= computed / pairs if pairs else 1.0
    if "experts" in axis_sizes:  # all compute as much as the busiest
        hardware["mlp"] *= LARGEST_GROUP
    updated = param_bytes * 2 + moment_bytes * 4 + 4 * 2
    accumulated = 4 * 2 + param_bytes + 2  # the last two: the cast of weights to bfloat16
    num_params = sum(
        math.prod(spec.shape(dict(axis_sizes))) for spec in specs if spec.path not in frozen
    )
    return StepCost(
        tokens=tokens,
        model=model,
        causal_flops=sum(
            model_flops(specs, axis_sizes, tied, tokens, pairs, tokens, frozen).values()
        ),
        hardware=hardware,
        elementwise_bytes=_elementwise_bytes(axis_sizes, slots, in_chunks, remat),
        optimizer_bytes=sizes["data"] * num_params * (updated + micro_batches * accumulated),
        attention=attention,
        has_experts="experts" in axis_sizes,
    )


def _in_chunks(trained: float, slots: float, micro_batches: int, sizes: Mapping[str, int]) -> float:
    """Return the tokens that the head computes: trained ones plus half a chunk per device."""
    parts = sizes["data"] * sizes["fsdp"] * sizes["sequence"] * micro_batches
    return min(trained + parts * LAST_HEAD_CHUNK / 2, slots) if trained else 0.0


def computed_pairs(attention: str, num_rows: int, row: RowWork) -> tuple[float, float]:
    """Return how many query-key pairs a backend computes forward and backward.

    cuDNN's packed kernel and the blockwise kernel skip other segments, except at block edges.
    tokamax's kernel skips them in the forward pass only. The reference computes all pairs.
    """
    visible, triangle, square = row.pairs, row.slots * (row.slots + 1) / 2, row.slots**2
    forward, backward = {
        "cudnn": (visible, visible),
        "blockwise": (visible, visible),
        "tokamax": (visible, triangle),
        "reference": (square, square),
    }[attention]
    return num_rows * forward, num_rows * backward


def recomputed(
    axis_sizes: Mapping[str, int], remat: str, offload: Sequence[str] = ()
) -> dict[str, float]:
    """Return the work that the backward pass recomputes, in units of each part's forward pass.

    At most two of the three MLP products are recomputed, as the output of the down projection is
    not needed again. The output projection of attention is recomputed for the MLP's input, which
    has no name that a policy could keep.

    Args:
        remat, offload: as in the config; remat is "none", "dots", "attn", "full" or names.

    Raises:
        ValueError: a name is unknown.
    """
    if remat == "none":
        return {}
    kept = {*KEPT.get(remat, tuple(remat.replace(" ", "").split(","))), *offload}
    if unknown := kept - NAMES.keys():
        raise ValueError(
            f"model.remat = {remat!r}, model.offload = {list(offload)}: {sorted(unknown)} unknown: "
            f"use {['none', *KEPT]} or names out of {list(NAMES)}"
        )
    out = axis_sizes["heads"] / (
        2 * axis_sizes["heads"] + 2 * axis_sizes["kv_heads"]
    )  # share of all attention projections
    if "dots" in kept:  # outputs of the attention projections and the MLP matrices
        kept |= {"mlp"}
        out = 0.0
    return {
        "attention_projections": out if {"qkv", "dots"} & kept else 1.0,
        "attention_scores": 0.0 if kept >= {"attention", "attention_lse"} else 1.0,
        "mlp": 0.0 if "mlp" in kept else 2 / 3,
    }


def hardware_flops(
    model: Mapping[str, float],
    forward: Mapping[str, float],
    axis_sizes: Mapping[str, int],
    remat: str,
    offload: Sequence[str] = (),
) -> dict[str, float]:
    """Return the FLOPs by part that the hardware computes for the FLOPs of `model_flops`.

    The attention scores are split into attention_forward and attention_backward, which run at
    different speeds. Recomputed scores count as forward.

    Args:
        model, forward: results of `model_flops` for the whole step and for the forward pass only.

    Raises:
        ValueError: see `recomputed`.
    """
    again = recomputed(axis_sizes, remat, offload)
    hardware = {
        part: flops + again.get(part, 0.0) * forward[part]
        for part, flops in model.items()
        if part != "attention_scores"
    }
    scores_flops = forward["attention_scores"]
    hardware["attention_forward"] = scores_flops * (1 + again.get("attention_scores", 0.0))
    hardware["attention_backward"] = scores_flops * _KERNEL_BACKWARD
    return hardware


def _elementwise_bytes(
    axis_sizes: Mapping[str, int], slots: float, trained: float, remat: str
) -> float:
    """Return the bytes that all devices move between matrix products.

    These are norms, rotation, SwiGLU, residual sums and the loss. Each counts as one fused kernel
    in bfloat16: two norms of 2 D, two residual sums of 3 D, q and k read and written, gate and up
    read and their product written. With experts, rows are read and written when they are sorted,
    put into blocks (x for gate and for up) and summed. The backward pass moves twice that, and
    recomputation once more. Per logit, 14 bytes: it is written, read twice, and its gradient is
    written. For each chunk of tokens the head's float32 gradient is read and written.
    """
    heads = (axis_sizes["heads"] + axis_sizes["kv_heads"]) * axis_sizes["head_dim"]
    elements = (
        10 * axis_sizes["embed"] + 2 * heads + 3 * axis_sizes["mlp"] * axis_sizes.get("chosen", 1)
    )
    elements += 10 * axis_sizes["embed"] * axis_sizes.get("chosen", 0)
    passes = 3 if remat == "none" else 4
    per_logit = 14 + 8 * axis_sizes["embed"] / HEAD_CHUNK
    return (
        passes * 2 * axis_sizes["layers"] * elements * slots
        + per_logit * axis_sizes["vocab"] * trained
    )
