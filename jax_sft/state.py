"""The train state: step, parameters and moments, how each is sharded, and their update."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_sft import parallel
from jax_sft.models.spec import Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes: arrays, or their shapes or shardings in the same places.

    Attributes:
        step: int32 scalar, optimizer steps done. It is also the position in the data.
        params: {our path: master weight}.
        opt_state: optax's state over `params`.
    """

    step: Any
    params: dict[str, Any]
    opt_state: Any


def param_shardings(rows: Iterable[Weight], mesh: Mesh) -> dict[str, NamedSharding]:
    """Return {our path: sharding}, by the logical axes of each row."""
    return {row.path: parallel.sharding(mesh, *row.axes) for row in rows}


def shardings(
    tx: optax.GradientTransformation, params: Mapping[str, Any], rows: Iterable[Weight], mesh: Mesh
) -> TrainState:
    """Return a TrainState of shardings: moments like their parameters, scalars replicated.

    Args:
        params: arrays or ShapeDtypeStructs.
    """
    of_params = param_shardings(rows, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    of_moments = optax.tree_utils.tree_map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, params),
        of_params,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(step=replicated, params=of_params, opt_state=of_moments)


def create(
    tx: optax.GradientTransformation, params: dict[str, jax.Array], rows: Iterable[Weight], mesh
) -> TrainState:
    """Return the state at step 0, its moments born sharded."""
    to = shardings(tx, params, rows, mesh)
    opt_state = jax.jit(tx.init, out_shardings=to.opt_state)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), to.step)
    return TrainState(step=step, params=params, opt_state=opt_state)


def abstract(
    tx: optax.GradientTransformation, rows: Iterable[Weight], dims: dict[str, int], dtype, mesh
) -> TrainState:
    """Return a TrainState of ShapeDtypeStructs with shardings, to restore or compile into."""
    rows = list(rows)
    params = {row.path: jax.ShapeDtypeStruct(row.shape(dims), dtype) for row in rows}
    shapes = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=params,
        opt_state=jax.eval_shape(tx.init, params),
    )
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        shardings(tx, params, rows, mesh),
    )


def update(
    tx: optax.GradientTransformation,
    old: TrainState,
    grads: Mapping[str, jax.Array],
    loss: jax.Array,
    to: TrainState,
) -> tuple[TrainState, jax.Array, jax.Array]:
    """Return (state after one optimizer step, norm of the gradient before clipping, skipped).

    Where the loss or the norm is not finite, the step counts but changes nothing else: parameters
    and moments stay, bit for bit, and skipped is True.

    Called inside jit, `old` donated. Arithmetic is float32, whatever is stored.

    On GPUs XLA compiles it to two kernels per parameter, one for the norm and one, in place, for
    the rest: nothing is copied, where a loop over layers would copy a layer. This needs gradients
    in the memory layout of their parameters. A reduce-scatter leaves another unless it is over the
    first dimension of a layer, and XLA may then copy the gradient whole, before a loop as well.

    Args:
        grads: {our path: gradient of the mean loss}.
        loss: scalar, looked at only for whether it is finite.
        to: the result of `shardings`: gradients, parameters and moments are pinned to it.
    """
    grads = jax.lax.with_sharding_constraint(dict(grads), to.params)
    grads = {path: grad.astype(jnp.float32) for path, grad in grads.items()}
    changes, opt_state = tx.update(grads, old.opt_state, old.params)
    params: Any = optax.apply_updates(old.params, changes)
    norm = optax.tree.norm(grads)
    is_good = jnp.isfinite(loss) & jnp.isfinite(norm)

    def chosen(new, before):
        # The learning rate follows the step, also past a step that was not applied.
        is_schedule = isinstance(new, optax.ScaleByScheduleState)
        return new if is_schedule else jnp.where(is_good, new, before)

    params, opt_state = jax.tree.map(
        chosen,
        (params, opt_state),
        (old.params, old.opt_state),
        is_leaf=lambda part: isinstance(part, optax.ScaleByScheduleState),
    )
    new = TrainState(step=old.step + 1, params=params, opt_state=opt_state)
    return jax.lax.with_sharding_constraint(new, to), norm, ~is_good
