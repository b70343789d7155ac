"""Show how the cost of a run grows: measured factor by factor, and predicted for many GPUs.

    python -m scripts.bench_growth step [--smoke]
    python -m scripts.bench_growth start [--smoke]
    python -m scripts.bench_growth gpus [--sizes 7b 32b 72b]

`step` measures the trainer's step on one device of this machine with random weights, and changes
one factor at a time. `start` runs the command twice for each size of model and data, with empty
caches and with those of the first run, and splits the start-up time into its parts. `gpus` compiles
the step for 8, 64 and 512 H200s at the same rows per GPU. It needs no GPU (see
requirements-plan.txt) and measures nothing. All print Markdown.
"""

import argparse
import dataclasses
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jax_sft import hardware, tiny
from jax_sft.planning import targets
from jax_sft.planning.analysis import Target, analyse
from jax_sft.planning.step_cost import full_row
from jax_sft.report.plan_tables import Plan
from jax_sft.validate import validate
from scripts import gpu_step
from scripts.gpu_cases import SHAPES, shape

REPO = Path(__file__).resolve().parent.parent

Started = tuple[float, str]  # seconds, and their parts

# ---- measured here -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Size:
    """The measured work: a model, and one row of equal segments."""

    tokens: int = 512
    segments: int = 2
    layers: int = 4
    vocab: int = 8192
    features: int = 256

    def raw(self) -> dict[str, Any]:
        """Return a config.json: heads of 64, two per kv head, an MLP of 2.75 times the features."""
        heads = self.features // 64
        mlp = 11 * self.features // 4
        return shape(self.features, mlp, self.layers, heads, heads // 2, self.vocab, True)


BASE = Size()
TINY = Size(tokens=64, segments=2, layers=1, vocab=256, features=128)  # for --smoke
# {factor: sizes}, each four times the one before.
FACTORS = {
    "tokens of a row, segments of 256": [
        dataclasses.replace(BASE, tokens=n, segments=n // 256) for n in (256, 1024, 4096)
    ],
    "tokens of a row, one segment": [
        dataclasses.replace(BASE, tokens=n, segments=1) for n in (256, 1024, 4096)
    ],
    "layers": [dataclasses.replace(BASE, layers=n) for n in (1, 4, 16)],
    "vocabulary": [dataclasses.replace(BASE, vocab=n) for n in (4096, 16384, 65536)],
    "segments of a row of 2048": [
        dataclasses.replace(BASE, tokens=2048, segments=n) for n in (1, 4, 16, 64)
    ],
}
SMOKE_FACTORS = {"layers": [dataclasses.replace(TINY, layers=n) for n in (1, 2)]}


def measured(size: Size, num_steps: int) -> dict[str, Any]:
    """Run the trainer's step at this size."""
    changes = {
        "model.dtype": "float32",
        "model.remat": "none",
        "data.seq_len": size.tokens,
        "data.max_segments": 256,
    }
    with tempfile.TemporaryDirectory() as folder:
        file = gpu_step.write_config(Path(folder), size.raw(), 1, changes)
        return gpu_step.measured_step(file, num_steps, max_segments=size.segments)


def growth(factors: Mapping[str, Sequence[Size]], num_steps: int) -> Iterator[list[str]]:
    """Yield a table row for every size."""
    for name, sizes in factors.items():
        first = None
        for size in sizes:
            result = measured(size, num_steps)
            amount = amount_of(size, sizes)
            seconds = result["fastest_s"]  # other work on the machine only adds time
            first = first or (amount, seconds)
            grown, slower = amount / first[0], seconds / first[1]
            yield [
                name,
                f"{amount:,}",
                f"{seconds * 1e3:,.1f} ms",
                f"{result['tokens'] / seconds:,.0f}",
                f"{slower:.2f}",
                f"{slower / grown:.2f}",
                f"{result['compile_s']:.1f} s",
            ]


def amount_of(size: Size, sizes: Sequence[Size]) -> int:
    """Return the value of the field that differs between sizes; tokens if segments differ too."""
    differs = [
        field.name
        for field in dataclasses.fields(Size)
        if len({getattr(other, field.name) for other in sizes}) > 1
    ]
    return getattr(size, "tokens" if "tokens" in differs else differs[0])


GROWTH_HEAD = ["grows", "to", "step", "tokens/s", "times the first", "over linear", "compiled in"]


# ---- start-up -----------------------------------------------------------------------------------

STARTS = {
    "parameters": [
        (dataclasses.replace(BASE, features=n, layers=layers), 1000)
        for n, layers in ((256, 4), (512, 8), (1024, 12))
    ],
    "rows of data": [(BASE, rows) for rows in (1000, 10_000, 100_000)],
}
SMOKE_STARTS = {"rows of data": [(TINY, 40)]}
STARTED = re.compile(r"^started in ([\d.]+) s: (.*); of this ", re.MULTILINE)


def starts(factors: Mapping[str, Sequence[tuple[Size, int]]]) -> Iterator[list[str]]:
    """Yield a table row for every model size and number of rows."""
    for name, sizes in factors.items():
        for size, num_rows in sizes:
            with tempfile.TemporaryDirectory() as folder:
                num_params, (cold, _), (warm, parts) = started(Path(folder), size, num_rows)
            yield [
                *(name, f"{num_params / 1e6:,.1f}M", f"{num_rows:,}"),
                *(f"{cold:.1f} s", f"{warm:.1f} s", parts),
            ]


def started(folder: Path, size: Size, num_rows: int) -> tuple[int, Started, Started]:
    """Train one step twice; return (number of parameters, first start, second start)."""
    file = gpu_step.write_config(
        folder,
        size.raw(),
        1,
        {
            "model.dtype": "float32",
            "data.seq_len": size.tokens,
            "train.steps": 1,
            "checkpoint.every_steps": 0,
        },
    )
    tiny.write_tokenizer(folder / "model")
    tiny.write_model(folder / "model", size.raw())
    tiny.write_words(folder, num_train=num_rows)
    (folder / "train.jsonl").rename(folder / "data.jsonl")
    command = [sys.executable, "-m", "jax_sft.train", f"--config={file}"]
    env = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(REPO)}
    start_times = []
    for number in range(2):
        output = subprocess.run(
            [*command, f"--workdir={folder / f'run{number}'}"],
            env=env,
            cwd=REPO,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
        seconds, parts = STARTED.findall(output)[0]
        start_times.append((float(seconds), parts))
    num_params = (folder / "model" / "model.safetensors").stat().st_size // 4
    return num_params, *start_times


START_HEAD = ["grows", "parameters", "rows", "cold start", "warm start", "of the warm one"]


# ---- predicted for many GPUs ---------------------------------------------------------------------

GPUS_PER_HOST = 8
SEQ_LEN = 4096
KEPT = "qkv,attention,attention_lse"
ALL_KEPT = f"{KEPT},mlp"
LARGE = {
    "7b": SHAPES["7b"],
    "32b": shape(5120, 27_648, 64, 40, 8, 152_064, False),
    "72b": shape(8192, 29_568, 80, 64, 8, 152_064, False),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run to plan, with rows of one segment of SEQ_LEN tokens."""

    size: str
    data: int
    fsdp: int
    rows_per_gpu: int
    remat: str

    @property
    def num_gpus(self) -> int:
        return self.data * self.fsdp


# Runs of one size with the same rows per GPU are compared. The meshes are those that were predicted
# to be fastest, and for 7B also their alternatives.
RUNS = (
    Run("7b", 1, 8, 4, ALL_KEPT),
    Run("7b", 1, 64, 4, ALL_KEPT),
    Run("7b", 8, 8, 4, ALL_KEPT),
    Run("7b", 8, 64, 4, ALL_KEPT),
    Run("7b", 64, 8, 4, ALL_KEPT),
    Run("7b", 1, 8, 1, ALL_KEPT),
    Run("7b", 1, 64, 1, ALL_KEPT),
    Run("7b", 8, 64, 1, ALL_KEPT),
    Run("32b", 1, 8, 2, KEPT),
    Run("32b", 1, 64, 2, KEPT),
    Run("32b", 8, 64, 2, KEPT),
    Run("72b", 1, 64, 2, KEPT),
    Run("72b", 8, 64, 2, KEPT),
)


def planned(run: Run) -> Plan:
    """Compile the step of a run and return its plan."""
    chip = hardware.find("h200")
    hosts = run.num_gpus // GPUS_PER_HOST
    changes = {
        "model.remat": run.remat,
        "data.seq_len": SEQ_LEN,
        "mesh.data": run.data,
        "mesh.fsdp": run.fsdp,
    }
    with tempfile.TemporaryDirectory() as folder:
        file = gpu_step.write_config(Path(folder), LARGE[run.size], 1, changes)
        cfg = runpy.run_path(str(file))["get_config"]()
        cfg.batch.rows = run.rows_per_gpu * run.num_gpus
        settings = validate(cfg, run.num_gpus, planned_for=chip.capability)
        devices = targets.topology(chip, hosts, GPUS_PER_HOST)
        target = Target(chip, hosts, GPUS_PER_HOST, devices, full_row(SEQ_LEN))
        return analyse(settings, target)


GPUS_HEAD = [
    *("model", "GPUs", "data x fsdp", "rows per GPU", "kept", "peak GiB", "slow GiB"),
    *("waits for network", "step", "MFU_c", "of 8 or first"),
]


def many_gpus(runs: Sequence[Run]) -> Iterator[list[str]]:
    """Yield a table row for every run."""
    first: dict[tuple[str, int], float] = {}
    for run in runs:
        plan = planned(run)
        assert "memory" in plan and "predicted" in plan
        memory, predicted = plan["memory"], plan["predicted"]
        step, mfu = predicted["step_time_s"], predicted["mfu_causal"]
        waits = predicted["time"]["exposed_communication_s"]
        base = first.setdefault((run.size, run.rows_per_gpu), mfu)
        yield [
            *(run.size, f"{run.num_gpus}", f"{run.data} x {run.fsdp}", f"{run.rows_per_gpu}"),
            "all" if run.remat == ALL_KEPT else "attention",
            f"{memory['peak_bytes'] / 2**30:.1f}" + ("" if memory["fits"] else " DOES NOT FIT"),
            f"{plan['communication_total']['slow_bytes'] / 2**30:.1f}",
            f"{waits / step:.1%}",
            f"{step:.3f} s",
            f"{mfu:.1%}",
            f"{mfu / base:.2f}",
        ]


# ---- command line --------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["step", "start", "gpus"])
    parser.add_argument("--sizes", nargs="+", choices=[*LARGE], default=[*LARGE])
    parser.add_argument("--steps", type=int, default=3, help="that are timed")
    parser.add_argument("--smoke", action="store_true", help="toy sizes")
    options = parser.parse_args(argv)
    if options.what == "step":
        factors = SMOKE_FACTORS if options.smoke else FACTORS
        head, rows = GROWTH_HEAD, growth(factors, options.steps)
    elif options.what == "start":
        head, rows = START_HEAD, starts(SMOKE_STARTS if options.smoke else STARTS)
    else:
        if problem := targets.plugin_problem():
            parser.error(problem)
        runs = [run for run in RUNS if run.size in options.sizes]
        head, rows = GPUS_HEAD, many_gpus(runs[:1] if options.smoke else runs)
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
