"""Every configuration key, its default, its unit and its reason.

A config file calls `default()`, changes what differs and returns it. Nothing else in the package
invents a default. `validate.py` checks the values; a test fails on a key that nobody reads.
"""

import os
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

# A ConfigDict. Its keys are checked where it is used, at run time: type checkers cannot see them.
Config = Any

OPTIMIZERS = ("adamw",)
SCHEDULES = ("cosine", "linear", "constant", "wsd")
MOMENTS_DTYPES = ("float32", "bfloat16")
# The highest b1 and b2 with moments in bfloat16. A step moves a moment by (1 - b) of its distance
# from the gradient, or from its square, and rounding undoes what is below half the spacing: 2^-9 to
# 2^-8 of the moment. On random gradients the second moment is then off by 0.02% at 0.95, 0.5% at
# 0.98 and 4% at 0.99; above 1 - 2^-8 = 0.996 it never falls again.
MAX_BFLOAT16_DECAY = 0.98
ON_NONFINITE = ("skip", "raise")
TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # and the package that each needs

# What may change between a checkpoint and the run that resumes it, and why: key or prefix. All else
# would train something that neither config describes.
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
    """Describe one data source; the keyword arguments replace the defaults below.

    Args:
        path: a file, a glob or a folder, relative to the working folder; or a hub data set. .json,
            .jsonl and .csv, also as .gz or .zst; .parquet.
        **changes: any of the keys below.

    Raises:
        KeyError: a keyword that is not a key of a source.
    """
    fields: Config = ConfigDict()
    fields.path = os.fspath(path)
    fields.format = ""  # one of data.sources.formats.FORMATS; "" = told by the columns, and shown
    fields.limit = 0  # rows to read from the start; 0 = all
    # In one epoch of the run a source gives `epochs` passes over itself; or, when the sources have
    # weights, its share of the examples: see data.mixture.
    fields.epochs = 1.0
    fields.weight = 0.0  # 0 = not weighted
    fields.subset = ""  # of a hub data set, and the two below
    fields.split = "train"
    fields.revision = ""  # commit or tag; "" = its main branch
    fields.prompt_key = "prompt"
    fields.query_key = ""  # appended to the prompt after a newline; "" = no such column
    fields.response_key = "response"
    fields.system_key = ""  # "" = no system message of our own
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
    cfg.seed = 0  # the only source of randomness: data order, and weights made from scratch

    model: Config = ConfigDict()
    cfg.model = model
    model.path = ""  # a Hugging Face model folder, or a hub id such as Qwen/Qwen2.5-7B
    model.revision = ""  # commit or tag of a hub id; "" = its main branch
    model.dtype = "bfloat16"  # of activations and of the weights while they multiply
    # Of the master weights. bfloat16 masters at SFT learning rates leave most weights unmoved: an
    # update below 1/256 of a weight rounds away.
    model.param_dtype = "float32"
    model.attention = "auto"  # one of ops.attention.dispatch.BACKENDS
    # In which gradients of matrices are formed and added up over devices. bfloat16 halves what is
    # sent, and rounds once per device and addition.
    model.grad_dtype = "float32"
    # What the backward pass keeps of a layer instead of computing it again: "none" (all is kept),
    # "dots", "attn", "full" (all is computed again), or remat_names.NAMES joined by commas.
    model.remat = "full"
    model.offload = ()  # names of remat_names.NAMES that are kept in pinned host memory

    lora: Config = ConfigDict()
    cfg.lora = lora  # adapters beside linear layers; everything else is frozen
    lora.rank = 0  # 0 = full fine-tuning
    lora.alpha = 16.0  # the update is multiplied by alpha / rank
    lora.dropout = 0.0  # share of an adapter's inputs that is zeroed in training
    # "all-linear" (all but the output head), or regular expressions for the names of linear layers
    # in the Hugging Face model, or for what follows any of their dots: ("q_proj", "v_proj").
    lora.targets = ("all-linear",)
    lora.rslora = False  # the update is multiplied by alpha / sqrt(rank) instead
    lora.dora = False  # also learn the length of each output's weights
    # "nf4": the weights of linear layers, which do not train, are held in 4 bits (QLoRA).
    lora.quantize = ""
    # A PEFT adapter to go on from; rank, alpha and the others are then its own.
    lora.path = ""

    data: Config = ConfigDict()
    cfg.data = data
    data.train = ConfigDict()  # {name: source(...)}
    data.eval = ConfigDict()  # {name: source(...)}; may stay empty
    data.seq_len = 2048  # tokens per row
    data.shuffle = True  # a new order each epoch; False keeps the order of the files
    # An example over seq_len: "raise", "drop", "truncate" (after the last whole trained turn that
    # fits) or "truncate_history" (the oldest turns go first). All are counted and shown.
    data.overlong = "drop"
    # Highest share of a source's rows, or of its trained tokens, that may be left out, for whatever
    # reason; from 1% on there is a warning. 1.0 = any.
    data.max_lost = 0.5
    data.on_bad_row = "raise"  # a row that cannot be used: "raise" or "skip" (counted, shown)
    # Bytes of one row of a file (about); a longer one is a row that cannot be used. The default is
    # four million tokens of text, and tokenizers take some hundred times as much memory.
    data.max_row_bytes = 16_000_000
    data.turns = "all"  # which assistant turns train: "all", "last" or "from:K", K counted from 1
    data.train_empty_think = False  # train the empty <think></think> that some templates write
    # A .jinja file, relative to the working folder, or "chatml", "llama3", "gemma" or "zephyr", in
    # the place of the model's own template; "" = that one. It is written into the export.
    data.chat_template = ""
    data.template_args = ConfigDict()  # variables for the chat template, e.g. enable_thinking
    data.date = "2024-07-26"  # what a template that prints the date sees: the same on every day
    data.packing = "best_fit"  # or "none": one example per row, padded to the batch's bucket
    data.max_segments = 256  # examples per row at most
    data.cache_dir = ""  # of tokenized data; "" = $XDG_CACHE_HOME/jax_sft or ~/.cache/jax_sft
    data.cache_gb = 50.0  # most that tokenized data take there: 10 billion tokens; 0 = no bound
    data.num_workers = 0  # processes that tokenize; 0 = one per core

    batch: Config = ConfigDict()
    cfg.batch = batch
    batch.rows = 64  # rows per optimizer step, over all devices and hosts
    batch.micro_rows = 0  # rows per forward and backward pass; 0 = all rows at once

    loss: Config = ConfigDict()
    cfg.loss = loss  # these change what is trained, never what is evaluated
    loss.z_loss = 0.0  # weight of the squared log-partition; 1e-4 is usual where logits drift
    loss.label_smoothing = 0.0  # share of the target spread over the vocabulary
    # Weight of the loss that keeps the experts of a model equally busy, reported as router_loss and
    # not in the loss. -1 = the model's router_aux_loss_coef, which transformers applies only with
    # output_router_logits: without it, fine-tuning may leave experts unused. 0 = off.
    loss.router_aux = -1.0

    train: Config = ConfigDict()
    cfg.train = train
    train.epochs = 1.0  # may be a fraction
    train.steps = 0  # optimizer steps; 0 = as many as train.epochs says
    # A step whose loss or gradient is not finite is never applied. "skip": it is counted and shown,
    # and more than max_nonfinite in a row stop the run, their batches dumped; "raise": the first.
    train.on_nonfinite = "skip"
    train.max_nonfinite = 2
    # Seconds without a sign of life of a process, or without a step finished (and over five times
    # the slowest of the last steps), after which all processes end for a restart; 0 = never.
    train.stall_timeout_s = 60.0
    # Regular expressions: tensors in whose Hugging Face names one is found do not train, e.g.
    # ("embed_tokens", r"layers\.[0-7]\.").
    train.freeze = ()
    # Folder of compiled programs, for the next start: at best one that all hosts share, as the one
    # in the workdir that takes its place otherwise; "" = `compiled` beside tokenized data, see
    # data.cache_dir; "none" = none. JAX_COMPILATION_CACHE_DIR, where it is set, goes before.
    train.compilation_cache = ""
    train.export = False  # also write the result as a Hugging Face folder to WORKDIR/export
    # In the export, make the token that ends most trained turns the tokenizer's eos_token as well;
    # generation_config.json and config.json always name it.
    train.export_tokenizer_eos = False

    optimizer: Config = ConfigDict()
    cfg.optimizer = optimizer
    optimizer.name = "adamw"
    optimizer.learning_rate = 1e-5  # at the top of the schedule
    optimizer.schedule = "cosine"  # "cosine", "linear", "constant" or "wsd"
    # below 1: fraction of all steps; from 1: number of steps, also where the run has fewer
    optimizer.warmup = 0.03
    optimizer.final_ratio = 0.1  # learning rate after the last step / highest one (not "constant")
    optimizer.decay_fraction = 0.2  # "wsd" only: share of all steps spent decaying at the end
    optimizer.weight_decay = 0.01  # on matrices only: never on norms and biases
    optimizer.b1 = 0.9
    optimizer.b2 = 0.95
    optimizer.eps = 1e-8
    # In which both moments are stored; arithmetic is float32. "bfloat16" saves 4 of the 12 bytes of
    # a parameter and its moments, and needs b1 and b2 of at most MAX_BFLOAT16_DECAY.
    optimizer.moments_dtype = "float32"
    optimizer.clip_norm = 1.0  # highest global gradient norm; 0 = no clipping

    mesh: Config = ConfigDict()
    cfg.mesh = mesh
    mesh.data = 1  # copies of the model; one of the four may be -1 = the devices that are left
    mesh.fsdp = -1  # shards of parameters and moments; also splits the batch
    mesh.tensor = 1  # shards of heads, mlp and vocabulary, which is padded for it
    mesh.sequence = 1  # shards of the tokens of a row
    mesh.cpu_devices = 0  # on the CPU platform: simulate this many devices in all; 0 = real ones

    evaluation: Config = ConfigDict()
    cfg.eval = evaluation
    evaluation.every_steps = 0  # 0 = only at the end (and at the start)
    evaluation.at_start = True
    evaluation.samples = 0  # validation examples answered greedily, shown and compared each time

    checkpoint: Config = ConfigDict()
    cfg.checkpoint = checkpoint
    checkpoint.every_steps = 500  # 0 = only the final step
    checkpoint.keep = 2  # newest steps kept
    checkpoint.keep_best = 0  # best steps by `metric` kept beside them
    checkpoint.metric = "eval/loss"  # lower is better; any eval metric, e.g. eval/NAME/loss
    # How files are checked before a checkpoint is used: "sizes" (of all, and the sha256 of those
    # below 1 MiB) or "hashes" (the sha256 of all: reads everything twice). Both also compare a
    # checksum of every array that was read.
    checkpoint.verify = "sizes"
    # Keys, or prefixes of keys, in which this run may differ from the one whose checkpoint it
    # resumes, beside those of FREE: e.g. ("optimizer.learning_rate",).
    checkpoint.allow_changes = ()

    log: Config = ConfigDict()
    cfg.log = log
    log.every_steps = 10
    log.per_source = False  # also the loss of each train source
    log.trackers = ()  # any of "tensorboard", "wandb"; metrics.jsonl is always written
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
    """Return {key: "key: old -> new"} of every leaf in which two results of `to_dict` differ."""
    lines = {}
    for key in sorted(old.keys() | new.keys()):
        name, before, after = prefix + key, old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines |= differences(before, after, name + ".")
        elif before != after:
            lines[name] = f"{name}: {before!r} -> {after!r}"
    return lines


