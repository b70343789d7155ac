"""Cross-entropy over a large vocabulary without ever holding the logits of all tokens.

Shape suffixes: B rows, T tokens, C tokens of a chunk, D model, V vocabulary.
Called by `step` and `evaluate` inside jit, under the mesh set by `jax.set_mesh`.
"""

import functools

import jax
import jax.numpy as jnp

from jax_sft import parallel

CHUNK_TOKENS = 1024  # logits of so many tokens live at a time on a device
_NO_TOKEN = 2**31 - 1
_TOKENS = ("data", "fsdp", "sequence")  # mesh axes that split tokens


def cross_entropy(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    sources_BT: jax.Array | None = None,
    num_sources: int = 0,
) -> tuple[jax.Array, ...]:
    """Return (sum of weighted losses, sum of weights, weighted correct predictions), all devices'.

    The loss of a token is logsumexp(logits) - logits[target]; the softmax is float32, the matrix
    products run in the dtype of `hidden_BTD`. An island of `shard_map`: each device takes its own
    tokens, and its part of the vocabulary over `tensor` (Shoeybi et al. 2019, arXiv:1909.08053,
    section 3). Chunks of CHUNK_TOKENS tokens are recomputed in the backward pass.

    Args:
        hidden_BTD: final hidden states.
        head_VD: output head, any float dtype.
        targets_BT: int token ids.
        weights_BT: float32, 0 where a token does not train.
        sources_BT: int, in 0..num_sources-1; read only with `num_sources`.
        num_sources: when above 0, two more results: the first two sums of each source, float32
            [num_sources], without gradient.
    """
    of_tokens = (targets_BT, weights_BT)
    if num_sources:
        assert sources_BT is not None, "num_sources needs sources_BT"
        of_tokens += (sources_BT,)
    island = jax.shard_map(
        functools.partial(_local, num_sources=num_sources),
        in_specs=(
            parallel.spec("batch", "token", "features"),
            parallel.spec("vocab", "features"),
            *[parallel.spec("batch", "token")] * len(of_tokens),
        ),
        out_specs=(jax.P(),) * (5 if num_sources else 3),
    )
    return island(hidden_BTD, head_VD.astype(hidden_BTD.dtype), *of_tokens)


def _local(hidden_BTD, head_VD, targets_BT, *others_BT, num_sources):
    """One device's tokens in chunks; the sums are then added over all devices."""
    num_tokens = targets_BT.size
    chunk = min(CHUNK_TOKENS, num_tokens)
    padding = -num_tokens % chunk

    def chunked(x):
        x = x.reshape(num_tokens, *x.shape[2:])
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, chunk, *x.shape[1:])

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add_chunk(sums, chunk):
        hidden_CD, *of_tokens_C = chunk
        found = _chunk_sums(hidden_CD, head_VD, *of_tokens_C, num_sources=num_sources)
        return tuple(map(jnp.add, sums, found)), None

    zero = jax.lax.pcast(jnp.float32(0), _TOKENS, to="varying")
    zeros = (zero,) * 3 + ((jnp.full(num_sources, zero),) * 2 if num_sources else ())
    chunks = tuple(map(chunked, (hidden_BTD, targets_BT, *others_BT)))
    sums, _ = jax.lax.scan(add_chunk, zeros, chunks)
    return jax.lax.psum(sums, _TOKENS)


def _chunk_sums(hidden_CD, head_VD, targets_C, weights_C, sources_C=None, num_sources=0):
    logits_CV = jnp.einsum("CD,VD->CV", hidden_CD, head_VD, preferred_element_type=jnp.float32)
    first_id = jax.lax.axis_index("tensor") * head_VD.shape[0]
    # The maximum only keeps exp() in range: it has no gradient.
    local_max_C = jax.lax.stop_gradient(logits_CV.max(axis=-1))
    max_C = jax.lax.pmax(local_max_C, "tensor")
    sum_exp_C = jax.lax.psum(jnp.exp(logits_CV - max_C[:, None]).sum(axis=-1), "tensor")
    local_C = targets_C - first_id
    is_local_C = (local_C >= 0) & (local_C < head_VD.shape[0])
    at_target_C = jnp.take_along_axis(
        logits_CV, jnp.clip(local_C, 0, head_VD.shape[0] - 1)[:, None], axis=-1
    )[:, 0]
    target_logit_C = jax.lax.psum(jnp.where(is_local_C, at_target_C, 0.0), "tensor")
    losses_C = max_C + jnp.log(sum_exp_C) - target_logit_C
    # The prediction is the first token with the highest logit, so that ties count once.
    found_C = jnp.where(local_max_C == max_C, logits_CV.argmax(axis=-1) + first_id, _NO_TOKEN)
    correct_C = jax.lax.pmin(jax.lax.stop_gradient(found_C), "tensor") == targets_C
    sums = (losses_C * weights_C).sum(), weights_C.sum(), (correct_C * weights_C).sum()
    if not num_sources:
        return sums
    # Masked sums, not scatter-adds: those add in any order on a GPU.
    is_from_SC = sources_C == jnp.arange(num_sources)[:, None]
    weighted_C = jax.lax.stop_gradient(losses_C) * weights_C
    return *sums, *(jnp.where(is_from_SC, of_C, 0.0).sum(1) for of_C in (weighted_C, weights_C))
