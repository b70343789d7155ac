"""Check the whole config before anything expensive, and report every problem with its remedy.

Called by `train` after the devices are known and before any data or weights are read.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from jax_sft import config, models
from jax_sft.adapters import freeze, lora, peft
from jax_sft.data import check
from jax_sft.files import paths
from jax_sft.nn import compute
from jax_sft.nn.model_def import ModelDef
from jax_sft.ops.attention.dispatch import BACKENDS, resolve
from jax_sft.runtime import patterns
from jax_sft.runtime.text import numbered
from jax_sft.sharding import rules
from jax_sft.sharding.mesh import mesh_shape
from jax_sft.weights import hf_folder
from jax_sft.weights.param_spec import ParamSpec

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Resolved:
    """Results of validation, so that no other module derives them again.

    Attributes:
        folder: the local model folder; for a hub model it has no weights yet.
        family: the module of the model's family.
        model_cfg: the family's Config.
        mesh_shape: {axis: size}.
        micro_rows: rows per micro-batch.
        attention: the backend that model.attention selects on these devices.
        adapters: the settings of lora.*; None = full fine-tuning.
    """

    folder: Path
    family: Any
    model_cfg: Any
    mesh_shape: dict[str, int]
    micro_rows: int
    attention: str
    adapters: lora.AdapterSettings | None = None


MOST_STEPS = 2**31  # steps are counted in int32 on the devices


def validate(cfg, num_devices: int, planned_for: tuple[int, ...] | None = None) -> Resolved:
    """Check a config against itself, the model folder, the data files and the devices.

    Args:
        planned_for: CUDA compute capability of the GPUs of a plan, which needs neither the GPUs
            nor the data; None = check the devices and the data of this machine.

    Raises:
        ValueError: the config has problems; the message lists all, each with its key and remedy.
    """
    problems: list[str] = []

    def attempt(what, *args):
        try:
            return what(*args)
        except ValueError as error:
            problems.append(str(error))
            return None

    problems += _value_problems(cfg)
    attempt(compute.policy, cfg.model.remat, tuple(cfg.model.offload))
    sizes = attempt(mesh_shape, cfg.mesh, num_devices)
    folder, family, model_cfg = _model(cfg, attempt)
    micro_rows = cfg.batch.micro_rows or cfg.batch.rows
    if sizes and cfg.batch.rows > 0 and micro_rows > 0 and cfg.data.seq_len > 0:
        problems += _batch_problems(cfg, micro_rows, sizes)
    num_before = len(problems)
    adapters = attempt(_settings, cfg)
    if model_cfg:
        specs_and_dims = family.weights(model_cfg), model_cfg.dims
        # 1. The trainable parameters can only be chosen with valid adapters.
        if len(problems) == num_before:
            specs_and_dims = attempt(_trained, cfg, family, model_cfg, adapters) or specs_and_dims
        # 2. The mesh must divide the arrays, those of the adapters included.
        if sizes:
            specs, dims = specs_and_dims
            arrays = {spec.path: (spec.axes, spec.shape(dims)) for spec in specs}
            problems += rules.size_problems(arrays, sizes)
    if model_cfg and cfg.data.seq_len > model_cfg.longest:
        scaled = model_cfg.rope.reach > 0
        problems.append(
            f"data.seq_len = {cfg.data.seq_len} is over the model's max_position_embeddings = "
            f"{model_cfg.max_positions}"
            + (f", which its rope scaling extends to {model_cfg.longest}" if scaled else "")
            + ": use at most that, or "
            + ("a larger factor" if scaled else "set a rope scaling in its config.json")
        )
    if model_cfg and cfg.loss.router_aux > 0 and "experts" not in model_cfg.dims:
        problems.append(
            f"loss.router_aux = {cfg.loss.router_aux} is for models with experts: use 0 or -1"
        )
    attention = None
    if sizes and model_cfg and cfg.model.attention in BACKENDS:
        attention = attempt(_attention, cfg, model_cfg, sizes, planned_for)
    if planned_for is None:
        problems += check.problems(cfg.data)
    if problems:
        raise ValueError(numbered("the config has {} problem(s)", problems))
    assert folder and sizes and attention
    return Resolved(folder, family, model_cfg, sizes, micro_rows, attention, adapters)


def _attention(cfg, model_cfg, sizes: dict[str, int], planned_for: tuple[int, ...] | None) -> str:
    """Return the attention backend that model.attention selects."""
    return resolve(
        cfg.model.attention,
        platform="gpu" if planned_for else jax.default_backend(),
        dtype=cfg.model.dtype,
        head_dim=model_cfg.head_dim,
        sequence=sizes["sequence"],
        capability=planned_for,
        has_soft_cap=model_cfg.attention_soft_cap > 0,
    )


def _trained(
    cfg, family, model_cfg, adapters: lora.AdapterSettings | None
) -> tuple[tuple[ParamSpec, ...], dict[str, int]]:
    """Return (specs, dims) of the model with its adapters; check stored adapters against it."""
    dtype = cfg.model.dtype if cfg.model.dtype in DTYPES else "float32"
    plain = ModelDef.of(family, model_cfg, dtype=dtype)
    chosen = freeze.choose(plain, adapters, () if adapters else cfg.train.freeze)
    if adapters and cfg.lora.path:
        peft.check(paths.local(cfg.lora.path, "lora.path"), chosen)
    return chosen.stored_specs, chosen.dims


def _settings(cfg) -> lora.AdapterSettings | None:
    """Return the adapter settings of `lora.*` or of the folder `lora.path`; None = no adapters."""
    given = lora.AdapterSettings(
        **{
            name: cfg.lora[name]
            for name in ("rank", "alpha", "dropout", "rslora", "dora", "quantize")
        },
        targets=tuple(cfg.lora.targets),
    )
    if cfg.lora.rank < 0 or not 0 < cfg.lora.alpha < math.inf or not 0 <= cfg.lora.dropout < 1:
        raise ValueError(
            f"lora.rank = {cfg.lora.rank}, lora.alpha = {cfg.lora.alpha}, lora.dropout = "
            f"{cfg.lora.dropout}: use a rank from 0 up (0 = no adapters), an alpha above 0 and a "
            "dropout from 0 up to, not including, 1"
        )
    patterns.matches("lora.targets", cfg.lora.targets, (), "ending")
    patterns.matches("train.freeze", cfg.train.freeze, (), "search")
    if not cfg.lora.path and not cfg.lora.rank:
        default = config.to_dict(config.default())["lora"]
        keys = [
            f"lora.{name} = {cfg.lora[name]!r}"
            for name, value in config.to_dict(cfg)["lora"].items()
            if value != default[name]
        ]
        if keys:
            raise ValueError(
                f"{' and '.join(keys)} need{'s' * (len(keys) == 1)} adapters: set lora.rank, or "
                "leave the default"
            )
        return None
    if cfg.train.freeze:
        raise ValueError(
            "train.freeze does not go with lora.rank or lora.path: with adapters, nothing else "
            "trains"
        )
    if not cfg.lora.path:
        return given
    stored = peft.read_settings(paths.local(cfg.lora.path, "lora.path"))
    default = config.default().lora
    for name in ("rank", "alpha", "targets", "rslora", "dora"):
        value, other = getattr(given, name), getattr(stored, name)
        if value not in (other, default[name]):
            raise ValueError(
                f"lora.{name} = {value!r}, but the adapter {cfg.lora.path} has {other!r}: leave "
                "it at its default"
            )
    dropout = given.dropout or stored.dropout
    return dataclasses.replace(stored, dropout=dropout, quantize=given.quantize)


def _model(cfg, attempt) -> tuple[Path | None, Any, Any]:
    """Return the model's folder, family and Config; None for those that cannot be read."""
    if not cfg.model.path:
        attempt(
            _fail, 'model.path is empty: name a model folder or a hub id like "Qwen/Qwen2.5-7B"'
        )
        return None, None, None
    folder = attempt(hf_folder.resolve, cfg.model.path, cfg.model.revision, False)
    raw = attempt(hf_folder.read_json, folder / "config.json") if folder else None
    family, model_cfg = (raw is not None and attempt(models.read, raw)) or (None, None)
    return folder, family, model_cfg


