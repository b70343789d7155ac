"""Define the cases of scripts/bench.py and make their models, rows and held-out examples."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_sft import config, models, tiny
from jax_sft.batch import FIELDS
from jax_sft.data.batches.examples import Examples
from jax_sft.data.batches.loader import Loader
from jax_sft.data.tokens import prepare
from jax_sft.planning import step_cost
from jax_sft.sharding.mesh import single_device_mesh
from jax_sft.training import metrics
from jax_sft.weights import hf_folder
from scripts.peers import ours
from scripts.peers.contract import Spec

QWEN2_15M = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "torch_dtype": "float32",
}
# The fields of HuggingFaceTB/SmolLM2-135M-Instruct's config.json that affect the computation.
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000.0,
    "torch_dtype": "float32",
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
ADAMW = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.01, "clip_norm": 1.0}


@dataclasses.dataclass(frozen=True)
class Case:
    """The work on which subjects are compared.

    Attributes:
        title: description in the table.
        config: config.json of a model with random weights.
        pretrained: whether `--model` replaces the random weights.
        tokenizer: folder in `--tokenizers`; "" = the byte tokenizer and words of `jax_sft.tiny`
            instead of `--data`.
        rows: number of rows per step, each of `seq_len` tokens.
        steps, warmup: number of steps in total, and of untimed steps at their start.
        num_held_out: number of examples whose loss is compared.
        changes: {key: value} of our own config, as a user would set it on such a machine.
        subjects: names in bench.SUBJECTS.
        targets: {subject: target ratio of our trained tokens/s to its own}.
        floor_target: upper limit of our step time, in lean floors; 0 = none.
        mfu_target: lower limit of MFU_c; 0 = none.
    """

    title: str
    config: Mapping[str, Any]
    seq_len: int
    steps: int
    warmup: int
    learning_rate: float
    subjects: tuple[str, ...]
    rows: int = 1
    pretrained: bool = False
    tokenizer: str = "smollm2"
    num_held_out: int = 16
    dtype: str = "float32"
    device: str = "cpu"
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    targets: Mapping[str, float] = dataclasses.field(default_factory=dict)
    floor_target: float = 0.0
    mfu_target: float = 0.0


ON_CPU = ("ours", "trl", "torch", "tunix-packed", "tunix-padded")
CASES = {
    "a": Case(
        title="random Qwen2, 15.5M parameters, tied 49,152 x 256 embedding, one row of 1024",
        config=QWEN2_15M,
        seq_len=1024,
        steps=18,
        warmup=3,
        learning_rate=5e-4,
        num_held_out=48,
        changes={"model.remat": "none"},
        subjects=ON_CPU,
        targets={"trl": 3.0, "tunix-packed": 2.0},
        floor_target=1.5,
    ),
    "b": Case(
        title="SmolLM2-135M, one row of 512",
        config=SMOLLM2_135M,
        pretrained=True,
        seq_len=512,
        steps=8,
        warmup=2,
        learning_rate=5e-5,
        changes={"model.remat": "dots,attention,attention_lse"},
        subjects=ON_CPU,
        targets={"trl": 1.4, "tunix-packed": 1.8},
        floor_target=1.5,
    ),
    "smoke": Case(
        title="toy: shows that everything runs, says nothing about speed",
        config=tiny.CONFIG,
        tokenizer="",
        seq_len=128,
        steps=4,
        warmup=1,
        learning_rate=1e-3,
        num_held_out=4,
        changes={"model.remat": "none"},
        subjects=("ours",),
        floor_target=1.5,
    ),
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Files from the command line that a case cannot generate."""

    data: Path  # JSON lines {"question", "answer"}
    tokenizers: Path  # a folder of tokenizer folders
    model: Path | None  # for pretrained cases


@dataclasses.dataclass(frozen=True)
class Work:
    """A case with its files.

    Attributes:
        spec: input of every run of the case, except for variant, started and workdir.
        title: the case's title and the origin of its weights.
        parameters: number of model parameters.
        flops: FLOPs of the mean timed step: head on trained tokens, attention within examples.
        causal_flops: FLOPs as published MFU counts them: head on all tokens that are not padding.
    """

    spec: Spec
    title: str
    parameters: int
    flops: float
    causal_flops: float


