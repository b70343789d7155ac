"""Compile the most promising settings until enough of them fit. Called by `plan`."""

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from jax_sft.planning import candidates
from jax_sft.planning.analysis import Target, analyse
from jax_sft.training import program
from jax_sft.validate import validate

MOST_COMPILED = 8  # settings per search
MOST_FITTING = 4


def search(cfg, target: Target, say: Callable[[str], None]) -> list[dict]:
    """Return compiled settings by predicted step time; estimates only choose which to compile.

    Args:
        say: prints a line of progress.
    """
    settings, fitting = [], 0
    for number, setting in enumerate(_promising(cfg, target), start=1):
        setting_plan = _try(cfg, target, setting)
        settings.append(setting_plan)
        fitting += setting_plan["fits"]
        say(f"  {number}/{MOST_COMPILED} {_line(setting_plan)}")
        if number == MOST_COMPILED or fitting == MOST_FITTING:
            break
    return sorted(settings, key=lambda one: (not one["fits"], one["step_time_s"]))


def advice(cfg, target: Target, most: int, say: Callable[[str], None]) -> list[str]:
    """Return settings with which the run fits: the first promising one whose compiled peak does."""
    tried = []
    for number, setting in enumerate(_promising(cfg, target), start=1):
        setting_plan = _try(cfg, target, setting)
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


def _promising(cfg, target: Target) -> Iterator[candidates.Setting]:
    """Yield the settings that should fit, fastest first, one per mesh and remat policy."""
    resolved = validate(cfg, target.num_devices, planned_for=target.chip.capability)
    model_def = program.model_def(cfg, resolved)
    model = candidates.Model(
        model_def.rows,
        model_def.dims,
        resolved.model_cfg.tied,
        jnp.dtype(cfg.model.param_dtype).itemsize,
        jnp.dtype(cfg.optimizer.moments_dtype).itemsize,
        jnp.dtype(cfg.model.grad_dtype).itemsize,
        model_def.frozen_bytes,
    )
    ranked = candidates.candidates(
        model,
        target.chip,
        hosts=target.hosts,
        gpus_per_host=target.gpus_per_host,
        num_rows=cfg.batch.rows,
        row=target.row,
        attention=resolved.attention,
    )
    seen = set()
    for candidate in ranked:
        kind = tuple(candidate.setting.mesh.items()), candidate.setting.remat
        if candidate.fits and kind not in seen:
            seen.add(kind)
            if _is_ranked_rightly(cfg, target, candidate.setting, resolved.attention):
                yield candidate.setting


def _is_ranked_rightly(cfg, target: Target, setting: candidates.Setting, attention: str) -> bool:
    """Whether a setting is valid and uses an attention as fast as the one it was ranked with."""
    try:
        resolved = validate(
            _changed(cfg, setting), target.num_devices, planned_for=target.chip.capability
        )
    except ValueError:  # such as an explicit model.attention=cudnn with sequence sharding
        return False
    return resolved.attention == attention or attention == "blockwise"


def _changed(cfg, setting: candidates.Setting) -> Any:
    changed: Any = ConfigDict(cfg.to_dict())
    changed.mesh.update(setting.mesh)
    changed.batch.micro_rows = setting.micro_rows
    changed.model.remat, changed.model.offload = setting.remat, ()
    return changed


def _try(cfg, target: Target, setting: candidates.Setting) -> dict:
    changed = _changed(cfg, setting)
    resolved = validate(changed, target.num_devices, planned_for=target.chip.capability)
    plan: Any = analyse(changed, resolved, target)
    return {
        "mesh": setting.mesh,
        "micro_rows": setting.micro_rows,
        "remat": setting.remat,
        "peak_bytes": plan["memory"]["peak_bytes"],
        "fits": plan["memory"]["fits"],
        "step_time_s": plan["predicted"]["step_time_s"],
        "mfu": plan["predicted"]["mfu"],
    }


def _flags(one: dict) -> str:
    mesh = " ".join(f"--config.mesh.{axis}={size}" for axis, size in one["mesh"].items())
    return (
        f"{mesh} --config.batch.micro_rows={one['micro_rows']} --config.model.remat={one['remat']}"
    )


def _line(one: dict) -> str:
    mesh = " ".join(f"{axis}={size}" for axis, size in one["mesh"].items() if size > 1)
    return (
        f"{mesh} micro_rows={one['micro_rows']} remat={one['remat']}: peak "
        f"{one['peak_bytes'] / 2**30:.1f} GiB, {'fits' if one['fits'] else 'does not fit'}, "
        f"predicted {one['step_time_s']:.2f} s, MFU {one['mfu']:.0%}"
    )
