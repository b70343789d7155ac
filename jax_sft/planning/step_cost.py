"""What a training step computes: FLOPs by part and bytes, from weight rows and the data's lengths.

Arithmetic alone. Called by `plan` and `search`; `roofline` makes times of it.
"""

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence

from jax_sft.nn.flops import model_flops
from jax_sft.nn.remat_names import KEPT, NAMES
from jax_sft.ops.head_chunks import CHUNKS
from jax_sft.weights.param_spec import Weight

# Attention's backward pass has five products for two of the forward pass: a flash kernel computes
# the scores again. The model's own backward pass, which MFU counts, has four.
_KERNEL_BACKWARD = 2.5
# Tokens of a device whose logits live at a time, most and least.
HEAD_CHUNK, *_, LAST_HEAD_CHUNK = CHUNKS["gpu"]
# Tokens of the busiest expert over the mean, with which all of them advance: ops.grouped.
LARGEST_GROUP = 2.0


# ---- what a row holds --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RowWork:
    """The mean row of the data.

    Attributes:
        slots: its length, padding included.
        tokens: those that are not padding.
        pairs: query-key pairs that see each other: causal, within segments. A sliding window is not
            taken into account: where segments are longer, this is too much.
        trained: tokens with a weight in the loss.
        source: where this comes from, in words.
    """

    slots: float
    tokens: float
    pairs: float
    trained: float
    source: str


def full_row(seq_len: int) -> RowWork:
    """Return a row that is one segment of trained tokens: the most work that a row can be."""
    pairs = seq_len * (seq_len + 1) / 2
    source = f"no data report: rows of one segment of {seq_len:,} trained tokens, an upper bound"
    return RowWork(seq_len, seq_len, pairs, seq_len, source)


def segment_pairs(report: Mapping[str, Mapping] | None, seq_len: int) -> RowWork:
    """Return the mean row of packed data, from the `train` part of a run's data_report.json.

    The report has the number and sum of the examples' lengths, a few percentiles and the longest.
    Between these the logarithm of the length is taken to be linear; then lengths are cut or dropped
    at `seq_len` as the report tells, and the mean square is scaled to the exact mean. On real
    lengths this is up to 8% too much; where a source has two kinds of examples of very different
    lengths it can be wrong by a factor of two. Sources count by their examples, whatever their
    weight or epochs. Rows are taken to be full: best-fit packing leaves less than a hundredth.

    Args:
        report: {source: counts}, see data.tokens.prepare.describe; None for `full_row`.
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
    if not mass:  # all that is known is dropped
        return (mean * seq_len + mean) / 2
    mean_square = second * mass / first**2 * mean**2
    return (min(max(mean_square, mean**2), mean * seq_len) + mean) / 2


def _sample(counts: Mapping) -> list[tuple[float, float]]:
    """Return (length, share of the examples) before `data.overlong`, shares adding up to 1."""
    longest = [one["tokens"] for one in counts["longest"]]
    dropped = counts["dropped"]["overlong"] + counts["dropped"]["no_trained_token"]
    rest = 1 - len(longest) / (counts["kept"] + dropped)
    lengths = counts["lengths"]
    knots = [(0.0, max(lengths["p5"] / 2, 1.0))]
    for share, key in ((0.05, "p5"), (0.5, "p50"), (0.95, "p95"), (0.99, "p99")):
        if share < rest:
            knots.append((share, max(lengths[key], 1.0)))
    knots.append((rest, float(min(longest))))
    found = [(float(length), (1 - rest) / len(longest)) for length in longest]
    for (left, low), (right, high) in itertools.pairwise(knots):
        parts = 200
        for part in range(parts):
            length = low * (high / low) ** ((part + 0.5) / parts)
            found.append((length, (right - left) / parts))
    return found


# ---- FLOPs -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What all devices do in one optimizer step.

    Attributes:
        tokens: those that are not padding.
        model: FLOPs by part, of these tokens.
        causal_flops: as published figures count: the head for every token, trained or not.
        hardware: FLOPs that are computed, by part, attention_scores in two: padding, recomputation
            and what an attention kernel does not skip are in it.
        elementwise_bytes: read and written between matrix products.
        optimizer_bytes: read and written by accumulation, clipping and update.
        attention: name of the backend.
        has_experts: whether the MLP is one of experts.
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
    rows: Sequence[Weight],
    dims: Mapping[str, int],
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
        param_bytes, moment_bytes: of a master weight, and of each of its two moments.
        frozen: paths of what does not train.
    """
    tokens, pairs, trained = (num_rows * n for n in (row.tokens, row.pairs, row.trained))
    model = model_flops(rows, dims, tied, tokens, pairs, trained, frozen)
    slots = num_rows * row.slots
    visited = computed_pairs(attention, num_rows, row)
    in_chunks = _in_chunks(trained, slots, micro_batches, sizes)
    padded, forward = (
        model_flops(rows, dims, tied, slots, pairs, in_chunks, frozen, only)
        for only in (False, True)
    )
    hardware = hardware_flops(padded, forward, dims, remat, offload)
    for name, computed in zip(("attention_forward", "attention_backward"), visited, strict=True):
        hardware[name] *= computed / pairs if pairs else 1.0
    if "experts" in dims:  # all advance with the busiest
        hardware["mlp"] *= LARGEST_GROUP
    updated = param_bytes * 2 + moment_bytes * 4 + 4 * 2
    accumulated = 4 * 2 + param_bytes + 2  # and the weights' cast to bfloat16
    num_params = sum(math.prod(row.shape(dict(dims))) for row in rows if row.path not in frozen)
    return StepCost(
        tokens=tokens,
        model=model,
        causal_flops=sum(model_flops(rows, dims, tied, tokens, pairs, tokens, frozen).values()),
        hardware=hardware,
        elementwise_bytes=_elementwise_bytes(dims, slots, in_chunks, remat),
        optimizer_bytes=sizes["data"] * num_params * (updated + micro_batches * accumulated),
        attention=attention,
        has_experts="experts" in dims,
    )


