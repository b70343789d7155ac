"""Fine-tune a Hugging Face model.

    python -m jax_sft.train --config=configs/tiny.py [--workdir=DIR] [--config.KEY=VALUE ...]

Any key of jax_sft/config.py can be set, e.g. --config.optimizer.learning_rate=2e-5
--config.batch.rows=32 --config.data.train.main.path=my.jsonl. Training into a folder that holds a
checkpoint resumes it. The folder gets config.json, metrics.jsonl, data_report.json, checkpoints/
and, with --config.train.export=True, export/.
"""

import contextlib
import functools
import json
import math
import os
import sys
import time
import types
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from ml_collections import config_flags

from jax_sft import (
    checkpoint,
    cluster,
    command,
    config,
    evaluate,
    exit_codes,
    hf,
    metrics,
    parallel,
    state,
    trackers,
)
from jax_sft.data import chat, prepare
from jax_sft.data.examples import Examples
from jax_sft.data.loader import Loader
from jax_sft.inference import LoadedModel
from jax_sft.ops import attention
from jax_sft.program import program
from jax_sft.validate import validate


def train(cfg: config.Config, workdir: str | Path) -> dict[str, float]:
    """Fine-tune as the config says; the same as the command `python -m jax_sft.train`.

    Args:
        cfg: from `jax_sft.config.default()`.
        workdir: the run's folder; a checkpoint in it is resumed.

    Returns:
        The metrics of the last step and the last evaluation (empty if nothing was left to do).

    Raises:
        ValueError: anything wrong with config, model or data, found before training starts.
        FloatingPointError: the loss became infinite or NaN.
    """
    # ---- devices and config ------------------------------------------------------------------
    workdir = Path(workdir).absolute()
    parallel.simulate_cpu_devices(cfg.mesh.cpu_devices)
    parallel.use_gpu_memory()
    cluster.initialize()
    first_process = jax.process_index() == 0
    say = print_now if first_process else silent
    resolved = validate(cfg, jax.device_count())
    mesh = parallel.make_mesh(resolved.mesh_shape)
    family, model_cfg = resolved.family, resolved.model_cfg
    rows, dims = family.weights(model_cfg), model_cfg.dims
    num_params = sum(math.prod(row.shape(dims)) for row in rows)
    folder = hf.resolve(cfg.model.path, cfg.model.revision)
    tensors = hf.check(folder, rows, dims, model_cfg.tied)
    tokenizer = chat.load_tokenizer(folder, needs_template=False)
    axes = " ".join(f"{axis}={size}" for axis, size in resolved.mesh_shape.items())
    say(f"model   {cfg.model.path}: {model_cfg.__module__}, {metrics.count(num_params)} parameters")
    say(f"mesh    {axes} on {jax.device_count()} x {jax.devices()[0].device_kind}")
    attention.self_test(
        resolved.attention,
        dtype=cfg.model.dtype,
        num_heads_per_kv=dims["heads"] // dims["kv_heads"],
        head_dim=dims["head_dim"],
        mesh=mesh,
    )
    say(f"attend  {resolved.attention}: values and gradients right on a packed test batch")

    # ---- data --------------------------------------------------------------------------------
    train_examples = prepare.prepare(cfg.data.train, folder, cfg.data, progress=first_process)
    eval_examples = {
        name: prepare.prepare({name: source}, folder, cfg.data, progress=first_process)
        for name, source in sorted(cfg.data.eval.items())
    }
    every_set = {"train": train_examples, **{f"eval/{n}": e for n, e in eval_examples.items()}}
    check_vocabulary(every_set.values(), dims["vocab"])
    cluster.check_same(
        "data",
        {name: prepare.fingerprint(examples) for name, examples in every_set.items()},
        "Every host must see the same files",
    )
    split = functools.partial(
        Loader, data=cfg.data, micro_rows=resolved.micro_rows, mesh=mesh, seed=cfg.seed
    )
    source_names = list(train_examples.sources) if cfg.log.per_source else []
    loader = split(
        train_examples,
        sources=cfg.data.train,
        rows=cfg.batch.rows,
        shuffle=cfg.data.shuffle,
        per_source=bool(source_names),
    )
    eval_sets = {
        name: split(examples, sources=None, rows=resolved.micro_rows, shuffle=False)
        for name, examples in eval_examples.items()
    }
    num_steps = cfg.train.steps or loader.num_steps(cfg.train.epochs)
    report = {"train": train_examples.report} | {
        "eval": {name: examples.report[name] for name, examples in eval_examples.items()}
    }
    say(prepare.table({**report["train"], **{f"eval/{n}": r for n, r in report["eval"].items()}}))
    say(
        f"packed  {loader.num_rows} rows, {loader.fill:.1%} full; "
        f"{loader.steps_per_epoch} steps per epoch"
    )

    # ---- state: a checkpoint of this run, or the pretrained weights ----------------------------
    if first_process:
        workdir.mkdir(parents=True, exist_ok=True)
        stored = {name: tensor.dtype for name, tensor in tensors.items()}
        checkpoint.keep_model_files(workdir / "checkpoints", folder, stored)
        (workdir / "data_report.json").write_text(json.dumps(report, indent=2) + "\n")
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", cfg.checkpoint)
    as_dict = config.to_dict(cfg)
    start = checkpoints.latest_step or 0
    compiled = program(cfg, resolved, mesh, num_steps, num_sources=len(source_names))
    if start:
        for line in config.differences(checkpoints.metadata().get("config", {}), as_dict):
            say(f"WARNING the config differs from the checkpoint's: {line}")
        say(f"resume  {workdir} from step {start} of {num_steps}")
        current = checkpoints.restore(compiled.state)
    else:
        shardings = state.param_shardings(rows, mesh)
        param_dtype = jnp.dtype(cfg.model.param_dtype)
        params = hf.load(tensors, rows, dims, shardings, param_dtype, first_process)
        current = state.create(compiled.tx, params, rows, mesh)
    if start >= num_steps:
        say(f"done    step {start} of {num_steps} is already there: raise train.epochs to go on")
    if first_process:
        (workdir / "config.json").write_text(json.dumps(as_dict, indent=2) + "\n")
    logs = trackers.start(cfg.log.trackers, workdir, as_dict, start) if first_process else []

    # ---- what logs and evaluates ---------------------------------------------------------------
    meter = metrics.Meter(
        every_steps=cfg.log.every_steps,
        num_steps=num_steps,
        start_step=start,
        epoch_of=loader.epoch_of,
        sources=source_names,
        flops=lambda sums: metrics.step_flops(
            rows, dims, model_cfg.tied, sums["tokens"], sums["pairs"]
        ),
        peak=metrics.peak_flops(jax.devices()),
    )
    answerer = LoadedModel(compiled.model_def, current.params, mesh) if cfg.eval.samples else None
    last: dict[str, float] = {}

    def log(found: dict[str, float]) -> None:
        for tracker in logs:
            tracker.log(int(found["step"]), {k: v for k, v in found.items() if k != "step"})
        last.update(found)

    def log_steps() -> None:
        found = meter.read()
        say(meter.line(found))
        log(found)

    def run_evaluation(step: int, params) -> dict[str, float]:
        with meter.paused():
            found = evaluate.evaluate(compiled.eval_step, params, eval_sets)
            if answerer and eval_examples:
                answerer.params = params
                found |= evaluate.answers(answerer, tokenizer, eval_examples, cfg.eval.samples, say)
        say(f"step {step}/{num_steps} | " + evaluate.line(found))
        log({"step": step, **found})
        return found

    # ---- the loop ------------------------------------------------------------------------------
    with contextlib.ExitStack() as stack:
        for opened in (*logs, checkpoints):  # closed whatever happens; the save first
            stack.callback(opened.close)
        stack.enter_context(jax.set_mesh(mesh))
        if eval_sets and cfg.eval.at_start and start == 0:
            run_evaluation(0, current.params)
        began = time.perf_counter()
        meter.start_clock()
        for step, packed in enumerate(loader.batches(start, num_steps), start=start + 1):
            if meter.due:  # the step before: its numbers are ready while this one is dispatched
                log_steps()
            current, sums = compiled.train_step(current, packed)
            meter.add(sums, packed["tokens"].size, loader.wait_ms)
            if step == start + 1:
                jax.block_until_ready(sums)
                say(f"compiled and ran the first step in {time.perf_counter() - began:.1f} s")
                meter.start_clock()
            is_last = step == num_steps
            evaluated = None
            if eval_sets and (is_last or is_due(step, cfg.eval.every_steps)):
                if meter.due:
                    log_steps()
                evaluated = run_evaluation(step, current.params)
            if is_last or is_due(step, cfg.checkpoint.every_steps):
                if meter.due:
                    log_steps()
                meter.check()  # never save what is no longer finite: a resume would start there
                checkpoints.save(current, as_dict, evaluated)
        if meter.due:
            log_steps()

    # ---- the end -------------------------------------------------------------------------------
    if cfg.train.export and first_process:
        exported = checkpoint.export(workdir / "checkpoints", workdir / "export", overwrite=True)
        say(f"export  {exported}")
    say(f"saved   {workdir / 'checkpoints'}")
    return last


