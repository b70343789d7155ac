"""Read and write adapters as PEFT files: `adapter_config.json`, `adapter_model.safetensors`."""

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
from jax_sft.weights.param_spec import ParamSpec

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Fields for the origin of an adapter and how PEFT applies it, which do not change what it computes.
_IGNORED = {
    *("peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision"),
    *("inference_mode", "auto_mapping", "megatron_core", "qalora_group_size"),
    *("ensure_weight_tying", "runtime_config", "eva_config"),
    "fan_in_fan_out",  # PEFT itself sets it to false for linear layers
}
# Values of init_lora_weights that do not change the weights of the model.
_INITS = (True, False, "gaussian", "eva", "orthogonal")


def read_settings(folder: Path) -> lora.AdapterSettings:
    """Read the settings of the adapters in a folder.

    Raises:
        ValueError: the folder has no LoRA adapter, the adapter uses an unsupported feature, or the
            folder has a link that leads out of it.
    """
    hf_folder.check_entries(folder)
    config = hf_folder.read_json(folder / CONFIG)
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type = {config.get('peft_type')!r}: only LORA is supported")
    if config.get("init_lora_weights", True) not in _INITS:
        problems.append(
            f"init_lora_weights = {config['init_lora_weights']!r} is not supported: most such "
            "methods change the weights of the model itself. Convert the adapter with PEFT first "
            "(path_initial_model_for_weight_conversion)"
        )
    if config.get("bias", "none") != "none":
        problems.append(f"bias = {config['bias']!r} is not supported (only none is)")
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
    return lora.AdapterSettings(
        rank=int(rank),
        alpha=float(alpha),
        dropout=float(dropout),
        targets=_targets(config, modules),
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
    )


# ---- the layers of an adapter --------------------------------------------------------------------

_SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_A = ".lora_A.weight"


def _selection_problems(config: Mapping[str, Any]) -> list[str]:
    """Return a problem for each field that selects modules in a form that PEFT does not write."""
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
    """Return {module with tensors in the folder: their rank}."""
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
    """Return the common rank and alpha of all modules, after rank_pattern and alpha_pattern.

    Raises:
        ValueError: modules differ in rank or scale.
    """
    modules, module_values = [*stored], {}
    for field, default in (("rank_pattern", config["r"]), ("alpha_pattern", config["lora_alpha"])):
        given = config.get(field) or {}
        # The first matching pattern decides, as in PEFT's get_pattern_key.
        expressions = [rf"(.*\.)?({key})$" for key in given]
        answers = patterns.matches(f"{folder / CONFIG}: {field}", expressions, modules, "match")
        module_values[field] = [
            next(
                (value for value, hits in zip(given.values(), answers, strict=True) if hits[n]),
                default,
            )
            for n in range(len(modules))
        ]
    pairs = {*zip(module_values["rank_pattern"], module_values["alpha_pattern"], strict=True)}
    if len(pairs) == 1:
        return pairs.pop()
    # As `write_config` writes them: a tensor of several kernels has a multiple of the rank, but the
    # same scale.
    power = 0.5 if config.get("use_rslora") else 1.0
    scale = config["lora_alpha"] / config["r"] ** power
    fits = module_values["rank_pattern"] == [*stored.values()]
    if fits and all(math.isclose(alpha / rank**power, scale) for rank, alpha in pairs):
        return config["r"], config["lora_alpha"]
    raise ValueError(
        f"{folder / CONFIG}: rank_pattern = {config.get('rank_pattern')!r} and alpha_pattern = "
        f"{config.get('alpha_pattern')!r} give modules different ranks or scales, which is not "
        "supported: all must have the same"
    )


def _targets(config: Mapping[str, Any], modules: Iterable[str]) -> tuple[str, ...]:
    """Return `AdapterSettings.targets`.

    These are the given names if they determine the selection. Otherwise they are the names of the
    modules with tensors, which `check` compares with PEFT's selection.
    """
    targets = config["target_modules"]
    if any(config.get(field) not in (None, [], "") for field in _SELECTION[1:]):
        return tuple(modules)
    if isinstance(targets, str):
        is_all = targets.lower() == lora.ALL_LINEAR
        return (lora.ALL_LINEAR,) if is_all else tuple(modules) or (targets,)
    # PEFT ignores names that match no module.
    named = [name for name in targets if any(_is_ending(name, module) for module in modules)]
    return tuple(named or targets)


def _is_ending(name: str, module: str) -> bool:
    return module == name or module.endswith("." + name)


