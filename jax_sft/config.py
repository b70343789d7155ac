"""Every configuration key, its default, its unit and its reason.

A config file calls `default()`, changes the keys that differ and returns the config. No other
module sets a default. `validate.py` checks the values. A test fails on a key that no code reads.
"""

import os
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

# A ConfigDict. Its keys are checked on access at run time, as type checkers cannot see them.
Config = Any

OPTIMIZERS = ("adamw",)
SCHEDULES = ("cosine", "linear", "constant", "wsd")
MOMENTS_DTYPES = ("float32", "bfloat16")
# The highest b1 and b2 with moments in bfloat16. A step moves a moment by (1 - b) of its distance
# from the gradient or the squared gradient. Rounding undoes a change below half the spacing, which
# is 2^-9 to 2^-8 of the moment. On random gradients, the error of the second moment is 0.02% at
# b2 = 0.95, 0.5% at 0.98 and 4% at 0.99. Above 1 - 2^-8 = 0.996 the moment never decreases again.
MAX_BFLOAT16_DECAY = 0.98
ON_NONFINITE = ("skip", "raise")
TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # {tracker: package it needs}

# {key or prefix that may differ between a checkpoint and the run that resumes it: reason}. A change
# of any other key would train a model that neither config describes.
FREE = {
    "mesh": "sums are only taken in another order",
    "batch.micro_rows": "as above, but with dropout or a loss that balances experts: bound_keys",
    "model.attention": "as above",
    "model.remat": "the same numbers, computed again or kept",
    "model.offload": "as above",
    "data.cache_dir": "the place of a copy",
    "data.cache_gb": "how many copies are kept",
    "data.chat_template": "compared by its text, wherever the file is",
    "data.max_lost": "whether a run starts",
    "data.num_workers": "how fast the same data are made",
    "eval": "when and what is measured, never trained on",
    "log": "what is shown",
    "checkpoint": "when the state is stored, and how it is checked",
    "train.export": "what is done with the result",
    "train.export_tokenizer_eos": "as above",
    "train.on_nonfinite": "whether a step that is never applied ends the run",
    "train.max_nonfinite": "as above",
    "train.stall_timeout_s": "when a run that hangs is ended",
    "train.compilation_cache": "the place of a copy",
}


def source(path: str | os.PathLike, **changes) -> Config:
    """Describe one data source; keyword arguments replace its defaults.

    Args:
        path: a file, a glob or a folder, relative to the working folder, or a hub data set. Files
            are .json, .jsonl or .csv, also compressed as .gz or .zst, or .parquet.
        **changes: values for any of the keys set in this function.

    Raises:
        KeyError: a keyword is not a key of a source.
    """
    fields: Config = ConfigDict()
    fields.path = os.fspath(path)
    fields.format = ""  # one of data.sources.formats.FORMATS; "" = inferred from the columns, shown
    fields.limit = 0  # rows to read from the start; 0 = all
    # Set one of the two, see data.batches.mixture.
    fields.epochs = 1.0  # passes over this source in one epoch of the run
    fields.weight = 0.0  # share of the examples: weight / sum of weights; 0 = not weighted
    fields.subset = ""  # subset of a hub data set
    fields.split = "train"  # split of a hub data set
    fields.revision = ""  # commit or tag of a hub data set; "" = its main branch
    # Names of columns:
    fields.prompt_key = "prompt"
    fields.query_key = ""  # appended to the prompt after a newline; "" = no such column
    fields.response_key = "response"
    fields.system_key = ""  # system message; "" = no such column ("system" for sharegpt data)
    fields.messages_key = "messages"
    fields.conversations_key = "conversations"
    fields.tools_key = "tools"
    fields.completion_key = "completion"
    fields.text_key = "text"
    for key, value in changes.items():
        if key not in fields:
            raise KeyError(f"a data source has no key {key!r}: use one of {sorted(fields)}")
        fields[key] = value
    return fields.lock()


