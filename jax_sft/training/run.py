"""The run: what `jax_sft.train(...)` and the command `python -m jax_sft.train` do."""

import contextlib
import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax

from jax_sft import config
from jax_sft.adapters import freeze
from jax_sft.checkpoint import model_files, pretrained, same_weights, saving, stop_tokens, to_hf
from jax_sft.data.batches.examples import Examples
from jax_sft.data.batches.loader import Loader
from jax_sft.data.tokens import losses, prepare
from jax_sft.data.tokens.detokenize import Detokenizer
from jax_sft.files import paths, run_files, run_lock
from jax_sft.hosts import cluster, compilation_cache, consensus, preflight
from jax_sft.hosts.preemption import Preempted, Preemption
from jax_sft.hosts.watchdog import SLOW_PHASE_S, Watchdog
from jax_sft.inference import LoadedModel
from jax_sft.ops.attention import self_test
from jax_sft.runtime import command_line, confined, lifecycle, terminal
from jax_sft.runtime.startup import Startup
from jax_sft.sharding.mesh import make_mesh, simulate_cpu_devices, use_gpu_memory
from jax_sft.training import evaluate, metrics, optim, state, trackers
from jax_sft.training.program import objective, program
from jax_sft.training.reporter import Reporter
from jax_sft.training.step import ROUTER_AUX
from jax_sft.training.step_guard import Health, dump_batches
from jax_sft.validate import MOST_STEPS, Resolved, validate
from jax_sft.weights import hf_folder, vocabulary

# How XLA says that a device's memory is full; JAX has no exception of its own for it.
OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)


def train(cfg: config.Config, workdir: str | Path, began: float | None = None) -> dict[str, float]:
    """Fine-tune as the config says; the same as the command `python -m jax_sft.train`.

    Args:
        cfg: from `jax_sft.config.default()`.
        workdir: the run's folder; a checkpoint in it is resumed.
        began: when the start that is timed began, by `time.perf_counter`; None = now.

    Returns:
        The metrics of the last step and the last evaluation (empty if nothing was left to do).

    Raises:
        ValueError: anything wrong with config, model or data, found before training starts; the
            memory is too small.
        FloatingPointError: the loss was not finite too often (train.max_nonfinite).
        Preempted: SIGTERM, SIGINT, SIGHUP or SIGUSR1; the state is saved. A second SIGINT is a
            KeyboardInterrupt, as is one before there is anything to save; in our own programs both
            end the process.
        NotSaved: trained to the end, but the last state could not be stored.
        Lost, Stopped: another process did not come, or ended with an error (cluster.py).

    A process that hangs, or that another one leaves waiting, is ended by the watchdog.
    """
    startup = Startup(time.perf_counter() if began is None else began)
    if began is not None:
        startup.end("imports")
    folder = paths.local(workdir, "--workdir")
    with (
        terminal.guarded(),
        Preemption(end=run_lock.end_process) as preemption,
        Watchdog(cfg.train.stall_timeout_s, preemption.beat, end=run_lock.end_process) as watch,
        _memory_explained(preemption),
        contextlib.ExitStack() as ends,
    ):
        return _train(cfg, folder, preemption, watch, startup, ends)


