"""The compiled step: packed batch in, new state out.

The loss is a pair (sum of weighted cross-entropy, sum of weights). Gradients of the sum are added
over micro-batches and divided once by the global sum of weights, so accumulation, packing and mesh
shape change only the rounding.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jax_sft.batch import Batch, fields
from jax_sft.nn.experts import balance_loss
from jax_sft.nn.model_def import ModelDef
from jax_sft.ops.cross_entropy import cross_entropy
from jax_sft.sharding import collectives, rules
from jax_sft.training import optim, state
from jax_sft.training.state import TrainState
from jax_sft.weights import placement

ROUTER_AUX = "router_aux"  # key of `objective` in this file
BY_SOURCE = ("loss_by_source", "weight_by_source")
Sums = dict[str, jax.Array]  # float32 over the whole batch; scalars except *_by_source


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scalars:
    """The numbers of a run that are arguments of its train step, so that a sweep compiles once.

    Attributes:
        optimizer: numbers of the optimizer.
        router_aux: float32 weight of the balance loss of experts.
        dropout_key: key data, uint32 [2]. Together with the step it decides what is dropped. None
            without dropout.
    """

    optimizer: optim.Hyperparams
    router_aux: Any = np.float32(0)
    dropout_key: Any = None

    def on(self, mesh: Mesh) -> "Scalars":
        """Return the numbers on all devices of a mesh."""
        everywhere = rules.sharding(mesh)
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, everywhere, lambda _: x), self
        )


TrainStep = Callable[[TrainState, Batch, Scalars], tuple[TrainState, Sums]]


def batch_sums(
    model_def: ModelDef,
    weights: dict[str, jax.Array],
    micro: Batch,
    num_sources: int = 0,
    objective: Mapping[str, float] | None = None,
    dropout_key: jax.Array | None = None,
) -> Sums:
    """Return the sums over one micro-batch of arrays [rows, tokens].

    The keys are loss, weight, correct (all weighted), tokens (without padding) and pairs (query-key
    pairs that causal attention within segments computes). With `num_sources`, which needs "sources"
    in the batch, also loss_by_source and weight_by_source [num_sources]. With `objective` and a
    model with experts, also router_loss: the balance loss of the experts over all tokens of the
    micro-batch, times the weight.

    Args:
        objective: terms trained in addition to the cross-entropy: z_loss and label_smoothing of
            `cross_entropy`, router_aux of `value_and_grad`; None = no such terms.
        dropout_key: random key of this micro-batch; None = no dropout.
    """
    micro = {name: collectives.interleave(array) for name, array in micro.items()}
    model = model_def.bind(weights, dropout_key)
    options = {name: value for name, value in (objective or {}).items() if name != ROUTER_AUX}
    balance = None
    if objective and model_def.has_experts:
        hidden_BTD, routing = model_def.routed(model, micro)
        balance = balance_loss(routing)
    else:
        hidden_BTD = model_def.hidden(model, micro)
    loss, weight, correct, *by_source = cross_entropy(
        hidden_BTD,
        model.head_VD,
        micro["targets"],
        micro["weights"],
        micro.get("sources"),
        num_sources,
        num_ids=model_def.cfg.vocab,
        head_trains=model_def.head_trains,
        soft_cap=model_def.cfg.logit_soft_cap,
        **options,
    )
    real = micro["segment_ids"] > 0
    pairs = jnp.where(real, micro["positions"] + 1, 0).astype(jnp.float32).sum()
    tokens = real.astype(jnp.float32).sum()
    sums = dict(loss=loss, weight=weight, correct=correct, tokens=tokens, pairs=pairs)
    if num_sources:
        sums |= dict(zip(BY_SOURCE, by_source, strict=True))
    if balance is not None:
        sums["router_loss"] = balance * weight
    return sums


def value_and_grad(
    model_def: ModelDef,
    params: dict[str, jax.Array],
    batch: Batch,
    num_sources: int = 0,
    objective: Mapping[str, float] | None = None,
    frozen: Mapping[str, jax.Array] | None = None,
    dropout_key: jax.Array | None = None,
) -> tuple[Sums, dict[str, jax.Array]]:
    """Return (sums over the batch, gradient of the mean loss), accumulated over micro-batches.

    Gradients are accumulated and returned in float32.

    Args:
        params: the trainable weights, which get a gradient.
        batch: arrays [micro-batches, rows, tokens].
        frozen: the other weights.
        num_sources, objective: see `batch_sums`. router_aux of `objective` is the weight of
            router_loss. The experts are balanced within each micro-batch.
        dropout_key: random key of this step, from which each micro-batch derives its own.
    """
    axes = {spec.path: spec.axes for spec in model_def.specs}
    num_micros = batch["tokens"].shape[0]
    router_aux = (objective or {}).get(ROUTER_AUX, 0.0)

    def loss(params, micro, key):
        weights = params | dict(frozen or {})
        sums = batch_sums(model_def, weights, micro, num_sources, objective, key)
        del sums["correct"]  # for evaluation only; the compiler drops its computation
        if "router_loss" in sums:
            return sums["loss"] + router_aux * sums["router_loss"], sums
        return sums["loss"], sums

    def gradient(micro, number):
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, number)
        grads, sums = jax.grad(loss, has_aux=True)(params, micro, key)
        return sums, {path: rules.constrain(grads[path], *axes[path]) for path in grads}

    def accumulate(carry, numbered):
        return jax.tree.map(jnp.add, carry, gradient(*numbered)), None

    first = {name: array[0] for name, array in batch.items()}
    if num_micros == 1:  # no accumulator
        sums, grads = gradient(first, 0)
    else:
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, jnp.float32), jax.eval_shape(gradient, first, 0)
        )
        zeros = (zeros[0], {p: rules.constrain(z, *axes[p]) for p, z in zeros[1].items()})
        (sums, grads), _ = jax.lax.scan(accumulate, zeros, (batch, jnp.arange(num_micros)))
    # A batch of only padding has weight 0 and a zero gradient: do not divide 0 by 0.
    count = jnp.where(sums["weight"] > 0, sums["weight"], 1.0)
    return sums, {path: grad.astype(jnp.float32) / count for path, grad in grads.items()}


def make_train_step(
    model_def: ModelDef,
    tx: optax.GradientTransformationExtraArgs,
    state_shardings: TrainState,
    mesh: Mesh,
    num_sources: int = 0,
    objective: Mapping[str, float] | None = None,
    compiler_options: dict[str, Any] | None = None,
) -> TrainStep:
    """Return the jitted `step(state, batch, scalars) -> (state, sums)`; the old state is donated.

    The sums are those of `batch_sums` without `correct`, plus grad_norm (before clipping),
    learning_rate and skipped (1 if loss or gradient was not finite, so that nothing changed). The
    step compiles once per batch shape: once if rows are packed, otherwise once per bucket.

    Args:
        objective: see `batch_sums`; router_aux of `scalars` takes the place of its own.
    """

    def train_step(old: TrainState, batch: Batch, scalars: Scalars) -> tuple[TrainState, Sums]:
        key, terms = None, objective
        if model_def.with_dropout:
            key = jax.random.fold_in(jax.random.wrap_key_data(scalars.dropout_key), old.step)
        if objective is not None:
            terms = {**objective, ROUTER_AUX: scalars.router_aux}
        sums, grads = value_and_grad(
            model_def, old.params, batch, num_sources, terms, old.frozen, key
        )
        new, sums["grad_norm"], skipped = state.update(
            tx,
            scalars.optimizer,
            old,
            grads,
            sums["loss"],
            state_shardings,
            model_def.layer_masks,
        )
        sums["skipped"] = skipped.astype(jnp.float32)
        sums["learning_rate"] = optim.learning_rate(scalars.optimizer, old.step)
        return new, sums

    replicated = state_shardings.step
    batch_sharding = batch_shardings(mesh, per_source=num_sources > 0)
    return jax.jit(
        train_step,
        in_shardings=(state_shardings, batch_sharding, replicated),
        out_shardings=(state_shardings, replicated),
        donate_argnums=0,
        compiler_options=compiler_options,
    )


def make_eval_step(
    model_def: ModelDef, mesh: Mesh, compiler_options: dict[str, Any] | None = None
) -> Callable[[dict[str, jax.Array], Batch, Sums], Sums]:
    """Return the jitted `step(params, batch, before) -> sums` of `batch_sums`, without gradients.

    It starts when `before` is ready, which is the sums of the previous batch or `no_sums()`.
    Otherwise CPUs would run several batches concurrently, and gloo would mix up their messages.
    """

    def eval_step(params, batch, before):
        del before

        def add(carry, micro):
            return jax.tree.map(jnp.add, carry, batch_sums(model_def, params, micro)), None

        return jax.lax.scan(add, jax.tree.map(jnp.asarray, no_sums()), batch)[0]

    param_shardings = placement.shardings(model_def.stored_specs, mesh)
    return jax.jit(
        eval_step,
        in_shardings=(param_shardings, batch_shardings(mesh), rules.sharding(mesh)),
        keep_unused=True,
        compiler_options=compiler_options,
    )


def no_sums() -> dict[str, np.float32]:
    """Return the sums of an evaluation before its first batch: zeros."""
    return dict.fromkeys(("loss", "weight", "correct", "tokens", "pairs"), np.float32(0))


def batch_shardings(mesh: Mesh, per_source: bool = False) -> dict[str, jax.sharding.NamedSharding]:
    """Return the sharding of each array of a batch."""
    token_sharding = rules.sharding(mesh, "micro_batch", "batch", "token")
    return dict.fromkeys(fields(per_source), token_sharding)
