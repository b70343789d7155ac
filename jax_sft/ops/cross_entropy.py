"""Cross-entropy over a large vocabulary, without holding the logits of all tokens at once.

Shape suffixes: B rows, T tokens, N tokens of a device, M the same with trained tokens first and
padded to whole chunks of the smallest size, C tokens of a chunk, D model, V vocabulary (per device
inside the shard_map region), S shards of the tokens over `tensor`.
Called by `step` and `evaluate` inside jit, under the mesh set by `jax.set_mesh`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_sft.ops.head_chunks import chunk_sizes, num_chunks
from jax_sft.sharding import collectives, rules

# `plan` looks for this name, "_" and the chunk size: loops whose trip count depends on data.
LOOP = "head_chunks"

Sums = tuple[jax.Array, ...]  # loss, weight, correct (and by source: loss, weight)


@dataclasses.dataclass(frozen=True)
class Objective:
    """The options of a token's loss, see `cross_entropy`."""

    z_loss: float
    label_smoothing: float
    soft_cap: float
    head_trains: bool
    num_ids: int


def cross_entropy(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    sources_BT: jax.Array | None = None,
    num_sources: int = 0,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    soft_cap: float = 0.0,
    head_trains: bool = True,
    num_ids: int = 0,
) -> Sums:
    """Return (sum of weighted losses, sum of weights, weighted correct predictions).

    The sums are over all devices.

    With logits z = hidden . head, the loss of a token is

        logsumexp(z) - (1 - label_smoothing) z[target] - label_smoothing mean(z)
        + z_loss logsumexp(z)^2

    z-loss: Chowdhery et al. 2022, arXiv:2204.02311, section 5. Label smoothing, spread over the
    whole vocabulary: Szegedy et al. 2016, arXiv:1512.00567, section 7. With soft_cap > 0, z is
    soft_cap tanh(hidden . head / soft_cap) throughout: Gemma 2, arXiv:2408.00118, section 2.

    Each device computes its own tokens and, over `tensor`, its part of the vocabulary (Shoeybi et
    al. 2019, arXiv:1909.08053, section 3). The softmax is float32. Matrix products multiply in the
    dtype of `hidden_BTD` and accumulate in float32. Only tokens with a weight are computed, in
    chunks. Gradients, if needed, are computed in the forward pass. So logits are computed once, the
    head is gathered once and its gradient is reduce-scattered once.

    Only the first sum has a gradient, with respect to `hidden_BTD` and `head_VD`; weights are data.
    Only first derivatives in reverse mode are supported.

    Args:
        hidden_BTD: final hidden states, with tokens sharded like the residual stream.
        head_VD: output head as stored: any float dtype, sharded as spec("vocab", "embed").
        targets_BT: int token ids; arbitrary where the weight is 0.
        weights_BT: float32, 0 for tokens without loss, never negative.
        sources_BT: int in 0..num_sources-1; read only if `num_sources` is set.
        head_trains: whether `head_VD` gets a gradient, which costs as much as the logits.
        num_ids: size of the vocabulary. Further rows of `head_VD` are padding, see `vocabulary`,
            and get a gradient of zero. 0 = no padding.
        num_sources: if above 0, return two more results: the first two sums per source, float32
            [num_sources].
    """
    token_arrays = (targets_BT, weights_BT)
    if num_sources:
        assert sources_BT is not None, "num_sources needs sources_BT"
        token_arrays += (sources_BT,)
    num_ids = num_ids or head_VD.shape[0]
    objective = Objective(z_loss, label_smoothing, soft_cap, head_trains, num_ids)
    with jax.named_scope("part.head"):
        return _sums(objective, num_sources, hidden_BTD, head_VD, token_arrays)


# ---- custom derivative, so that nothing differentiates through the region or its loop ------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(objective: Objective, num_sources: int, hidden_BTD, head_VD, token_arrays_BT) -> Sums:
    return _shard_map_region(
        objective, num_sources, hidden_BTD, head_VD, token_arrays_BT, gradients=False
    )