def chosen(config: Mapping[str, Any], modules: Sequence[str], where: str) -> list[bool]:
    """Return for each module whether PEFT would adapt it, as in check_target_module_exists.

    Args:
        where: file name of the config, for messages.
    """
    targets, excluded = config["target_modules"], config.get("exclude_modules") or []
    if isinstance(targets, str):
        is_all = targets.lower() == lora.ALL_LINEAR
        is_target = [True] * len(modules)
        if not is_all:
            (is_target,) = patterns.matches(
                f"{where}: target_modules", [targets], modules, "fullmatch"
            )
    else:
        is_target = [
            module in targets
            or (any(_is_ending(name, module) for name in targets) and _is_in_layers(config, module))
            for module in modules
        ]
    if isinstance(excluded, str) and excluded:
        (is_excluded,) = patterns.matches(
            f"{where}: exclude_modules", [excluded], modules, "fullmatch"
        )
    else:
        is_excluded = [any(_is_ending(name, module) for name in excluded) for module in modules]
    return [yes and not no for yes, no in zip(is_target, is_excluded, strict=True)]


def _is_in_layers(config: Mapping[str, Any], module: str) -> bool:
    """Return whether `layers_to_transform` includes the layer of a module."""
    layers, named = config.get("layers_to_transform"), config.get("layers_pattern") or []
    if layers is None or layers == []:
        return True
    named = [named] if isinstance(named, str) else named
    expressions = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in named] or [r".*?\.[^.]*\.(\d+)\."]
    match = next((m for expression in expressions if (m := re.match(expression, module))), None)
    return match is not None and int(match[1]) in (layers if isinstance(layers, list) else [layers])


def _selection_differences(folder: Path, model_def: ModelDef) -> list[str]:
    """Return the differences between PEFT's selection of layers and the adapters of the model."""
    known = [module for modules in lora.modules(model_def).values() for module in modules]
    config = hf_folder.read_json(folder / CONFIG)
    by_peft = {
        m for m, yes in zip(known, chosen(config, known, str(folder / CONFIG)), strict=True) if yes
    }
    with_tensors = {
        lora.target_of(name)
        for spec in model_def.trainable_specs
        if spec.path.endswith(".lora.a.kernel")
        for _, name in tensors(spec, model_def)
    }
    fields = " with ".join(name for name in _SELECTION if config.get(name) not in (None, [], ""))
    return [
        *(f"{name} has no tensors, but {fields} chooses it" for name in by_peft - with_tensors),
        *(
            f"{name} has tensors, but {fields} does not choose it"
            for name in with_tensors - by_peft
        ),
    ]


def load(folder: Path, model_def: ModelDef, mesh: Mesh, dtype) -> dict[str, jax.Array]:
    """Read adapters into their shards.

    Args:
        model_def: model with adapters as `read_settings` returns them.
        dtype: dtype of the returned arrays.

    Returns:
        {path: array}.

    Raises:
        ValueError: tensors are missing, unknown or have a wrong shape; the message lists them.
    """
    check(folder, model_def)
    params = {}
    with safe_open(folder / WEIGHTS, framework="numpy") as stored:
        for spec in model_def.trainable_specs:
            array = np.zeros(spec.shape(model_def.axis_sizes), dtype)
            for index, name in tensors(spec, model_def):
                part = _part(stored.get_tensor(name), spec, name, model_def.axis_sizes)
                array[index] = spec.from_hf(part, model_def.axis_sizes).astype(dtype)
            sharding = rules.sharding(mesh, *spec.axes)
            params[spec.path] = jax.make_array_from_callback(
                array.shape, sharding, lambda block, array=array: array[block]
            )
    return params


def check(folder: Path, model_def: ModelDef) -> None:
    """Check the tensors of a folder against a model with adapters, reading only headers.

    Raises:
        ValueError: tensors are unknown, missing or have a wrong shape; the message lists them all.
    """
    headers, problems = hf_reader.read_headers(folder)
    expected = {
        name: _shapes(spec, model_def.axis_sizes)
        for spec in model_def.trainable_specs
        for _, name in tensors(spec, model_def)
    }
    problems += _selection_differences(folder, model_def)
    problems += [f"{name} belongs to no adapter" for name in headers.keys() - expected.keys()]
    for name, shapes in expected.items():
        if name not in headers:
            problems.append(f"{name} {shapes[0]} is missing")
        elif headers[name].shape not in shapes:
            problems.append(f"{name} has shape {headers[name].shape}, not {shapes[0]}")
        elif headers[name].dtype not in hf_reader.DTYPES:
            problems.append(
                f"{name} has dtype {headers[name].dtype}: not one of {[*hf_reader.DTYPES]}"
            )
    if problems:
        if ranks := hf_folder.read_json(folder / CONFIG).get("rank_pattern"):
            problems.append(f"{CONFIG} has rank_pattern = {ranks!r}, but one rank is supported")
        shown = sorted(problems)[:50] + ["..."] * (len(problems) > 50)
        raise ValueError(f"{folder} does not fit the model:\n  " + "\n  ".join(shown))


