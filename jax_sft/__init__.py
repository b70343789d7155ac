"""Supervised fine-tuning of Hugging Face language models in JAX.

Has the three functions that the commands run:

    jax_sft.train(config, workdir)         # fine-tune; returns the last metrics
    jax_sft.export(checkpoint, out)        # a run's checkpoint -> a Hugging Face folder
    jax_sft.load(folder, mesh=None, dtype="float32").logits(tokens)    # [B, T] -> [B, T, V]
"""

import importlib
import os
import signal
import sys
import time
from typing import Any

__version__ = "0.1.0"  # pyproject.toml reads it here

BEGAN_S = time.perf_counter()  # approximate start of the process, if it runs one of our programs

_PROGRAM = os.path.basename(sys.argv[0]) if sys.argv else ""
if _PROGRAM in ("-m", "jax-sft") and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # One of our programs is about to be imported. Ctrl-C prints nothing until `lifecycle.begin`.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# Silence transformers' advice to install PyTorch, which its tokenizers do not need.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# Imported on first use, so that config files and tokenizing processes do not wait for JAX.
_HOMES = {"load": "jax_sft.inference", "export": "jax_sft.export", "train": "jax_sft.train"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jax_sft' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    # Modules `export` and `train` are callable, since importing them binds these names to them.
    return home if _HOMES[name] == f"jax_sft.{name}" else getattr(home, name)
