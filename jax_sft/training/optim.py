"""The optimizer and its learning-rate schedule.

`hyperparams` turns the config's numbers into arguments of the compiled step: no number of
`optimizer` is part of the program, so a sweep over any of them compiles once.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_sft.settings import Optimizer
from jax_sft.weights.param_spec import ParamSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hyperparams:
    """The numbers of the optimizer: float32 scalars, from `hyperparams`.

    Differences and reciprocals are stored next to some numbers. They are rounded once, from
    float64, as the compiler would round them if the numbers were constants of the program.

    Attributes:
        learning_rate: highest of the schedule.
        warmup: steps of the warm-up.
        warmup_slope: 1 / (warmup + 1).
        decay_start: step at which the learning rate begins to fall.
        decay_slope: 1 / (steps that it falls).
        is_cosine: whether it falls along a cosine (bool), or else linearly.
        final_ratio: last learning rate / highest one.
        final_drop: 1 - final_ratio.
        weight_decay: weight decay of matrices.
        b1, b2: decay per step of the first and the second moment.
        b1_rest, b2_rest: 1 - b1 and 1 - b2.
        eps: added to the root of the second moment.
        clip_norm: highest global norm of the gradient; inf = no clipping.
    """

    learning_rate: Any
    warmup: Any
    warmup_slope: Any
    decay_start: Any
    decay_slope: Any
    is_cosine: Any
    final_ratio: Any
    final_drop: Any
    weight_decay: Any
    b1: Any
    b1_rest: Any
    b2: Any
    b2_rest: Any
    eps: Any
    clip_norm: Any


def warmup_steps(optimizer: Optimizer, num_steps: int) -> int:
    """Return the number of warm-up steps; `optimizer.warmup` below 1 is a share of `num_steps`.

    It may exceed `num_steps`: the ramp keeps the configured slope, as in transformers.
    """
    warmup = optimizer.warmup
    return round(warmup * num_steps if warmup < 1 else warmup)


def warnings(optimizer: Optimizer, num_steps: int) -> list[str]:
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


def hyperparams(optimizer: Optimizer, num_steps: int) -> Hyperparams:
    """Return the numbers of the optimizer for a run of `num_steps` steps, on the host.

    The name of the schedule becomes numbers as well: "constant" falls to its highest rate, and
    "linear" and "wsd" differ only in where they begin to fall.
    """
    warmup = float(warmup_steps(optimizer, num_steps))
    decay_start, decay_steps = warmup, max(num_steps - warmup, 1.0)
    if optimizer.schedule == "wsd":
        decay_steps = max(optimizer.decay_fraction * num_steps, 1.0)
        decay_start = num_steps - decay_steps
    final_ratio = 1.0 if optimizer.schedule == "constant" else optimizer.final_ratio
    one = np.float32(1)
    with np.errstate(over="ignore"):  # a clip_norm of 1e300 is as good as inf
        return Hyperparams(
            learning_rate=np.float32(optimizer.learning_rate),
            warmup=np.float32(warmup),
            warmup_slope=one / np.float32(warmup + 1),
            decay_start=np.float32(decay_start),
            decay_slope=one / np.float32(decay_steps),
            is_cosine=np.bool_(optimizer.schedule == "cosine"),
            final_ratio=np.float32(final_ratio),
            final_drop=np.float32(1 - final_ratio),
            weight_decay=np.float32(optimizer.weight_decay),
            b1=np.float32(optimizer.b1),
            b1_rest=np.float32(1 - optimizer.b1),
            b2=np.float32(optimizer.b2),
            b2_rest=np.float32(1 - optimizer.b2),
            eps=np.float32(optimizer.eps),
            clip_norm=np.float32(optimizer.clip_norm or np.inf),
        )


def learning_rate(numbers: Hyperparams, step: Any) -> jax.Array:
    """Return the learning rate of a step (0 = first).

    Warm-up rises linearly and never starts at zero: (step + 1) / (warmup + 1) of the peak. After
    it "cosine" and "linear" fall to final_ratio of the peak at `num_steps`, and "constant" stays at
    the peak. "wsd" (Hu et al. 2024, arXiv:2404.06395) stays at the peak and falls linearly to
    final_ratio over the last decay_fraction of all steps.
    """
    step = jnp.asarray(step, jnp.float32)
    rise = (step + 1) * numbers.warmup_slope
    done = jnp.clip((step - numbers.decay_start) * numbers.decay_slope, 0.0, 1.0)
    cosine = numbers.final_ratio + numbers.final_drop * 0.5 * (1 + jnp.cos(jnp.pi * done))
    linear = 1 - numbers.final_drop * done
    fall = jnp.where(numbers.is_cosine, cosine, linear)
    return numbers.learning_rate * jnp.where(step < numbers.warmup, rise, fall)


def make(moments_dtype: str, specs: Iterable[ParamSpec]) -> optax.GradientTransformationExtraArgs:
    """Return AdamW (Loshchilov & Hutter 2019) behind global-norm clipping.

    Its update needs the argument `numbers`, which are `Hyperparams`. Weight decay acts on matrices,
    including embeddings, and never on norms and biases.

    Args:
        moments_dtype: dtype in which moments are stored, independent of the dtype of the
            parameters.
    """
    decayed = {spec.path: spec.is_matrix for spec in specs}

    def with_numbers(numbers: Hyperparams) -> optax.GradientTransformation:
        adamw = optax.chain(
            _scale_by_adam(numbers),
            optax.add_decayed_weights(numbers.weight_decay, decayed),
            optax.scale_by_learning_rate(lambda step: learning_rate(numbers, step)),
        )
        tx = optax.chain(_clip_by_global_norm(numbers.clip_norm), adamw)
        return store_moments(tx, jnp.dtype(moments_dtype))

    def update(updates, state, params=None, **extra: Any):
        return with_numbers(extra["numbers"]).update(updates, state, params)

    any_numbers = Hyperparams(*[np.float32(0)] * len(dataclasses.fields(Hyperparams)))
    return optax.GradientTransformationExtraArgs(with_numbers(any_numbers).init, update)


def _clip_by_global_norm(clip_norm) -> optax.GradientTransformation:
    """Return optax's clip_by_global_norm with one product less per element.

    optax multiplies by clip_norm, which the compiler drops if it is the constant 1, the default.
    The division by norm / clip_norm costs the same for every clip_norm, including inf.
    """

    def update(updates, state, params=None):
        del params
        norm = optax.tree.norm(updates)
        is_small, divisor = norm < clip_norm, norm / clip_norm
        return jax.tree.map(lambda g: jax.lax.select(is_small, g, g / divisor), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _scale_by_adam(numbers: Hyperparams) -> optax.GradientTransformation:
    """Return optax's scale_by_adam with b1, b2 and eps as arguments.

    optax computes 1 - b2 from the b2 that it is given. From a float32 argument that is another
    number than from the constant of the config: 1.3e-5 off for b2 = 0.999.
    """

    def update(updates, state, params=None):
        del params
        mu = jax.tree.map(lambda g, m: numbers.b1_rest * g + numbers.b1 * m, updates, state.mu)
        nu = jax.tree.map(lambda g, v: numbers.b2_rest * g**2 + numbers.b2 * v, updates, state.nu)
        count = optax.safe_increment(state.count)
        mean = optax.tree.bias_correction(mu, numbers.b1, count)
        square = optax.tree.bias_correction(nu, numbers.b2, count)
        scaled = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + numbers.eps), mean, square)
        return scaled, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


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
