"""Compile the most promising settings until enough of them fit. Called by `plan`."""

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from jax_sft.planning import candidates
from jax_sft.planning.analysis import Target, analyse
from jax_sft.training import program
from jax_sft.validate import validate

MOST_COMPILED = 8  # of a search
MOST_FITTING = 4


def search(cfg, target: Target, say: Callable[[str], None]) -> list[dict]:
    """Return settings by predicted step time, each compiled: the estimates only choose which.

    Args:
        say: prints a line of progress.
    """
    found, fitting = [], 0
    for number, setting in enumerate(_promising(cfg, target), start=1):
        one = _try(cfg, target, setting)
        found.append(one)
        fitting += one["fits"]
        say(f"  {number}/{MOST_COMPILED} {_line(one)}")
        if number == MOST_COMPILED or fitting == MOST_FITTING:
            break
    return sorted(found, key=lambda one: (not one["fits"], one["step_time_s"]))


def advice(cfg, target: Target, most: int, say: Callable[[str], None]) -> list[str]:
    """Return what to set so that the run fits: the first promising setting that does, compiled."""
    tried = []
    for number, setting in enumerate(_promising(cfg, target), start=1):
        one = _try(cfg, target, setting)
        tried.append(one)
        say(f"  {number}/{most} {_line(one)}")
        if one["fits"]:
            return [f"{_flags(one)}: {_line(one)}"]
        if number == most:
            break
    if not tried:
        return [
            "no mesh, micro-batch and remat policy is expected to fit: use more --hosts, a larger "
            "--target, optimizer.moments_dtype=bfloat16, or model.offload=\"('residual',)\""
        ]
    return [f"not enough, compiled: {_flags(one)}: {_line(one)}" for one in tried]


def _promising(cfg, target: Target) -> Iterator[candidates.Setting]:
    """The settings that should fit, the fastest first; of those that are alike only the first."""
    resolved = validate(cfg, target.num_devices, planned_for=target.chip.capability)
    model_def = program.model_def(cfg, resolved)
    model = candidates.Model(
        model_def.rows,
        model_def.dims,
        resolved.model_cfg.tied,
        jnp.dtype(cfg.model.param_dtype).itemsize,
        jnp.dtype(cfg.optimizer.moments_dtype).itemsize,
        jnp.dtype(cfg.model.grad_dtype).itemsize,
        model_def.still,
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
    for one in ranked:
        kind = tuple(one.setting.mesh.items()), one.setting.remat
        if one.fits and kind not in seen:
            seen.add(kind)
            if _is_ranked_rightly(cfg, target, one.setting, resolved.attention):
                yield one.setting


def _is_ranked_rightly(cfg, target: Target, setting: candidates.Setting, attention: str) -> bool:
    """Whether a setting can run, and with an attention as fast as it was ranked with."""
    try:
        found = validate(
            _changed(cfg, setting), target.num_devices, planned_for=target.chip.capability
        )
    except ValueError:  # such as cuDNN's attention, asked for by name, on a split row
        return False
    return found.attention == attention or attention == "blockwise"


def _changed(cfg, setting: candidates.Setting) -> Any:
    changed: Any = ConfigDict(cfg.to_dict())
    changed.mesh.update(setting.mesh)
    changed.batch.micro_rows = setting.micro_rows
    changed.model.remat, changed.model.offload = setting.remat, ()
    return changed


def _try(cfg, target: Target, setting: candidates.Setting) -> dict:
    changed = _changed(cfg, setting)
    resolved = validate(changed, target.num_devices, planned_for=target.chip.capability)
    found: Any = analyse(changed, resolved, target)
    return {
        "mesh": setting.mesh,
        "micro_rows": setting.micro_rows,
        "remat": setting.remat,
        "peak_bytes": found["memory"]["peak_bytes"],
        "fits": found["memory"]["fits"],
        "step_time_s": found["predicted"]["step_time_s"],
        "mfu": found["predicted"]["mfu"],
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
