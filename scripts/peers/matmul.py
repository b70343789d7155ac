"""Measure how fast this machine multiplies large matrices, which no training step can beat.

    python matmul.py SPEC.json [SIZE ...]

The spec's variant is "jax" or "torch". The last line of output is one JSON object with flops_per_s,
how and versions.
"""

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np

from scripts.peers import contract

SIZES = {"cpu": (2048, 4096), "gpu": (8192, 16384)}
SECONDS = 1.5  # time spent on each size; the fastest product counts


def main() -> None:
    spec = contract.read()
    product = {"jax": in_jax, "torch": in_torch}[spec.variant](spec)
    sizes = [int(size) for size in sys.argv[2:]] or SIZES[spec.device]
    seconds = {size: fastest(product(size)) for size in sizes}
    size = max(seconds, key=lambda size: size**3 / seconds[size])
    result = {
        "flops_per_s": 2 * size**3 / seconds[size],
        "how": f"{size} x {size} times {size} x {size} in {spec.dtype}",
        "versions": {spec.variant: version(spec.variant)},
    }
    print("\n" + json.dumps(result), flush=True)


def in_jax(spec: contract.Spec) -> Callable[[int], Callable[[], object]]:
    """Return a function from a size to a call that multiplies and waits."""
    import jax
    import jax.numpy as jnp

    multiply = jax.jit(jnp.matmul)

    def product(size: int) -> Callable[[], object]:
        x = jnp.asarray(np.random.default_rng(0).standard_normal((size, size)), spec.dtype)
        return lambda: jax.block_until_ready(multiply(x, x))

    return product


def in_torch(spec: contract.Spec) -> Callable[[int], Callable[[], object]]:
    """Return a function from a size to a call that multiplies and waits."""
    import torch

    device = "cuda" if spec.device == "gpu" else "cpu"

    def product(size: int) -> Callable[[], object]:
        x = torch.randn(size, size, device=device, dtype=getattr(torch, spec.dtype))

        def call() -> None:
            torch.matmul(x, x)
            if device == "cuda":
                torch.cuda.synchronize()

        return call

    return product


def fastest(call: Callable[[], object]) -> float:
    """Return the seconds of the fastest of many calls, after one call that compiles."""
    call()
    times = []
    began = time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return min(times)


if __name__ == "__main__":
    main()
