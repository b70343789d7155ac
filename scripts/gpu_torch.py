"""Measure a case of scripts/gpu_cases.py in PyTorch: a transformers model trained as in TRL.

    python -m scripts.gpu_torch torch/SIZE/LENGTH --out FILE [--smoke]

Packed rows are concatenated into a batch of one (TRL's padding-free batches). Attention is
FlashAttention over their segments. Every layer is recomputed in the backward pass (TRL's default),
and AdamW is fused. At 7B, weights, gradients and moments are bfloat16, as float32 does not fit;
smaller models have float32 masters and autocast. A step uses nothing else of TRL.
"""

import argparse
import functools
import importlib.util
import inspect
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn.attention import varlen
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from scripts import gpu_case, gpu_cases, gpu_profile, gpu_step
from scripts.gpu_case import MAX_SEGMENTS, NUM_STEPS, PROFILED_STEPS
from scripts.gpu_cases import MEDIANS, Case, Setting
from scripts.gpu_checks import Row, record

OWN = "varlen"  # the name under which PyTorch's own FlashAttention is registered
PURE = ("7b",)  # sizes with bfloat16 weights and moments


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", help="e.g. torch/7b/4096 or torch-compiled/7b/4096")
    parser.add_argument("--out", type=Path, required=True, help="of the results")
    parser.add_argument("--smoke", action="store_true", help="on the CPU")
    options = parser.parse_args(argv)
    case = gpu_cases.find(options.task)
    device = torch.device("cpu" if options.smoke else "cuda")
    run = functools.partial(measured, device=device)
    for row in gpu_case.first_that_fits(case, run, is_out_of_memory):
        gpu_case.show(row)
        record(options.out, {"task": options.task, **row})
    return 0


def is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        error.__traceback__ = None  # its frames reference the model
        torch.cuda.empty_cache()
        return True
    return False


def measured(case: Case, setting: Setting, device: torch.device) -> Row:
    """Train a few steps and return the measurements."""
    dtype = torch.bfloat16 if case.size in PURE else torch.float32
    attention, reason = attention_here(device)
    config = transformers.AutoConfig.for_model(**case.raw(setting))
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    forward: Callable[..., Any] = torch.compile(model) if case.variant == "compiled" else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    shape = (setting.rows, case.length)
    segments, positions = gpu_step.rows_of_segments(*shape, MAX_SEGMENTS, MEDIANS[case.length])
    inputs = packed(positions, config.vocab_size, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.float32)

    def step() -> float:
        optimizer.zero_grad()
        with autocast:
            loss = forward(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()  # waits for the loss

    def waited() -> float:
        loss = step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return loss

    began = time.perf_counter()
    times = gpu_step.timed(waited, NUM_STEPS)
    tokens = int(np.prod(shape))
    return {
        "layers": config.num_hidden_layers,
        "attention": attention,
        "attention_because": reason,
        "dtype": str(dtype),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "all_steps_s": time.perf_counter() - began,
        **times,
        "tokens": tokens,
        "pairs": int((positions + 1.0).sum()),
        "tokens_per_s": tokens / times["step_time_s"],
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        **profiled(waited, device),
    }


def packed(positions: np.ndarray, vocab: int, device: torch.device) -> dict[str, Any]:
    """Return the model's arguments: all rows in a batch of one, and their segment bounds."""
    flat = positions.reshape(-1)
    ends = np.append(np.flatnonzero(flat == 0), len(flat))
    bounds = torch.tensor(ends, dtype=torch.int32, device=device)
    longest = int(np.diff(ends).max())
    tokens = torch.randint(vocab, (1, len(flat)), device=device)
    return {
        "input_ids": tokens,
        "labels": tokens.clone(),
        "position_ids": torch.tensor(flat[None], device=device),
        **{"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds},
        **{"max_length_q": longest, "max_length_k": longest},
    }


def attention_here(device: torch.device) -> tuple[str, str]:
    """Return (fastest attention that works on packed rows on this machine, why no faster one does).

    The order of preference is: FlashAttention's own package on a GPU; the kernel in PyTorch, tested
    on a small packed row; PyTorch's attention with a mask over the whole batch, which transformers
    makes from the positions.
    """
    if device.type == "cuda" and importlib.util.find_spec("flash_attn"):
        return "flash_attention_2", ""
    try:
        wrong = error_of_attend(device)
    except (RuntimeError, TypeError, ValueError) as error:
        return "sdpa", f"PyTorch's FlashAttention does not run: {str(error)[:300]}"
    if wrong > 0.03:  # for bfloat16; a wrong mask gives 0.3 or more
        return "sdpa", f"PyTorch's FlashAttention is wrong by {wrong:.2g}"
    ALL_ATTENTION_FUNCTIONS.register(OWN, attend)
    return OWN, "the package flash_attn is not installed" if device.type == "cuda" else ""


def error_of_attend(device: torch.device) -> float:
    """Return the largest error of `attend` and its gradients, relative to the largest value."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = ((1, 6, 48, 64), (1, 2, 48, 64), (1, 2, 48, 64))
    arrays = [
        torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes
    ]
    segments = {
        "bounds": torch.tensor([0, 17, 48], dtype=torch.int32, device=device),
        "longest": 31,
    }
    results = []
    for function in (on_gpu if device.type == "cuda" else on_cpu, on_cpu):
        out = function(*arrays, **segments)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), arrays)])
    return max(
        float(((array - reference).abs().max() / reference.abs().max()).detach())
        for array, reference in zip(*results, strict=True)
    )


def attend(module, query, key, value, attention_mask, *, scaling=None, **kwargs):
    """Attend within segments; return ([1, T, N, H], None), as transformers requires.

    Args:
        query, key, value: [1, heads, T, H].
        attention_mask: None, as transformers makes no mask for an attention that it does not know.
        scaling: 1 / sqrt(H), the default of both kernels.
        kwargs: bounds of the segments, see `packed`.
    """
    assert attention_mask is None and scaling in (None, query.shape[-1] ** -0.5)
    function = on_gpu if query.is_cuda else on_cpu
    return function(query, key, value, kwargs["cu_seq_lens_q"], kwargs["max_length_q"]), None


def on_gpu(query, key, value, bounds, longest):
    """Attend with the FlashAttention 2 that is part of PyTorch."""
    parameters = inspect.signature(varlen.varlen_attn).parameters
    options: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    )
    if "enable_gqa" in parameters:
        options["enable_gqa"] = True
    else:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # [T, heads, H]
    attended: Any = varlen.varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)
    return attended[None]


def on_cpu(query, key, value, bounds, longest):
    """Attend segment by segment, with the same arguments and result as `on_gpu`."""
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x[:, :, start:stop] for x in (query, key, value)), is_causal=True, enable_gqa=True
        )
        for start, stop in itertools.pairwise(bounds.tolist())
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


def profiled(step: Callable[[], Any], device: torch.device) -> Row:
    """Trace a few steps and return their summary, in the same form as for JAX."""
    activities = torch.profiler.ProfilerActivity
    activity = activities.CUDA if device.type == "cuda" else activities.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(PROFILED_STEPS):
            step()
    events = [
        gpu_profile.Event(1e3 * event.time_range.start, 1e3 * event.time_range.end, event.name, "")
        for event in profile.events() or ()
        if device.type == "cpu" or str(event.device_type).endswith("CUDA")
    ]
    if not events:
        return {"profile_problem": "the trace has no kernels"}
    return gpu_profile.summary(events, PROFILED_STEPS, {})


if __name__ == "__main__":
    sys.exit(main())
