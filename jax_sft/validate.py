"""Check the whole config before anything expensive, and report every problem with its remedy.

Called by `train` after the devices are known and before any data or weights are read.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from jax_sft import config, models, settings
from jax_sft.adapters import freeze, lora, peft
from jax_sft.data import check
from jax_sft.files import paths
from jax_sft.nn import compute
from jax_sft.nn.model_def import ModelDef
from jax_sft.ops.attention.dispatch import resolve
from jax_sft.runtime import patterns
from jax_sft.runtime.text import numbered
from jax_sft.settings import Settings
from jax_sft.sharding import rules
from jax_sft.sharding.mesh import mesh_shape
from jax_sft.weights import hf_folder
from jax_sft.weights.param_spec import ParamSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resolved(Settings):
    """Settings that were checked, and what follows from them on these devices.

    Attributes:
        folder: the local model folder; for a hub model it has no weights yet.
        family: the module of the model's family.
        model_cfg: the family's Config.
        mesh_shape: {axis: size}.
        micro_rows: rows per micro-batch.
        attention: the backend that model.attention selects on these devices.
        adapters: the adapters of lora.*; None = full fine-tuning.
    """

    folder: Path
    family: Any
    model_cfg: Any
    mesh_shape: dict[str, int]
    micro_rows: int
    attention: str
    adapters: lora.AdapterSettings | None = None


def validate(
    cfg: config.Config | Settings, num_devices: int, planned_for: tuple[int, ...] | None = None
) -> Resolved:
    """Check a config against itself, the model folder, the data files and the devices.

    Args:
        planned_for: CUDA compute capability of the GPUs of a plan, which needs neither the GPUs
            nor the data; None = check the devices and the data of this machine.

    Raises:
        ValueError: the config has problems; the message lists all, each with its key and remedy.
    """
    given = config.to_settings(cfg)
    problems: list[str] = []

    def attempt(what, *args):
        try:
            return what(*args)
        except ValueError as error:
            problems.append(str(error))
            return None

    problems += settings.problems(given) + _value_problems(given)
    attempt(compute.policy, given.model.remat, given.model.offload)
    sizes = attempt(mesh_shape, given.mesh, num_devices)
    folder, family, model_cfg = _model(given.model, attempt)
    micro_rows = given.batch.micro_rows or given.batch.rows
    if sizes and given.batch.rows > 0 and micro_rows > 0 and given.data.seq_len > 0:
        problems += _batch_problems(given, micro_rows, sizes)
    adapters = attempt(_adapters, given)
    is_valid = not any(text.startswith(("lora.", "train.freeze")) for text in problems)
    if model_cfg:
        specs_and_dims = family.weights(model_cfg), model_cfg.axis_sizes
        # 1. The trainable parameters can only be chosen with valid adapters.
        if is_valid:
            specs_and_dims = attempt(_trained, given, family, model_cfg, adapters) or specs_and_dims
        # 2. The mesh must divide the arrays, those of the adapters included.
        if sizes:
            specs, dims = specs_and_dims
            arrays = {spec.path: (spec.axes, spec.shape(dims)) for spec in specs}
            problems += rules.size_problems(arrays, sizes)
        problems += _model_problems(given, model_cfg)
    attention = None
    if sizes and model_cfg and not any(text.startswith("model.attention") for text in problems):
        attention = attempt(_attention, given.model, model_cfg, sizes, planned_for)
    if planned_for is None:
        problems += check.problems(given.data)
    if problems:
        raise ValueError(numbered("the config has {} problem(s)", problems))
    assert folder and sizes and attention
    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(Settings)}
    return Resolved(
        **values,
        folder=folder,
        family=family,
        model_cfg=model_cfg,
        mesh_shape=sizes,
        micro_rows=micro_rows,
        attention=attention,
        adapters=adapters,
    )


def _model_problems(given: Settings, model_cfg: Any) -> list[str]:
    """Return the settings that do not fit the model."""
    problems = []
    if given.data.seq_len > model_cfg.longest:
        scaled = model_cfg.rope.reach > 0
        problems.append(
            f"data.seq_len = {given.data.seq_len} is over the model's max_position_embeddings = "
            f"{model_cfg.max_positions}"
            + (f", which its rope scaling extends to {model_cfg.longest}" if scaled else "")
            + ": use at most that, or "
            + ("a larger factor" if scaled else "set a rope scaling in its config.json")
        )
    if given.loss.router_aux > 0 and "experts" not in model_cfg.axis_sizes:
        problems.append(
            f"loss.router_aux = {given.loss.router_aux} is for models with experts: use 0 or -1"
        )
    return problems


def _attention(
    model: settings.Model,
    model_cfg: Any,
    sizes: dict[str, int],
    planned_for: tuple[int, ...] | None,
) -> str:
    """Return the attention backend that model.attention selects."""
    return resolve(
        model.attention,
        platform="gpu" if planned_for else jax.default_backend(),
        dtype=model.dtype,
        head_dim=model_cfg.head_dim,
        sequence=sizes["sequence"],
        capability=planned_for,
        has_soft_cap=model_cfg.attention_soft_cap > 0,
    )


def _trained(
    given: Settings, family: Any, model_cfg: Any, adapters: lora.AdapterSettings | None
) -> tuple[tuple[ParamSpec, ...], dict[str, int]]:
    """Return (specs, dims) of the model with its adapters; check stored adapters against it."""
    dtype = given.model.dtype if given.model.dtype in settings.DTYPES else "float32"
    plain = ModelDef.of(family, model_cfg, dtype=dtype)
    chosen = freeze.choose(plain, adapters, () if adapters else given.train.freeze)
    if adapters and given.lora.path:
        peft.check(paths.local(given.lora.path, "lora.path"), chosen)
    return chosen.stored_specs, chosen.axis_sizes


def _adapters(given: Settings) -> lora.AdapterSettings | None:
    """Return the adapters of `lora.*` or of the folder `lora.path`; None = no adapters."""
    values, default = given.lora, settings.Lora()
    patterns.matches("lora.targets", values.targets, (), "ending")
    patterns.matches("train.freeze", given.train.freeze, (), "search")
    if not values.path and not values.rank:
        keys = [
            f"lora.{field.name} = {value!r}"
            for field in dataclasses.fields(values)
            if (value := getattr(values, field.name)) != getattr(default, field.name)
        ]
        if keys:
            raise ValueError(
                f"{' and '.join(keys)} need{'s' * (len(keys) == 1)} adapters: set lora.rank, or "
                "leave the default"
            )
        return None
    if given.train.freeze:
        raise ValueError(
            "train.freeze does not go with lora.rank or lora.path: with adapters, nothing else "
            "trains"
        )
    chosen = lora.AdapterSettings(
        **{
            field.name: getattr(values, field.name)
            for field in dataclasses.fields(values)
            if field.name != "path"
        }
    )
    if not values.path:
        return chosen
    stored = peft.read_settings(paths.local(values.path, "lora.path"))
    for name in ("rank", "alpha", "targets", "rslora", "dora"):
        value, other = getattr(chosen, name), getattr(stored, name)
        if value not in (other, getattr(default, name)):
            raise ValueError(
                f"lora.{name} = {value!r}, but the adapter {values.path} has {other!r}: leave "
                "it at its default"
            )
    dropout = chosen.dropout or stored.dropout
    return dataclasses.replace(stored, dropout=dropout, quantize=chosen.quantize)


def _model(model: settings.Model, attempt: Callable[..., Any]) -> tuple[Path | None, Any, Any]:
    """Return the model's folder, family and Config; None for those that cannot be read."""
    if not model.path:
        attempt(
            _fail, 'model.path is empty: name a model folder or a hub id like "Qwen/Qwen2.5-7B"'
        )
        return None, None, None
    folder = attempt(hf_folder.resolve, model.path, model.revision, False)
    raw = attempt(hf_folder.read_json, folder / "config.json") if folder else None
    family, model_cfg = (raw is not None and attempt(models.read, raw)) or (None, None)
    return folder, family, model_cfg