def _forward(objective, num_sources, hidden_BTD, head_VD, token_arrays_BT):
    sums, *grads = _shard_map_region(
        objective, num_sources, hidden_BTD, head_VD, token_arrays_BT, gradients=True
    )
    # The barrier keeps both gradients together. Without it XLA reduce-scatters the head's gradient
    # only after the backward pass of the layers and holds it whole in float32 until then (2 GiB for
    # a 7B model).
    return sums, jax.lax.optimization_barrier(grads)


def _backward(objective, num_sources, grads, cotangents):
    del num_sources
    scaled = [(grad * cotangents[0]).astype(grad.dtype) for grad in grads]
    return *scaled, *((None,) * (1 if objective.head_trains else 2))


_sums.defvjp(_forward, _backward)


def _shard_map_region(
    objective, num_sources, hidden_BTD, head_VD, token_arrays_BT, *, gradients: bool
) -> Any:
    hidden_spec = rules.spec("batch", "residual", "features")
    head_spec = rules.spec("vocab", "embed")
    sum_specs = (jax.P(),) * (5 if num_sources else 3)
    grad_specs = (hidden_spec, head_spec) if objective.head_trains else (hidden_spec,)
    return collectives.shard_map_region(
        functools.partial(
            _local, objective=objective, num_sources=num_sources, gradients=gradients
        ),
        in_specs=(hidden_spec, head_spec, (rules.spec("batch", "token"),) * len(token_arrays_BT)),
        out_specs=(sum_specs, *grad_specs) if gradients else sum_specs,
    )(hidden_BTD, head_VD, token_arrays_BT)


# ---- one device ----------------------------------------------------------------------------------


