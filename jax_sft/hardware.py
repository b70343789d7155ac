"""Describe the chips that `plan` supports: memory, speed and the values that the compiler needs.

Contains only numbers, which `targets`, `roofline` and `metrics` read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of GPU, in a host whose GPUs are joined by NVLink.

    Attributes:
        name: value of --target.
        kind: name that the driver and JAX report.
        memory_bytes: memory that the driver gives to programs, less than the card's nominal size.
        peak_flops: peak of dense bfloat16, FLOP/s.
        hbm_bytes_per_s: bandwidth of its memory.
        nvlink_bytes_per_s: bandwidth to the other GPUs of its host, in one direction.
        network_bytes_per_s: bandwidth to other hosts, in one direction and per GPU. This assumes
            the usual network for the chip; the actual hosts may have less.
        capability: CUDA compute capability, (major, minor).
        cores: number of streaming multiprocessors.
        fpus_per_core: float32 units per streaming multiprocessor.
        clock_ghz: highest clock rate.
        l2_bytes: size of the L2 cache.
        shared_bytes_per_core, shared_bytes_per_block: largest shared memory.
        pcie_bytes_per_s: bandwidth to the host's memory.
        nvlinks: number of NVLink links in use.
    """

    name: str
    kind: str
    memory_bytes: int
    peak_flops: float
    hbm_bytes_per_s: float
    nvlink_bytes_per_s: float
    network_bytes_per_s: float
    capability: tuple[int, int]
    cores: int
    fpus_per_core: int
    clock_ghz: float
    l2_bytes: int
    shared_bytes_per_core: int
    shared_bytes_per_block: int
    pcie_bytes_per_s: int
    nvlinks: int


# Peaks, bandwidths and links are from NVIDIA's data sheets (A100 80GB SXM, H100 SXM, H200 SXM, HGX
# B200), without sparsity. The compiler's values (cores, clocks, caches) and the memory are from the
# specs in XLA's xla/backends/gpu/target_config/specs/*.txtpb, which were read from such cards. The
# memory of the H200 is an exception: its spec has 141 GiB, but the driver gives programs 139.72 to
# 139.81 GiB (143,155 MiB with driver 580).
# The network is one adapter per GPU, of 400 Gbit/s (DGX H100, H200, B200) or 200 Gbit/s (DGX A100).
_HOPPER: Mapping[str, Any] = dict(
    peak_flops=989e12,
    nvlink_bytes_per_s=450e9,
    network_bytes_per_s=50e9,
    capability=(9, 0),
    cores=132,
    fpus_per_core=128,
    clock_ghz=1.98,
    l2_bytes=52_428_800,
    shared_bytes_per_core=233_472,
    shared_bytes_per_block=232_448,
    pcie_bytes_per_s=34_359_738_368,
    nvlinks=18,
)
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="h100",
            kind="NVIDIA H100 80GB HBM3",
            memory_bytes=84_942_979_072,  # 79.11 GiB
            hbm_bytes_per_s=3.35e12,
            **_HOPPER,
        ),
        Chip(
            name="h200",
            kind="NVIDIA H200",
            memory_bytes=143_155 * MIB,
            hbm_bytes_per_s=4.8e12,
            **_HOPPER,
        ),
        Chip(
            name="b200",
            kind="NVIDIA B200",
            memory_bytes=191_514_411_008,  # 178.36 GiB
            peak_flops=2250e12,
            hbm_bytes_per_s=8e12,
            nvlink_bytes_per_s=900e9,
            network_bytes_per_s=50e9,
            capability=(10, 0),
            cores=148,
            fpus_per_core=128,
            clock_ghz=1.965,
            l2_bytes=132_644_864,
            shared_bytes_per_core=233_472,
            shared_bytes_per_block=232_448,
            pcie_bytes_per_s=68_719_476_736,
            nvlinks=18,
        ),
        Chip(
            name="a100",
            kind="NVIDIA A100-SXM4-80GB",
            memory_bytes=85_100_068_864,  # 79.26 GiB
            peak_flops=312e12,
            hbm_bytes_per_s=2.039e12,
            nvlink_bytes_per_s=300e9,
            network_bytes_per_s=25e9,
            capability=(8, 0),
            cores=108,
            fpus_per_core=64,
            clock_ghz=1.41,
            l2_bytes=41_943_040,
            shared_bytes_per_core=167_936,
            shared_bytes_per_block=166_912,
            pcie_bytes_per_s=17_179_869_184,
            nvlinks=12,
        ),
    )
}


def find(name: str) -> Chip:
    """Return the chip of a name.

    Raises:
        ValueError: there is no such chip.
    """
    if name not in CHIPS:
        raise ValueError(f"--target={name}: use one of {list(CHIPS)}")
    return CHIPS[name]