def make(case: Case, name: str, inputs: Inputs, folder: Path) -> Work:
    """Write the model, rows and examples of a case; reuse only random weights of earlier runs.

    Raises:
        ValueError: a file of `inputs` is missing, or the data has too few examples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data, source = _data(case, inputs, folder)
    model, weights = _model(case, inputs, folder)
    spec = Spec(
        model=str(model),
        rows=str(folder / "rows.npz"),
        examples=str(folder / "examples.jsonl"),
        held_out=str(folder / "held_out.jsonl"),
        seq_len=case.seq_len,
        steps=case.steps,
        warmup=case.warmup,
        dtype=case.dtype,
        device=case.device,
        optimizer={"learning_rate": case.learning_rate, **ADAMW},
        variant="",
        started=0.0,
        workdir="",
        ours={
            "data": str(data),
            "source": source,
            "cache_dir": str(folder / "tokens"),
            "rows": case.rows,
            "changes": dict(case.changes),
        },
    )
    run = config.to_settings(ours.run_config(dataclasses.replace(spec, held_out="")))
    examples = prepare.prepare(run.data.train, model, run.data, progress=False)
    loader = Loader(
        examples,
        run.data,
        run.data.train,
        rows=case.rows,
        micro_rows=run.batch.micro_rows or case.rows,
        mesh=single_device_mesh(),
        shuffle=run.data.shuffle,
        seed=run.seed,
    )
    steps = [loader.build(step, range(case.rows)) for step in range(case.steps)]
    rows = {field: np.stack([step[field] for step in steps]) for field in FIELDS}
    np.savez(spec.rows, **rows)  # pyright: ignore[reportArgumentType]
    used = [
        int(id_)
        for step in range(case.steps)
        for row in loader.schedule.rows_of(step)
        for id_ in row
    ]
    unused = sorted({*range(len(examples))} - {*used})[-case.num_held_out :]
    if len(unused) < case.num_held_out:
        raise ValueError(f"{data}: {len(examples)} examples are too few for case {name}")
    _write(Path(spec.examples), examples, used)
    _write(Path(spec.held_out), examples, unused)
    return Work(spec, f"{case.title} ({weights})", **work_of(model, rows, case.warmup))


def work_of(model: Path, rows: Mapping[str, np.ndarray], warmup: int) -> dict[str, Any]:
    """Return the fields parameters, flops and causal_flops of `Work`.

    Args:
        model: a folder with config.json.
        rows: arrays [steps, rows, seq_len].
    """
    raw = hf_folder.read_json(model / "config.json")
    family = models.find(raw["model_type"])
    cfg = family.Config.from_hf(raw)
    weights = family.weights(cfg)
    real = rows["segment_ids"][warmup:] > 0
    num_steps = len(real)
    tokens = real.sum() / num_steps
    pairs = (rows["positions"][warmup:] + 1)[real].sum(dtype=np.int64) / num_steps
    trained = (rows["weights"][warmup:] > 0).sum() / num_steps
    parts = step_cost.model_flops(weights, cfg.axis_sizes, cfg.tied, tokens, pairs, trained)
    sizes = (int(np.prod(row.shape(cfg.axis_sizes), dtype=np.int64)) for row in weights)
    return {
        "parameters": sum(sizes),
        "flops": float(sum(parts.values())),
        "causal_flops": float(metrics.step_flops(weights, cfg.axis_sizes, cfg.tied, tokens, pairs)),
    }


@functools.cache
def _words(folder: Path) -> Path:
    return tiny.build(folder)


def _data(case: Case, inputs: Inputs, folder: Path) -> tuple[Path, dict[str, str]]:
    """Return the data file of a case and the keys of its rows."""
    if not case.tokenizer:
        return _words(folder / "words") / "train.jsonl", {}
    if not inputs.data.exists():
        raise ValueError(f"--data={inputs.data} does not exist: JSON lines of question and answer")
    return inputs.data, {"prompt_key": "question", "response_key": "answer"}


def _model(case: Case, inputs: Inputs, folder: Path) -> tuple[Path, str]:
    """Return the model folder and the origin of its weights."""
    if case.pretrained and inputs.model:
        if not (inputs.model / "config.json").exists():
            raise ValueError(f"--model={inputs.model} is no model folder")
        return inputs.model, "pretrained weights"
    model = folder / "model"
    made = model / "config.json"
    if made.exists() and json.loads(made.read_text()) == case.config:
        return model, "random weights"
    shutil.rmtree(model, ignore_errors=True)
    model.mkdir()
    if case.tokenizer:
        tokenizer = inputs.tokenizers / case.tokenizer
        if not (tokenizer / "tokenizer.json").exists():
            raise ValueError(f"--tokenizers: {tokenizer} has no tokenizer.json")
        for file in TOKENIZER_FILES:
            if (tokenizer / file).exists():
                shutil.copy(tokenizer / file, model / file)
    else:
        tiny.write_tokenizer(model)
    dtype = {"float32": "F32", "bfloat16": "BF16"}[case.dtype]
    tiny.write_model(model, dict(case.config), dtype=dtype)
    return model, "random weights"


def _write(file: Path, examples: Examples, ids: list[int]) -> None:
    """Write examples as JSON lines {"ids", "mask"}."""
    with file.open("w") as stream:
        for id_ in ids:
            example = examples.encoded(id_)
            mask = (example.weights > 0).astype(int).tolist()
            stream.write(json.dumps({"ids": example.ids.tolist(), "mask": mask}) + "\n")
