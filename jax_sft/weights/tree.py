"""Convert between an NNX model and a flat dict from dotted path to array.

The paths are the attribute paths of the NNX model (`layers.attn.q.kernel`) and the keys of
parameter specs, shardings, moments and checkpoints alike.
"""

import functools
from typing import Any

import jax


def paths(model: Any) -> list[str]:
    """Return the dotted path of each array of an NNX model, in flattening order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    return [name.removesuffix(".value") for name in names]


def to_dict(model: Any) -> dict[str, Any]:
    """Return {dotted path: array} of an NNX model (real or abstract)."""
    return dict(zip(paths(model), jax.tree.leaves(model), strict=True))


def from_dict(abstract: Any, params: dict[str, Any]) -> Any:
    """Return a model with the structure of `abstract` and the arrays of `params`."""
    leaves = [params[path] for path in paths(abstract)]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def module_at(model: Any, path: str) -> Any:
    """Return the module of an NNX model that holds the array of a dotted path."""
    return functools.reduce(getattr, path.split(".")[:-1], model)
