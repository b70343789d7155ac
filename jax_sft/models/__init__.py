"""Model families: one file each, found by the `model_type` of config.json.

A family file defines `Config` (with `from_hf`, `dims`, and `window`, the sliding window of those
layers that have one), `weights(cfg)` and `Model(cfg, key)`. One with experts has their numbers in
`dims`, "experts" and "chosen" (those that a token takes), the weight of their balance in
`Config.router_aux`, and a `Model` with `routed` (see `layers.Decoder`).
"""

import importlib
import pkgutil
from types import ModuleType

_PRIMITIVES = {"layers", "experts", "spec", "rope"}


def families() -> list[str]:
    """Return the model types that have a file here."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _PRIMITIVES)


def find(model_type: str) -> ModuleType:
    """Return the module of a family.

    Raises:
        ValueError: no such family; the message names those there are.
    """
    if model_type not in families():
        raise ValueError(f"model_type {model_type!r} is not supported: use one of {families()}")
    return importlib.import_module(f"{__name__}.{model_type}")
