"""Model families: one file each, found by the `model_type` of config.json.

A family file defines `Config` (with `from_hf`, `dims`, `window`, the sliding window of those layers
that have one, and `attention_soft_cap` and `logit_soft_cap`, 0 = none), `weights(cfg)` and
`Model(cfg, key)`. One with experts has their numbers in `dims`, "experts" and "chosen" (those that
a token takes), the weight of their balance in `Config.router_aux`, and a `Model` with `routed` (see
`decoder.Decoder`).
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from jax_sft.weights.hf_config import shown

_TEXT_ONLY = {"gemma3": "gemma3_text"}  # a model of several kinds of input: its language model
_PRIMITIVES = {"decoder_specs", "sizes"}


def families() -> list[str]:
    """Return the model types that have a file here."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _PRIMITIVES)


def find(model_type: str) -> ModuleType:
    """Return the module of a family.

    Raises:
        ValueError: no such family; the message names those there are.
    """
    if model_type not in families():
        remedy = f"use one of {families()}"
        if text := _TEXT_ONLY.get(model_type):
            remedy = (
                f"it takes images. Use a folder of its language model alone, whose config.json is "
                f"its text_config and whose model_type is {text!r}; or {remedy}"
            )
        raise ValueError(f"model_type {shown(model_type)} is not supported: {remedy}")
    return importlib.import_module(f"{__name__}.{model_type}")


def read(config: dict[str, Any]) -> tuple[ModuleType, Any]:
    """Return (the module of a family, its Config) of a config.json.

    Raises:
        ValueError: no such family, or a field that it does not implement or that is out of range.
    """
    family = find(str(config.get("model_type")))
    return family, family.Config.from_hf(config)
