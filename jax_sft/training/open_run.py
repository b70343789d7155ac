"""Open a run: join its processes, check its config, lock its workdir, choose its attention.

All problems of the config, the machine or the model's folder are reported by this module, before
any data or weights are read.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jax_sft import config
from jax_sft.checkpoint import pretrained, saving
from jax_sft.data.tokens import prepare
from jax_sft.files import run_lock
from jax_sft.hosts import cluster, compilation_cache, consensus, preflight
from jax_sft.hosts.preemption import Preemption
from jax_sft.hosts.watchdog import Watchdog
from jax_sft.ops.attention import self_test
from jax_sft.runtime import confined
from jax_sft.runtime.startup import Startup
from jax_sft.settings import Settings
from jax_sft.sharding.mesh import make_mesh, simulate_cpu_devices, use_gpu_memory
from jax_sft.training import metrics
from jax_sft.validate import Resolved, validate
from jax_sft.weights import hf_folder, vocabulary
from jax_sft.weights.param_spec import ParamSpec

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """The model that a run starts from.

    Attributes:
        folder: local folder of the model.
        specs: specs of its weights.
        axis_sizes: {name: size} of the dimensions of the weights, without padding.
        weights: reads the weights.
    """

    folder: Path
    specs: tuple[ParamSpec, ...]
    axis_sizes: dict[str, int]
    weights: pretrained.Weights


@dataclasses.dataclass(frozen=True)
class Run:
    """The environment of a run, which does not change once the run is open.

    Attributes:
        settings: the settings, with the attention backend that passed its test.
        config: the settings as a plain dict, in the form in which they are stored.
        workdir: the run's folder.
        is_first: whether this is process 0, which prints and writes.
        say: prints a line on process 0; does nothing on the others.
        mesh: all devices.
        model: the model that the run starts from.
        lock: lock of the workdir, held by process 0; None on the others.
        preemption: decides when to stop.
        watch: watchdog to which this process reports its phase.
        startup: measures the parts of the start.
    """

    settings: Resolved
    config: dict[str, Any]
    workdir: Path
    is_first: bool
    say: Say
    mesh: Mesh
    model: BaseModel
    lock: run_lock.RunLock | None
    preemption: Preemption
    watch: Watchdog
    startup: Startup


def open_run(
    given: Settings,
    workdir: Path,
    preemption: Preemption,
    watch: Watchdog,
    startup: Startup,
    ends: contextlib.ExitStack,
) -> Run:
    """Join the other processes and check everything that can be checked before reading the data.

    Args:
        given: the settings, not checked yet.
        ends: exit stack that releases the workdir at the end of the run.

    Raises:
        ValueError: anything is wrong with config, workdir or model.
        Lost, Stopped: another process did not join, or ended with an error.
    """
    # 1. Configure devices before JAX starts. Join the processes before they compare anything.
    _join(given, watch)
    is_first = cluster.process_id() == 0
    say = print_now if is_first else silent
    as_dict = config.to_dict(given)
    watch.at("comparing hosts")
    preflight.same_programs(as_dict | {"workdir": str(workdir)})
    preflight.clocks(say)
    # 2. Set up the compilation cache before anything is compiled.
    compilation_cache.use(given.train.compilation_cache, workdir, say)
    # 3. Check the config before locking the workdir, and lock the workdir before reading it.
    settings = validate(given, jax.device_count())
    preflight.shared_folder(workdir)
    lock = _take_lock(workdir, say, ends)
    saving.check_folder(workdir / "checkpoints")
    mesh = make_mesh(settings.mesh_shape)
    model = _find_model(settings)
    if is_first and not prepare.is_cached(settings.data, model.folder):
        confined.start_early()  # it starts while the attention is tested
    _describe(settings, model, say)
    attention = _choose_attention(settings, model, mesh, say)
    startup.end("checks")
    return Run(
        settings=dataclasses.replace(settings, attention=attention),
        config=as_dict,
        workdir=workdir,
        is_first=is_first,
        say=say,
        mesh=mesh,
        model=model,
        lock=lock,
        preemption=preemption,
        watch=watch,
        startup=startup,
    )


def _join(given: Settings, watch: Watchdog) -> None:
    """Configure the devices and join the other processes."""
    simulate_cpu_devices(given.mesh.cpu_devices)
    use_gpu_memory()
    watch.at("joining")
    cluster.initialize(watched=given.train.stall_timeout_s > 0)
    watch.joined()


def _take_lock(workdir: Path, say: Say, ends: contextlib.ExitStack) -> run_lock.RunLock | None:
    """Lock the workdir until the run ends; return the lock on process 0, None on the others.

    Raises:
        ValueError: another run has the workdir, or it cannot be locked; raised on all processes.
    """
    lock = run_lock.RunLock(workdir, say) if cluster.process_id() == 0 else None

    def take() -> None:
        ends.enter_context(lock or contextlib.nullcontext())

    consensus.from_first("run lock", take)
    return lock


def _find_model(settings: Resolved) -> BaseModel:
    """Find the model's weights, reading only the headers of their files.

    Raises:
        ValueError: the weights do not fit the model.
    """
    specs, axis_sizes = (
        tuple(settings.family.weights(settings.model_cfg)),
        settings.model_cfg.axis_sizes,
    )
    folder = hf_folder.resolve(settings.model.path, settings.model.revision)
    weights = pretrained.find(
        folder,
        specs,
        axis_sizes,
        settings.model_cfg.tied,
        step=hf_folder.step_of(settings.model.path),
        vocab_shards=settings.mesh_shape["tensor"],
    )
    return BaseModel(folder, specs, axis_sizes, weights)


def _describe(settings: Resolved, model: BaseModel, say: Say) -> None:
    """Print the model and the devices, with warnings about the model's folder."""
    num_params = sum(math.prod(spec.shape(model.axis_sizes)) for spec in model.specs)
    family = settings.model_cfg.__module__
    say(f"model   {settings.model.path}: {family}, {metrics.count(num_params)} parameters")
    if pickles := hf_folder.pickles(model.folder):
        say(f"WARNING {', '.join(pickles)} in the model's folder: pickle files are never read")
    axes = " ".join(f"{axis}={size}" for axis, size in settings.mesh_shape.items())
    say(f"mesh    {axes} on {jax.device_count()} x {jax.devices()[0].device_kind}")
    vocab, shards = settings.model_cfg.vocab, settings.mesh_shape["tensor"]
    if (padded := vocabulary.padded(model.axis_sizes, shards)["vocab"]) > vocab:
        say(f"padded  vocabulary {vocab:,} -> {padded:,} for mesh.tensor = {shards}")


def _choose_attention(settings: Resolved, model: BaseModel, mesh: Mesh, say: Say) -> str:
    """Return the attention backend of the run after it has passed its self-test.

    Raises:
        ValueError: the configured backend fails its self-test.
    """
    model_cfg, axis_sizes = settings.model_cfg, model.axis_sizes
    attention = self_test.choose(
        settings.model.attention,
        say=say,
        dtype=settings.model.dtype,
        num_heads_per_kv=axis_sizes["heads"] // axis_sizes["kv_heads"],
        head_dim=axis_sizes["head_dim"],
        mesh=mesh,
        has_window=model_cfg.window is not None and model_cfg.window < settings.data.seq_len,
        has_soft_cap=model_cfg.attention_soft_cap > 0,
    )
    say(f"attend  {attention}: values and gradients right on a packed test batch")
    return attention


def print_now(line: str) -> None:
    """Print a line and flush it, so that it also appears at once in a pipe."""
    print(line, flush=True)


def silent(_: str) -> None:
    """Discard the line (used on every process but the first)."""
