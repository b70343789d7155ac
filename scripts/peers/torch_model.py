"""Load, describe and measure models for the subjects that use torch and transformers."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from scripts.peers.contract import Spec, peak_rss_bytes


def load(spec: Spec) -> transformers.PreTrainedModel:
    """Return the model with float32 masters, and with FlashAttention if installed on a GPU."""
    has_flash = importlib.util.find_spec("flash_attn") is not None and spec.device == "gpu"
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        Path(spec.model),
        dtype=torch.float32,
        attn_implementation="flash_attention_2" if has_flash else "sdpa",
    )
    return model.to("cuda" if spec.device == "gpu" else "cpu")


def describe(model: transformers.PreTrainedModel) -> str:
    """Describe the attention implementation and the library of matrix products."""
    library = "cuBLAS" if model.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    if model.device.type == "cpu":
        library += ", MKL" if torch.backends.mkl.is_available() else ", no MKL"
        library += " and oneDNN" if torch.backends.mkldnn.is_available() else ", no oneDNN"
    return f"{model.config._attn_implementation} attention, {library}"


def wait(device: torch.device) -> None:
    """Wait until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory so far, of the GPU's allocator or of the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss_bytes()


def nll(
    model: transformers.PreTrainedModel, spec: Spec, ids: Sequence[int], mask: Sequence[int]
) -> float:
    """Return the summed loss of the trained tokens of a single example."""
    head: Any = model.get_output_embeddings()
    device = model.device
    tokens = torch.tensor([list(ids)], device=device)
    trained = torch.tensor(list(mask[1:]), device=device, dtype=torch.bool)
    with (
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16, enabled=spec.dtype == "bfloat16"),
    ):
        hidden = model.base_model(tokens, use_cache=False).last_hidden_state[0, :-1]
        logits = head(hidden[trained]).float()
    loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:][trained], reduction="sum")
    return float(loss)
