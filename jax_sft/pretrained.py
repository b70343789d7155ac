"""The weights a run begins with: of the model folder, and of its adapters."""

from collections.abc import Collection, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_sft import hf, lora, peft, state
from jax_sft.model import ModelDef


def load(
    tensors: Mapping[str, hf.Tensor],
    model_def: ModelDef,
    paths: Collection[str],
    mesh: Mesh,
    dtype,
    progress: bool = True,
) -> dict[str, jax.Array]:
    """Read some weights of a model folder into their shards.

    Args:
        tensors: as returned by `hf.check`.
        paths: ours, of what is read.
        dtype: of what trains; what is frozen has its own.

    Returns:
        {our path: array}.
    """
    shardings = state.param_shardings(model_def.rows, mesh)
    found = {}
    dtype_of = {path: np.dtype(model_def.frozen.get(path, dtype)) for path in paths}
    for one in sorted(set(dtype_of.values()), key=str):
        rows = [row for row in model_def.rows if dtype_of.get(row.path) == one]
        found |= hf.load(tensors, rows, model_def.dims, shardings, one, progress)
    return found


def adapters(
    cfg, settings: lora.Settings, model_def: ModelDef, weights: Mapping[str, jax.Array], mesh: Mesh
) -> dict[str, jax.Array]:
    """Return new adapters, or those of `lora.path`.

    Args:
        settings: what `lora.*` means.
        weights: those of the model.

    Raises:
        ValueError: the stored adapters do not fit the model.
    """
    dtype = jnp.dtype(cfg.model.param_dtype)
    if cfg.lora.path:
        return peft.load(Path(cfg.lora.path).expanduser(), model_def, mesh, dtype)
    return lora.init(model_def, settings, weights, mesh, cfg.seed, dtype)
