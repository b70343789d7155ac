"""Every configuration key: type, default, unit, meaning, allowed values, and what a resume allows.

`config.default()` returns these keys as the ConfigDict that config files change. `validate` returns
them as frozen `Settings`, which all other code reads. docs/config.md and --help-config list them. A
test fails on a key that no code reads.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
SCHEDULES = ("cosine", "linear", "constant", "wsd")
MOMENTS_DTYPES = ("float32", "bfloat16")
# The highest b1 and b2 with moments in bfloat16. A step moves a moment by (1 - b) of its distance
# from the gradient or the squared gradient. Rounding undoes a change below half the spacing, which
# is 2^-9 to 2^-8 of the moment. On random gradients, the error of the second moment is 0.02% at
# b2 = 0.95, 0.5% at 0.98 and 4% at 0.99. Above 1 - 2^-8 = 0.996 the moment never decreases again.
MAX_BFLOAT16_DECAY = 0.98
STEPS_LIMIT = 2**31  # steps are counted in int32 on the devices
TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # {tracker: package it needs}


@dataclasses.dataclass(frozen=True)
class Key:
    """Describes a configuration key. Its name, type and default are those of its field.

    Attributes:
        text: what the key sets.
        unit: unit of its value; "" = none.
        choices: all allowed values; empty = not limited to a list.
        least, most: lowest and highest allowed value; None = no such bound.
        above, below: bounds that are not allowed themselves; None = no such bound.
        free: why a run may resume with another value than that of its checkpoint; "" = it may not,
            as it would train a model that neither config describes.
    """

    text: str
    unit: str = ""
    choices: Sequence[Any] = ()
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    free: str = ""

    def problem(self, name: str, value: Any) -> str:
        """Return what is wrong with a value and what to use instead; "" = nothing."""
        if self.choices or not self.allowed():
            is_allowed = not self.choices or value in self.choices
            return "" if is_allowed else f"{name} = {value!r}: use {self.allowed()}"
        if not -math.inf < value < math.inf:  # an int may be too large for math.isfinite
            return f"{name} = {value!r}: use {self.allowed()}, and a finite number"
        is_allowed = (
            (self.least is None or self.least <= value)
            and (self.most is None or value <= self.most)
            and (self.above is None or self.above < value)
            and (self.below is None or value < self.below)
        )
        return "" if is_allowed else f"{name} = {value!r}: use {self.allowed()}"

    def allowed(self) -> str:
        """Return the allowed values in words; "" = any."""
        if self.choices:
            return f"one of {list(self.choices)}"
        if self.most is not None:
            return f"a value from {self.least} to {self.most}"
        if self.below is not None:
            return f"a value from {self.least} up to, not including, {_number(self.below)}"
        if self.above is not None:
            return f"a value above {self.above}"
        return f"at least {self.least}" if self.least is not None else ""


def _number(value: float) -> str:
    """Return a number in words, a large power of two as such."""
    power = math.log2(value)
    return f"2**{power:.0f}" if power > 20 and power.is_integer() else f"{value}"


def _key(default: Any, text: str, unit: str = "", **fields: Any) -> Any:
    """Return the dataclass field of a `Key` with this default."""
    metadata = {"key": Key(text, unit, **fields)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _section(of: type, free: str = "") -> Any:
    """Return the dataclass field of a section; `free` is that of each of its keys (`Key`)."""
    return dataclasses.field(default_factory=of, metadata={"free": free})


@dataclasses.dataclass(frozen=True)
class Model:
    """The model and the precision of its computation."""

    path: str = _key("", "Hugging Face model folder, or a hub id such as Qwen/Qwen2.5-7B.")
    revision: str = _key("", 'Commit or tag of a hub id; "" = its main branch.')
    dtype: str = _key(
        "bfloat16", "Dtype of activations, and of weights in matrix products.", choices=DTYPES
    )
    param_dtype: str = _key(
        "float32",
        "Dtype of the master weights. In bfloat16, an update below 1/256 of a weight is lost to "
        "rounding, so that SFT learning rates leave most weights unchanged.",
        choices=DTYPES,
    )
    attention: str = _key(
        "auto",
        'Attention backend; "auto" = the fastest one that these devices can run.',
        choices=("auto", "cudnn", "tokamax", "blockwise", "reference"),
        free="sums are only taken in another order",
    )
    grad_dtype: str = _key(
        "float32",
        "Dtype in which gradients of matrices are computed and summed over devices. bfloat16 "
        "halves the bytes sent, and rounds once per device and addition.",
        choices=DTYPES,
    )
    remat: str = _key(
        "full",
        "Values of a layer that are kept for the backward pass instead of recomputed: none (all "
        "are kept), dots, attn, full (all are recomputed), or some of residual, qkv, attention, "
        "attention_lse, mlp and dots, joined by commas.",
        free="the same numbers, recomputed or kept",
    )
    offload: tuple[str, ...] = _key(
        (),
        "Those of the values named in model.remat that are kept in pinned host memory.",
        free="the same numbers, recomputed or kept",
    )


@dataclasses.dataclass(frozen=True)
class Lora:
    """Adapters on linear layers. With adapters, all other parameters are frozen."""

    rank: int = _key(0, "Rank of the adapters; 0 = full fine-tuning.", least=0)
    alpha: float = _key(16.0, "The output of an adapter is multiplied by alpha / rank.", above=0)
    dropout: float = _key(
        0.0, "Share of an adapter's inputs that is zeroed in training.", least=0, below=1
    )
    targets: tuple[str, ...] = _key(
        ("all-linear",),
        "Layers with adapters: all-linear (all but the output head), or regular expressions, e.g. "
        '("q_proj", "v_proj"). An expression must match the whole name of a linear layer in the '
        "Hugging Face model, or everything after one of the name's dots.",
    )
    rslora: bool = _key(False, "Multiply the adapter's output by alpha / sqrt(rank) instead.")
    dora: bool = _key(False, "Also train the norm of each output's weight vector (DoRA).")
    quantize: str = _key(
        "",
        'nf4 stores the frozen weights of linear layers in 4 bits (QLoRA); "" = not quantized.',
        choices=("", "nf4"),
    )
    path: str = _key(
        "",
        "Folder of a PEFT adapter from which training continues. The adapter's rank, alpha, "
        "targets, rslora and dora are used, and its dropout if lora.dropout is 0.",
    )


@dataclasses.dataclass(frozen=True)
class Source:
    """A data source: `config.source(path, ...)`."""

    path: str = _key(
        "",
        "File, glob or folder, relative to the working folder, or a hub data set. Files are .json, "
        ".jsonl or .csv, also compressed as .gz or .zst, or .parquet.",
    )
    format: str = _key(
        "",
        'Format of the rows; "" = inferred from the columns, and shown.',
        choices=(
            *("", "messages", "sharegpt", "prompt_response", "prompt_completion", "tokens"),
            "text",
        ),
    )
    limit: int = _key(0, "Rows to read from the start; 0 = all.", "rows", least=0)
    epochs: float = _key(
        1.0, "Passes over this source in one epoch of the run. Set this or weight.", "epochs"
    )
    weight: float = _key(0.0, "Share of the examples: weight / sum of weights; 0 = not weighted.")
    subset: str = _key("", "Subset of a hub data set.")
    split: str = _key("train", "Split of a hub data set.")
    revision: str = _key("", 'Commit or tag of a hub data set; "" = its main branch.')
    prompt_key: str = _key("prompt", "Column of the prompt.")
    query_key: str = _key("", 'Column that is appended to the prompt after a newline; "" = none.')
    response_key: str = _key("response", "Column of the response.")
    system_key: str = _key(
        "", 'Column of the system message; "" = none ("system" for sharegpt data).'
    )
    messages_key: str = _key("messages", "Column of the messages.")
    conversations_key: str = _key("conversations", "Column of the conversations.")
    tools_key: str = _key("tools", "Column of the tools.")
    completion_key: str = _key("completion", "Column of the completion.")
    text_key: str = _key("text", "Column of the text.")


@dataclasses.dataclass(frozen=True)
class Data:
    """The training and validation data, and how they become rows of tokens."""

    train: Mapping[str, Source] = _key({}, "{name: source} of the training data.")
    eval: Mapping[str, Source] = _key({}, "{name: source} of the validation data; may be empty.")
    seq_len: int = _key(2048, "Length of a row.", "tokens", least=1)
    shuffle: bool = _key(True, "Use a new order in each epoch; False keeps the order of the files.")
    overlong: str = _key(
        "drop",
        "Treatment of an example longer than seq_len: raise, drop, truncate (cut it after the last "
        "whole trained turn that fits) or truncate_history (remove its oldest turns). Such "
        "examples are counted and reported.",
        choices=("raise", "drop", "truncate", "truncate_history"),
    )
    max_lost: float = _key(
        0.5,
        "Highest share of a source's rows, or of its trained tokens, that may be left out for any "
        "reason. A share of 1% or more gives a warning. 1.0 = no limit.",
        least=0,
        most=1,
        free="it decides whether a run starts",
    )
    on_bad_row: str = _key(
        "raise",
        "For a row that cannot be used: raise, or skip and report it.",
        choices=("raise", "skip"),
    )
    max_row_bytes: int = _key(
        16_000_000,
        "Approximate size limit of one row of a file; a longer row cannot be used. The default "
        "is about four million tokens of text. A tokenizer needs about a hundred times as much "
        "memory.",
        "bytes",
        least=1000,
    )
    turns: str = _key("all", "Assistant turns that train: all, last, or from:K, counted from 1.")
    train_empty_think: bool = _key(False, "Also train the empty <think></think> of some templates.")
    chat_template: str = _key(
        "",
        "Chat template: a .jinja file, relative to the working folder, or chatml, llama3, gemma or "
        'zephyr; "" = the model\'s own. The template is written into the export.',
        free="compared by its text, wherever the file is",
    )
    template_args: Mapping[str, Any] = _key(
        {}, "Variables for the chat template, e.g. enable_thinking."
    )
    date: str = _key(
        "2024-07-26", "Date for templates that print today's, so that tokens do not vary."
    )
    packing: str = _key(
        "best_fit",
        "best_fit, or none: one example per row, padded to the batch's bucket.",
        choices=("best_fit", "none"),
    )
    max_segments: int = _key(256, "Most examples per row.", "examples", least=1)
    cache_dir: str = _key(
        "",
        'Folder of tokenized data; "" = $XDG_CACHE_HOME/jax_sft or ~/.cache/jax_sft.',
        free="the place of a copy",
    )
    cache_gb: float = _key(
        50.0,
        "Limit of the tokenized data in cache_dir: 50 GB hold 10 billion tokens. 0 = no limit.",
        "GB",
        least=0,
        free="how many copies are kept",
    )
    num_workers: int = _key(
        0,
        "Tokenizing processes; 0 = one per core.",
        "processes",
        least=0,
        free="how fast the same data are made",
    )


@dataclasses.dataclass(frozen=True)
class Batch:
    """The size of a step."""

    rows: int = _key(64, "Rows per optimizer step, over all devices and hosts.", "rows", least=1)
    micro_rows: int = _key(
        0,
        "Rows per forward and backward pass; 0 = all rows at once.",
        "rows",
        least=0,
        free="sums are only taken in another order; not free with dropout, or with a loss that "
        "balances experts",
    )


@dataclasses.dataclass(frozen=True)
class Loss:
    """Terms of the training loss. They never change the evaluation loss."""

    z_loss: float = _key(
        0.0, "Weight of the squared log-partition; 1e-4 is usual if logits drift.", least=0
    )
    label_smoothing: float = _key(
        0.0, "Share of the target spread over the vocabulary.", least=0, below=1
    )
    router_aux: float = _key(
        -1.0,
        "Weight of the loss that balances the load of a model's experts. It is reported as "
        "router_loss, not as part of the loss. 0 = off. -1 = the model's router_aux_loss_coef, "
        "applied even without output_router_logits, which transformers requires: fine-tuning may "
        "else leave experts unused.",
    )


@dataclasses.dataclass(frozen=True)
class Train:
    """Length of the run, trainable parameters, failures, and results."""

    epochs: float = _key(1.0, "Passes over the data; may be fractional.", "epochs")
    steps: int = _key(
        0, "Optimizer steps; 0 = set by train.epochs.", "steps", least=0, below=STEPS_LIMIT
    )
    on_nonfinite: str = _key(
        "skip",
        "Treatment of a step whose loss or gradient is not finite, which is never applied. skip "
        "counts and reports such steps; more than max_nonfinite in a row stop the run, and their "
        "batches are dumped. raise stops the run at the first.",
        choices=("skip", "raise"),
        free="whether a step that is never applied ends the run",
    )
    max_nonfinite: int = _key(
        2,
        "Most steps in a row that may be skipped.",
        "steps",
        least=0,
        free="whether steps that are never applied end the run",
    )
    stall_timeout_s: float = _key(
        60.0,
        "All processes end for a restart if a process gives no sign of life for this long, or if "
        "no step finishes within the longer of this time and five times the slowest recent step. "
        "0 = never.",
        "seconds",
        least=0,
        free="when a run that hangs is ended",
    )
    freeze: tuple[str, ...] = _key(
        (),
        'Regular expressions, e.g. ("embed_tokens", r"layers\\.[0-7]\\."). A tensor is frozen if '
        "one of them matches any part of its Hugging Face name.",
    )
    compilation_cache: str = _key(
        "",
        "Folder in which compiled programs are kept for the next start, ideally shared by all "
        "hosts. WORKDIR/compiled replaces a folder that cannot be written, that another user may "
        'write to or that not all hosts see. "" = compiled/ in the default folder of '
        "data.cache_dir; none = no cache. JAX_COMPILATION_CACHE_DIR takes precedence if it is set.",
        free="the place of a copy",
    )
    export: bool = _key(
        False,
        "Also write the result as a Hugging Face folder to WORKDIR/export.",
        free="what is done with the result",
    )
    export_tokenizer_eos: bool = _key(
        False,
        "In the export, also make the token that ends most trained turns the tokenizer's "
        "eos_token. generation_config.json and config.json always name this token.",
        free="what is done with the result",
    )


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimizer and its learning-rate schedule."""

    name: str = _key("adamw", "Optimizer.", choices=("adamw",))
    learning_rate: float = _key(1e-5, "Highest learning rate of the schedule.", least=0)
    schedule: str = _key("cosine", "Shape of the learning-rate curve.", choices=SCHEDULES)
    warmup: float = _key(
        0.03,
        "Length of the warm-up: below 1, a fraction of all steps; from 1 on, a number of steps, "
        "even if the run has fewer.",
        least=0,
    )
    final_ratio: float = _key(
        0.1,
        "Last learning rate / highest one; not used by constant.",
        least=0,
        most=1,
    )
    decay_fraction: float = _key(
        0.2, "wsd only: share of all steps spent decaying at the end.", least=0, most=1
    )
    weight_decay: float = _key(
        0.01, "Weight decay of matrices; norms and biases have none.", least=0
    )
    b1: float = _key(0.9, "Decay of the first moment per step.", least=0, below=1)
    b2: float = _key(0.95, "Decay of the second moment per step.", least=0, below=1)
    eps: float = _key(1e-8, "Added to the root of the second moment.", above=0)
    moments_dtype: str = _key(
        "float32",
        "Dtype in which both moments are stored; the arithmetic is float32. bfloat16 saves 4 of "
        f"the 12 bytes of a parameter and its moments. It needs b1 and b2 of at most "
        f"{MAX_BFLOAT16_DECAY}.",
        choices=MOMENTS_DTYPES,
    )
    clip_norm: float = _key(1.0, "Highest global gradient norm; 0 = no clipping.", least=0)


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Size of each mesh axis; one of the four may be -1 = all remaining devices."""

    data: int = _key(1, "Copies of the model.", "devices")
    fsdp: int = _key(-1, "Shards of parameters and moments; also splits the batch.", "devices")
    tensor: int = _key(
        1,
        "Shards of heads, mlp and the vocabulary (padded to a multiple of this).",
        "devices",
    )
    sequence: int = _key(1, "Shards of the tokens of a row.", "devices")
    cpu_devices: int = _key(
        0,
        "Simulated CPU devices over all processes; 0 = use the real devices.",
        "devices",
        least=0,
    )


@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluations during the run."""

    every_steps: int = _key(0, "Steps between evaluations; 0 = only at the end.", "steps", least=0)
    at_start: bool = _key(True, "Also evaluate before the first step.")
    samples: int = _key(
        0,
        "Validation examples to answer greedily, print and compare each time.",
        "examples",
        least=0,
    )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When the state is stored, and how it is checked."""

    every_steps: int = _key(
        500, "Steps between saves; 0 = save only the final step.", "steps", least=0
    )
    keep: int = _key(2, "Newest steps to keep.", "steps", least=1)
    keep_best: int = _key(
        0, "Best steps by checkpoint.metric to keep in addition.", "steps", least=0
    )
    metric: str = _key(
        "eval/loss", "Metric of keep_best, lower is better: any of eval, e.g. eval/NAME/loss."
    )
    verify: str = _key(
        "sizes",
        "Check of the files before a checkpoint is used: sizes (sizes of all, and the sha256 of "
        "those below 1 MiB) or hashes (the sha256 of all, which reads everything twice). Both also "
        "compare a checksum of every array that is read.",
        choices=("sizes", "hashes"),
    )
    allow_changes: tuple[str, ...] = _key(
        (),
        "Keys or prefixes of keys, in addition to those that are always free, in which this run "
        'may differ from the run whose checkpoint it resumes, e.g. ("optimizer.learning_rate",).',
    )


@dataclasses.dataclass(frozen=True)
class Log:
    """Metrics on the screen and in trackers."""

    every_steps: int = _key(10, "Steps between two lines of metrics.", "steps", least=1)
    per_source: bool = _key(False, "Also log the loss of each train source.")
    trackers: tuple[str, ...] = _key(
        (), f"Any of {', '.join(TRACKERS)}, in addition to metrics.jsonl."
    )


@dataclasses.dataclass(frozen=True)
class Settings:
    """The values of all keys."""

    seed: int = _key(
        0,
        "The only source of randomness: data order, initial adapters, dropout.",
        least=0,
        below=2**63,
    )
    model: Model = _section(Model)
    lora: Lora = _section(Lora)
    data: Data = _section(Data)
    batch: Batch = _section(Batch)
    loss: Loss = _section(Loss)
    train: Train = _section(Train)
    optimizer: Optimizer = _section(Optimizer)
    mesh: Mesh = _section(Mesh, free="sums are only taken in another order")
    eval: Eval = _section(Eval, free="when and what is measured, never trained on")
    checkpoint: Checkpoint = _section(Checkpoint, free="when the state is stored, and its checks")
    log: Log = _section(Log, free="what is shown")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A key with its place in the config.

    Attributes:
        name: dotted name; the keys of a source begin with data.train.NAME.
        default: its value in `config.default()`.
        key: its description. `free` is that of its section if the key has none.
    """

    name: str
    default: Any
    key: Key


def entries(section: Any = None, prefix: str = "", free: str = "") -> Iterator[Entry]:
    """Yield all keys of the config, or of one section, in their order."""
    section = Settings() if section is None else section
    for field in dataclasses.fields(section):
        name, default = prefix + field.name, getattr(section, field.name)
        if dataclasses.is_dataclass(default):
            yield from entries(default, name + ".", field.metadata["free"])
            continue
        key = field.metadata["key"]
        yield Entry(name, default, dataclasses.replace(key, free=key.free or free))
        if name == "data.train":
            yield from entries(Source(), "data.train.NAME.")


def problems(section: Any, prefix: str = "") -> list[str]:
    """Return the values of a section, or of all, that their keys do not allow."""
    messages = []
    for field in dataclasses.fields(section):
        name, value = prefix + field.name, getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            messages += problems(value, name + ".")
        elif key := field.metadata.get("key"):
            messages += filter(None, [key.problem(name, value)])
    return messages


def free_keys() -> dict[str, str]:
    """Return {key: why a run may resume with another value}."""
    return {entry.name: entry.key.free for entry in entries() if entry.key.free}
