"""Adapters as files, in the format of PEFT: `adapter_config.json`, `adapter_model.safetensors`."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors import safe_open

from jax_sft.adapters import lora
from jax_sft.nn.model_def import ModelDef
from jax_sft.runtime import patterns
from jax_sft.runtime.text import at_most
from jax_sft.sharding import rules
from jax_sft.weights import hf_folder, hf_reader
from jax_sft.weights.param_spec import Weight

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Fields that describe where an adapter comes from and how PEFT applies it, not what it computes.
_IGNORED = {
    *("peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision"),
    *("inference_mode", "auto_mapping", "megatron_core", "qalora_group_size"),
    *("ensure_weight_tying", "runtime_config", "eva_config"),
    "fan_in_fan_out",  # PEFT itself sets it to false for linear layers
}
# Of init_lora_weights: those that leave the weights of the model as they were.
_INITS = (True, False, "gaussian", "eva", "orthogonal")


def read_settings(folder: Path) -> lora.Settings:
    """Read what adapters a folder holds.

    Raises:
        ValueError: it is no LoRA adapter, uses something that is not implemented here, or has a
            link out of it.
    """
    hf_folder.check_entries(folder)
    config = hf_folder.read_json(folder / CONFIG)
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type = {config.get('peft_type')!r}: only LORA is known")
    if config.get("init_lora_weights", True) not in _INITS:
        problems.append(
            f"init_lora_weights = {config['init_lora_weights']!r} is not supported: most such "
            "methods change the weights of the model itself. Convert the adapter with PEFT first "
            "(path_initial_model_for_weight_conversion)"
        )
    if config.get("bias", "none") != "none":
        problems.append(f"bias = {config['bias']!r} is not implemented: none")
    rank: Any = config.get("r")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        problems.append(f"r = {rank!r} must be a positive integer")
    alpha, dropout = config.get("lora_alpha", 8), config.get("lora_dropout", 0.0)
    for name, value in (("lora_alpha", alpha), ("lora_dropout", dropout)):
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            problems.append(f"{name} = {value!r} must be a number from 0 up")
    if not problems and dropout >= 1:
        problems.append(f"lora_dropout = {dropout!r} must be below 1")
    problems += _selection_problems(config)
    read = {"init_lora_weights", "bias", "r", "lora_alpha", "lora_dropout", *_SELECTION}
    read |= {"use_rslora", "use_dora", "rank_pattern", "alpha_pattern"}
    problems += [
        f"{name} = {value!r} is not supported"
        for name, value in config.items()
        if name not in read | _IGNORED and not (value is False or value in (None, [], {}, ""))
    ]
    if problems:
        raise ValueError(f"{folder / CONFIG}: {'; '.join(problems)}")
    modules = _modules(folder)
    rank, alpha = _rank(folder, config, modules)
    return lora.Settings(
        rank=int(rank),
        alpha=float(alpha),
        dropout=float(dropout),
        targets=_targets(config, modules),
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
    )


# ---- which layers an adapter is for -------------------------------------------------------------

_SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_A = ".lora_A.weight"


def _selection_problems(config: Mapping[str, Any]) -> list[str]:
    """Say which of the fields that choose modules have another form than PEFT writes."""
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    problems = []
    if not targets or not _are_names(targets):
        problems.append(f"target_modules = {targets!r} must be names of modules")
    if not _are_names(config.get("exclude_modules") or []):
        problems.append(f"exclude_modules = {config['exclude_modules']!r} must be names of modules")
    numbers = layers if isinstance(layers, list) else [0 if layers is None else layers]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        problems.append(f"layers_to_transform = {layers!r} must be numbers of layers")
    named = config.get("layers_pattern") or []
    named = [named] if isinstance(named, str) else named
    if not _are_names(named) or not all(re.fullmatch(r"\w+", name) for name in named):
        problems.append(f"layers_pattern = {named!r} must be plain names of lists of layers")
    for name, least in (("rank_pattern", 1), ("alpha_pattern", 0)):
        given = config.get(name) or {}
        if not isinstance(given, dict) or not all(
            isinstance(value, int | float) and not isinstance(value, bool) and value >= least
            for value in given.values()
        ):
            problems.append(f"{name} = {given!r} must map names of modules to numbers")
    return problems


def _are_names(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(name, str) for name in value)
    )


def _modules(folder: Path) -> dict[str, int]:
    """Return {name of a module that has tensors in a folder: rank of these}."""
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / WEIGHTS).with_suffix(".bin")
        reason = "it is not a PEFT adapter"
        if pickled.is_file():
            reason = (
                f"{pickled.name} is a pickle file, which is never read. Save it with PEFT again"
            )
        raise ValueError(f"{folder} has no {WEIGHTS}: {reason}")
    headers, problems = hf_reader.read_headers(folder)
    if problems:
        raise ValueError(f"{folder}: {'; '.join(at_most(problems))}")
    return {
        lora.target_of(name): tensor.shape[0] if tensor.shape else 0
        for name, tensor in headers.items()
        if name.endswith(_A)
    }


def _rank(folder: Path, config: Mapping[str, Any], stored: Mapping[str, int]) -> tuple[int, float]:
    """Return the rank and alpha that all modules have; patterns of both may change them.

    Raises:
        ValueError: modules differ in their rank or scale.
    """
    modules, of_module = [*stored], {}
    for field, default in (("rank_pattern", config["r"]), ("alpha_pattern", config["lora_alpha"])):
        given = config.get(field) or {}
        # As PEFT's get_pattern_key: the first that matches.
        expressions = [rf"(.*\.)?({key})$" for key in given]
        answers = patterns.matches(f"{folder / CONFIG}: {field}", expressions, modules, "match")
        of_module[field] = [
            next(
                (value for value, hits in zip(given.values(), answers, strict=True) if hits[n]),
                default,
            )
            for n in range(len(modules))
        ]
    pairs = {*zip(of_module["rank_pattern"], of_module["alpha_pattern"], strict=True)}
    if len(pairs) == 1:
        return pairs.pop()
    # As `write_config` has them: tensors for several kernels have more ranks, at the same scale.
    power = 0.5 if config.get("use_rslora") else 1.0
    scale = config["lora_alpha"] / config["r"] ** power
    fits = of_module["rank_pattern"] == [*stored.values()]
    if fits and all(math.isclose(alpha / rank**power, scale) for rank, alpha in pairs):
        return config["r"], config["lora_alpha"]
    raise ValueError(
        f"{folder / CONFIG}: rank_pattern = {config.get('rank_pattern')!r} and alpha_pattern = "
        f"{config.get('alpha_pattern')!r} give modules different ranks or scales, which is not "
        "supported: all must have the same"
    )


def _targets(config: Mapping[str, Any], modules: Iterable[str]) -> tuple[str, ...]:
    """Return `Settings.targets`: the names as they are given where these say all, otherwise those
    of the modules with tensors, which `check` compares with what PEFT would choose.
    """
    targets = config["target_modules"]
    if any(config.get(field) not in (None, [], "") for field in _SELECTION[1:]):
        return tuple(modules)
    if isinstance(targets, str):
        is_all = targets.lower() == lora.ALL_LINEAR
        return (lora.ALL_LINEAR,) if is_all else tuple(modules) or (targets,)
    # PEFT passes over names that no module has.
    named = [name for name in targets if any(_is_ending(name, module) for module in modules)]
    return tuple(named or targets)


def _is_ending(name: str, module: str) -> bool:
    return module == name or module.endswith("." + name)


def chosen(config: Mapping[str, Any], modules: Sequence[str], where: str) -> list[bool]:
    """Whether PEFT would give each linear layer an adapter, by its check_target_module_exists.

    Args:
        where: file of the config, in messages.
    """
    targets, excluded = config["target_modules"], config.get("exclude_modules") or []
    if isinstance(targets, str):
        is_all = targets.lower() == lora.ALL_LINEAR
        found = [True] * len(modules)
        if not is_all:
            (found,) = patterns.matches(f"{where}: target_modules", [targets], modules, "fullmatch")
    else:
        found = [
            module in targets
            or (any(_is_ending(name, module) for name in targets) and _is_in_layers(config, module))
            for module in modules
        ]
    if isinstance(excluded, str) and excluded:
        (left,) = patterns.matches(f"{where}: exclude_modules", [excluded], modules, "fullmatch")
    else:
        left = [any(_is_ending(name, module) for name in excluded) for module in modules]
    return [yes and not no for yes, no in zip(found, left, strict=True)]


def _is_in_layers(config: Mapping[str, Any], module: str) -> bool:
    """Whether `layers_to_transform` has the layer of a module."""
    layers, named = config.get("layers_to_transform"), config.get("layers_pattern") or []
    if layers is None or layers == []:
        return True
    named = [named] if isinstance(named, str) else named
    expressions = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in named] or [r".*?\.[^.]*\.(\d+)\."]
    match = next((m for one in expressions if (m := re.match(one, module))), None)
    return match is not None and int(match[1]) in (layers if isinstance(layers, list) else [layers])


def _selection_differences(folder: Path, model_def: ModelDef) -> list[str]:
    """Compare the layers that PEFT would choose with those of a model that has adapters."""
    known = [module for modules in lora.modules(model_def).values() for module in modules]
    config = hf_folder.read_json(folder / CONFIG)
    by_peft = {
        m for m, yes in zip(known, chosen(config, known, str(folder / CONFIG)), strict=True) if yes
    }
    here = {
        lora.target_of(name)
        for row in model_def.moving
        if row.path.endswith(".lora.a.kernel")
        for _, name in tensors(row, model_def)
    }
    fields = " with ".join(name for name in _SELECTION if config.get(name) not in (None, [], ""))
    return [
        *(f"{name} has no tensors, but {fields} chooses it" for name in by_peft - here),
        *(f"{name} has tensors, but {fields} does not choose it" for name in here - by_peft),
    ]


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
                part = _part(stored.get_tensor(name), row, name, model_def.dims)
                array[index] = row.from_hf(part, model_def.dims).astype(dtype)
            sharding = rules.sharding(mesh, *row.axes)
            params[row.path] = jax.make_array_from_callback(
                array.shape, sharding, lambda block, array=array: array[block]
            )
    return params


def check(folder: Path, model_def: ModelDef) -> None:
    """Compare the tensors of a folder with a model that has adapters, reading only headers.

    Raises:
        ValueError: every unknown, missing or misshapen tensor at once.
    """
    found, problems = hf_reader.read_headers(folder)
    wanted = {
        name: _shapes(row, model_def.dims)
        for row in model_def.moving
        for _, name in tensors(row, model_def)
    }
    problems += _selection_differences(folder, model_def)
    problems += [f"{name} belongs to no adapter" for name in found.keys() - wanted.keys()]
    for name, shapes in wanted.items():
        if name not in found:
            problems.append(f"{name} {shapes[0]} is missing")
        elif found[name].shape not in shapes:
            problems.append(f"{name} has shape {found[name].shape}, not {shapes[0]}")
        elif found[name].dtype not in hf_reader.DTYPES:
            problems.append(
                f"{name} has dtype {found[name].dtype}: not one of {[*hf_reader.DTYPES]}"
            )
    if problems:
        if ranks := hf_folder.read_json(folder / CONFIG).get("rank_pattern"):
            problems.append(f"{CONFIG} has rank_pattern = {ranks!r}, but one rank is supported")
        shown = sorted(problems)[:50] + ["..."] * (len(problems) > 50)
        raise ValueError(f"{folder} does not fit the model:\n  " + "\n  ".join(shown))


def tensors(row: Weight, model_def: ModelDef) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yield (index along the stacked axes, HF name) of the layers that have this adapter."""
    chosen = model_def.trained.get(row.path)
    for index, name in row.hf_tensors(model_def.dims):
        if chosen is None or chosen[index]:
            yield index, name


