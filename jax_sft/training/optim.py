"""The optimizer and its learning-rate schedule, from the config."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jax_sft.weights.param_spec import ParamSpec


def warmup_steps(optimizer, num_steps: int) -> int:
    """Return the number of warm-up steps; `optimizer.warmup` below 1 is a share of `num_steps`.

    It may exceed `num_steps`: the ramp keeps the configured slope, as in transformers.
    """
    warmup = optimizer.warmup
    return round(warmup * num_steps if warmup < 1 else warmup)


def warnings(optimizer, num_steps: int) -> list[str]:
    """Return warnings about parts of the schedule that a run of `num_steps` steps never reaches."""
    warmup, decay_steps = warmup_steps(optimizer, num_steps), optimizer.decay_fraction * num_steps
    if warmup >= num_steps:
        highest = optimizer.learning_rate * num_steps / (warmup + 1)
        return [
            f"optimizer.warmup = {optimizer.warmup:g} lasts {warmup:,} steps, the run "
            f"{num_steps:,}: the learning rate reaches {highest:.2e} at its last step, never "
            f"optimizer.learning_rate = {optimizer.learning_rate:g}. Use a shorter warm-up, or "
            "more steps"
        ]
    if optimizer.schedule == "wsd" and warmup + decay_steps > num_steps:
        return [
            f"optimizer.warmup = {optimizer.warmup:g} and optimizer.decay_fraction = "
            f"{optimizer.decay_fraction:g} overlap in a run of {num_steps:,} steps: the learning "
            f"rate never reaches optimizer.learning_rate = {optimizer.learning_rate:g}"
        ]
    return []


def schedule(optimizer, num_steps: int) -> Callable[[Any], jax.Array]:
    """Return the learning rate as a function of the step (0 = first).

    Warm-up rises linearly and never starts at zero: (step + 1) / (warmup + 1) of the peak. After
    it "cosine" and "linear" fall to final_ratio of the peak at `num_steps`, and "constant" stays at
    the peak. "wsd" (Hu et al. 2024, arXiv:2404.06395) stays at the peak and falls linearly to
    final_ratio over the last decay_fraction of all steps.
    """
    # As a float, because a Python int may be too large for JAX to convert.
    warmup = float(warmup_steps(optimizer, num_steps))
    floor = optimizer.final_ratio

    def factor(step: jax.Array) -> jax.Array:
        rise = (step + 1) / (warmup + 1)
        done = jnp.clip((step - warmup) / max(num_steps - warmup, 1), 0.0, 1.0)
        decay_steps = max(optimizer.decay_fraction * num_steps, 1.0)
        decaying = jnp.clip((step - (num_steps - decay_steps)) / decay_steps, 0.0, 1.0)
        fall = {
            "cosine": floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * done)),
            "linear": 1 - (1 - floor) * done,
            "constant": jnp.ones_like(done),
            "wsd": 1 - (1 - floor) * decaying,
        }[optimizer.schedule]
        return jnp.where(step < warmup, rise, fall)

    return lambda step: optimizer.learning_rate * factor(jnp.asarray(step, jnp.float32))


def make(optimizer, num_steps: int, specs: Iterable[ParamSpec]) -> optax.GradientTransformation:
    """Return AdamW (Loshchilov & Hutter 2019) behind global-norm clipping.

    Weight decay acts on matrices, including embeddings, and never on norms and biases. Moments are
    stored in `optimizer.moments_dtype`, independent of the dtype of the parameters.
    """
    decayed = {spec.path: spec.is_matrix for spec in specs}
    clip = optax.clip_by_global_norm(optimizer.clip_norm) if optimizer.clip_norm else None
    adamw = optax.adamw(
        schedule(optimizer, num_steps),
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        mask=decayed,
    )
    tx = optax.chain(clip, adamw) if clip else adamw
    return store_moments(tx, jnp.dtype(optimizer.moments_dtype))


def store_moments(tx: optax.GradientTransformation, dtype) -> optax.GradientTransformation:
    """Wrap `tx` to compute with float32 moments and store them in `dtype` between steps."""

    def cast(state, to):
        return optax.tree_utils.tree_map_params(tx, lambda moment: moment.astype(to), state)

    def init(params):
        return cast(tx.init(params), dtype)

    def update(updates, state, params=None):
        updates, state = tx.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)
