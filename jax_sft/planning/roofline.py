"""How long a step would take, by arithmetic alone: nothing here is measured, all is predicted.

In: the cost of a step, a chip, and the traffic that was found in the compiled step. Out: a
Prediction with its assumptions. Called by `plan` and `search`.
"""

import dataclasses
from collections.abc import Sequence

from jax_sft.hardware import Chip
from jax_sft.planning.step_cost import LARGEST_GROUP, StepCost

# Shares of the dense bfloat16 peak. The best shapes of cuBLAS reach 0.80 on an H100 and 0.87 on an
# A100 (ml-engineering's table of maximum achievable matmul FLOPS); a model's shapes reach less.
GEMM_EFFICIENCY = 0.70
# Full-vocabulary products on an H100: 615 to 690 TFLOP/s, of which the middle.
HEAD_EFFICIENCY = 652e12 / 989e12
# Forward and backward, counted as four and ten FLOPs per pair, head and dimension. Flash kernels:
# the middle of 490 to 636 and of 361 to 452 TFLOP/s, which tokamax's wheel gives for an H100,
# head_dim 128, 2k tokens or more; cuDNN's are taken to be the same. Without one, 17 times slower.
_FLASH = (563e12 / 989e12, 406e12 / 989e12)
_PLAIN = (_FLASH[0] / 17, _FLASH[1] / 17)
ATTENTION_EFFICIENCY = {
    **{"cudnn": _FLASH, "tokamax": _FLASH, "blockwise": _PLAIN, "reference": _PLAIN}
}
HBM_EFFICIENCY = 0.85  # of fused elementwise kernels; plain copies reach 0.90
# NCCL: rings of 8 H200 reach 368 of 450 GB/s per direction, rings of 4 hosts 47 of 50 GB/s per
# network adapter; small messages take 18 us within a host and 99 us over 4 hosts (6 hops there and
# back). All of these are in ml-engineering's network benchmarks.
NVLINK_EFFICIENCY = 0.82
NETWORK_EFFICIENCY = 0.94
LATENCY_S = 20e-6  # of each collective
HOP_LATENCY_S = 13e-6  # more for each host that a ring passes
# Of the multiprocessors, taken by NCCL's kernels while they run: 16 of 132; it uses 16 to 32.
NCCL_SHARE = 16 / 132


@dataclasses.dataclass(frozen=True)
class Traffic:
    """A collective of one place in the program, over a whole step and as one device sees it.

    Attributes:
        kind: such as all-gather.
        axis: the mesh axes that it runs over.
        bytes_fast, bytes_slow: sent over NVLink and over the network, by all `count` executions.
        count: how often it runs in a step.
        hidden_behind_flops: of matrix products that the device computes between its starts and its
            ends, over the whole step.
        hidden_behind_bytes: that other kernels read and write meanwhile.
        blocking: nothing runs meanwhile.
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
        mfu_causal: the same with the head for every token, as published figures count.
        time: seconds by what the devices do or wait for; contention_s is what compute takes longer
            while collectives run beside it.
        compute: the seconds of matrix products, by part.
        hidden_communication_s: runs beside `time` and is not in it.
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
        hosts: that the devices are in.
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
    """Return the seconds that a step's executions of a collective take by themselves.

    Both kinds of links are busy at the same time: the slower one decides.
    """
    fast = traffic.bytes_fast / (chip.nvlink_bytes_per_s * NVLINK_EFFICIENCY)
    slow = traffic.bytes_slow / (chip.network_bytes_per_s * NETWORK_EFFICIENCY)
    hops = (hosts - 1) * (2 if traffic.kind == "all-reduce" else 1) if traffic.bytes_slow else 0
    return max(fast, slow) + traffic.count * (LATENCY_S + hops * HOP_LATENCY_S)


def _communication(
    traffic: Sequence[Traffic], chip: Chip, hosts: int, compute_s: float
) -> tuple[float, float]:
    """Return the seconds (waited for, hidden behind compute).

    A collective is hidden as long as the kernels between its starts and ends take; all together
    cannot be hidden behind more than there is to compute.
    """
    flops_per_s = chip.peak_flops * GEMM_EFFICIENCY
    bytes_per_s = chip.hbm_bytes_per_s * HBM_EFFICIENCY
    taken = hidden = 0.0
    for one in traffic:
        seconds = traffic_time(one, chip, hosts)
        beside = one.hidden_behind_flops / flops_per_s + one.hidden_behind_bytes / bytes_per_s
        taken += seconds
        hidden += 0.0 if one.blocking else min(seconds, beside)
    hidden = min(hidden, compute_s)
    return taken - hidden, hidden


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
