"""Make a tiny model folder, tokenizer and data set for the quickstart and the tests.

The task is to spell a made-up word backwards, so that learning is visible in the answers. The
held-out words never occur in training, so a model can only answer them by the rule.
"""

import json
import os
import random
import secrets
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from jax_sft import models
from jax_sft.nn.layers import INIT_STD
from jax_sft.weights import hf_writer

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "initializer_range": 0.08,  # about 1 / sqrt(hidden_size); 0.02 rarely learns the task
    "dtype": "float32",
}


def build(folder: str | Path) -> Path:
    """Make `folder` with model/, train.jsonl and heldout.jsonl, unless it exists.

    The result is the same every time. The folder appears only when it is complete, so that several
    processes may call this function at the same time.
    """
    folder = Path(folder)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    unfinished.mkdir()
    (unfinished / "model").mkdir()
    write_tokenizer(unfinished / "model")
    write_model(unfinished / "model", CONFIG)
    write_words(unfinished)
    try:
        os.rename(unfinished, folder)
    except OSError:  # another process made the folder first
        shutil.rmtree(unfinished)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer (one token per byte) with a ChatML template."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate(alphabet)}
    # Any, because the setters of pre_tokenizer and decoder are typed to accept only base classes.
    backend: Any = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(special)
    import transformers  # here, as making only a model does not need it

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def write_model(folder: Path, config: dict, seed: int = 0, dtype: str = "F32") -> None:
    """Write config.json, generation_config.json and random weights of any supported family.

    Uses NumPy and not the model's own initialization, because a config file calls this function
    before JAX may start.
    """
    family = models.find(config["model_type"])
    cfg = family.Config.from_hf(config)
    specs = family.weights(cfg)
    rng = np.random.default_rng(seed)
    std = config.get("initializer_range", INIT_STD)
    params = {}
    for spec in specs:
        noise = std * rng.standard_normal(spec.shape(cfg.axis_sizes))
        params[spec.path] = np.float32(noise + spec.path.endswith(".scale"))
    dtypes = {name: dtype for spec in specs for _, name in spec.hf_tensors(cfg.axis_sizes)}
    hf_writer.save(params, specs, cfg.axis_sizes, dtypes, folder, 5_000_000_000, progress=False)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}) + "\n")


def write_words(folder: Path, num_train: int = 20_000, num_heldout: int = 100) -> None:
    """Write train.jsonl and heldout.jsonl: {"prompt": "Spell backwards: abcd", "response": "dcba"}.

    Words are random and have 3 to 6 letters. Held-out words have 5 or 6 letters and are in no
    training row.
    """
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"

    def word(shortest: int) -> str:
        return "".join(rng.choices(letters, k=rng.randint(shortest, 6)))

    heldout = sorted({word(5) for _ in range(num_heldout)})
    train = [w for w in (word(3) for _ in range(num_train)) if w not in set(heldout)]
    for name, words in (("train", train), ("heldout", heldout)):
        rows = ({"prompt": f"Spell backwards: {w}", "response": w[::-1]} for w in words)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
