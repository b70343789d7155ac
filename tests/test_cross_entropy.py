"""Cross-entropy against float64 NumPy, values and gradients, on several meshes.

Shape suffixes: B rows, T tokens, D model, V vocabulary, N heads, K kv heads, H head dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jax_sft import parallel
from jax_sft.ops import cross_entropy as ce

MESHES = [(8, 1, 1, 1), (1, 1, 8, 1), (1, 1, 2, 4), (2, 2, 2, 1), (1, 2, 2, 2)]


def make_mesh(sizes):
    return parallel.make_mesh(dict(zip(parallel.AXES, sizes, strict=True)))


def relative_error(found, wanted) -> float:
    """The largest error against the largest value."""
    wanted = np.asarray(wanted, np.float64)
    return np.abs(np.asarray(found, np.float64) - wanted).max() / np.abs(wanted).max()


B, T, D, V = 8, 20, 12, 40
CHUNK = 7  # divides the tokens of a device on none of the meshes: 20, 160, 40, 40, 40


def loss_problem(scale: float = 1.0, seed: int = 0):
    rng = np.random.default_rng(seed)
    hidden_BTD = np.float32(scale * rng.standard_normal((B, T, D)))
    head_VD = np.float32(rng.standard_normal((V, D)))
    targets_BT = rng.integers(0, V, (B, T)).astype(np.int32)
    weights_BT = np.float32(rng.integers(0, 2, (B, T)) * rng.choice([1.0, 0.5], (B, T)))
    return hidden_BTD, head_VD, targets_BT, weights_BT


def dense_loss(hidden_BTD, head_VD, targets_BT, weights_BT):
    """(loss, weight, correct, gradient of hidden, gradient of head), all in float64."""
    hidden_BTD, head_VD = np.float64(hidden_BTD), np.float64(head_VD)
    weights_BT = np.float64(weights_BT)
    logits_BTV = hidden_BTD @ head_VD.T
    shifted_BTV = logits_BTV - logits_BTV.max(-1, keepdims=True)
    exp_BTV = np.exp(shifted_BTV)
    probs_BTV = exp_BTV / exp_BTV.sum(-1, keepdims=True)
    one_hot_BTV = np.eye(V)[targets_BT]
    losses_BT = np.log(exp_BTV.sum(-1)) - (shifted_BTV * one_hot_BTV).sum(-1)
    correct_BT = logits_BTV.argmax(-1) == targets_BT
    grad_BTV = (probs_BTV - one_hot_BTV) * weights_BT[..., None]
    return (
        (losses_BT * weights_BT).sum(),
        weights_BT.sum(),
        (correct_BT * weights_BT).sum(),
        grad_BTV @ head_VD,
        np.einsum("BTV,BTD->VD", grad_BTV, hidden_BTD),
    )


@functools.cache  # compiled once per mesh and chunk
def loss_and_gradients(sizes, chunk):
    def loss(hidden_BTD, head_VD, targets_BT, weights_BT):
        loss, *counts = ce.cross_entropy(hidden_BTD, head_VD, targets_BT, weights_BT)
        return loss, counts

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def sharded_loss(sizes, problem, chunk: int = CHUNK):
    """(loss, weight, correct, gradient of hidden, gradient of head) of ours on a mesh."""
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(make_mesh(sizes)):
        patch.setattr(ce, "CHUNK_TOKENS", chunk)
        (value, counts), grads = loss_and_gradients(sizes, chunk)(*problem)
        return jax.device_get((value, *counts, *grads))


@pytest.mark.parametrize("sizes", MESHES)
def test_loss_counts_and_gradients_equal_the_dense_ones(sizes):
    problem = loss_problem()
    wanted, found = dense_loss(*problem), sharded_loss(sizes, problem)
    assert relative_error(found[0], wanted[0]) < 1e-6
    assert found[1] == wanted[1] and found[2] == wanted[2]
    assert relative_error(found[3], wanted[3]) < 1e-5
    assert relative_error(found[4], wanted[4]) < 1e-5


@pytest.mark.parametrize("chunk", [1, B * T, 4096])
def test_the_size_of_chunks_changes_rounding_alone(chunk):
    problem = loss_problem()
    wanted, found = dense_loss(*problem), sharded_loss((1, 2, 2, 2), problem, chunk)
    assert relative_error(found[0], wanted[0]) < 1e-6 and found[2] == wanted[2]
    assert relative_error(found[4], wanted[4]) < 1e-5


def test_a_batch_without_weights_has_no_loss_and_no_gradient():
    hidden_BTD, head_VD, targets_BT, weights_BT = loss_problem()
    found = sharded_loss((2, 2, 2, 1), (hidden_BTD, head_VD, targets_BT, 0 * weights_BT))
    assert all(not np.any(value) for value in found)


def test_tokens_without_weight_get_no_gradient():
    problem = loss_problem()
    grad_BTD = sharded_loss((1, 2, 2, 2), problem)[3]
    assert not grad_BTD[problem[3] == 0].any()
    assert grad_BTD[problem[3] > 0].any(axis=-1).all()


@pytest.mark.parametrize("sizes", [(1, 1, 8, 1), (1, 2, 2, 2)])
def test_huge_logits_do_not_overflow(sizes):
    problem = loss_problem(scale=1e4)
    wanted, found = dense_loss(*problem), sharded_loss(sizes, problem)
    assert wanted[0] / wanted[1] > 1e4
    assert relative_error(found[0], wanted[0]) < 1e-6 and found[2] == wanted[2]
    assert all(np.isfinite(value).all() for value in found)


def test_bfloat16_loss_is_rounded_in_its_inputs_alone():
    hidden_BTD, head_VD, targets_BT, weights_BT = loss_problem()
    hidden_BTD = jnp.asarray(hidden_BTD, jnp.bfloat16)
    rounded = jnp.asarray(head_VD, jnp.bfloat16)
    wanted = dense_loss(hidden_BTD, rounded, targets_BT, weights_BT)
    found = sharded_loss((1, 2, 2, 2), (hidden_BTD, head_VD, targets_BT, weights_BT))
    assert relative_error(found[0], wanted[0]) < 1e-6 and found[2] == wanted[2]
    assert found[4].dtype == np.float32 and relative_error(found[4], wanted[4]) < 2e-2


def test_a_model_that_prefers_nothing_is_not_right_everywhere():
    hidden_BTD, head_VD, targets_BT, weights_BT = loss_problem()
    found = sharded_loss((1, 1, 8, 1), (0 * hidden_BTD, head_VD, targets_BT, weights_BT))
    assert found[2] <= (weights_BT * (targets_BT == 0)).sum()  # as argmax would have it


NUM_SOURCES = 5  # the fourth has no token


@functools.cache  # compiled once per mesh
def loss_by_source_and_gradients(sizes):
    def loss(hidden_BTD, head_VD, *of_tokens):
        loss, *others = ce.cross_entropy(hidden_BTD, head_VD, *of_tokens, NUM_SOURCES)
        return loss, others

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def sharded_loss_by_source(sizes, problem, sources_BT):
    """(loss, weight, correct, loss by source, weight by source, two gradients) of ours."""
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(make_mesh(sizes)):
        patch.setattr(ce, "CHUNK_TOKENS", CHUNK)
        (value, others), grads = loss_by_source_and_gradients(sizes)(*problem, sources_BT)
        return jax.device_get((value, *others, *grads))


@pytest.mark.parametrize("sizes", MESHES)
def test_the_loss_of_each_source_is_the_dense_one_of_its_tokens_alone(sizes):
    problem = loss_problem()
    sources_BT = np.random.default_rng(1).choice([0, 1, 2, 4], (B, T)).astype(np.int32)
    found = sharded_loss_by_source(sizes, problem, sources_BT)
    for source in range(NUM_SOURCES):
        alone = np.where(sources_BT == source, problem[3], np.float32(0))
        wanted_loss, wanted_weight, *_ = dense_loss(*problem[:3], alone)
        assert found[3][source] == pytest.approx(wanted_loss, rel=1e-6)
        assert found[4][source] == wanted_weight
    assert found[3].tolist()[3] == 0.0 and found[3].dtype == found[4].dtype == np.float32


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (1, 2, 2, 2)])
def test_asking_for_the_loss_of_each_source_changes_nothing_else(sizes):
    problem = loss_problem()
    sources_BT = np.random.default_rng(2).integers(0, NUM_SOURCES, (B, T)).astype(np.int32)
    asked, plain = sharded_loss_by_source(sizes, problem, sources_BT), sharded_loss(sizes, problem)
    for with_sources, without in zip((*asked[:3], *asked[5:]), plain, strict=True):
        np.testing.assert_array_equal(with_sources, without)


def test_the_loss_of_each_source_holds_no_logits_of_all_tokens():
    # 4096 tokens and 512 ids, in chunks of 7: logits of all tokens would be 2M numbers.
    shapes = ((8, 512, 12), np.float32), ((512, 12), np.float32), ((8, 512), np.int32)
    arguments = [jax.ShapeDtypeStruct(*s) for s in (*shapes, ((8, 512), np.float32), shapes[2])]

    def loss(*problem):
        total, *others = ce.cross_entropy(*problem, NUM_SOURCES)
        return total, others

    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(make_mesh((1, 1, 8, 1))):
        patch.setattr(ce, "CHUNK_TOKENS", CHUNK)
        traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)).trace(*arguments)
    largest = max(largest_array(traced.jaxpr.jaxpr), default=0)
    assert largest < 8 * 512 * 64  # an eighth of the vocabulary on each device


def largest_array(jaxpr):
    """The sizes of the arrays that a jaxpr makes, with those of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield from (getattr(out.aval, "size", 0) for out in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from largest_array(inner)