# ---- tensors that hold several kernels -----------------------------------------------------------


def joined(row: Weight) -> Weight:
    """Return the row of the tensor that a file has for an adapter.

    It is the same, but for the B of one of several kernels in a tensor: there it stands in the
    columns of its own A, with zeros beside it.
    """
    if not row.fused or not row.path.endswith(".b.kernel"):
        return row
    return dataclasses.replace(
        row, layout=re.sub(r"\b(whole_)?rank\b", f"ranks_of_{len(row.fused)}", row.layout)
    )


def widened(array: np.ndarray, row: Weight) -> np.ndarray:
    """Return the array of a row as one of `joined(row)`, with the zeros."""
    (axis,) = [n for n, name in enumerate(row.axes) if name in ("rank", "whole_rank")]
    rank = array.shape[axis]
    padding = [(0, 0)] * array.ndim
    padding[axis] = (row.place * rank, (len(row.fused) - 1 - row.place) * rank)
    return np.pad(array, padding)


def _shapes(row: Weight, dims: dict[str, int]) -> list[tuple[int, ...]]:
    """The shapes that a file's tensor may have; the first is what we write."""
    found = [joined(row).hf_shape(dims)]
    if row.path.endswith(".a.kernel") and row.fused:
        found.append((dims["rank"], found[0][1]))
    elif row.fused:
        found.append(row.hf_shape(dims))
    return found


