"""Compile the train step of a config for devices that need not exist. Called by `analysis`."""

import contextlib
import dataclasses
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from jax_sft.hosts import compilation_cache
from jax_sft.planning import targets
from jax_sft.sharding.mesh import make_mesh
from jax_sft.training.program import Program, program
from jax_sft.validate import Resolved

ANY_NUM_STEPS = 1000  # a constant of the schedule that affects no shape


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled train step.

    Attributes:
        program: the program that was compiled.
        text: the optimized, scheduled module; for CPU devices, the module after partitioning.
        memory: bytes per device: arguments, temporaries, peak (with arguments), host.
        for_gpus: whether text and memory are for GPUs.
        lower_s, compile_s: seconds.
        involuntary: the compiler's reports of rematerialization forced by sharding.
    """

    program: Program
    text: str
    memory: dict[str, int]
    for_gpus: bool
    lower_s: float
    compile_s: float
    involuntary: tuple[str, ...]


def compile_step(settings: Resolved, devices: Sequence[Any]) -> Compiled:
    """Compile the step that `train` would run on these devices."""
    mesh = make_mesh(settings.mesh_shape, devices)
    num_sources = len(settings.data.train) if settings.log.per_source else 0
    planned = program(settings, mesh, ANY_NUM_STEPS, num_sources=num_sources)
    for_gpus = mesh.devices.flat[0].platform != "cpu"
    with (
        jax.set_mesh(mesh),
        # Programs for absent devices cannot be loaded again, and a cache hit writes no dump.
        compilation_cache.off(),
        captured_stderr() as lines,
        tempfile.TemporaryDirectory(prefix="jax-sft-plan-") as folder,
    ):
        began = time.perf_counter()
        lowered = planned.train_step.lower(planned.state, planned.batch, planned.scalars)
        lowered_at = time.perf_counter()
        options = targets.compiler_options() if for_gpus else _dump_options(folder)
        compiled = lowered.compile(compiler_options=options)
        ended = time.perf_counter()
        text = compiled.as_text() if for_gpus else _partitioned(Path(folder))
    analysis = compiled.memory_analysis()
    memory = {
        "arguments": analysis.argument_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "peak": analysis.peak_memory_in_bytes,
        "host": analysis.host_temp_size_in_bytes + analysis.host_argument_size_in_bytes,
    }
    involuntary = [line for line in lines if "nvoluntary full rematerialization" in line]
    return Compiled(
        planned,
        text,
        memory,
        for_gpus,
        lowered_at - began,
        ended - lowered_at,
        tuple(re.sub(r"^.*?\] ", "", line) for line in involuntary),
    )


def _dump_options(folder: str) -> dict[str, Any]:
    return {
        "xla_dump_to": folder,
        "xla_dump_hlo_as_text": True,
        "xla_dump_hlo_pass_re": "spmd-partitioning",
    }


def _partitioned(folder: Path) -> str:
    """Return the step after partitioning; later CPU passes turn its bfloat16 into float32."""
    (file,) = folder.glob("*train_step*.after_spmd-partitioning.*.txt")
    return file.read_text()


def shard_bytes(array: jax.ShapeDtypeStruct) -> int:
    """Return the bytes of one device's shard of an abstract array."""
    assert array.sharding is not None
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


@contextlib.contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Collect the lines written to the process's stderr, also by C++, instead of printing them."""
    lines: list[str] = []
    with tempfile.TemporaryFile() as file:
        saved = os.dup(2)
        try:
            os.dup2(file.fileno(), 2)
            yield lines
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()
