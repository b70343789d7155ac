"""Adapters as files, in the format of PEFT: `adapter_config.json`, `adapter_model.safetensors`."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors import safe_open

from jax_sft import hf, lora, parallel
from jax_sft.model import ModelDef
from jax_sft.models.spec import Weight

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Fields that describe where an adapter comes from and how PEFT applies it, not what it computes.
_IGNORED = {
    *("peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision"),
    *("inference_mode", "auto_mapping", "megatron_core", "qalora_group_size"),
    *("ensure_weight_tying", "runtime_config", "eva_config"),
}
# Of init_lora_weights: those that leave the weights of the model as they were.
_INITS = (True, False, "gaussian", "eva", "orthogonal")


def read_settings(folder: Path) -> lora.Settings:
    """Read what adapters a folder holds.

    Raises:
        ValueError: it is no LoRA adapter, or uses something that is not implemented here.
    """
    config = hf.read_json(folder / CONFIG)
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type = {config.get('peft_type')!r}: only LORA is known")
    if config.get("init_lora_weights", True) not in _INITS:
        problems.append(
            f"init_lora_weights = {config['init_lora_weights']!r} has changed the weights of the "
            "model itself: convert the adapter with PEFT first"
        )
    if config.get("bias", "none") != "none":
        problems.append(f"bias = {config['bias']!r} is not implemented: none")
    rank: Any = config.get("r")
    targets: Any = config.get("target_modules")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        problems.append(f"r = {rank!r} must be a positive integer")
    alpha, dropout = config.get("lora_alpha", 8), config.get("lora_dropout", 0.0)
    for name, value in (("lora_alpha", alpha), ("lora_dropout", dropout)):
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            problems.append(f"{name} = {value!r} must be a number from 0 up")
    targets = [targets] if isinstance(targets, str) else targets
    if not targets or not all(isinstance(one, str) for one in targets):
        problems.append(f"target_modules = {targets!r} must be names of modules")
    read = {"init_lora_weights", "bias", "r", "target_modules", "lora_alpha", "lora_dropout"}
    read |= {"use_rslora", "use_dora"}
    problems += [
        f"{name} = {value!r} is not implemented"
        for name, value in config.items()
        if name not in read | _IGNORED and value not in (None, False, [], {}, "")
    ]
    if problems:
        raise ValueError(f"{folder / CONFIG}: {'; '.join(problems)}")
    return lora.Settings(
        rank=int(rank),
        alpha=float(alpha),
        dropout=float(dropout),
        targets=tuple(targets),
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
    )


def load(folder: Path, model_def: ModelDef, mesh: Mesh, dtype) -> dict[str, jax.Array]:
    """Read adapters into their shards.

    Args:
        model_def: with adapters as `read_settings` describes them.
        dtype: of the returned arrays.

    Returns:
        {our path: array}.

    Raises:
        ValueError: tensors that are missing, unknown or misshapen; each is named.
    """
    check(folder, model_def)
    params = {}
    with safe_open(folder / WEIGHTS, framework="numpy") as stored:
        for row in model_def.moving:
            array = np.zeros(row.shape(model_def.dims), dtype)
            for index, name in tensors(row, model_def):
                array[index] = row.from_hf(stored.get_tensor(name), model_def.dims).astype(dtype)
            sharding = parallel.sharding(mesh, *row.axes)
            params[row.path] = jax.make_array_from_callback(
                array.shape, sharding, lambda block, array=array: array[block]
            )
    return params


def check(folder: Path, model_def: ModelDef) -> None:
    """Compare the tensors of a folder with a model that has adapters, reading only headers.

    Raises:
        ValueError: every unknown, missing or misshapen tensor at once.
    """
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}: it is not a PEFT adapter")
    found, problems = hf.read_headers(folder)
    wanted = {
        name: row.hf_shape(model_def.dims)
        for row in model_def.moving
        for _, name in tensors(row, model_def)
    }
    problems += [f"{name} belongs to no adapter" for name in found.keys() - wanted.keys()]
    for name, shape in wanted.items():
        if name not in found:
            problems.append(f"{name} {shape} is missing")
        elif found[name].shape != shape:
            problems.append(f"{name} has shape {found[name].shape}, not {shape}")
        elif found[name].dtype not in hf.DTYPES:
            problems.append(f"{name} has dtype {found[name].dtype}: not one of {[*hf.DTYPES]}")
    if problems:
        shown = sorted(problems)[:50] + ["..."] * (len(problems) > 50)
        raise ValueError(f"{folder} does not fit the model:\n  " + "\n  ".join(shown))


def tensors(row: Weight, model_def: ModelDef) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yield (index along the stacked axes, HF name) of the layers that have this adapter."""
    chosen = model_def.trained.get(row.path)
    for index, name in row.hf_tensors(model_def.dims):
        if chosen is None or chosen[index]:
            yield index, name


def write_config(
    out: Path, model_def: ModelDef, settings: lora.Settings, base: str, revision: str = ""
) -> None:
    """Write what PEFT needs to know of adapters, beside their tensors.

    Args:
        base: path or hub id of the model that they belong to, and its revision.
    """
    chosen = [
        lora.target_of(name)
        for row in model_def.rows
        if row.path.endswith(".lora.a.kernel")
        for _, name in tensors(row, model_def)
    ]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision or None,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": _shortest(chosen, lora.modules(model_def)),
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _shortest(chosen: list[str], known: Mapping[str, list[str]]) -> list[str]:
    """Name modules by their endings where that chooses these and no others."""
    endings = {name.rpartition(".")[2] for name in chosen}
    every = [name for names in known.values() for name in names]
    same = {name for name in every if name.rpartition(".")[2] in endings}
    return sorted(endings) if same == set(chosen) else chosen