def _fail(message: str):
    raise ValueError(message)


def _value_problems(given: Settings) -> list[str]:
    """Return the problems with values that no `settings.Key` describes alone."""
    highest, optimizer = settings.MAX_BFLOAT16_DECAY, given.optimizer
    decays = {"optimizer.b1": optimizer.b1, "optimizer.b2": optimizer.b2}
    problems = [
        f"{key} = {decay} is too slow for bfloat16 moments, which round its steps away: use at "
        f'most {highest}, or optimizer.moments_dtype = "float32"'
        for key, decay in decays.items()
        if optimizer.moments_dtype == "bfloat16" and highest < decay < 1
    ]
    if given.loss.router_aux != -1 and not 0 <= given.loss.router_aux < math.inf:
        problems.append(
            f"loss.router_aux = {given.loss.router_aux}: use 0 or more, or -1 for the model's own"
        )
    if not given.train.steps and not 0 < given.train.epochs < math.inf:
        problems.append(
            f"train.epochs = {given.train.epochs}: use a positive value, or set train.steps"
        )
    if given.checkpoint.keep_best:
        every, saved = given.eval.every_steps, given.checkpoint.every_steps
        if not given.data.eval or every <= 0 or saved % every:
            problems.append(
                "checkpoint.keep_best needs an evaluation at every save: add data.eval and set "
                f"eval.every_steps (now {every}) to a divisor of checkpoint.every_steps ({saved})"
            )
        known = ["eval/" + n for n in ("loss", "perplexity")]
        known += [f"eval/{name}/{n}" for name in given.data.eval for n in ("loss", "perplexity")]
        if given.checkpoint.metric not in known:
            problems.append(f"checkpoint.metric = {given.checkpoint.metric!r}: use one of {known}")
    problems += [
        f"checkpoint.allow_changes: {key!r} is no config key, nor the start of one"
        for key in config.unknown(given.checkpoint.allow_changes)
    ]
    return problems + _tracker_problems(given.log.trackers)