def drift(stored: dict, new: dict, bound: Iterable[str] = ()) -> dict[str, str]:
    """Return the differences between a checkpoint's config and today's that change the training.

    Keys of FREE that are not `bound` are left out, and keys that the program did not have, or no
    longer has, unless the new value is not the default.
    """
    known = to_dict(default())
    old, new = _with_defaults(stored, known), _with_defaults(new, known)
    for rows in (old["batch"], new["batch"]):
        rows["micro_rows"] = rows["micro_rows"] or rows["rows"]
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
    """Whether a dotted key is among others or below one of them."""
    return any(key == other or key.startswith(other + ".") for other in keys)


def unknown(keys: Iterable[str], cfg: Config) -> list[str]:
    """Return those that are neither a key, nor the start of one, nor that of a data source."""
    as_dict = to_dict(cfg)
    return [key for key in keys if _value(as_dict, key) is None and not _is_open(key)]


def _is_open(key: str) -> bool:
    """Whether a key is below one that users fill."""
    return covered(key, ("data.train", "data.eval", "data.template_args"))


def _with_defaults(stored: dict, defaults: dict) -> dict:
    """The stored config, with the default of every key that it lacks."""
    found = dict(stored)
    for key, value in defaults.items():
        if isinstance(value, dict):
            found[key] = _with_defaults(dict(found.get(key, {})), value)
        else:
            found.setdefault(key, value)
    return found


def _value(as_dict: Any, key: str) -> Any:
    """The value of a dotted key; None if there is none."""
    for part in key.split("."):
        as_dict = as_dict.get(part) if isinstance(as_dict, dict) else None
    return as_dict