def is_due(step: int, every: int) -> bool:
    """Whether something done every so many steps (0 = never) is done after this one."""
    return every > 0 and step % every == 0


def check_vocabulary(sets: Iterable[Examples], vocab: int) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        ValueError: the tokenizer does not belong to the model.
    """
    highest = max(counts["highest_id"] for e in sets for counts in e.report.values())
    if highest >= vocab:
        raise ValueError(
            f"the tokenizer gives token id {highest}, the model has only {vocab}: it belongs to "
            "another model, or tokens were added to it without resizing the embedding"
        )


def print_now(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


def silent(_: str) -> None:
    """What all processes but the first have to say."""


class _CallableModule(types.ModuleType):
    """Lets `jax_sft.train` be both this module and the function, whichever is asked for first."""

    def __call__(self, cfg: config.Config, workdir: str | Path) -> dict[str, float]:
        return train(cfg, workdir)


sys.modules[__name__].__class__ = _CallableModule


def main(_: list[str]) -> None:
    """The command line."""
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file it touches
    config_file = Path(config_flags.get_config_filename(flags.FLAGS["config"]))
    workdir = flags.FLAGS.workdir or Path("runs") / config_file.stem
    try:
        train(flags.FLAGS.config, workdir)
    except (ValueError, FloatingPointError) as error:
        if command.shows_traceback():
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = exit_codes.USER_ERROR if isinstance(error, ValueError) else 1
        if jax.distributed.is_initialized():
            sys.stdout.flush()
            os._exit(code)  # an orderly exit would wait for the other processes
        sys.exit(code)


if __name__ == "__main__":
    command.define_config()
    flags.DEFINE_string("workdir", "", "The run's folder; default runs/NAME_OF_CONFIG")
    app.run(main, flags_parser=command.parse_flags)
