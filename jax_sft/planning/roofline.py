"""Predict the time of a step by arithmetic only; nothing is measured.

In: the cost of a step, a chip, and the traffic of the compiled step. Out: a Prediction with its
assumptions. Called by `plan` and `search`.
"""

import dataclasses
from collections.abc import Sequence

from jax_sft.hardware import Chip
from jax_sft.planning.step_cost import LARGEST_GROUP, StepCost

# Shares of the dense bfloat16 peak. The best shapes of cuBLAS reach 0.80 on an H100 and 0.87 on an
# A100 (ml-engineering's table of maximum achievable matmul FLOPS); a model's shapes reach less.
GEMM_EFFICIENCY = 0.70
# Full-vocabulary products reach 615 to 690 TFLOP/s on an H100; this is the midpoint.
HEAD_EFFICIENCY = 652e12 / 989e12
# Forward and backward, counted as four and ten FLOPs per pair, head and dimension. Flash kernels:
# the midpoints of 490 to 636 and of 361 to 452 TFLOP/s, which tokamax's wheel reports for an H100,
# head_dim 128, 2k tokens or more. cuDNN's kernels are assumed to reach the same. Attention without
# a flash kernel is assumed to be 17 times slower.
_FLASH = (563e12 / 989e12, 406e12 / 989e12)
_PLAIN = (_FLASH[0] / 17, _FLASH[1] / 17)
ATTENTION_EFFICIENCY = {
    **{"cudnn": _FLASH, "tokamax": _FLASH, "blockwise": _PLAIN, "reference": _PLAIN}
}
HBM_EFFICIENCY = 0.85  # fused elementwise kernels; plain copies reach 0.90
# NCCL: rings of 8 H200 reach 368 of 450 GB/s per direction, rings of 4 hosts 47 of 50 GB/s per
# network adapter. Small messages take 18 us within a host and 99 us over 4 hosts (6 hops for the
# round trip). All figures are from ml-engineering's network benchmarks.
NVLINK_EFFICIENCY = 0.82
NETWORK_EFFICIENCY = 0.94
LATENCY_S = 20e-6  # per collective
HOP_LATENCY_S = 13e-6  # added for each further host of a ring
# Share of the multiprocessors that NCCL's kernels occupy: 16 of 132. NCCL uses 16 to 32.
NCCL_SHARE = 16 / 132


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One collective of the program, over a whole step, as seen by one device.

    Attributes:
        kind: HLO opcode, such as all-gather.
        axis: mesh axes that the collective runs over.
        bytes_fast, bytes_slow: bytes sent over NVLink and the network by all `count` executions.
        count: executions per step.
        hidden_behind_flops: FLOPs of matrix products that the device computes between the starts
            and the ends of the collective, over the whole step.
        hidden_behind_bytes: bytes that other kernels read and write in that time.
        blocking: whether no other kernel runs in that time.
    """

    kind: str
    axis: tuple[str, ...]
    bytes_fast: float
    bytes_slow: float
    count: float
    hidden_behind_flops: float = 0.0
    hidden_behind_bytes: float = 0.0
    blocking: bool = False


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A predicted step. Nothing in it was measured.

    Attributes:
        step_time_s: the sum of `time`.
        mfu: the model's FLOPs (head: trained tokens only) over the peak of all devices.
        mfu_causal: the same with the head for every token, as published figures count it.
        time: seconds by activity. contention_s is the slowdown of compute by overlapping
            collectives.
        compute: seconds of matrix products, by part.
        hidden_communication_s: overlaps with `time` and is not included in it.
        assumptions: one sentence each.
    """

    step_time_s: float
    tokens_per_s: float
    tokens_per_s_per_device: float
    mfu: float
    mfu_causal: float
    time: dict[str, float]
    compute: dict[str, float]
    hidden_communication_s: float
    assumptions: tuple[str, ...]