def _fail(message: str):
    raise ValueError(message)


def _value_problems(cfg) -> list[str]:
    """Return the problems with single values."""
    choices = {
        "model.dtype": DTYPES,
        "model.param_dtype": DTYPES,
        "model.grad_dtype": DTYPES,
        "model.attention": BACKENDS,
        "lora.quantize": ("", "nf4"),
        "train.on_nonfinite": config.ON_NONFINITE,
        "optimizer.name": config.OPTIMIZERS,
        "checkpoint.verify": ("sizes", "hashes"),
        "optimizer.schedule": config.SCHEDULES,
        "optimizer.moments_dtype": config.MOMENTS_DTYPES,
    }
    at_least: dict[str, float] = {
        **{
            "seed": 0,
            "batch.rows": 1,
            "batch.micro_rows": 0,
            "train.steps": 0,
            "train.max_nonfinite": 0,
            "train.stall_timeout_s": 0,
            "optimizer.warmup": 0,
        },
        **{"optimizer.clip_norm": 0, "optimizer.weight_decay": 0, "optimizer.learning_rate": 0},
        **{"loss.z_loss": 0, "mesh.cpu_devices": 0, "eval.every_steps": 0, "eval.samples": 0},
        **{"checkpoint.every_steps": 0, "checkpoint.keep": 1, "checkpoint.keep_best": 0},
        **{"log.every_steps": 1},
    }
    # 0 <= value < 1
    within = dict.fromkeys(("optimizer.b1", "optimizer.b2", "loss.label_smoothing"), 1.0)
    shares = ("optimizer.final_ratio", "optimizer.decay_fraction")  # 0 <= value <= 1
    problems = [
        f"{key} = {_get(cfg, key)!r}: use one of {list(known)}"
        for key, known in choices.items()
        if _get(cfg, key) not in known
    ]
    problems += [
        f"{key} = {_get(cfg, key)}: use at least {least}"
        for key, least in at_least.items()
        if not least <= _get(cfg, key) < math.inf
    ]
    problems += [
        f"{key} = {_get(cfg, key)}: use a value from 0 up to, not including, {below}"
        for key, below in within.items()
        if not 0 <= _get(cfg, key) < below
    ]
    problems += [
        f"{key} = {_get(cfg, key)}: use a value from 0 to 1"
        for key in shares
        if not 0 <= _get(cfg, key) <= 1
    ]
    if cfg.seed >= 2**63:
        problems.append(f"seed = {cfg.seed}: use one below 2**63")
    if cfg.train.steps >= MOST_STEPS:
        problems.append(f"train.steps = {cfg.train.steps}: use one below {MOST_STEPS} (2**31)")
    highest = config.MAX_BFLOAT16_DECAY
    problems += [
        f"{key} = {_get(cfg, key)} is too slow for bfloat16 moments, which round its steps away: "
        f'use at most {highest}, or optimizer.moments_dtype = "float32"'
        for key in within
        if cfg.optimizer.moments_dtype == "bfloat16" and highest < _get(cfg, key) < 1
    ]
    if cfg.loss.router_aux != -1 and not 0 <= cfg.loss.router_aux < math.inf:
        problems.append(
            f"loss.router_aux = {cfg.loss.router_aux}: use 0 or more, or -1 for the model's own"
        )
    if not 0 < cfg.optimizer.eps < math.inf:
        problems.append(f"optimizer.eps = {cfg.optimizer.eps}: use a positive value such as 1e-8")
    if not cfg.train.steps and not 0 < cfg.train.epochs < math.inf:
        problems.append(
            f"train.epochs = {cfg.train.epochs}: use a positive value, or set train.steps"
        )
    if cfg.checkpoint.keep_best:
        every, saved = cfg.eval.every_steps, cfg.checkpoint.every_steps
        if not cfg.data.eval or not every or saved % every:
            problems.append(
                "checkpoint.keep_best needs an evaluation at every save: add data.eval and set "
                f"eval.every_steps (now {every}) to a divisor of checkpoint.every_steps ({saved})"
            )
        known = ["eval/" + n for n in ("loss", "perplexity")]
        known += [f"eval/{name}/{n}" for name in cfg.data.eval for n in ("loss", "perplexity")]
        if cfg.checkpoint.metric not in known:
            problems.append(f"checkpoint.metric = {cfg.checkpoint.metric!r}: use one of {known}")
    problems += [
        f"checkpoint.allow_changes: {key!r} is no config key, nor the start of one"
        for key in config.unknown(cfg.checkpoint.allow_changes, cfg)
    ]
    return problems + _tracker_problems(cfg.log.trackers)


