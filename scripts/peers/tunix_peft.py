"""Run full fine-tuning with Tunix's PeftTrainer, in two variants.

"padded" is the path that Tunix supports: one example per row, padded to seq_len, with Tunix's own
positions and mask. "packed" is packed manually, as Tunix has no option for it: the rows of all
subjects with positions and a mask of our own, in Tunix's own loss and loop.
"""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# pyright: reportMissingImports=false
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import model as llama_model
from tunix.models.llama3 import params as llama_params
from tunix.models.qwen2 import model as qwen_model
from tunix.models.qwen2 import params as qwen_params
from tunix.sft import hooks, peft_trainer, utils

from scripts.peers import contract

Arrays = dict[str, np.ndarray]


def main() -> None:
    spec = contract.read()
    packed = spec.variant == "packed"
    model = load(spec)
    clock = contract.Clock(spec)
    timer = Timer(clock)
    trainer = peft_trainer.PeftTrainer(
        model,
        make_optimizer(spec.optimizer),
        peft_trainer.TrainingConfig(eval_every_n_steps=10**9, max_steps=spec.steps),
    )
    trainer.with_gen_model_input_fn(packed_inputs if packed else padded_inputs)
    trainer.with_training_hooks(timer)
    batches = list(packed_batches(spec) if packed else padded_batches(spec))

    trainer.train(noting_the_first(batches, model, clock))
    peak = peak_bytes()
    if packed:
        tokens, trained = contract.counts(spec)
    else:
        timed = batches[spec.warmup :]
        tokens = [int(batch["input_mask"].sum()) for batch in timed]
        trained = [int(batch["trained"][:, 1:].sum()) for batch in timed]
    after = held_out_loss(spec, model)
    del trainer, model
    before = held_out_loss(spec, load(spec)) if spec.held_out else None
    contract.report(
        how="PeftTrainer, "
        + (
            "packed by hand, mask of blocks"
            if packed
            else f"one example per row, padded to {spec.seq_len}"
        )
        + ", dense attention, one-hot loss"
        + ("; its Llama's rope_theta mended by us" if has_mended_rotation() else ""),
        packages=["google-tunix", "jax", "flax", "optax"],
        step_s=clock.timed,
        losses=timer.losses,
        tokens=tokens,
        trained=trained,
        first_step_s=clock.first_step_s,
        peak_bytes=peak,
        held_out_before=before,
        held_out_after=after,
    )


def noting_the_first(
    batches: list[Arrays], model: nnx.Module, clock: contract.Clock
) -> Iterator[Arrays]:
    """Yield the batches; wait for the first step in between, as Tunix's hooks run a step late."""
    for number, batch in enumerate(batches):
        if number == 1:
            jax.block_until_ready(nnx.state(model))
            clock.first()
        yield batch


class Timer(hooks.TrainingHooks):
    """Record when steps end; by then Tunix has waited for the loss."""

    def __init__(self, clock: contract.Clock):
        self._clock = clock
        self.losses: list[float] = []

    def on_train_step_end(self, train_ctx, train_step, train_loss):
        self._clock.step()
        self.losses.append(float(train_loss))

    def on_train_start(self, train_ctx):
        """Do nothing."""

    def on_train_end(self, train_ctx):
        """Do nothing."""

    def on_train_step_start(self, train_ctx):
        """Do nothing."""

    def on_eval_step_start(self, train_ctx):
        """Do nothing."""

    def on_eval_step_end(self, train_ctx, eval_loss):
        """Do nothing."""


def load(spec: contract.Spec) -> nnx.Module:
    """Return Tunix's own model with the weights of the folder, float32 masters.

    Raises:
        ValueError: neither Qwen2 nor a float32 Llama without rope_scaling.
    """
    raw = json.loads((Path(spec.model) / "config.json").read_text())
    heads = raw["num_attention_heads"]
    fields: dict[str, Any] = dict(
        num_layers=raw["num_hidden_layers"],
        vocab_size=raw["vocab_size"],
        embed_dim=raw["hidden_size"],
        hidden_dim=raw["intermediate_size"],
        num_heads=heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        num_kv_heads=raw["num_key_value_heads"],
        rope_theta=int(raw.get("rope_theta") or raw["rope_parameters"]["rope_theta"]),
        norm_eps=raw["rms_norm_eps"],
    )
    kind, tied = raw["model_type"], raw["tie_word_embeddings"]
    if kind == "qwen2":
        fields |= {"use_tied_embedding": tied, "dtype": jnp.dtype(spec.dtype)}
        cfg, params = qwen_model.ModelConfig(**fields), qwen_params
    elif kind == "llama" and spec.dtype == "float32" and not raw.get("rope_scaling"):
        cfg, params = llama_model.ModelConfig(**fields, weight_tying=tied), llama_params
        # Tunix 0.1.7 never passes rope_theta to its Llama's rotation, which uses 1,000,000. For
        # SmolLM2, with 100,000, its loss before training is 1.587 instead of 1.487. The fix does
        # not change the amount of work.
        if not has_mended_rotation():
            theta = {"rope_theta": cfg.rope_theta}
            llama_model.apply_rope = functools.partial(llama_model.apply_rope, **theta)
    else:
        raise ValueError(f"Tunix has no {kind} in {spec.dtype} that computes the same")
    return params.create_model_from_safe_tensors(spec.model, cfg, dtype=jnp.float32)