def _part(tensor: np.ndarray, row: Weight, name: str, dims: dict[str, int]) -> np.ndarray:
    """What a tensor of a file holds of a row.

    Adapters of PEFT have one A for all kernels of a tensor: each here gets a copy.
    """
    whole = [(0, size) for size in row.shape(dims)[len(row.stacked) :]]
    rank = dims["rank"]
    if row.fused and row.path.endswith(".a.kernel"):
        is_shared = len(tensor) == rank
        return tensor if is_shared else tensor[rank * row.place :][:rank]
    first, *rest = row.hf_index(tuple(whole), dims)
    part = tensor[first]
    if rest and part.shape[1] != rest[0].stop:
        mine = slice(rank * row.place, rank * (row.place + 1))
        if np.any(np.delete(part, mine, axis=1)):
            raise ValueError(
                f"{name} has other values than zero beside its diagonal of {len(row.fused)} parts: "
                f"its rank is not {rank} for each"
            )
        return part[:, mine]
    return part


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
    counts = {
        lora.target_of(row.hf).rpartition(".")[2]: len(row.fused)
        for row in model_def.moving
        if row.fused
    }
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
        "rank_pattern": {name: count * settings.rank for name, count in counts.items()},
        "alpha_pattern": {
            name: settings.alpha * (math.sqrt(count) if settings.rslora else count)
            for name, count in counts.items()
        },
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
    return sorted(endings) if same == set(chosen) else sorted(set(chosen))
