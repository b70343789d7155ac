"""Compare the logits of an export under transformers with ours, from the checkpoint it is of.

Called by export_hf.py --verify. Both compute in float32, one after the other: 4 bytes of memory per
parameter. Our weights are rounded to the dtypes of the export first, so that what is left is the
order of sums alone, whatever dtypes are exported.
"""

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jax_sft import hf, inference, parallel, trainable
from jax_sft.hf_export import Plan

SHAPE = (2, 48)  # rows and tokens
TOLERANCE = 1e-4  # of the largest logit; float32 sums in other orders differ by under 1e-5 of it
# With adapters, whose sums with their weights are rounded, and not only the weights.
MERGED_TOLERANCE = 0.05


def missing(planned: Plan) -> str:
    """Say what stands in the way of a comparison; "" = nothing."""
    if planned.is_adapter:
        return "--verify compares whole models: add --merge"
    if importlib.util.find_spec("torch"):
        return ""
    return "--verify needs PyTorch to run transformers' model: pip install torch"


def compare(planned: Plan, out: Path) -> tuple[float, float]:
    """Return (largest difference of two logits, the most that is allowed)."""
    vocab = planned.dims["vocab"]
    tokens = np.random.default_rng(0).integers(0, vocab, SHAPE)
    ours, theirs = our_logits(planned, tokens), their_logits(out, tokens)
    difference = float(np.max(np.abs(ours - theirs)))
    is_rounded = any(np.dtype(hf.DTYPES[one]).itemsize < 4 for one in planned.dtypes.values())
    tolerance = MERGED_TOLERANCE if planned.settings and is_rounded else TOLERANCE
    return difference, tolerance * float(np.max(np.abs(ours)))


def our_logits(planned: Plan, tokens: np.ndarray) -> np.ndarray:
    """Logits of the checkpoint's parameters, float32 [B, T, V]."""
    model_def, mesh = planned.model_def, parallel.single_device_mesh()
    params = {path: jnp.asarray(planned.read(path), jnp.float32) for path in planned.arrays}
    if planned.weights:
        rest = [row.path for row in planned.rows if row.path not in params]
        params |= trainable.read(planned.weights, model_def, rest, mesh, jnp.float32, False)
    for row in planned.rows:
        for index, name in row.hf_tensors(planned.dims):
            dtype = hf.DTYPES[planned.dtypes[name]]
            if np.dtype(dtype).itemsize < 4 and row.path in params:
                array = params[row.path]
                rounded = array[index].astype(dtype).astype(jnp.float32)
                params[row.path] = array.at[index].set(rounded)
    return np.asarray(inference.LoadedModel(model_def, params, mesh).logits(tokens))


def their_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits of transformers' model of a folder, float32 [B, T, V]."""
    # Not part of what the project needs: a test is all that it is for.
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()