def default() -> Config:
    """Return a locked config with every key at its default; data and model.path are empty."""
    cfg: Config = ConfigDict()
    cfg.seed = 0  # the only source of randomness: data order, initial adapters, dropout

    model: Config = ConfigDict()
    cfg.model = model
    model.path = ""  # a Hugging Face model folder, or a hub id such as Qwen/Qwen2.5-7B
    model.revision = ""  # commit or tag of a hub id; "" = its main branch
    model.dtype = "bfloat16"  # dtype of activations, and of weights in matrix products
    # Dtype of the master weights. In bfloat16, an update below 1/256 of a weight is lost to
    # rounding, so that SFT learning rates leave most weights unchanged.
    model.param_dtype = "float32"
    model.attention = "auto"  # one of ops.attention.dispatch.BACKENDS
    # Dtype in which gradients of matrices are computed and summed over devices. bfloat16 halves the
    # bytes sent, and rounds once per device and addition.
    model.grad_dtype = "float32"
    # Values of a layer that are kept for the backward pass instead of recomputed: "none" (all are
    # kept), "dots", "attn", "full" (all are recomputed), or remat_names.NAMES joined by commas.
    model.remat = "full"
    model.offload = ()  # those of remat_names.NAMES that are kept in pinned host memory

    lora: Config = ConfigDict()
    cfg.lora = lora  # adapters on linear layers; all other parameters are frozen
    lora.rank = 0  # 0 = full fine-tuning
    lora.alpha = 16.0  # the adapter's output is multiplied by alpha / rank
    lora.dropout = 0.0  # fraction of an adapter's inputs that is zeroed in training
    # Layers with adapters: "all-linear" (all but the output head), or regular expressions, e.g.
    # ("q_proj", "v_proj"). An expression must match the whole name of a linear layer in the Hugging
    # Face model, or everything after one of the name's dots.
    lora.targets = ("all-linear",)
    lora.rslora = False  # multiply the adapter's output by alpha / sqrt(rank) instead
    lora.dora = False  # also train the norm of each output's weight vector (DoRA)
    # "nf4" stores the frozen weights of linear layers in 4 bits (QLoRA); "" = not quantized.
    lora.quantize = ""
    # Folder of a PEFT adapter from which training continues. The adapter's rank, alpha, targets,
    # rslora and dora are used, and its dropout if lora.dropout is 0.
    lora.path = ""

    data: Config = ConfigDict()
    cfg.data = data
    data.train = ConfigDict()  # {name: source(...)}
    data.eval = ConfigDict()  # {name: source(...)}; may be empty
    data.seq_len = 2048  # tokens per row
    data.shuffle = True  # use a new order in each epoch; False keeps the order of the files
    # Treatment of an example longer than seq_len: "raise", "drop", "truncate" (cut it after the
    # last whole trained turn that fits) or "truncate_history" (remove its oldest turns). Such
    # examples are counted and reported.
    data.overlong = "drop"
    # Highest share of a source's rows, or of its trained tokens, that may be left out for any
    # reason. A share of 1% or more gives a warning. 1.0 = no limit.
    data.max_lost = 0.5
    data.on_bad_row = "raise"  # for a row that cannot be used: "raise", or "skip" and report it
    # Approximate size limit in bytes of one row of a file; a longer row cannot be used. The default
    # is about four million tokens of text. A tokenizer needs about a hundred times as much memory.
    data.max_row_bytes = 16_000_000
    data.turns = "all"  # assistant turns that train: "all", "last" or "from:K", counted from 1
    data.train_empty_think = False  # also train the empty <think></think> of some templates
    # Chat template: a .jinja file, relative to the working folder, or "chatml", "llama3", "gemma"
    # or "zephyr"; "" = the model's own. The template is written into the export.
    data.chat_template = ""
    data.template_args = ConfigDict()  # variables for the chat template, e.g. enable_thinking
    data.date = "2024-07-26"  # date for templates that print today's, so that tokens do not vary
    data.packing = "best_fit"  # or "none": one example per row, padded to the batch's bucket
    data.max_segments = 256  # most examples per row
    # Folder of tokenized data; "" = $XDG_CACHE_HOME/jax_sft or ~/.cache/jax_sft.
    data.cache_dir = ""
    # Limit in GB of the tokenized data in cache_dir: 50 GB hold 10 billion tokens. 0 = no limit.
    data.cache_gb = 50.0
    data.num_workers = 0  # tokenizing processes; 0 = one per core

    batch: Config = ConfigDict()
    cfg.batch = batch
    batch.rows = 64  # rows per optimizer step, over all devices and hosts
    batch.micro_rows = 0  # rows per forward and backward pass; 0 = all rows at once

    loss: Config = ConfigDict()
    cfg.loss = loss  # these keys change the training loss, never the evaluation loss
    loss.z_loss = 0.0  # weight of the squared log-partition; 1e-4 is usual if logits drift
    loss.label_smoothing = 0.0  # share of the target spread over the vocabulary
    # Weight of the loss that balances the load of a model's experts. It is reported as router_loss,
    # not as part of the loss. 0 = off. -1 = the model's router_aux_loss_coef, applied even without
    # output_router_logits, which transformers requires: fine-tuning may else leave experts unused.
    loss.router_aux = -1.0

    train: Config = ConfigDict()
    cfg.train = train
    train.epochs = 1.0  # passes over the data; may be fractional
    train.steps = 0  # optimizer steps; 0 = set by train.epochs
    # A step whose loss or gradient is not finite is never applied. "skip" counts and reports such
    # steps; more than max_nonfinite in a row stop the run, and their batches are dumped. "raise"
    # stops the run at the first.
    train.on_nonfinite = "skip"
    train.max_nonfinite = 2
    # All processes end for a restart if a process gives no sign of life for this many seconds, or
    # if no step finishes in this time and in five times the slowest recent step; 0 = never.
    train.stall_timeout_s = 60.0
    # Regular expressions, e.g. ("embed_tokens", r"layers\.[0-7]\."). A tensor is frozen if one of
    # them matches any part of its Hugging Face name.
    train.freeze = ()
    # Folder in which compiled programs are kept for the next start, ideally shared by all hosts.
    # WORKDIR/compiled replaces a folder that cannot be written, that another user may write to or
    # that not all hosts see. "" = `compiled` in the default folder of data.cache_dir; "none" = no
    # cache. JAX_COMPILATION_CACHE_DIR takes precedence if it is set.
    train.compilation_cache = ""
    train.export = False  # also write the result as a Hugging Face folder to WORKDIR/export
    # In the export, also make the token that ends most trained turns the tokenizer's eos_token.
    # generation_config.json and config.json always name this token.
    train.export_tokenizer_eos = False

    optimizer: Config = ConfigDict()
    cfg.optimizer = optimizer
    optimizer.name = "adamw"  # one of OPTIMIZERS
    optimizer.learning_rate = 1e-5  # highest of the schedule
    optimizer.schedule = "cosine"  # "cosine", "linear", "constant" or "wsd"
    # Length of the warm-up: below 1, a fraction of all steps; from 1 on, a number of steps, even if
    # the run has fewer.
    optimizer.warmup = 0.03
    optimizer.final_ratio = 0.1  # last learning rate / highest one; not used by "constant"
    optimizer.decay_fraction = 0.2  # "wsd" only: share of all steps spent decaying at the end
    optimizer.weight_decay = 0.01  # applied to matrices, never to norms and biases
    optimizer.b1 = 0.9  # decay of the first moment per step
    optimizer.b2 = 0.95  # decay of the second moment per step
    optimizer.eps = 1e-8  # added to the root of the second moment
    # Dtype in which both moments are stored; the arithmetic is float32. "bfloat16" saves 4 of the
    # 12 bytes of a parameter and its moments. It needs b1 and b2 of at most MAX_BFLOAT16_DECAY.
    optimizer.moments_dtype = "float32"
    optimizer.clip_norm = 1.0  # highest global gradient norm; 0 = no clipping

    mesh: Config = ConfigDict()
    cfg.mesh = mesh
    # Size of each mesh axis; one of the four may be -1 = all remaining devices.
    mesh.data = 1  # copies of the model
    mesh.fsdp = -1  # shards of parameters and moments; also splits the batch
    mesh.tensor = 1  # shards of heads, mlp and the vocabulary (padded to a multiple of this)
    mesh.sequence = 1  # shards of the tokens of a row
    mesh.cpu_devices = 0  # simulated CPU devices over all processes; 0 = use the real devices

    evaluation: Config = ConfigDict()
    cfg.eval = evaluation
    evaluation.every_steps = 0  # steps between evaluations; 0 = only at the end
    evaluation.at_start = True  # also evaluate before the first step
    evaluation.samples = 0  # eval examples to answer greedily, print and compare each time

    checkpoint: Config = ConfigDict()
    cfg.checkpoint = checkpoint
    checkpoint.every_steps = 500  # steps between saves; 0 = save only the final step
    checkpoint.keep = 2  # number of newest steps to keep
    checkpoint.keep_best = 0  # number of best steps by `metric` to keep in addition
    checkpoint.metric = "eval/loss"  # lower is better; any eval metric, e.g. eval/NAME/loss
    # Check of the files before a checkpoint is used: "sizes" (sizes of all, and the sha256 of those
    # below 1 MiB) or "hashes" (the sha256 of all, which reads everything twice). Both also compare
    # a checksum of every array that is read.
    checkpoint.verify = "sizes"
    # Keys or prefixes of keys, in addition to FREE, in which this run may differ from the run whose
    # checkpoint it resumes, e.g. ("optimizer.learning_rate",).
    checkpoint.allow_changes = ()

    log: Config = ConfigDict()
    cfg.log = log
    log.every_steps = 10  # steps between two lines of metrics
    log.per_source = False  # also log the loss of each train source
    log.trackers = ()  # any of TRACKERS, in addition to metrics.jsonl
    cfg.lock()
    data.train.unlock()
    data.eval.unlock()
    data.template_args.unlock()
    return cfg


