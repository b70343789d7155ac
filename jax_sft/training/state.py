"""The train state: step, parameters and moments, their shardings and their update."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_sft.training.optim import Hyperparams
from jax_sft.weights import placement
from jax_sft.weights.param_spec import ParamSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes: arrays, or their shapes or shardings in the same structure.

    Attributes:
        step: int32 scalar, number of optimizer steps done. It is also the position in the data.
        params: {parameter path: master weight} of the trainable weights.
        opt_state: optax's state over `params`.
        frozen: {parameter path: weight} of the frozen weights, which are not in checkpoints.
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
        """Return the arrays that a checkpoint stores: {"params/PATH" or "optimizer/PATH": leaf}.

        The step is stored next to the arrays. Frozen weights are not stored.
        """
        leaves = {f"params/{path}": leaf for path, leaf in self.params.items()}
        moments, _ = jax.tree_util.tree_flatten_with_path(self.opt_state)
        for path, leaf in moments:
            leaves[f"optimizer/{jax.tree_util.keystr(path, simple=True, separator='.')}"] = leaf
        return leaves

    def from_named(self, step: int, leaves: Mapping[str, Any]) -> "TrainState":
        """Return a state with the structure of this state, without frozen weights.

        Args:
            leaves: leaves with the names and in the order of `named`.
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
    specs: Iterable[ParamSpec],
    mesh: Mesh,
    frozen: Collection[str] = (),
) -> TrainState:
    """Return a TrainState of shardings: moments like their parameters, scalars replicated.

    Args:
        params: arrays or ShapeDtypeStructs of the trainable weights.
        frozen: paths of the frozen weights.
    """
    all_shardings = placement.shardings(specs, mesh)
    param_shardings = {path: all_shardings[path] for path in params}
    replicated = NamedSharding(mesh, PartitionSpec())
    opt_shardings = optax.tree_utils.tree_map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, params),
        param_shardings,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(
        step=replicated,
        params=param_shardings,
        opt_state=opt_shardings,
        frozen={path: all_shardings[path] for path in frozen},
    )


def create(
    tx: optax.GradientTransformation,
    weights: dict[str, jax.Array],
    specs: Iterable[ParamSpec],
    mesh,
    frozen: Collection[str] = (),
) -> TrainState:
    """Return the state at step 0, with moments that are sharded from the start."""
    params = {path: array for path, array in weights.items() if path not in frozen}
    to = shardings(tx, params, specs, mesh)
    opt_state = jax.jit(tx.init, out_shardings=to.opt_state)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), to.step)
    frozen_weights = {path: weights[path] for path in frozen}
    return TrainState(step=step, params=params, opt_state=opt_state, frozen=frozen_weights)


def abstract(
    tx: optax.GradientTransformation,
    specs: Iterable[ParamSpec],
    axis_sizes: dict[str, int],
    dtype,
    mesh: Mesh,
    frozen: Mapping[str, Any] | None = None,
) -> TrainState:
    """Return a TrainState of ShapeDtypeStructs with shardings, to restore or compile into.

    Args:
        dtype: dtype of the trainable weights.
        frozen: {parameter path: dtype} of the frozen weights.
    """
    specs, frozen = list(specs), frozen or {}
    shapes = {
        spec.path: jax.ShapeDtypeStruct(spec.shape(axis_sizes), frozen.get(spec.path, dtype))
        for spec in specs
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
        shardings(tx, params, specs, mesh, frozen),
    )


def update(
    tx: optax.GradientTransformationExtraArgs,
    numbers: Hyperparams,
    old: TrainState,
    grads: Mapping[str, jax.Array],
    loss: jax.Array,
    to: TrainState,
    trained: Mapping[str, np.ndarray] | None = None,
) -> tuple[TrainState, jax.Array, jax.Array]:
    """Return (state after one optimizer step, norm of the gradient before clipping, skipped).

    If the loss or the norm is not finite, the step counts but changes nothing else: parameters and
    moments stay the same bit for bit, and skipped is True.

    Called inside jit, with `old` donated. Arithmetic is float32, independent of the stored dtypes.

    On GPUs XLA compiles the update to two kernels per parameter, one for the norm and one, in
    place, for the rest. Nothing is copied, whereas a loop over layers would copy a layer. This
    needs gradients in the memory layout of their parameters. A reduce-scatter leaves another layout
    unless it is over the first dimension of a layer. XLA may then copy the whole gradient, which
    can also happen before a loop.

    Args:
        tx, numbers: from `optim.make` and `optim.hyperparams`.
        grads: {parameter path: gradient of the mean loss}.
        loss: scalar, only tested for being finite.
        to: result of `shardings`; gradients, parameters and moments are constrained to it.
        trained: {parameter path: bool array over leading dims} of parameters of which only some
            layers train.
    """
    grads = jax.lax.with_sharding_constraint(dict(grads), to.params)
    grads = _zero_frozen({path: grad.astype(jnp.float32) for path, grad in grads.items()}, trained)
    changes, opt_state = tx.update(grads, old.opt_state, old.params, numbers=numbers)
    changes = _zero_frozen(changes, trained)  # again, because weight decay changes frozen layers
    params: Any = optax.apply_updates(old.params, changes)
    norm = optax.tree.norm(grads)
    is_good = jnp.isfinite(loss) & jnp.isfinite(norm)

    def chosen(new, before):
        # The learning rate follows the step, even after a step that was not applied.
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


def _zero_frozen(arrays, trained: Mapping[str, np.ndarray] | None) -> dict[str, jax.Array]:
    """Return the arrays with zeros in the frozen layers."""
    masked = dict(arrays)
    for path, is_trained in (trained or {}).items():
        mask = is_trained.reshape(*is_trained.shape, *[1] * (masked[path].ndim - is_trained.ndim))
        masked[path] = jnp.where(mask, masked[path], 0)
    return masked