def _tracker_problems(names: Iterable[str]) -> list[str]:
    """Return the problems with trackers that are unknown or whose package is missing."""
    problems = []
    for name in names:
        if name not in settings.TRACKERS:
            problems.append(f"log.trackers: {name!r} is not one of {list(settings.TRACKERS)}")
        elif importlib.util.find_spec(package := settings.TRACKERS[name]) is None:
            problems.append(f"log.trackers: {name!r} needs `pip install {package}`")
    return problems


def _batch_problems(given: Settings, micro_rows: int, sizes: dict[str, int]) -> list[str]:
    """Return the problems with rows, micro-batches and tokens that the mesh does not divide."""
    problems = []
    ranks = sizes["data"] * sizes["fsdp"]
    if given.batch.rows % micro_rows:
        problems.append(
            f"batch.rows = {given.batch.rows} is not divisible by batch.micro_rows = {micro_rows}: "
            f"use {max(given.batch.rows // micro_rows, 1) * micro_rows} rows, or other micro_rows"
        )
    if micro_rows % ranks:
        key = "batch.micro_rows" if given.batch.micro_rows else "batch.rows"
        below, above = micro_rows // ranks * ranks, -(-micro_rows // ranks) * ranks
        fits = f"{below} or {above}" if below else str(above)
        problems.append(
            f"{key} = {micro_rows} is not divisible by data x fsdp = {ranks}: use {fits}, or "
            "change mesh.fsdp"
        )
    shards = sizes["sequence"] * sizes["tensor"]  # of the residual stream
    if given.data.seq_len % shards:
        multiple = -(-given.data.seq_len // shards) * shards
        axes = " x ".join(f"mesh.{axis}" for axis in ("sequence", "tensor") if sizes[axis] > 1)
        problems.append(
            f"data.seq_len = {given.data.seq_len} is not divisible by {axes} = {shards}: "
            f"use {multiple}"
        )
    return problems