def _local(hidden_BTD, head_VD, token_arrays_BT, *, objective, num_sources, gradients):
    """Return the sums over all devices and, with `gradients`, this device's blocks of gradients."""
    token_axes = (*rules.RULES["batch"], *rules.RULES["token"])
    head = head_VD.astype(hidden_BTD.dtype)
    is_whole = jax.lax.axis_size(rules.RULES["embed"]) == 1
    if not is_whole:
        # D first: for a gather over the last dimension, XLA transposes the whole, not the shard.
        head = jax.lax.all_gather(head.T, rules.RULES["embed"], tiled=True)
    num_local = len(head_VD)
    # Tokens are in the order in which the S shards of `tensor` hold their hidden states.
    hidden_SBTD = collectives.all_gather(hidden_BTD, "tensor")
    hidden_ND = hidden_SBTD.reshape(-1, hidden_BTD.shape[-1])
    shards = hidden_SBTD.shape[0]
    token_arrays_N = [
        x_BT.reshape(len(x_BT), shards, -1).swapaxes(0, 1).reshape(-1) for x_BT in token_arrays_BT
    ]
    weights_N = token_arrays_N[1]
    sizes = chunk_sizes(num_local, len(weights_N), collectives.platform())
    index_M = trained_first(weights_N, sizes[-1])
    targets_M, weights_M, *sources_M = (
        x_N.at[index_M].get(mode="fill", fill_value=0) for x_N in token_arrays_N
    )
    none_M = jnp.zeros(len(index_M), jnp.float32), jnp.zeros(len(index_M), bool)
    no_grads = [jnp.zeros(hidden_ND.shape, hidden_ND.dtype)]
    if objective.head_trains:
        no_grads.append(jnp.zeros((hidden_ND.shape[-1], num_local), jnp.float32))
    start = (
        *jax.lax.pcast(none_M, token_axes, to="varying"),
        jax.lax.pcast(no_grads if gradients else (), rules.AXES, to="varying"),
    )

    def add_chunk(first, size, carry):
        def chunk_of(x_M):
            return jax.lax.dynamic_slice_in_dim(x_M, first, size)

        def with_chunk(x_M, x_C):
            return jax.lax.dynamic_update_slice_in_dim(x_M, x_C, first, 0)

        losses_M, correct_M, grads = carry
        head_DV = (
            head.T if is_whole else head
        )  # in the loop .T fuses with the products; before, it copies
        index_C = chunk_of(index_M)
        # Hidden states and weights are zero for positions past the end.
        hidden_CD = hidden_ND.at[index_C].get(mode="fill", fill_value=0)
        losses_C, correct_C, grad_CV = _chunk(
            hidden_CD, head_DV, chunk_of(targets_M), chunk_of(weights_M), objective
        )
        if gradients:
            hidden_DC = hidden_CD.T
            if collectives.platform() == "cpu":
                # The barrier forces a copy (1/200 of the operands). YNNPACK does not accept
                # transposed operands, and Eigen, which does, multiplies 256 x 256 by 256 x 49152
                # at 0.6 of YNNPACK's speed.
                hidden_DC = jax.lax.optimization_barrier(hidden_DC)
            grads = _add_gradients(grads, index_C, hidden_DC, head_DV, grad_CV)
        return with_chunk(losses_M, losses_C), with_chunk(correct_M, correct_C), grads

    # The devices of one `tensor` group have the same tokens, hence the same number of chunks, so
    # the collectives over `tensor` inside the loops match. The loops contain no other collectives.
    carry, first = start, 0
    for size, count in zip(sizes, num_chunks(jnp.count_nonzero(weights_N), sizes), strict=True):

        def add_next(number, carry, first=first, size=size):
            return add_chunk(first + number * size, size, carry)

        with jax.named_scope(f"{LOOP}_{size}"):
            carry = jax.lax.fori_loop(0, count, add_next, carry)
        first += count * size
    losses_M, correct_M, grads = carry
    sums = losses_M * weights_M, weights_M, correct_M * weights_M
    by_source = _sums_by_source(sums[:2], sources_M[0], num_sources) if num_sources else ()
    sums = collectives.psum((*(amounts_M.sum() for amounts_M in sums), *by_source), token_axes)
    if not gradients:
        return sums
    grad_hidden_ND, *head_grads = grads
    grad_hidden_BTD = collectives.psum_scatter(grad_hidden_ND.reshape(hidden_SBTD.shape), "tensor")
    head_grads = [
        collectives.sum_over_tokens(grad_DV, ("embed", "vocab")) for grad_DV in head_grads
    ]
    return sums, grad_hidden_BTD, *(grad_DV.T.astype(head_VD.dtype) for grad_DV in head_grads)


def trained_first(weights_N: jax.Array, chunk: int) -> jax.Array:
    """Return the positions of tokens with a weight in order, then positions past the end.

    The length is that of all tokens, padded to whole chunks, so any share of trained tokens fits.
    No position occurs twice.
    """
    places_N = jnp.arange(len(weights_N))
    is_trained_N = weights_N != 0
    empty_M = len(weights_N) + jnp.arange(len(weights_N) + -len(weights_N) % chunk)
    # A scatter instead of a sort: one kernel, and no two tokens share a slot.
    slot_N = jnp.where(is_trained_N, jnp.cumsum(is_trained_N) - 1, len(empty_M) + places_N)
    return empty_M.at[slot_N].set(places_N, mode="drop", unique_indices=True)


