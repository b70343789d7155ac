"""Compiled modules for the tests of planning/hlo: real ones, and hand-written ones."""

import gzip
from functools import cache
from pathlib import Path

from jax_sft.planning.hlo import loops, parser

FOLDER = Path(__file__).parent / "hlo"
NAMES = sorted(file.name.split(".")[0] for file in FOLDER.glob("*.txt*"))

# The 2-layer 7B of the step_* files, and what one device computes.
D, N, K, H, F, V, L, T = 3584, 28, 4, 128, 18944, 152064, 2, 4096
PER_LAYER = D * (N + 2 * K) * H + N * H * D + 3 * D * F  # elements of a layer's matrices


def text_of(name: str) -> str:
    plain = FOLDER / f"{name}.txt"
    if plain.exists():
        return plain.read_text()
    return gzip.decompress(Path(f"{plain}.gz").read_bytes()).decode()


@cache
def module_of(name: str) -> parser.Module:
    return parser.parse(text_of(name))


@cache
def counts_of(name: str) -> dict[str, float]:
    return loops.executions(module_of(name), dynamic=lambda loop: 5)


def module(entry: str, before: str = "", header: str = "is_scheduled=true") -> parser.Module:
    """A hand-written module of 8 devices: the lines of its entry, and computations before it."""
    lines = "\n".join(f"  {line.strip()}" for line in entry.strip().splitlines())
    return parser.parse(
        f"HloModule hand, {header}, num_partitions=8\n\n{before}\nENTRY %main {{\n{lines}\n}}\n"
    )
