"""Compile the most promising settings until enough of them fit. Called by `plan`."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp

from jax_sft.planning import candidates
from jax_sft.planning.analysis import Target, analyse
from jax_sft.settings import Settings
from jax_sft.training import program
from jax_sft.validate import validate

MOST_COMPILED = 8  # settings per search
MOST_FITTING = 4


def search(settings: Settings, target: Target, say: Callable[[str], None]) -> list[dict]:
    """Return compiled settings by predicted step time; estimates only choose which to compile.

    Args:
        say: prints a line of progress.
    """
    plans, num_fitting = [], 0
    for number, setting in enumerate(_promising(settings, target), start=1):
        setting_plan = _try(settings, target, setting)
        plans.append(setting_plan)
        num_fitting += setting_plan["fits"]
        say(f"  {number}/{MOST_COMPILED} {_line(setting_plan)}")
        if number == MOST_COMPILED or num_fitting == MOST_FITTING:
            break
    return sorted(plans, key=lambda plan: (not plan["fits"], plan["step_time_s"]))


def advice(settings: Settings, target: Target, most: int, say: Callable[[str], None]) -> list[str]:
    """Return settings with which the run fits: the first promising one whose compiled peak does."""
    tried = []
    for number, setting in enumerate(_promising(settings, target), start=1):
        setting_plan = _try(settings, target, setting)
        tried.append(setting_plan)
        say(f"  {number}/{most} {_line(setting_plan)}")
        if setting_plan["fits"]:
            return [f"{_flags(setting_plan)}: {_line(setting_plan)}"]
        if number == most:
            break
    if not tried:
        return [
            "no mesh, micro-batch and remat policy is expected to fit: use more --hosts, a larger "
            "--target, optimizer.moments_dtype=bfloat16, or model.offload=\"('residual',)\""
        ]
    return [
        f"not enough, compiled: {_flags(setting_plan)}: {_line(setting_plan)}"
        for setting_plan in tried
    ]


def _promising(settings: Settings, target: Target) -> Iterator[candidates.Setting]:
    """Yield the settings that should fit, fastest first, one per mesh and remat policy."""
    resolved = validate(settings, target.num_devices, planned_for=target.chip.capability)
    model_def = program.model_def(resolved)
    model = candidates.Model(
        model_def.specs,
        model_def.axis_sizes,
        resolved.model_cfg.tied,
        jnp.dtype(settings.model.param_dtype).itemsize,
        jnp.dtype(settings.optimizer.moments_dtype).itemsize,
        jnp.dtype(settings.model.grad_dtype).itemsize,
        model_def.frozen_bytes,
    )
    ranked = candidates.candidates(
        model,
        target.chip,
        hosts=target.hosts,
        gpus_per_host=target.gpus_per_host,
        num_rows=settings.batch.rows,
        row=target.row,
        attention=resolved.attention,
    )
    seen = set()
    for candidate in ranked:
        kind = tuple(candidate.setting.mesh.items()), candidate.setting.remat
        if candidate.fits and kind not in seen:
            seen.add(kind)
            if _is_ranked_rightly(settings, target, candidate.setting, resolved.attention):
                yield candidate.setting


def _is_ranked_rightly(
    settings: Settings, target: Target, setting: candidates.Setting, attention: str
) -> bool:
    """Whether a setting is valid and uses an attention as fast as the one it was ranked with."""
    try:
        resolved = validate(
            _changed(settings, setting), target.num_devices, planned_for=target.chip.capability
        )
    except ValueError:  # such as an explicit model.attention=cudnn with sequence sharding
        return False
    return resolved.attention == attention or attention == "blockwise"


def _changed(settings: Settings, setting: candidates.Setting) -> Settings:
    """Return the settings with the mesh, micro-batch and remat policy of a candidate."""
    return dataclasses.replace(
        settings,
        mesh=dataclasses.replace(settings.mesh, **setting.mesh),
        batch=dataclasses.replace(settings.batch, micro_rows=setting.micro_rows),
        model=dataclasses.replace(settings.model, remat=setting.remat, offload=()),
    )


def _try(settings: Settings, target: Target, setting: candidates.Setting) -> dict:
    changed = _changed(settings, setting)
    resolved = validate(changed, target.num_devices, planned_for=target.chip.capability)
    plan: Any = analyse(resolved, target)
    return {
        "mesh": setting.mesh,
        "micro_rows": setting.micro_rows,
        "remat": setting.remat,
        "peak_bytes": plan["memory"]["peak_bytes"],
        "fits": plan["memory"]["fits"],
        "step_time_s": plan["predicted"]["step_time_s"],
        "mfu": plan["predicted"]["mfu"],
    }


def _flags(setting: dict) -> str:
    mesh = " ".join(f"--config.mesh.{axis}={size}" for axis, size in setting["mesh"].items())
    return (
        f"{mesh} --config.batch.micro_rows={setting['micro_rows']} "
        f"--config.model.remat={setting['remat']}"
    )


def _line(setting: dict) -> str:
    mesh = " ".join(f"{axis}={size}" for axis, size in setting["mesh"].items() if size > 1)
    return (
        f"{mesh} micro_rows={setting['micro_rows']} remat={setting['remat']}: peak "
        f"{setting['peak_bytes'] / 2**30:.1f} GiB, "
        f"{'fits' if setting['fits'] else 'does not fit'}, "
        f"predicted {setting['step_time_s']:.2f} s, MFU {setting['mfu']:.0%}"
    )