def _chunk(hidden_CD, head_DV, targets_C, weights_C, objective: Objective):
    """Return (unweighted loss per token, whether correct, weighted gradient of the logits).

    The gradient is float32 [C, V]; the compiler fuses it with its consumers or removes it.
    """
    logits_CV = jnp.einsum("CD,DV->CV", hidden_CD, head_DV, preferred_element_type=jnp.float32)
    if cap := objective.soft_cap:
        logits_CV = cap * jnp.tanh(logits_CV / cap)
    num_local, num_ids = head_DV.shape[1], objective.num_ids
    first_id = jax.lax.axis_index("tensor") * num_local
    ids_V = first_id + jnp.arange(num_local)
    is_padded = num_ids < num_local * jax.lax.axis_size("tensor")

    def at_real_ids(x_CV, elsewhere):
        return jnp.where(ids_V < num_ids, x_CV, elsewhere) if is_padded else x_CV

    is_target_CV = ids_V == targets_C[:, None]
    real_CV = at_real_ids(logits_CV, -jnp.inf)
    max_C = jax.lax.pmax(real_CV.max(axis=-1), "tensor")
    shifted_CV = real_CV - max_C[:, None]
    exp_CV = jnp.exp(shifted_CV)
    # The prediction is the first token with the highest logit, so that ties count once.
    is_better_CV = (shifted_CV == 0) & (ids_V < targets_C[:, None])
    # The target's logit is gathered; a masked sum would take two more passes on CPUs.
    local_C = targets_C - first_id
    is_here_C = (local_C >= 0) & (local_C < num_local)
    place_C1 = jnp.where(is_here_C, local_C, 0)[:, None]
    target_C = jnp.take_along_axis(shifted_CV, place_C1, axis=-1)[:, 0]
    sums_C = [exp_CV.sum(axis=-1), jnp.where(is_here_C, target_C, 0.0)]
    if objective.label_smoothing:
        sums_C.append(at_real_ids(shifted_CV, 0.0).sum(axis=-1))
    # Stacked, so that there is one collective per chunk instead of one per sum.
    sum_exp_C, target_C, *sum_C = collectives.psum(jnp.stack(sums_C), "tensor")
    # Not stacked, so that the compiler can remove it when it is unused.
    correct_C = (target_C == 0) & (collectives.psum(is_better_CV.sum(axis=-1), "tensor") == 0)
    log_sum_C = jnp.log(sum_exp_C)
    losses_C = log_sum_C - target_C
    slope_C, at_target, elsewhere = 1.0, 1.0, 0.0
    if smoothing := objective.label_smoothing:
        losses_C += smoothing * (target_C - sum_C[0] / num_ids)
        at_target, elsewhere = 1.0 - smoothing, smoothing / num_ids
    if z_loss := objective.z_loss:
        log_z_C = max_C + log_sum_C
        losses_C += z_loss * log_z_C**2
        slope_C = 1.0 + 2.0 * z_loss * log_z_C
    softmax_CV = exp_CV * (weights_C * slope_C / sum_exp_C)[:, None]
    target_CV = jnp.where(is_target_CV, at_target, 0.0) + at_real_ids(elsewhere, 0.0)
    grad_CV = softmax_CV - weights_C[:, None] * target_CV
    if cap:
        grad_CV *= 1.0 - (logits_CV / cap) ** 2
    return losses_C, correct_C, grad_CV


def _add_gradients(grads, index_C, hidden_DC, head_DV, grad_CV):
    """Set the chunk's rows of the hidden gradient, and add its part to the head's gradient."""
    grad_hidden_ND, *head_grads = grads
    grad_CV = grad_CV.astype(hidden_DC.dtype)
    grad_hidden_ND = grad_hidden_ND.at[index_C].set(
        jnp.einsum("CV,DV->CD", grad_CV, head_DV),
        mode="drop",
        indices_are_sorted=True,
        unique_indices=True,
    )
    # One matrix product that accumulates in place in float32 (checked in the HLO for H200).
    head_grads = [
        grad_DV + jnp.einsum("CV,DC->DV", grad_CV, hidden_DC, preferred_element_type=jnp.float32)
        for grad_DV in head_grads
    ]
    return [grad_hidden_ND, *head_grads]


def _sums_by_source(amounts: Sums, sources_M, num_sources: int) -> Sums:
    # Masked sums, since scatter-adds add in a nondeterministic order on a GPU.
    is_from_SM = sources_M == jnp.arange(num_sources)[:, None]
    return tuple(jnp.where(is_from_SM, amounts_M, 0.0).sum(axis=1) for amounts_M in amounts)