def tensors(spec: ParamSpec, model_def: ModelDef) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yield (index along the stacked axes, HF name) for each layer with this adapter."""
    chosen = model_def.layer_masks.get(spec.path)
    for index, name in spec.hf_tensors(model_def.axis_sizes):
        if chosen is None or chosen[index]:
            yield index, name


# ---- tensors that hold several kernels -----------------------------------------------------------


def joined(spec: ParamSpec) -> ParamSpec:
    """Return the spec of the tensor in a file for a parameter of an adapter.

    It is the same spec, except for B of a fused tensor. The file stores that B block-diagonally: it
    is zero outside the columns of its own A.
    """
    if not spec.fused or not spec.path.endswith(".b.kernel"):
        return spec
    return dataclasses.replace(
        spec, layout=re.sub(r"\b(whole_)?rank\b", f"ranks_of_{len(spec.fused)}", spec.layout)
    )


def widened(array: np.ndarray, spec: ParamSpec) -> np.ndarray:
    """Pad the array of `spec` with zeros to an array of `joined(spec)`."""
    (axis,) = [n for n, name in enumerate(spec.axes) if name in ("rank", "whole_rank")]
    rank = array.shape[axis]
    padding = [(0, 0)] * array.ndim
    padding[axis] = (spec.place * rank, (len(spec.fused) - 1 - spec.place) * rank)
    return np.pad(array, padding)


def _shapes(spec: ParamSpec, axis_sizes: dict[str, int]) -> list[tuple[int, ...]]:
    """Return the shapes that a tensor in a file may have; the first is the one we write."""
    shapes = [joined(spec).hf_shape(axis_sizes)]
    if spec.path.endswith(".a.kernel") and spec.fused:
        shapes.append((axis_sizes["rank"], shapes[0][1]))
    elif spec.fused:
        shapes.append(spec.hf_shape(axis_sizes))
    return shapes


def _part(tensor: np.ndarray, spec: ParamSpec, name: str, axis_sizes: dict[str, int]) -> np.ndarray:
    """Return the part of a file's tensor that belongs to a parameter.

    PEFT has one A for all kernels of a tensor, so each kernel's adapter gets a copy.
    """
    whole = [(0, size) for size in spec.shape(axis_sizes)[len(spec.stacked) :]]
    rank = axis_sizes["rank"]
    if spec.fused and spec.path.endswith(".a.kernel"):
        is_shared = len(tensor) == rank
        return tensor if is_shared else tensor[rank * spec.place :][:rank]
    first, *rest = spec.hf_index(tuple(whole), axis_sizes)
    part = tensor[first]
    if rest and part.shape[1] != rest[0].stop:
        own_columns = slice(rank * spec.place, rank * (spec.place + 1))
        if np.any(np.delete(part, own_columns, axis=1)):
            raise ValueError(
                f"{name} has values other than zero outside its diagonal of {len(spec.fused)} "
                f"parts: its rank is not {rank} for each"
            )
        return part[:, own_columns]
    return part


def write_config(
    out: Path, model_def: ModelDef, settings: lora.AdapterSettings, base: str, revision: str = ""
) -> None:
    """Write PEFT's config of the adapters.

    Args:
        base, revision: path or hub id of the base model, and its revision.
    """
    chosen = [
        lora.target_of(name)
        for spec in model_def.specs
        if spec.path.endswith(".lora.a.kernel")
        for _, name in tensors(spec, model_def)
    ]
    counts = {
        lora.target_of(spec.hf).rpartition(".")[2]: len(spec.fused)
        for spec in model_def.trainable_specs
        if spec.fused
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
    """Return the endings of the chosen names if they select no other module, else the names."""
    endings = {name.rpartition(".")[2] for name in chosen}
    every = [name for names in known.values() for name in names]
    same = {name for name in every if name.rpartition(".")[2] in endings}
    return sorted(endings) if same == set(chosen) else sorted(set(chosen))