@contextlib.contextmanager
def _memory_explained(preemption: Preemption) -> Iterator[None]:
    """Say what to change where memory is too small for the first step.

    Raises:
        ValueError: instead of JAX's error.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        text = " ".join(str(error).split())
        on_host = isinstance(error, MemoryError)
        if preemption.saves or not (on_host or OUT_OF_MEMORY.search(text)):
            raise
        raise ValueError(
            f"the memory of {'this machine' if on_host else 'the devices'} is too small for this "
            f'run: {text[:300]}\nset batch.micro_rows lower, model.remat = "full", data.seq_len '
            "shorter, or use more devices (mesh.fsdp); python -m jax_sft.plan with the same config "
            "tells what fits"
        ) from error


def _train(
    cfg: config.Config,
    workdir: Path,
    preemption: Preemption,
    watch: Watchdog,
    startup: Startup,
    ends: contextlib.ExitStack,
) -> dict[str, float]:
    # ---- processes, devices and config ---------------------------------------------------------
    simulate_cpu_devices(cfg.mesh.cpu_devices)
    use_gpu_memory()
    watch.at("joining")
    cluster.initialize(watched=cfg.train.stall_timeout_s > 0)
    watch.joined()
    first_process = cluster.process_id() == 0
    say = print_now if first_process else silent
    as_dict = config.to_dict(cfg)
    watch.at("comparing hosts")
    preflight.same_programs(as_dict | {"workdir": str(workdir)})
    preflight.clocks(say)
    compilation_cache.use(cfg.train.compilation_cache, workdir, say)
    resolved = validate(cfg, jax.device_count())
    preflight.shared_folder(workdir)
    lock = take_lock(workdir, say, ends)
    saving.check_folder(workdir / "checkpoints")
    mesh = make_mesh(resolved.mesh_shape)
    family, model_cfg = resolved.family, resolved.model_cfg
    rows, dims = family.weights(model_cfg), model_cfg.dims
    num_params = sum(math.prod(row.shape(dims)) for row in rows)
    folder = hf_folder.resolve(cfg.model.path, cfg.model.revision)
    shards = resolved.mesh_shape["tensor"]
    pretrained_weights = pretrained.find(
        *(folder, rows, dims, model_cfg.tied),
        step=hf_folder.step_of(cfg.model.path),
        vocab_shards=shards,
    )
    if first_process and not prepare.is_cached(cfg.data, folder):
        confined.start_early()
    axes = " ".join(f"{axis}={size}" for axis, size in resolved.mesh_shape.items())
    say(f"model   {cfg.model.path}: {model_cfg.__module__}, {metrics.count(num_params)} parameters")
    if pickles := hf_folder.pickles(folder):
        say(f"WARNING {', '.join(pickles)} in the model's folder: pickle files are never read")
    say(f"mesh    {axes} on {jax.device_count()} x {jax.devices()[0].device_kind}")
    if (padded := vocabulary.padded(dims, shards)["vocab"]) > model_cfg.vocab:
        of_mesh = f"mesh.tensor = {shards}"
        say(f"padded  vocabulary {model_cfg.vocab:,} -> {padded:,} for {of_mesh}")
    chosen = self_test.choose(
        cfg.model.attention,
        say=say,
        dtype=cfg.model.dtype,
        num_heads_per_kv=dims["heads"] // dims["kv_heads"],
        head_dim=dims["head_dim"],
        mesh=mesh,
        has_window=model_cfg.window is not None and model_cfg.window < cfg.data.seq_len,
        has_soft_cap=model_cfg.attention_soft_cap > 0,
    )
    resolved = dataclasses.replace(resolved, attention=chosen)
    say(f"attend  {chosen}: values and gradients right on a packed test batch")
    startup.end("checks")

    # ---- data --------------------------------------------------------------------------------
    watch.at("reading the data")
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
    if num_steps >= MOST_STEPS:
        raise ValueError(
            f"train.epochs = {cfg.train.epochs} gives {num_steps} steps: use fewer, so that they "
            f"are below {MOST_STEPS} (2**31)"
        )
    report = {"train": train_examples.report} | {
        "eval": {name: examples.report[name] for name, examples in eval_examples.items()}
    }
    say(prepare.table({**report["train"], **{f"eval/{n}": r for n, r in report["eval"].items()}}))
    for of_set in (report["train"], *({f"eval/{n}": r} for n, r in report["eval"].items())):
        for warning in losses.warnings(of_set):
            say(f"WARNING {warning}")
    say(
        f"packed  {loader.num_rows} rows, {loader.fill:.1%} full; "
        f"{loader.steps_per_epoch} steps per epoch"
    )
    for warning in optim.warnings(cfg.optimizer, num_steps):
        say(f"WARNING {warning}")

    turn_ends = stop_tokens.inherited(folder) | stop_tokens.trained(train_examples.report)
    model_stops = stop_tokens.named(folder)
    if cfg.train.export_tokenizer_eos:
        stop_tokens.eos_text(folder, turn_ends)  # fails now, not after the training
    say(f"stops   {stop_tokens.line(folder, model_stops, turn_ends, train_examples.report)}")
    startup.end("data")

    # ---- state: a checkpoint of this run, or the pretrained weights ----------------------------
    watch.at("loading the weights")
    if first_process:
        lifecycle.keeps(workdir)
    adapter = paths.local(cfg.lora.path, "lora.path") if cfg.lora.path else None
    same_weights.check(folder, adapter, hf_folder.step_of(cfg.model.path))
    checkpoints = saving.Checkpoints(
        workdir / "checkpoints",
        cfg.checkpoint,
        model=model_files.Model(
            folder, pretrained_weights.dtypes, prepare.options(cfg.data).chat_template
        ),
        data=prepare.fingerprint(train_examples),
        eval_data={name: prepare.fingerprint(found) for name, found in eval_examples.items()},
        bound=bound_keys(cfg, resolved),
        adapters=dataclasses.asdict(resolved.adapters) if resolved.adapters else None,
        vocabulary=vocabulary.Vocabulary.of(rows, model_cfg.vocab),
        turn_ends=turn_ends,
        guard=lock.check if lock else None,
        say=say,
    )
    found = checkpoints.start(as_dict)
    compiled = program(cfg, resolved, mesh, num_steps, num_sources=len(source_names))
    model_def = compiled.model_def
    if model_def.frozen or model_def.trained:
        what = "adapters" if resolved.adapters else "what train.freeze leaves"
        say(f"trains  {what}: {metrics.count(freeze.count(model_def))} parameters")
    read = functools.partial(
        *(pretrained.read, pretrained_weights, model_def),
        mesh=mesh,
        dtype=cfg.model.param_dtype,
        progress=first_process,
    )
    if found:
        arrays, found = checkpoints.restore(found, compiled.state.named())
        current = compiled.state.from_named(found.step, arrays)
        say(f"resume  {workdir} from step {found.step} of {num_steps}")
        current = dataclasses.replace(
            current, frozen=read(row.path for row in rows if row.path not in compiled.state.params)
        )
    else:
        weights = read([row.path for row in rows])
        if resolved.adapters:
            weights |= freeze.adapters(cfg, resolved.adapters, model_def, weights, mesh)
        current = state.create(compiled.tx, weights, model_def.stored, mesh, model_def.frozen)
    checkpoints.keep_frozen(current.frozen, found)
    start = found.step if found else 0
    if start < num_steps:
        checkpoints.keep_model_files()
    if cfg.train.export and start < num_steps:
        consensus.from_first("export folder", lambda: to_hf.check_of_run(workdir, say))
    owed = bool(eval_sets) and (found.extra.get("owes_evaluation") if found else cfg.eval.at_start)
    if start >= num_steps:
        advice = how_to_train_on(cfg, start, loader)
        say(f"done    step {start} of {num_steps} is already there: {advice}")
    if start >= num_steps and not owed:  # nothing to train, so nothing to write
        end_run(cfg, workdir, lock, preemption, watch, say)
        return {}
    record = run_files.Record(workdir, say) if first_process else None
    if record:
        record.write("data_report.json", report)
        record.write("config.json", as_dict)
    logs = trackers.start(cfg.log.trackers, workdir, as_dict, start, say) if first_process else []

    startup.end("weights")

    # ---- what logs and evaluates ---------------------------------------------------------------
    def dump(found: Mapping[int, Mapping[str, float]]) -> Path:
        folder = workdir / "nonfinite"
        if first_process:
            dump_batches(folder, loader, train_examples, found)
        return folder

    health = Health(
        on_nonfinite=cfg.train.on_nonfinite,
        most=cfg.train.max_nonfinite,
        dump=dump,
        say=say,
        skipped=found.extra.get("skipped_steps", 0) if found else 0,
        vocab=model_cfg.vocab,
    )
    meter = metrics.Meter(
        every_steps=cfg.log.every_steps,
        num_steps=num_steps,
        start_step=start,
        epoch_of=loader.epoch_of,
        sources=source_names,
        flops=lambda sums: metrics.step_flops(
            *(model_def.rows, model_def.dims, model_cfg.tied),
            *(sums["tokens"], sums["pairs"], model_def.still),
        ),
        peak=metrics.peak_flops(jax.devices()),
        observe=health.note,
    )
    evaluator = evaluate.Evaluator(
        compiled.eval_step,
        eval_sets,
        tick=functools.partial(_tick, watch, preemption),
        examples=eval_examples,
        num_samples=cfg.eval.samples,
        stop_ids=stop_tokens.union(model_stops, turn_ends),
        answerer=LoadedModel(model_def, current.weights, mesh) if cfg.eval.samples else None,
        detokenizer=Detokenizer(folder) if cfg.eval.samples and eval_examples else None,
        say=say,
    )
    reporter = Reporter(
        meter=meter,
        health=health,
        evaluator=evaluator,
        trackers=logs,
        num_steps=num_steps,
        say=say,
    )
    save = functools.partial(
        _save,
        checkpoints=checkpoints,
        reporter=reporter,
        lock=lock,
        record=record,
        watch=watch,
        config=as_dict,
    )
    done = start
    stopped = owes_evaluation = False

    # ---- the loop ------------------------------------------------------------------------------
    # At the end, whatever happens, the running save is waited for before the trackers are closed.
    with reporter, checkpoints, jax.set_mesh(mesh):
        if owed:
            reporter.evaluate(start, current.weights)
            startup.end("evaluation")
        began = time.perf_counter()
        reporter.start_clock()
        for packed in watch.batches(loader.batches(start, num_steps), start + 1):
            stopped = preemption.reached()
            if stopped:
                break
            if lock:
                lock.check()
            # The step before: its numbers are ready while this one is dispatched.
            reporter.log_due()
            current, sums = compiled.train_step(current, packed)
            watch.started(sums)
            reporter.add(sums, packed["tokens"].size, loader.wait_ms)
            done += 1
            if done == start + 1:
                jax.block_until_ready(sums)
                say(f"compiled and ran the first step in {time.perf_counter() - began:.1f} s")
                startup.end("first step")
                say(startup.line())
                reporter.start_clock()
                preemption.saves_from_here()
            is_last = done == num_steps
            evaluated = None
            if eval_sets and (is_last or is_due(done, cfg.eval.every_steps)):
                reporter.log_due()
                try:
                    evaluated = reporter.evaluate(done, current.weights)
                except Preempted as told:
                    say(f"step {done}: {told}")
                    stopped = owes_evaluation = True
            if stopped:
                break
            if is_last or is_due(done, cfg.checkpoint.every_steps):
                save(done, current, metrics=evaluated, owes_evaluation=False, wait=is_last)
        reporter.log_due()
        if stopped:
            # Waits, and tries again what was begun and failed.
            save(done, current, metrics=None, owes_evaluation=owes_evaluation, wait=True)
        watch.at("waiting for the last save")
    if stopped:
        is_saved = f"is saved in {workdir}" if checkpoints.saved_step == done else "is NOT saved"
        raise Preempted(f"told to stop: step {done} of {num_steps} {is_saved}")

    # ---- the end -------------------------------------------------------------------------------
    if start < num_steps:
        checkpoints.require(num_steps)
        say(f"saved   {workdir / 'checkpoints'}")
    end_run(cfg, workdir, lock, preemption, watch, say)
    return reporter.last


def _tick(watch: Watchdog, preemption: Preemption) -> None:
    """Note that an evaluation goes on.

    Raises:
        Preempted: the run is to stop.
    """
    watch.at("evaluating")
    if preemption.reached():
        raise Preempted("told to stop within an evaluation")


def _save(
    step: int,
    current: state.TrainState,
    *,
    metrics: dict[str, float] | None,
    owes_evaluation: bool,
    wait: bool,
    checkpoints: saving.Checkpoints,
    reporter: Reporter,
    lock: run_lock.RunLock | None,
    record: run_files.Record | None,
    watch: Watchdog,
    config: dict,
) -> None:
    """Save the state after a step.

    Args:
        metrics: of the evaluation of this very step.
        owes_evaluation: whether the resumed run evaluates this step first.
        wait: whether to wait until it is stored.
    """
    reporter.require_sound(step)  # a run that has gone wrong stops before it is saved
    if lock:
        lock.check(look=True)
    if record:
        record.mend()
    watch.at(f"saving step {step}")
    extra = {"skipped_steps": reporter.skipped_steps, "owes_evaluation": owes_evaluation}
    checkpoints.save(step, current.named(), config, metrics, extra, wait)


def end_run(
    cfg: config.Config,
    workdir: Path,
    lock: run_lock.RunLock | None,
    preemption: Preemption,
    watch: Watchdog,
    say: Callable[[str], None],
) -> None:
    """Export what is saved, if asked to, and wait for the other processes."""
    if cfg.train.export and preemption.told:
        raise Preempted("told to stop: the run is saved, and not exported yet")
    preemption.saves_from_here(False)
    if cfg.train.export and cluster.process_id() == 0:
        watch.at("exporting")
        if lock:
            lock.check(look=True)
        told = "told to stop: the run is saved, and not exported yet"
        with preemption.raising(Preempted(told)):
            to_hf.of_run(
                workdir,
                tokenizer_eos=cfg.train.export_tokenizer_eos,
                say=lambda line: say(f"export  {line}"),
            )
    watch.at("waiting for the other processes to finish")
    cluster.exchange("the end", "", timeout_s=SLOW_PHASE_S)


def how_to_train_on(cfg: config.Config, start: int, loader: Loader) -> str:
    """Say how a run that has done all its steps is trained further."""
    key = "train.steps" if cfg.train.steps else "train.epochs"
    value: float = cfg.train.steps or cfg.train.epochs
    while (num_steps := value if cfg.train.steps else loader.num_steps(value)) <= start:
        value = 2 * value
    rate = [float(optim.schedule(cfg.optimizer, steps)(start)) for steps in (start, int(num_steps))]
    allowed = tuple(dict.fromkeys((*cfg.checkpoint.allow_changes, key)))
    return (
        f"nothing was trained or written. To train up to step {num_steps:.0f} (the learning rate "
        f"goes from {rate[0]:.2g} back to {rate[1]:.2g}): "
        + command_line.again({key: f"{value:g}", "checkpoint.allow_changes": allowed})
    )


def bound_keys(cfg: config.Config, resolved: Resolved) -> tuple[str, ...]:
    """Return the keys of config.FREE that change the losses of this run: what is drawn, or
    balanced, within each micro-batch depends on its rows.
    """
    drops = resolved.adapters is not None and resolved.adapters.dropout > 0
    balances = objective(cfg.loss, resolved.model_cfg).get(ROUTER_AUX)
    return ("batch.micro_rows",) if drops or balances else ()


def take_lock(
    workdir: Path, say: Callable[[str], None], ends: contextlib.ExitStack
) -> run_lock.RunLock | None:
    """Take a workdir for this run, until it ends; return the lock on process 0, which holds it.

    Raises:
        ValueError: on all processes, another run has the workdir, or it cannot be locked.
    """
    lock = run_lock.RunLock(workdir, say) if cluster.process_id() == 0 else None

    def take() -> None:
        ends.enter_context(lock or contextlib.nullcontext())

    consensus.from_first("run lock", take)
    return lock


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
