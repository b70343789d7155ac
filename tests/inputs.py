"""Inputs of tests: folders of tiny models of any family, and configs of tiny runs."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_sft import config, settings, tiny

WITHOUT_TORCH = "torch is not installed: pip install -r requirements-dev.txt"
# For a test that runs `export --verify`, whose reference is torch. requirements-test.txt lacks it,
# for Pythons without a CPU build of torch; the rest of the file runs there. On 3.11 none skips.
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason=WITHOUT_TORCH)

# A small model in which no two dimensions are equal, so that a mix-up cannot go unnoticed.
ODD = {
    "model_type": "qwen2",
    "vocab_size": 272,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def write_model(
    parent: Path, name: str = "model", seed: int = 0, dtype: str = "F32", **changes
) -> Path:
    """Write a model folder: random weights, a byte tokenizer, config.json with these keywords."""
    folder = parent / name
    folder.mkdir()
    tiny.write_tokenizer(folder)
    tiny.write_model(folder, ODD | changes, seed=seed, dtype=dtype)
    return folder


def write_strong_model(parent: Path, name: str = "model", seed: int = 0, **changes) -> Path:
    """Write a model in float32 with weights so large that each moves the logits by far more than
    any tolerance: a trained model's initial std of 0.02 hides a wrong rotation or bias.
    """
    folder = write_model(parent, name, seed=seed, **changes)
    rng = np.random.default_rng(seed)
    # Gemma's norms multiply by 1 + weight.
    centre = 0 if changes.get("model_type", "").startswith("gemma") else 1
    strong = {}
    for key, weight in load_file(folder / "model.safetensors").items():
        noise = rng.standard_normal(weight.shape)
        if weight.ndim == 2:
            gain = 1.2 if key.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
            strong[key] = gain * noise / np.sqrt(weight.shape[1])
            if key.endswith(".gate.weight"):  # a router
                strong[key] = uneven(strong[key])
        else:
            strong[key] = 0.3 * noise + centre * key.endswith("norm.weight")
    embedding = "model.embed_tokens.weight"
    strong[embedding] = strong[embedding] * 1.5
    strong = {key: np.float32(weight) for key, weight in strong.items()}
    save_file(strong, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def uneven(router: np.ndarray) -> np.ndarray:
    """Change a router [experts, features] so that no token has the last of 5 or more experts among
    its best two: of two pairs of opposite logits, two are above its own, which is 0.
    """
    if len(router) < 5:
        return router
    a, b, *others, _ = router
    return np.stack([a, -a, b, -b, *others[2:], np.zeros_like(a)])


def source(path: str | os.PathLike, **changes) -> settings.Source:
    """A data source as the data pipeline takes it; keywords are its keys."""
    return settings.Source(os.fspath(path), **changes)


def write_config(parent: Path, model: Path | None = None, num_rows: int = 60, **changes):
    """Return a small valid float32 config on one mesh axis, of data in `parent`; keywords are
    dotted keys.

    Args:
        model: its folder; by default it is written into `parent`.
        num_rows: of the data, where they are not written yet.
    """
    data = parent / "data.jsonl"
    if not data.exists():
        rows = [
            {
                "prompt": f"count to {n % 7}" + "!" * (n % 11),
                "response": "123456789"[: 1 + n % 9],
            }
            for n in range(num_rows)
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = config.default()
    cfg.model.path = str(model or write_model(parent))
    cfg.model.dtype = "float32"
    cfg.data.train.main = config.source(str(data))
    cfg.data.seq_len = 128
    cfg.batch.rows = 8
    cfg.optimizer.learning_rate = 1e-3
    cfg.train.steps = 20
    cfg.log.every_steps = 1
    cfg.checkpoint.every_steps = 0
    for key, value in changes.items():
        target = cfg
        *parents, leaf = key.split(".")
        for group in parents:
            target = target[group]
        target[leaf] = value
    return cfg