def _in_chunks(trained: float, slots: float, micro_batches: int, sizes: Mapping[str, int]) -> float:
    """Tokens that the head computes: those that train, the last chunk of a device half empty."""
    parts = sizes["data"] * sizes["fsdp"] * sizes["sequence"] * micro_batches
    return min(trained + parts * LAST_HEAD_CHUNK / 2, slots) if trained else 0.0


def computed_pairs(attention: str, num_rows: int, row: RowWork) -> tuple[float, float]:
    """Return how many query-key pairs a backend computes forward and backward.

    cuDNN's packed kernel and the blockwise one skip other segments, but for the edges of blocks;
    tokamax's skips them forward only; the reference computes whole squares.
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
    dims: Mapping[str, int], remat: str, offload: Sequence[str] = ()
) -> dict[str, float]:
    """Return what the backward pass computes again, in units of each part's forward pass.

    The output of the down projection is not needed again: of the three matrices of an MLP at most
    two are. The output projection of attention is, for the MLP's input, which has no name.

    Args:
        remat, offload: as in the config: "none", "dots", "attn", "full" or names.

    Raises:
        ValueError: an unknown name.
    """
    if remat == "none":
        return {}
    kept = {*KEPT.get(remat, tuple(remat.replace(" ", "").split(","))), *offload}
    if unknown := kept - NAMES.keys():
        raise ValueError(
            f"model.remat = {remat!r}, model.offload = {list(offload)}: {sorted(unknown)} unknown: "
            f"use {['none', *KEPT]} or names out of {list(NAMES)}"
        )
    out = dims["heads"] / (2 * dims["heads"] + 2 * dims["kv_heads"])  # of all its projections
    if "dots" in kept:  # what attention's projections and the MLP's matrices return
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
    dims: Mapping[str, int],
    remat: str,
    offload: Sequence[str] = (),
) -> dict[str, float]:
    """Return the FLOPs by part that are computed for those of `model_flops`.

    The attention scores are in two parts, attention_forward and attention_backward, as they run at
    different speeds; what remat computes again of them is forward.

    Args:
        model, forward: results of `model_flops`, the second of the forward pass only.

    Raises:
        ValueError: see `recomputed`.
    """
    again = recomputed(dims, remat, offload)
    hardware = {
        part: flops + again.get(part, 0.0) * forward[part]
        for part, flops in model.items()
        if part != "attention_scores"
    }
    of_scores = forward["attention_scores"]
    hardware["attention_forward"] = of_scores * (1 + again.get("attention_scores", 0.0))
    hardware["attention_backward"] = of_scores * _KERNEL_BACKWARD
    return hardware


def _elementwise_bytes(dims: Mapping[str, int], slots: float, trained: float, remat: str) -> float:
    """Bytes that all devices move between matrix products: norms, rotation, SwiGLU, sums, loss.

    Counted as one fused kernel each, in bfloat16: two norms of 2 D, two residual sums of 3 D, q and
    k read and written, gate and up read and their product written; the rows of experts read and
    written when they are sorted, put into blocks (x for gate and for up), and summed. The backward
    pass moves twice that, recomputation once more. A logit is written, read twice and its gradient
    written, 14 bytes; for each chunk of tokens the head's float32 gradient is read and written.
    """
    heads = (dims["heads"] + dims["kv_heads"]) * dims["head_dim"]
    elements = 10 * dims["embed"] + 2 * heads + 3 * dims["mlp"] * dims.get("chosen", 1)
    elements += 10 * dims["embed"] * dims.get("chosen", 0)
    passes = 3 if remat == "none" else 4
    per_logit = 14 + 8 * dims["embed"] / HEAD_CHUNK
    return passes * 2 * dims["layers"] * elements * slots + per_logit * dims["vocab"] * trained
