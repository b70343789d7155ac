"""The train state: step, parameters and moments, how each is sharded, and their update."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_sft.weights import placement
from jax_sft.weights.param_spec import Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes: arrays, or their shapes or shardings in the same places.

    Attributes:
        step: int32 scalar, optimizer steps done. It is also the position in the data.
        params: {our path: master weight} of what trains.
        opt_state: optax's state over `params`.
        frozen: {our path: weight} of what does not; it is not in checkpoints.
    """

    step: Any
    params: dict[str, Any]
    opt_state: Any
    frozen: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def weights(self) -> dict[str, Any]:
        """All weights of the model."""
        return self.params | self.frozen

    def named(self) -> dict[str, Any]:
        """Return what a checkpoint stores: {"params/PATH" or "optimizer/PATH": leaf}.

        The step is stored beside the arrays, frozen weights are not stored.
        """
        leaves = {f"params/{path}": leaf for path, leaf in self.params.items()}
        moments, _ = jax.tree_util.tree_flatten_with_path(self.opt_state)
        for path, leaf in moments:
            leaves[f"optimizer/{jax.tree_util.keystr(path, simple=True, separator='.')}"] = leaf
        return leaves

    def from_named(self, step: int, leaves: Mapping[str, Any]) -> "TrainState":
        """Return a state of this one's structure, without frozen weights.

        Args:
            leaves: under the names, and in the order, of `named`.
        """
        assert [*leaves] == [*self.named()], "not the leaves of this state"
        values = [*leaves.values()]
        return TrainState(
            step=jax.device_put(np.int32(step), self.step.sharding),
            params=dict(zip(self.params, values, strict=False)),
            opt_state=jax.tree.unflatten(
                jax.tree.structure(self.opt_state), values[len(self.params) :]
            ),
        )


def shardings(
    tx: optax.GradientTransformation,
    params: Mapping[str, Any],
    rows: Iterable[Weight],
    mesh: Mesh,
    frozen: Collection[str] = (),
) -> TrainState:
    """Return a TrainState of shardings: moments like their parameters, scalars replicated.

    Args:
        params: arrays or ShapeDtypeStructs of what trains.
        frozen: paths of what does not.
    """
    everything = placement.shardings(rows, mesh)
    of_params = {path: everything[path] for path in params}
    replicated = NamedSharding(mesh, PartitionSpec())
    of_moments = optax.tree_utils.tree_map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, params),
        of_params,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(
        step=replicated,
        params=of_params,
        opt_state=of_moments,
        frozen={path: everything[path] for path in frozen},
    )


def create(
    tx: optax.GradientTransformation,
    weights: dict[str, jax.Array],
    rows: Iterable[Weight],
    mesh,
    frozen: Collection[str] = (),
) -> TrainState:
    """Return the state at step 0, its moments born sharded."""
    params = {path: array for path, array in weights.items() if path not in frozen}
    to = shardings(tx, params, rows, mesh)
    opt_state = jax.jit(tx.init, out_shardings=to.opt_state)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), to.step)
    still = {path: weights[path] for path in frozen}
    return TrainState(step=step, params=params, opt_state=opt_state, frozen=still)


def abstract(
    tx: optax.GradientTransformation,
    rows: Iterable[Weight],
    dims: dict[str, int],
    dtype,
    mesh: Mesh,
    frozen: Mapping[str, Any] | None = None,
) -> TrainState:
    """Return a TrainState of ShapeDtypeStructs with shardings, to restore or compile into.

    Args:
        dtype: of what trains.
        frozen: {our path: dtype} of what does not.
    """
    rows, frozen = list(rows), frozen or {}
    shapes = {
        row.path: jax.ShapeDtypeStruct(row.shape(dims), frozen.get(row.path, dtype)) for row in rows
    }
    params = {path: shape for path, shape in shapes.items() if path not in frozen}
    state = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=params,
        opt_state=jax.eval_shape(tx.init, params),
        frozen={path: shapes[path] for path in frozen},
    )
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        state,
        shardings(tx, params, rows, mesh, frozen),
    )


def update(
    tx: optax.GradientTransformation,
    old: TrainState,
    grads: Mapping[str, jax.Array],
    loss: jax.Array,
    to: TrainState,
    trained: Mapping[str, np.ndarray] | None = None,
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
        trained: {our path: bool array over leading axes} where only some layers train.
    """
    grads = jax.lax.with_sharding_constraint(dict(grads), to.params)
    grads = _of_trained({path: grad.astype(jnp.float32) for path, grad in grads.items()}, trained)
    changes, opt_state = tx.update(grads, old.opt_state, old.params)
    changes = _of_trained(changes, trained)  # weight decay too
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
    new = TrainState(old.step + 1, params, opt_state, old.frozen)
    return jax.lax.with_sharding_constraint(new, to), norm, ~is_good


def _of_trained(arrays, trained: Mapping[str, np.ndarray] | None) -> dict[str, jax.Array]:
    """The arrays, zero in the layers that do not train."""
    found = dict(arrays)
    for path, is_trained in (trained or {}).items():
        mask = is_trained.reshape(*is_trained.shape, *[1] * (found[path].ndim - is_trained.ndim))
        found[path] = jnp.where(mask, found[path], 0)
    return found
