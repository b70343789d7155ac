"""Make a model folder with a real model's shape and random bfloat16 weights, to try large folders.

    python -m scripts.make_model --like=7b --out=DIR [--headers-only]

Weights are written in blocks, so that memory use stays small. With --headers-only the files have
headers and sizes but no content (they are sparse), which is enough for --dry-run.
"""

import argparse
import json
import math
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

from jax_sft.runtime import lifecycle

if __name__ == "__main__":
    lifecycle.begin()

import numpy as np
from ml_dtypes import bfloat16

from jax_sft import models, tiny
from jax_sft.files import outputs, paths
from jax_sft.weights import hf_writer

# Sizes of Qwen2.5 (from config.json on the hub) and the number of weight files.
SHAPES = {
    "0.5b": (dict(D=896, F=4864, L=24, N=14, K=2, V=151_936, tied=True), 1),
    "7b": (dict(D=3584, F=18_944, L=28, N=28, K=4, V=152_064, tied=False), 4),
    "72b": (dict(D=8192, F=29_568, L=80, N=64, K=8, V=152_064, tied=False), 37),
}


def config_of(like: str) -> dict:
    """Return the config.json of a shape."""
    sizes, _ = SHAPES[like]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": sizes["D"],
        "intermediate_size": sizes["F"],
        "num_hidden_layers": sizes["L"],
        "num_attention_heads": sizes["N"],
        "num_key_value_heads": sizes["K"],
        "vocab_size": sizes["V"],
        "tie_word_embeddings": sizes["tied"],
        "hidden_act": "silu",
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "torch_dtype": "bfloat16",
    }


class Random:
    """A `BlockReader` of random bits, never NaN or infinite, generated when they are read."""

    dtype = np.dtype(bfloat16)

    def __init__(self, shape: tuple[int, ...], seed: int):
        self.shape, self._seed = shape, seed
        self.chunk = (1,) * len(shape)

    def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray:
        """Return the block of these slices; the same slices give the same bits."""
        shape = [part.stop - part.start for part in slices]
        rng = np.random.default_rng([self._seed, *(part.start for part in slices)])
        words = np.frombuffer(rng.bytes(2 * math.prod(shape)), np.uint16)
        # Sign and fraction are random; the exponent is one of 8, from 2**-15 to 2**-8.
        return ((words & 0x83FF) | 0x3800).view(bfloat16).reshape(shape)

    def finish(self) -> None:
        """Do nothing, as there are no stored bytes to compare with."""


def make(like: str, out: Path, headers_only: bool) -> None:
    """Write the folder.

    Raises:
        ValueError: the folder exists already, or `out` is not a place for a model.
    """
    out = outputs.check(out, outputs.EXPORT).out
    config = config_of(like)
    family = models.find("qwen2")
    cfg = family.Config.from_hf(config)
    rows = family.weights(cfg)
    dtypes = {name: "BF16" for row in rows for _, name in row.hf_tensors(cfg.axis_sizes)}
    total = sum(2 * math.prod(row.shape(cfg.axis_sizes)) for row in rows)
    shard_bytes = math.ceil(1.01 * total / SHAPES[like][1])
    out.mkdir(parents=True, exist_ok=True)
    tiny.write_tokenizer(out)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps({"do_sample": False}) + "\n")
    if headers_only:
        hf_writer.begin(hf_writer.layout(rows, cfg.axis_sizes, dtypes, shard_bytes), out)
    else:
        params = {row.path: Random(row.shape(cfg.axis_sizes), n) for n, row in enumerate(rows)}
        hf_writer.save(params, rows, cfg.axis_sizes, dtypes, out, shard_bytes)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--like", required=True, choices=[*SHAPES])
    parser.add_argument("--out", required=True, help="the folder to write: new, or empty")
    parser.add_argument("--headers-only", action="store_true", help="sparse files")
    options = parser.parse_args()
    make(options.like, paths.local(options.out, "--out"), options.headers_only)
    return 0


if __name__ == "__main__":
    lifecycle.run(main)