def has_mended_rotation() -> bool:
    """Return whether `load` has set the right rope_theta."""
    return isinstance(llama_model.apply_rope, functools.partial)


def make_optimizer(numbers: dict[str, float]) -> optax.GradientTransformation:
    """Return gradient clipping followed by AdamW, with weight decay on matrices."""
    return optax.chain(
        optax.clip_by_global_norm(numbers["clip_norm"]),
        optax.adamw(
            numbers["learning_rate"],
            b1=numbers["b1"],
            b2=numbers["b2"],
            eps=numbers["eps"],
            weight_decay=numbers["weight_decay"],
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )


def packed_batches(spec: contract.Spec) -> Iterator[Arrays]:
    """Yield packed rows [rows, seq_len], cut where appended targets do not fit."""
    for batch in spec.batches():
        shape = batch["tokens"].shape
        names = ("tokens", "trained", "segment_ids", "positions")
        made = {name: np.zeros(shape, np.int32) for name in names}
        for row in range(shape[0]):
            row_arrays = {name: array[row] for name, array in batch.items()}
            start = 0
            for number, (ids, labels) in enumerate(contract.segments(row_arrays), start=1):
                stop = min(start + len(ids), shape[1])
                place, length = (row, slice(start, stop)), stop - start
                made["tokens"][place] = ids[:length]
                made["trained"][place] = np.array(labels[:length]) != contract.IGNORED
                made["segment_ids"][place] = number
                made["positions"][place] = np.arange(length)
                start = stop
        yield made


def packed_inputs(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the arguments of Tunix's loss for packed rows; traced."""
    segments = batch["segment_ids"]
    causal = jnp.tril(jnp.ones((segments.shape[1],) * 2, bool))
    return {
        "input_tokens": batch["tokens"],
        "input_mask": batch["trained"],
        "positions": batch["positions"],
        "attention_mask": causal[None] & (segments[:, :, None] == segments[:, None, :]),
    }


def padded_batches(spec: contract.Spec) -> Iterator[Arrays]:
    """Yield one example per row, padded to [rows, seq_len]."""
    examples = contract.read_examples(spec.examples)
    rows = len(next(spec.batches())["tokens"])
    for step in range(spec.steps):
        made = {
            name: np.zeros((rows, spec.seq_len), np.int32)
            for name in ("tokens", "trained", "input_mask")
        }
        for row in range(rows):
            ids, mask = examples[(step * rows + row) % len(examples)]
            made["tokens"][row, : len(ids)] = ids
            made["trained"][row, : len(ids)] = mask
            made["input_mask"][row, : len(ids)] = 1
        yield made


def padded_inputs(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the arguments of Tunix's loss for padded rows, from the functions its examples use."""
    real = batch["input_mask"] > 0
    return {
        "input_tokens": batch["tokens"],
        "input_mask": batch["trained"],
        "positions": utils.build_positions_from_mask(real),
        "attention_mask": utils.make_causal_attn_mask(real),
    }


def held_out_loss(spec: contract.Spec, model: nnx.Module) -> float | None:
    """Return the mean loss of the held-out examples, each padded to one length to compile once."""
    if not spec.held_out:
        return None
    longest = max(len(ids) for ids, _ in contract.read_examples(spec.held_out))
    length = -(-longest // 64) * 64

    @nnx.jit
    def summed(model, tokens, trained):
        positions = jnp.arange(length)[None]
        mask = jnp.tril(jnp.ones((1, length, length), bool))
        logits, _ = model(tokens, positions, None, mask)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return jnp.sum(losses * trained[:, 1:])

    def nll(ids, mask) -> float:
        arrays = np.zeros((2, 1, length), np.int32)
        arrays[0, 0, : len(ids)], arrays[1, 0, : len(ids)] = ids, mask
        return float(summed(model, *arrays))

    return contract.mean_loss(spec, nll)


def peak_bytes() -> int:
    """Return the peak memory so far, of the GPU's allocator or of the process."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else contract.peak_rss_bytes()


if __name__ == "__main__":
    main()
