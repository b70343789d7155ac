"""Measure one case of scripts/gpu_cases.py in JAX; that script starts this one for each case.

    python -m scripts.gpu_case SYSTEM/SIZE/LENGTH --out FILE [--smoke]

Prints the results and appends them to the file as JSON lines.
"""

import argparse
import dataclasses
import functools
import gc
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scripts import stand_ins

if missing := stand_ins.install():
    print(f"stand-ins for {missing}, which are not installed", file=sys.stderr)

import jax
import jax.numpy as jnp

from jax_sft import hardware
from jax_sft.ops.attention import self_test
from jax_sft.planning import targets
from jax_sft.planning.analysis import Target, analyse
from jax_sft.planning.step_cost import RowWork
from jax_sft.sharding.mesh import single_device_mesh, use_gpu_memory
from jax_sft.validate import validate
from scripts import gpu_cases, gpu_measure, gpu_profile, gpu_step
from scripts.gpu_cases import MEDIANS, Case, Setting
from scripts.gpu_checks import Row, record
from scripts.peers import jax_plain

MAX_SEGMENTS = 256  # per row; the default of data.max_segments
NUM_STEPS = 6  # timed steps, after the first
PROFILED_STEPS = 2
OPTIMIZER = dict(learning_rate=1e-5, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.01, clip_norm=1.0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", help="machine, predict/CASE or a case, e.g. ours/7b/4096")
    parser.add_argument("--out", type=Path, required=True, help="of the results")
    parser.add_argument("--smoke", action="store_true", help="toy sizes")
    options = parser.parse_args(argv)
    use_gpu_memory()
    first, _, rest = options.task.partition("/")
    if first == "machine":
        rows = machine(options.smoke)
    elif first == "predict":
        rows = predict(gpu_cases.find(rest))
    else:
        case = gpu_cases.find(options.task)
        rows = first_that_fits(case, SYSTEMS[case.system], is_out_of_memory)
    for row in rows:
        show(row)
        record(options.out, {"task": options.task, **row})
    return 0


def show(row: Row) -> None:
    """Print a row without its lists."""
    shown = {key: value for key, value in row.items() if not isinstance(value, list)}
    print("  " + "  ".join(f"{key} {gpu_measure.shown(v)}" for key, v in shown.items()), flush=True)


def first_that_fits(
    case: Case, run: Callable[[Case, Setting], Row], is_out_of_memory: Callable[[Exception], bool]
) -> Iterator[Row]:
    """Yield a row per setting that runs out of memory, then the result of the first that fits.

    Raises:
        MemoryError: no setting fits in memory.
    """
    for setting in case.settings:
        about: Row = {"rows": setting.rows, "settings": setting.changes}
        try:
            result = run(case, setting)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            result, problem = None, str(error)[:200]
        if result:
            flops = gpu_cases.model_flops(case.raw(setting), result["tokens"], result["pairs"])
            mfu = flops / result["step_time_s"] / gpu_cases.PEAK_FLOPS
            yield about | {"mfu_c": mfu, "expected": expected(setting)} | result
            return
        yield about | {"layers": setting.layers, "out_of_memory": problem}
        gc.collect()  # free what the error still referenced
    raise MemoryError(f"none of {len(case.settings)} settings of {case.name} fits")


def expected(setting: Setting) -> dict[str, float] | None:
    """Return the prediction of `plan` with the keys of a plan; None = unknown."""
    if setting.expected is None:
        return None
    gib, seconds = setting.expected
    return {"peak_bytes": gib * 2**30, "step_time_s": seconds}


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


# ---- systems -------------------------------------------------------------------------------------


def measure_own(case: Case, setting: Setting) -> Row:
    """Measure the trainer's own step."""
    profiled = functools.partial(_profiled, num_steps=PROFILED_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        return gpu_step.measured_step(
            config_of(case, setting, Path(folder)),
            NUM_STEPS,
            max_segments=MAX_SEGMENTS,
            median=MEDIANS[case.length],
            finish=profiled,
        )


def _profiled(step: Callable[[], Any], text: str, num_steps: int) -> Row:
    return gpu_profile.profiled(step, num_steps, text)


def config_of(case: Case, setting: Setting, folder: Path) -> Path:
    """Write the config file of a case of our trainer; return its path."""
    changes = {"data.seq_len": case.length, "data.max_segments": MAX_SEGMENTS}
    return gpu_step.write_config(folder, case.raw(setting), setting.rows, changes | setting.changes)


def plain(case: Case, setting: Setting) -> Row:
    """Measure scripts/peers/jax_plain.py with first moments in bfloat16."""
    cfg = jax_plain.Config.of(case.raw(setting), "bfloat16")
    tx = jax_plain.make_optimizer(OPTIMIZER, mu_dtype=jnp.bfloat16)
    shape = (setting.rows, case.length)
    segments, positions = gpu_step.rows_of_segments(*shape, MAX_SEGMENTS, MEDIANS[case.length])
    keys = jax.random.split(jax.random.key(1), 2)
    tokens, targets_BT = (jax.random.randint(key, shape, 0, cfg.vocab) for key in keys)
    batch = {
        "tokens": tokens,
        "targets": targets_BT,
        "weights": jnp.ones(shape),
        "segment_ids": jnp.asarray(segments),
        "positions": jnp.asarray(positions),
    }
    params = jax_plain.random(cfg)
    held = [params, jax.jit(tx.init)(params)]
    del params
    began = time.perf_counter()
    compiled = jax_plain.make_step(cfg, tx).lower(*held, batch).compile()
    compile_s = time.perf_counter() - began

    def step() -> float:
        *held[:], loss = compiled(*held, batch)
        return float(loss)  # waits for the step

    times = gpu_step.timed(step, NUM_STEPS)
    peak = gpu_step.peak_bytes()
    step_tokens = setting.rows * case.length
    return {
        "layers": cfg.layers,
        "attention": f"jax.nn {cfg.implementation}, mask",
        "compile_s": compile_s,
        **times,
        "tokens": step_tokens,
        "pairs": int((positions + 1.0).sum()),
        "tokens_per_s": step_tokens / times["step_time_s"],
        "peak_bytes": peak,
        **gpu_profile.profiled(step, PROFILED_STEPS, compiled.as_text() or ""),
    }


SYSTEMS: dict[str, Callable[[Case, Setting], Row]] = {"ours": measure_own, "jax_plain": plain}


# ---- other tasks ---------------------------------------------------------------------------------


def machine(smoke: bool) -> Iterator[Row]:
    """Yield versions, the best speed of products and copies, and the self-test of attention."""
    sizes = gpu_measure.SMOKE if smoke else gpu_measure.H200
    yield from gpu_measure.versions("", sizes)
    n = 256 if smoke else 8192
    a, b = (
        jax.random.normal(key, (n, n), jnp.bfloat16) for key in jax.random.split(jax.random.key(0))
    )
    product = gpu_measure.compile_here(lambda a, b: a @ b, (a, b))
    seconds, _ = gpu_measure.measured(product, (a, b), sizes.shortest_s)
    yield {"product": n, "TFLOPs": 2 * n**3 / seconds / 1e12}
    big = jnp.zeros((n, n, 32), jnp.bfloat16)  # 4 GiB
    copy = gpu_measure.compile_here(lambda x: x + 1, (big,))
    seconds, _ = gpu_measure.measured(copy, (big,), sizes.shortest_s)
    yield {"copied_bytes": 2 * big.nbytes, "TB_per_s": 2 * big.nbytes / seconds / 1e12}
    del big
    heads_per_kv, head_dim = sizes.head_shapes[0]
    began = time.perf_counter()
    failed: list[str] = []
    backend = self_test.choose(
        sizes.attention,
        say=failed.append,
        dtype=sizes.dtype,
        num_heads_per_kv=heads_per_kv,
        head_dim=head_dim,
        mesh=single_device_mesh(),
    )
    yield from ({"attention": line} for line in failed)
    yield {"attention": backend, "self_test": "passed", "seconds": time.perf_counter() - began}


def predict(case: Case) -> Iterator[Row]:
    """Plan each setting for one H200, with the rows that will be measured; needs no GPU."""
    targets.keep_off_gpus()
    chip = hardware.find("h200")
    for setting in case.settings:
        median = MEDIANS[case.length]
        _, positions = gpu_step.rows_of_segments(setting.rows, case.length, MAX_SEGMENTS, median)
        pairs = float((positions + 1.0).sum()) / setting.rows
        row = RowWork(case.length, case.length, pairs, case.length, "as measured")
        with tempfile.TemporaryDirectory() as folder:
            file = config_of(case, setting, Path(folder))
            cfg = runpy.run_path(str(file))["get_config"]()
            settings = validate(cfg, 1, planned_for=chip.capability)
            plan = analyse(settings, Target(chip, 1, 1, targets.topology(chip, 1, 1), row))
        flops = gpu_cases.model_flops(
            case.raw(setting), setting.rows * case.length, pairs * setting.rows
        )
        assert "memory" in plan and "predicted" in plan
        peak, seconds = plan["memory"]["peak_bytes"], plan["predicted"]["step_time_s"]
        yield {
            **dataclasses.asdict(setting),
            "fits": plan["memory"]["fits"],
            "predicted": (round(peak / 2**30, 1), round(seconds, 3)),
            "predicted_mfu_c": flops / seconds / gpu_cases.PEAK_FLOPS,
        }


if __name__ == "__main__":
    sys.exit(main())