def to_dict(cfg: Config) -> dict:
    """Return the config as plain nested dicts and lists, as stored in config.json."""
    as_dict = cfg.to_dict()
    as_dict["log"]["trackers"] = list(as_dict["log"]["trackers"])
    as_dict["model"]["offload"] = list(as_dict["model"]["offload"])
    as_dict["lora"]["targets"] = list(as_dict["lora"]["targets"])
    as_dict["train"]["freeze"] = list(as_dict["train"]["freeze"])
    as_dict["checkpoint"]["allow_changes"] = list(as_dict["checkpoint"]["allow_changes"])
    return as_dict


def differences(old: dict, new: dict, prefix: str = "") -> dict[str, str]:
    """Return {key: "key: old -> new"} for every leaf that differs between two `to_dict` results."""
    lines = {}
    for key in sorted(old.keys() | new.keys()):
        name, before, after = prefix + key, old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines |= differences(before, after, name + ".")
        elif before != after:
            lines[name] = f"{name}: {before!r} -> {after!r}"
    return lines


def drift(stored: dict, new: dict, bound: Iterable[str] = ()) -> dict[str, str]:
    """Return the differences between a stored and a new config that change the training.

    Keys of FREE are left out unless they are in `bound`. A key that the stored config lacks counts
    as its default. A key that the program no longer has is ignored.
    """
    known = to_dict(default())
    old, new = _with_defaults(stored, known), _with_defaults(new, known)
    for batch in (old["batch"], new["batch"]):
        batch["micro_rows"] = batch["micro_rows"] or batch["rows"]
    for sources in ("train", "eval"):
        for name, fields in old["data"][sources].items():
            old["data"][sources][name] = source("").to_dict() | fields
    return {
        key: line
        for key, line in differences(old, new).items()
        if (not covered(key, FREE) or key in bound)
        and (_value(known, key) is not None or _is_open(key))
    }


def covered(key: str, keys: Iterable[str]) -> bool:
    """Return whether a dotted key is one of `keys` or below one of them."""
    return any(key == other or key.startswith(other + ".") for other in keys)


def unknown(keys: Iterable[str], cfg: Config) -> list[str]:
    """Return the `keys` that are no config key, no prefix of one, and not below an open key."""
    as_dict = to_dict(cfg)
    return [key for key in keys if _value(as_dict, key) is None and not _is_open(key)]


def _is_open(key: str) -> bool:
    """Return whether a key is, or is below, one whose contents the user names."""
    return covered(key, ("data.train", "data.eval", "data.template_args"))


def _with_defaults(stored: dict, defaults: dict) -> dict:
    """Return the stored config with the default of every key that it lacks."""
    filled = dict(stored)
    for key, value in defaults.items():
        if isinstance(value, dict):
            filled[key] = _with_defaults(dict(filled.get(key, {})), value)
        else:
            filled.setdefault(key, value)
    return filled


def _value(as_dict: Any, key: str) -> Any:
    """Return the value of a dotted key, or None if the key does not exist."""
    for part in key.split("."):
        as_dict = as_dict.get(part) if isinstance(as_dict, dict) else None
    return as_dict