def predict(
    cost: StepCost, chip: Chip, num_devices: int, hosts: int, traffic: Sequence[Traffic]
) -> Prediction:
    """Return the predicted time of a step whose cost all devices share evenly.

    Args:
        hosts: number of hosts of the devices.
        traffic: every collective of the step.
    """
    forward, backward = ATTENTION_EFFICIENCY[cost.attention]
    efficiency = {
        "attention_forward": forward,
        "attention_backward": backward,
        "head": HEAD_EFFICIENCY,
    }
    peak = num_devices * chip.peak_flops
    compute = {
        part: flops / (peak * efficiency.get(part, GEMM_EFFICIENCY))
        for part, flops in cost.hardware.items()
    }
    memory = num_devices * chip.hbm_bytes_per_s * HBM_EFFICIENCY
    elementwise_s, optimizer_s = cost.elementwise_bytes / memory, cost.optimizer_bytes / memory
    exposed, hidden = _communication(traffic, chip, hosts, sum(compute.values()) + elementwise_s)
    time = {
        "compute_s": sum(compute.values()),
        "elementwise_s": elementwise_s,
        "optimizer_s": optimizer_s,
        "exposed_communication_s": exposed,
        "contention_s": hidden * NCCL_SHARE,
    }
    step_time = sum(time.values())
    return Prediction(
        step_time_s=step_time,
        tokens_per_s=cost.tokens / step_time,
        tokens_per_s_per_device=cost.tokens / step_time / num_devices,
        mfu=sum(cost.model.values()) / step_time / peak,
        mfu_causal=cost.causal_flops / step_time / peak,
        time=time,
        compute=compute,
        hidden_communication_s=hidden,
        assumptions=_assumptions(cost, chip, hosts),
    )


def traffic_time(traffic: Traffic, chip: Chip, hosts: int) -> float:
    """Return the seconds that all executions of a collective in a step take without overlap.

    Both kinds of links are busy at the same time, so the slower one decides.
    """
    fast = traffic.bytes_fast / (chip.nvlink_bytes_per_s * NVLINK_EFFICIENCY)
    slow = traffic.bytes_slow / (chip.network_bytes_per_s * NETWORK_EFFICIENCY)
    hops = (hosts - 1) * (2 if traffic.kind == "all-reduce" else 1) if traffic.bytes_slow else 0
    return max(fast, slow) + traffic.count * (LATENCY_S + hops * HOP_LATENCY_S)


def _communication(
    traffic: Sequence[Traffic], chip: Chip, hosts: int, compute_s: float
) -> tuple[float, float]:
    """Return the seconds of communication that are (exposed, hidden behind compute).

    A collective is hidden for at most the time of the kernels between its start and end. All
    collectives together are hidden for at most `compute_s`.
    """
    flops_per_s = chip.peak_flops * GEMM_EFFICIENCY
    bytes_per_s = chip.hbm_bytes_per_s * HBM_EFFICIENCY
    total = hidden = 0.0
    for collective in traffic:
        seconds = traffic_time(collective, chip, hosts)
        overlap = (
            collective.hidden_behind_flops / flops_per_s
            + collective.hidden_behind_bytes / bytes_per_s
        )
        total += seconds
        hidden += 0.0 if collective.blocking else min(seconds, overlap)
    hidden = min(hidden, compute_s)
    return total - hidden, hidden


def _assumptions(cost: StepCost, chip: Chip, hosts: int) -> tuple[str, ...]:
    forward, backward = ATTENTION_EFFICIENCY[cost.attention]
    lines = [
        f"matrix products reach {GEMM_EFFICIENCY:.0%} of {chip.peak_flops / 1e12:.0f} TFLOP/s, "
        f"the head's {HEAD_EFFICIENCY:.0%}",
        f"attention ({cost.attention}) reaches {forward:.1%} forward and {backward:.1%} backward: "
        + (
            "measured on an H100 with head_dim 128 and segments of 2k tokens or more"
            if (forward, backward) == _FLASH
            else "without a flash kernel it is taken to be 17 times slower than with one"
        ),
        f"elementwise work and the optimizer reach {HBM_EFFICIENCY:.0%} of "
        f"{chip.hbm_bytes_per_s / 1e12:.2f} TB/s",
        f"NVLink gives {NVLINK_EFFICIENCY:.0%} of {chip.nvlink_bytes_per_s / 1e9:.0f} GB/s; each "
        f"collective takes {LATENCY_S * 1e6:.0f} us more",
        "asynchronous collectives hide behind the kernels between their start and end, and take "
        f"{NCCL_SHARE:.0%} of the multiprocessors from them; all others are waited for",
        "no waiting for data, for the host or for slower devices; equal work on every device",
        "mfu counts the head for trained tokens, mfu_causal for all, as published figures do",
    ]
    if cost.has_experts:
        lines.append(
            f"the busiest expert of a layer has {LARGEST_GROUP:.0f} times the mean of tokens on "
            "each device, and all experts compute as much as it does"
        )
    if hosts > 1:
        lines.insert(
            4,
            f"the network gives {NETWORK_EFFICIENCY:.0%} of {chip.network_bytes_per_s / 1e9:.0f} "
            f"GB/s per GPU and direction, the usual one for {chip.name}: yours may have less; a "
            f"ring takes {HOP_LATENCY_S * 1e6:.0f} us more for each host it passes",
        )
    return tuple(lines)
