"""Shared fixtures: 8 fake CPU devices, tiny model folders of any family, tiny runs."""

import importlib.metadata
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8"
    # Tiny programs that run once are not worth optimizing: test_models takes a quarter less.
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
# The emitters of fusions take two thirds of the seconds of a compilation; 0.11 cannot do without.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Lowering writes ten lines of Python's stack into each operation otherwise: 8% of the seconds.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import atexit
import gc
import importlib.util
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_sft import config, tiny

# Tokenized data of the tests, and of the programs that they run, goes with them.
_CACHE = tempfile.TemporaryDirectory(prefix="jax-sft-tests-")
atexit.register(_CACHE.cleanup)
os.environ["XDG_CACHE_HOME"] = _CACHE.name


def pytest_addoption(parser):
    text = "write tests/data/tokens/token_digests.json anew, after TOKENS_VERSION was raised"
    parser.addoption("--update-token-digests", action="store_true", help=text)


class WithoutTorch(pytest.Module):
    """A test file that imports torch, where torch is not installed."""

    def collect(self):
        reason = "torch is not installed: pip install -r requirements-dev.txt"
        pytest.skip(reason, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector):
    """Skip the files that compare with torch where it has no build, instead of failing there."""
    imports_torch = re.search(r"^import torch$", module_path.read_text("utf-8"), re.MULTILINE)
    if imports_torch and importlib.util.find_spec("torch") is None:
        return WithoutTorch.from_parent(parent, path=module_path)
    return None


MOST_WORKERS = 8  # each takes 1 to 2 GB


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Answer `-n auto` (of scripts/test.sh): a worker per core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, MOST_WORKERS)


def pytest_collection_finish() -> None:
    """Look for garbage rarely, and never in what was imported: a quarter of the seconds of tests
    that trace programs went there.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 1000)


@pytest.hookimpl(trylast=True)  # behind the fixtures of the file
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Collect what the tests of a file left, so that a warning about it comes with that file."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()


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


@pytest.fixture
def make_model(tmp_path):
    """Make a model folder with random weights and a byte tokenizer; keywords change config.json."""

    def make(name: str = "model", seed: int = 0, dtype: str = "F32", **changes) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        tiny.write_tokenizer(folder)
        tiny.write_model(folder, ODD | changes, seed=seed, dtype=dtype)
        return folder

    return make


@pytest.fixture
def make_strong_model(make_model):
    """Like make_model, in float32 with weights so large that each moves the logits by far more
    than any tolerance: a trained model's initial std of 0.02 hides a wrong rotation or bias.
    """

    def make(name: str = "model", seed: int = 0, **changes) -> Path:
        folder = make_model(name, seed=seed, **changes)
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

    return make


def uneven(router: np.ndarray) -> np.ndarray:
    """Change a router [experts, features] so that no token has the last of 5 or more experts among
    its best two: of two pairs of opposite logits, two are above its own, which is 0.
    """
    if len(router) < 5:
        return router
    a, b, *others, _ = router
    return np.stack([a, -a, b, -b, *others[2:], np.zeros_like(a)])


@pytest.fixture
def make_config(tmp_path, make_model):
    """Make a small valid float32 config on one mesh axis; keywords are dotted keys."""

    def make(model: Path | None = None, num_rows: int = 60, **changes):
        data = tmp_path / "data.jsonl"
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
        cfg.model.path = str(model or make_model())
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
            for parent in parents:
                target = target[parent]
            target[leaf] = value
        return cfg

    return make
