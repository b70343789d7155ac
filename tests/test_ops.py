"""Cross-entropy and attention against float64 NumPy, values and gradients, on several meshes.

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
from jax_sft.ops.attention import packed_attention

MESHES = [(8, 1, 1, 1), (1, 1, 8, 1), (1, 1, 2, 4), (2, 2, 2, 1), (1, 2, 2, 2)]


def make_mesh(sizes):
    return parallel.make_mesh(dict(zip(parallel.AXES, sizes, strict=True)))


def relative_error(found, wanted) -> float:
    """The largest error against the largest value."""
    wanted = np.asarray(wanted, np.float64)
    return np.abs(np.asarray(found, np.float64) - wanted).max() / np.abs(wanted).max()


# ---- cross-entropy -------------------------------------------------------------------------------

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


# ---- attention -----------------------------------------------------------------------------------

N, K, H, S = 8, 8, 6, 16  # S tokens in a row here
SCALE = 0.37


def attention_problem(num_kv_heads: int = K, seed: int = 0):
    """q, k, v, segment ids and positions of packed rows; one row is padding alone."""
    rng = np.random.default_rng(seed)
    q, k, v = (np.float32(rng.standard_normal((B, S, n, H))) for n in (N, *[num_kv_heads] * 2))
    segments = np.zeros((B, S), np.int32)
    for row, lengths in enumerate(
        [[S], [1] * S, [5, 7, 4], [3, 6], [], [9], [1, 14], [2, 2, 2, 2, 2]]
    ):
        ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        segments[row, : len(ids)] = ids
    positions = np.zeros((B, S), np.int32)
    for row in range(B):
        for segment in set(segments[row]) - {0}:
            part = segments[row] == segment
            positions[row, part] = np.arange(part.sum())
    return q, k, v, segments, positions


def naive_attention(q, k, v, segments, positions, grad_out):
    """(out, gradients of q, k, v) in float64, one segment and head at a time; padding stays 0."""
    q, k, v = (np.float64(x) for x in (q, k, v))
    out = np.zeros_like(q)
    grads = [np.zeros_like(x) for x in (q, k, v)]
    for row in range(B):
        for segment in set(segments[row]) - {0}:
            part = np.flatnonzero(segments[row] == segment)
            part = part[np.argsort(positions[row, part])]
            visible = np.tril(np.ones((len(part), len(part)), bool))
            for head in range(N):
                kv_head = head // (N // k.shape[2])
                queries, keys = q[row, part, head], k[row, part, kv_head]
                values, grad = v[row, part, kv_head], grad_out[row, part, head]
                scores = np.where(visible, SCALE * queries @ keys.T, -np.inf)
                probs = np.exp(scores - scores.max(-1, keepdims=True))
                probs /= probs.sum(-1, keepdims=True)
                out[row, part, head] = probs @ values
                grad_probs = grad @ values.T
                grad_scores = probs * (grad_probs - (grad_probs * probs).sum(-1, keepdims=True))
                grads[0][row, part, head] += SCALE * grad_scores @ keys
                grads[1][row, part, kv_head] += SCALE * grad_scores.T @ queries
                grads[2][row, part, kv_head] += probs.T @ grad
    return out, *grads


@functools.cache  # compiled once per mesh and shapes
def attention_and_gradients(sizes):
    @jax.jit
    def run(q, k, v, segments, positions, grad_out):
        def attend(q, k, v):
            return packed_attention(q, k, v, segments, positions, scale=SCALE, backend="auto")

        out, backward = jax.vjp(attend, q, k, v)
        return out, *backward(grad_out)

    return run


def sharded_attention(sizes, problem, grad_out):
    """(out, gradients of q, k, v) of ours on a mesh."""
    with jax.set_mesh(make_mesh(sizes)):
        return jax.device_get(attention_and_gradients(sizes)(*problem, grad_out))


def output_gradient(segments) -> np.ndarray:
    grad = np.random.default_rng(9).standard_normal((B, S, N, H))
    return np.float32(grad * (segments > 0)[..., None, None])  # nobody reads padding


@pytest.mark.parametrize("sizes", MESHES)
def test_attention_and_its_gradients_equal_the_naive_ones(sizes):
    problem = attention_problem()
    grad_out = output_gradient(problem[3])
    wanted = naive_attention(*problem, grad_out)
    found = sharded_attention(sizes, problem, grad_out)
    real = problem[3] > 0
    assert relative_error(found[0][real], wanted[0][real]) < 1e-5
    for mine, other in zip(found[1:], wanted[1:], strict=True):
        assert relative_error(mine, other) < 1e-5


@pytest.mark.parametrize(
    ("num_kv_heads", "sizes"),
    # 2 or 4 of them on a device, and 1
    [(4, (8, 1, 1, 1)), (4, (1, 1, 2, 4)), (2, (1, 2, 2, 2)), (1, (4, 1, 1, 2))],
)
def test_query_heads_share_kv_heads_in_order(num_kv_heads, sizes):
    problem = attention_problem(num_kv_heads)
    grad_out = output_gradient(problem[3])
    wanted = naive_attention(*problem, grad_out)
    found = sharded_attention(sizes, problem, grad_out)
    assert found[2].shape == (B, S, num_kv_heads, H)
    real = problem[3] > 0
    assert relative_error(found[0][real], wanted[0][real]) < 1e-5
    for mine, other in zip(found[1:], wanted[1:], strict=True):
        assert relative_error(mine, other) < 1e-5


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (1, 1, 2, 4)])
def test_no_bit_of_a_segment_depends_on_another_one(sizes):
    q, k, v, segments, positions = attention_problem()
    grad_out = output_gradient(segments)
    rng = np.random.default_rng(5)
    theirs = (segments == 2)[..., None, None]
    other = [np.float32(np.where(theirs, 50 * rng.standard_normal(x.shape), x)) for x in (q, k, v)]
    before = sharded_attention(sizes, (q, k, v, segments, positions), grad_out)
    after = sharded_attention(sizes, (*other, segments, positions), grad_out)
    for mine, changed in zip(before, after, strict=True):
        np.testing.assert_array_equal(mine[segments != 2], changed[segments != 2])
        assert (mine[segments == 2] != changed[segments == 2]).any()


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (1, 1, 2, 4)])
def test_no_bit_of_a_token_depends_on_a_later_one(sizes):
    q, k, v, segments, positions = attention_problem()
    grad_out = output_gradient(segments)
    later = (positions >= 3)[..., None, None]
    changed_kv = [np.float32(np.where(later, 7.0, x)) for x in (k, v)]
    before = sharded_attention(sizes, (q, k, v, segments, positions), grad_out)[0]
    after = sharded_attention(sizes, (q, *changed_kv, segments, positions), grad_out)[0]
    early = (positions < 3) & (segments > 0)
    np.testing.assert_array_equal(before[early], after[early])
    assert (before[positions >= 3] != after[positions >= 3]).any()


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (1, 1, 2, 4)])
def test_padding_gives_no_nan_and_no_gradient(sizes):
    problem = attention_problem()
    padding = problem[3] == 0
    assert padding[4].all()  # a row of padding alone
    found = sharded_attention(sizes, problem, output_gradient(problem[3]))
    assert all(np.isfinite(value).all() for value in found)
    assert all(not value[padding].any() for value in found[1:])


@pytest.mark.parametrize("layout", ["reversed", "striped", "random"])
def test_the_layout_of_tokens_permutes_the_output_alone(layout):
    q, k, v, segments, positions = attention_problem()
    order = {
        "reversed": np.arange(S)[::-1],
        "striped": np.arange(S).reshape(4, -1).T.ravel(),  # every sequence shard gets all parts
        "random": np.random.default_rng(1).permutation(S),
    }[layout]
    grad_out = output_gradient(segments)
    problem = (q, k, v, segments, positions)
    straight = sharded_attention((1, 1, 2, 4), problem, grad_out)
    moved = tuple(x[:, order] for x in problem)
    permuted = sharded_attention((1, 1, 2, 4), moved, grad_out[:, order])
    for mine, other in zip(permuted, straight, strict=True):
        assert relative_error(mine, other[:, order]) < 1e-6


def test_bfloat16_attention_is_within_rounding():
    q, k, v, segments, positions = attention_problem()
    rounded = tuple(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    grad_out = output_gradient(segments)
    wanted = naive_attention(*rounded, segments, positions, grad_out)[0]
    found = sharded_attention(
        (1, 2, 2, 2), (*rounded, segments, positions), jnp.asarray(grad_out, jnp.bfloat16)
    )[0]
    assert found.dtype == jnp.bfloat16
    assert relative_error(found[segments > 0], wanted[segments > 0]) < 1e-2
