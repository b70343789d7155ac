"""Which parameters train: all, those that `train.freeze` leaves, or adapters alone.

And what the weights are when training begins.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_sft.adapters import lora, nf4, peft
from jax_sft.files import paths
from jax_sft.nn.model_def import ModelDef
from jax_sft.runtime import patterns


def choose(
    model_def: ModelDef, adapters: lora.Settings | None, frozen: Sequence[str] = ()
) -> ModelDef:
    """Return the model with what is frozen, and its adapters if it has any.

    Args:
        adapters: what `lora.*` means; None = there are none.
        frozen: `train.freeze`.

    Raises:
        ValueError: a pattern names nothing, or nothing is left to train.
    """
    if not adapters:
        return freeze(model_def, frozen)
    adapted = lora.add(model_def, adapters)
    return nf4.pack(adapted) if adapters.quantize == "nf4" else adapted


def freeze(model_def: ModelDef, expressions: Sequence[str]) -> ModelDef:
    """Freeze the tensors in whose Hugging Face names a pattern is found, e.g. "embed_tokens".

    Parameters stack layers: one of which only some layers are frozen keeps its master weights and
    moments, and the frozen layers do not move.

    Raises:
        ValueError: a pattern is found in no name, or every tensor is frozen.
    """
    names = {
        row.path: [name for _, name in row.hf_tensors(model_def.dims)] for row in model_def.rows
    }
    every = [name for of_row in names.values() for name in of_row]
    found = np.zeros(len(every), bool)
    answers = patterns.matches("train.freeze", expressions, every, "search")
    for pattern, answer in zip(expressions, answers, strict=True):
        found |= answer
        if not any(answer):
            raise ValueError(
                f"train.freeze: {pattern!r} is found in no name of a tensor. There are "
                f"{', '.join(of_row[0] for of_row in names.values())}, and those of other layers"
            )
    still, trained = [], {}
    ends = np.cumsum([len(of_row) for of_row in names.values()])
    for row, frozen in zip(model_def.rows, np.split(found, ends[:-1]), strict=True):
        if frozen.all():
            still.append(row.path)
        elif frozen.any():
            trained[row.path] = ~frozen.reshape([model_def.dims[axis] for axis in row.stacked])
    if len(still) == len(model_def.rows):
        raise ValueError(
            f"train.freeze = {list(expressions)} freezes every tensor: nothing is left"
        )
    frozen = model_def.without_masters(still)
    return dataclasses.replace(model_def, frozen=frozen, trained=trained)


def count(model_def: ModelDef) -> int:
    """Return how many parameters train."""
    total = 0
    for row in model_def.moving:
        shape = model_def.vocabulary.cut(row.path, row.shape(model_def.dims))
        layers = model_def.trained.get(row.path, np.ones(shape[: len(row.stacked)], bool))
        total += int(layers.sum()) * math.prod(shape[len(row.stacked) :])
    return total


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
        return peft.load(paths.local(cfg.lora.path, "lora.path"), model_def, mesh, dtype)
    return lora.init(model_def, settings, weights, mesh, cfg.seed, dtype)