def _tracker_problems(names: Iterable[str]) -> list[str]:
    """Return the problems with trackers that are unknown or whose package is missing."""
    problems = []
    for name in names:
        if name not in config.TRACKERS:
            problems.append(f"log.trackers: {name!r} is not one of {list(config.TRACKERS)}")
        elif importlib.util.find_spec(package := config.TRACKERS[name]) is None:
            problems.append(f"log.trackers: {name!r} needs `pip install {package}`")
    return problems


def _batch_problems(cfg, micro_rows: int, sizes: dict[str, int]) -> list[str]:
    """Return the problems with rows, micro-batches and tokens that the mesh does not divide."""
    problems = []
    ranks = sizes["data"] * sizes["fsdp"]
    if cfg.batch.rows % micro_rows:
        problems.append(
            f"batch.rows = {cfg.batch.rows} is not divisible by batch.micro_rows = {micro_rows}: "
            f"use {max(cfg.batch.rows // micro_rows, 1) * micro_rows} rows, or other micro_rows"
        )
    if micro_rows % ranks:
        key = "batch.micro_rows" if cfg.batch.micro_rows else "batch.rows"
        below, above = micro_rows // ranks * ranks, -(-micro_rows // ranks) * ranks
        fits = f"{below} or {above}" if below else str(above)
        problems.append(
            f"{key} = {micro_rows} is not divisible by data x fsdp = {ranks}: use {fits}, or "
            "change mesh.fsdp"
        )
    shards = sizes["sequence"] * sizes["tensor"]  # of the residual stream
    if cfg.data.seq_len % shards:
        multiple = -(-cfg.data.seq_len // shards) * shards
        axes = " x ".join(f"mesh.{axis}" for axis in ("sequence", "tensor") if sizes[axis] > 1)
        problems.append(
            f"data.seq_len = {cfg.data.seq_len} is not divisible by {axes} = {shards}: "
            f"use {multiple}"
        )
    return problems


def _get(cfg, key: str):
    """Return the value of a dotted key."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg
