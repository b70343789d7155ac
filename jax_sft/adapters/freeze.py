"""Choose the trainable parameters: all, all but those of `train.freeze`, or only adapters.

Also creates or loads the adapters before training.
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
    model_def: ModelDef, adapters: lora.AdapterSettings | None, frozen: Sequence[str] = ()
) -> ModelDef:
    """Return the model with its frozen parameters and its adapters, if any.

    Args:
        adapters: settings from `lora.*`; None = no adapters.
        frozen: `train.freeze`.

    Raises:
        ValueError: a pattern matches nothing, or no trainable parameter is left.
    """
    if not adapters:
        return freeze(model_def, frozen)
    # `add` freezes all other weights, and `pack` quantizes only frozen kernels: the order matters.
    adapted = lora.add(model_def, adapters)
    return nf4.pack(adapted) if adapters.quantize == "nf4" else adapted


def freeze(model_def: ModelDef, expressions: Sequence[str]) -> ModelDef:
    """Freeze the tensors whose Hugging Face names match any pattern, e.g. "embed_tokens".

    A parameter is a stack of layers. If only some of its layers are frozen, it keeps its master
    weights and moments, and the frozen layers are not updated.

    Raises:
        ValueError: a pattern matches no name, or every tensor is frozen.
    """
    names = {
        spec.path: [name for _, name in spec.hf_tensors(model_def.axis_sizes)]
        for spec in model_def.specs
    }
    all_names = [name for tensors in names.values() for name in tensors]
    is_frozen = np.zeros(len(all_names), bool)
    answers = patterns.matches("train.freeze", expressions, all_names, "search")
    for pattern, answer in zip(expressions, answers, strict=True):
        is_frozen |= answer
        if not any(answer):
            raise ValueError(
                f"train.freeze: {pattern!r} matches no tensor name. There are "
                f"{', '.join(tensors[0] for tensors in names.values())}, and those of other layers"
            )
    frozen_paths, trained = [], {}
    ends = np.cumsum([len(tensors) for tensors in names.values()])
    for spec, frozen in zip(model_def.specs, np.split(is_frozen, ends[:-1]), strict=True):
        if frozen.all():
            frozen_paths.append(spec.path)
        elif frozen.any():
            trained[spec.path] = ~frozen.reshape(
                [model_def.axis_sizes[axis] for axis in spec.stacked]
            )
    if len(frozen_paths) == len(model_def.specs):
        raise ValueError(
            f"train.freeze = {list(expressions)} freezes every tensor: nothing is left"
        )
    frozen = model_def.without_masters(frozen_paths)
    return dataclasses.replace(model_def, frozen_dtypes=frozen, layer_masks=trained)


def count(model_def: ModelDef) -> int:
    """Return the number of trainable parameters."""
    total = 0
    for spec in model_def.trainable_specs:
        shape = model_def.vocabulary.cut(spec.path, spec.shape(model_def.axis_sizes))
        layers = model_def.layer_masks.get(spec.path, np.ones(shape[: len(spec.stacked)], bool))
        total += int(layers.sum()) * math.prod(shape[len(spec.stacked) :])
    return total


def adapters(
    settings: lora.AdapterSettings,
    model_def: ModelDef,
    weights: Mapping[str, jax.Array],
    mesh: Mesh,
    *,
    path: str,
    seed: int,
    dtype: str,
) -> dict[str, jax.Array]:
    """Return new adapters, or those of a PEFT folder.

    Args:
        settings: the adapters of `model_def`.
        weights: the weights of the model.
        path: `lora.path`; "" = new adapters.
        seed: of the random values of new adapters.
        dtype: of the adapters.

    Raises:
        ValueError: the stored adapters do not fit the model.
    """
    if path:
        return peft.load(paths.local(path, "lora.path"), model_def, mesh, jnp.dtype(dtype))
    return lora.init(model_def, settings, weights, mesh, seed, jnp.dtype(dtype))
