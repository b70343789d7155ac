"""Settings of a model's computation for all families: dtypes, attention, rematerialization.

`ModelDef` creates the Compute; model families pass it on to the modules of `layers`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_sft.nn.remat_names import KEPT, NAMES
from jax_sft.sharding import collectives, rules
from jax_sft.weights import tree

_WEIGHT = "weight"  # checkpoint name of a gathered weight, which is never kept


def _all_but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    """Return whether to keep the result of an operation: the policy "none" of `jax.checkpoint`.

    JAX's name policies do not look inside a custom derivative, so `gather` is recognized by its
    contents. The result of a sharding constraint can be recomputed from its operand.
    """
    inside = params["call_jaxpr"].eqns if primitive.name == "custom_vjp_call" else ()
    is_weight = any(
        eqn_params.get("name") == _WEIGHT for eqn_params in (params, *(e.params for e in inside))
    )
    return not is_weight and primitive.name != "sharding_constraint"


# model.remat: the values of a layer that are kept for the backward pass instead of recomputed.
REMAT: dict[str, Callable[..., Any]] = {"none": _all_but_gathered}


def policy(remat: str, offload: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Return the `jax.checkpoint` policy for these settings.

    Args:
        remat: "none" (keep all but gathered weights), "dots" (keep matrix products), "attn" (keep
            attention), "full" (keep nothing but each layer's input), or NAMES joined by commas.
        offload: NAMES that are kept in pinned host memory instead of the device's.

    Raises:
        ValueError: a name is unknown, or `offload` is used with a policy that has no names.
    """
    if remat in REMAT:
        if offload:
            raise ValueError(
                f"model.offload = {list(offload)} cannot be combined with model.remat = {remat!r}: "
                'use "full", "attn" or names'
            )
        return REMAT[remat]
    saved = KEPT[remat] if remat in KEPT else tuple(remat.replace(" ", "").split(","))
    for key, value, names in (("remat", remat, saved), ("offload", list(offload), offload)):
        if any(name not in NAMES for name in names):
            policies = f"one of {[*REMAT, *KEPT]}, or " if key == "remat" else ""
            raise ValueError(
                f"model.{key} = {value!r}: use {policies}names out of {list(NAMES)}"
                + " joined by commas" * (key == "remat")
            )
    if not offload:
        return jax.checkpoint_policies.save_only_these_names(*saved)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[name for name in saved if name not in offload],
        names_which_can_be_offloaded=list(offload),
        offload_src="device",
        offload_dst="pinned_host",
    )


@dataclasses.dataclass(frozen=True)
class Compute:
    """The settings that model code gets in addition to its weights and inputs.

    Attributes:
        dtype: dtype of activations, and of matrices in products.
        grad_dtype: dtype in which gradients of matrices are reduced over devices.
        attention: one of ops.attention.dispatch.BACKENDS.
        max_segments: upper bound on the segments of a row.
        policy: `jax.checkpoint` policy of a layer.
        axes: {path of a matrix: logical axes of its dimensions}.
    """

    dtype: Any
    grad_dtype: Any
    attention: str
    max_segments: int
    policy: Callable[..., Any]
    axes: Mapping[str, tuple[str, ...]]

    def gathered(self, layer: Any, name: str) -> Any:
        """Return one layer of the stack `name` with its matrices gathered in the compute dtype."""
        params = tree.to_dict(layer)
        for path, weight in params.items():
            axes = self.axes.get(f"{name}.{path}")
            if axes:
                with jax.named_scope(f"part.{name}.{path}"):  # shown by `plan`
                    layer_axes = axes[-weight.ndim :]
                    if jnp.issubdtype(weight.dtype, jnp.integer):  # quantized: gathered as stored
                        whole = rules.constrain(weight, *rules.gathered(layer_axes))
                        params[path] = checkpoint_name(whole, _WEIGHT)
                    else:
                        params[path] = gather(weight, layer_axes, self.dtype, self.grad_dtype)
        return tree.from_dict(layer, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather(weight: jax.Array, axes: tuple[str, ...], dtype, grad_dtype) -> jax.Array:
    """Round a sharded master weight, then gather it over the axes of `embed` (ZeRO stage 3).

    (Rajbhandari et al. 2020, arXiv:1910.02054; Zhao et al. 2023, arXiv:2304.11277.) The gradient
    from `layers.Linear` is already summed and scattered. It is constrained to the weight's sharding
    here, so that no other kind of product can leave it all-reduced.

    Args:
        axes: logical axes of the weight's dimensions.
        dtype: the weight is rounded to this dtype before it is gathered.
        grad_dtype: dtype of the result, and so the dtype in which its gradient is computed and
            summed.
    """
    shard = rules.constrain(weight.astype(dtype), *axes)  # cast before the gather: half the bytes
    return checkpoint_name(collectives.gather(shard, axes), _WEIGHT).astype(grad_dtype)


def _gather_fwd(weight, axes, dtype, grad_dtype):
    return gather(weight, axes, dtype, grad_dtype), jnp.zeros((), weight.dtype)


def _gather_bwd(axes, dtype, grad_dtype, like, grad):
    return (rules.constrain(grad, *axes).astype(like.dtype),)


gather.defvjp(_gather_fwd, _gather_bwd)
