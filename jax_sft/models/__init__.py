"""Model families: one file each, selected by the `model_type` of config.json.

A family file defines `Config`, `weights(cfg)` and `Model(cfg, key)`. `Config` has `from_hf`,
`axis_sizes`, `window` (that of windowed layers), `attention_soft_cap` and `logit_soft_cap` (0 =
none). A family with experts has "experts" and "chosen" (experts per token) in `axis_sizes`, the
weight of the load-balancing loss in `Config.router_aux`, and a `Model` with `routed` (see
`decoder.Decoder`).
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from jax_sft.weights.hf_config import shown

_TEXT_ONLY = {"gemma3": "gemma3_text"}  # {multimodal model: its language model}
_PRIMITIVES = {"decoder_specs", "sizes"}


def families() -> list[str]:
    """Return the supported model types."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _PRIMITIVES)


def find(model_type: str) -> ModuleType:
    """Return the module of a family.

    Raises:
        ValueError: no such family; the message names the supported ones.
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
        ValueError: no such family, or a field is not implemented or out of range.
    """
    family = find(str(config.get("model_type")))
    return family, family.Config.from_hf(config)
