"""Check an export: its files, its logits under transformers, and whether its answers end.

Both models compute in float32, one after the other, with 4 bytes of memory per parameter. The
weights of the checkpoint are first rounded to the dtypes of the export. The logits then differ only
by the order of sums, whatever the dtypes. One answer is generated with transformers' defaults and
the export's own generation config.
"""

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jinja2
import numpy as np

from jax_sft import inference
from jax_sft.checkpoint import pretrained, stop_tokens
from jax_sft.checkpoint.to_hf import Plan
from jax_sft.files import sums
from jax_sft.runtime import exit_codes
from jax_sft.sharding.mesh import single_device_mesh
from jax_sft.weights import hf_reader

EXIT_CHANGED = 1
SHAPE = (2, 48)  # rows and tokens
# Fraction of the largest logit. float32 sums in another order differ by less than 1e-5 of it.
TOLERANCE = 1e-4
# The same for merged adapters: the sum of adapter and weight is rounded, not only the weight.
MERGED_TOLERANCE = 0.05
PROMPT = "Name a color."
MOST_NEW_TOKENS = 64  # tokens of the answer; a minute for a model of 7B parameters
# Errors of transformers for a folder without a tokenizer, or a template that refuses the prompt.
NOT_GENERATED = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError),
    jinja2.TemplateError,
)


@dataclasses.dataclass(frozen=True)
class Answer:
    """One generated answer.

    Attributes:
        text: text with its special tokens.
        new_ids: the generated tokens.
        stop_ids: tokens at which transformers' `generate` stops for this export.
        runs_on: tokens that end trained turns but do not stop `generate`; "" = none.
        problem: why there is no answer; "" = there is an answer.
    """

    text: str = ""
    new_ids: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    runs_on: str = ""
    problem: str = ""

    @property
    def line(self) -> str:
        """Describe whether the answer ended."""
        if self.runs_on:
            return (
                f"answers DO NOT END: generation continues after {self.runs_on}, which the trained "
                f"turns end with: {self.text!r}"
            )
        if self.problem:
            return f"WARNING no sample answer was generated: {self.problem}"
        if self.new_ids and self.new_ids[-1] in self.stop_ids:
            return f"a sample answer ends after {len(self.new_ids)} tokens: {self.text!r}"
        if not self.stop_ids:
            return f"WARNING the export names no stop token, generation never ends: {self.text!r}"
        return (
            f"WARNING the stop tokens are right, but a sample answer did not end within "
            f"{len(self.new_ids)} tokens: the model may be trained too little: {self.text!r}"
        )


def check_files(folder: Path) -> int:
    """Compare a folder with its SHA256SUMS, print the differences and return the exit code.

    Raises:
        ValueError: the folder has no SHA256SUMS.
        OSError: a file cannot be read.
    """
    if not (folder / sums.NAME).exists():
        raise ValueError(
            f"{folder} has no {sums.NAME}: it was not written by `export` or `convert`"
        )
    if not (listed := sums.read(folder)):
        print(f"{folder / sums.NAME} is damaged, or another program wrote it")
        return EXIT_CHANGED
    problems = sums.check(folder, listed, "checking files")
    for problem in problems:
        print(problem)
    size = sum(nbytes for nbytes, _ in listed.files.values()) / 1e9
    contents = f"{listed.kind} of step {listed.about.get('step')}, {len(listed.files)} files"
    verdict = f"{len(problems)} DIFFER" if problems else "as they were written"
    print(f"{folder}: {contents}, {size:.3f} GB: {verdict}")
    return EXIT_CHANGED if problems else exit_codes.DONE


def missing(planned: Plan) -> str:
    """Return why the logits cannot be compared; "" = they can."""
    if planned.is_adapter:
        return "--verify compares whole models: add --merge"
    if importlib.util.find_spec("torch"):
        return ""
    return "--verify needs PyTorch to run transformers' model: pip install torch"


def compare(planned: Plan, out: Path) -> tuple[float, float, Answer]:
    """Return (largest difference of two logits, largest allowed difference, generated answer)."""
    vocab = planned.axis_sizes["vocab"]
    tokens = np.random.default_rng(0).integers(0, vocab, SHAPE)
    logits = our_logits(planned, tokens)
    hf_logits, answer = their_logits(out, tokens, planned.turn_ends or {})
    difference = float(np.max(np.abs(logits - hf_logits)))
    is_rounded = any(
        np.dtype(hf_reader.DTYPES[dtype]).itemsize < 4 for dtype in planned.dtypes.values()
    )
    tolerance = MERGED_TOLERANCE if planned.settings and is_rounded else TOLERANCE
    return difference, tolerance * float(np.max(np.abs(logits))), answer


def our_logits(planned: Plan, tokens: np.ndarray) -> np.ndarray:
    """Return the logits of the checkpoint's parameters, float32 [B, T, V]."""
    model_def, mesh = planned.model_def, single_device_mesh()
    params = {path: jnp.asarray(planned.read(path), jnp.float32) for path in planned.arrays}
    if planned.weights:
        rest = [spec.path for spec in planned.specs if spec.path not in params]
        params |= pretrained.read(planned.weights, model_def, rest, mesh, jnp.float32, False)
    for spec in planned.specs:
        for index, name in spec.hf_tensors(planned.axis_sizes):
            dtype = hf_reader.DTYPES[planned.dtypes[name]]
            if np.dtype(dtype).itemsize < 4 and spec.path in params:
                array = params[spec.path]
                rounded = array[index].astype(dtype).astype(jnp.float32)
                params[spec.path] = array.at[index].set(rounded)
    return np.asarray(inference.LoadedModel(model_def, params, mesh).logits(tokens))


def their_logits(
    folder: Path, tokens: np.ndarray, turn_ends: Mapping[int, int]
) -> tuple[np.ndarray, Answer]:
    """Return the logits of transformers' model of a folder, float32 [B, T, V], and an answer."""
    # PyTorch is not a dependency of the project; only this check needs it.
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)).logits.numpy()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        return logits, generated(model, tokenizer, turn_ends)
    except NOT_GENERATED as error:
        return logits, Answer(problem=f"{type(error).__name__}: {error}")


def generated(model: Any, tokenizer: Any, turn_ends: Mapping[int, int]) -> Answer:
    """Return a greedy answer to PROMPT by transformers' `generate`.

    Args:
        turn_ends: tokens that end the trained turns, see `stop_tokens`.

    Raises:
        ValueError: the tokenizer has more tokens than the model.
    """
    import torch

    if tokenizer.chat_template:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
    else:
        prompt = tokenizer(PROMPT)["input_ids"]
    eos = model.generation_config.eos_token_id
    stops = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if max(prompt) >= model.config.vocab_size:
        raise ValueError("the tokenizer has more tokens than the model")
    ids = torch.tensor([prompt])
    new_ids = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=MOST_NEW_TOKENS,
        pad_token_id=0,  # not used, as a batch of one prompt has no padding
    )[0, len(prompt) :].tolist()
    missed = [end for end in turn_ends if end not in stops or end in new_ids[:-1]]
    names = dict(zip(missed, tokenizer.convert_ids_to_tokens(missed), strict=True))
    runs_on = stop_tokens.shown(missed, names, {}) if missed else ""
    return Answer(tokenizer.decode(new_ids), tuple(new_ids), tuple(stops), runs_on)
