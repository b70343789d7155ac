"""Attention against float64 NumPy, values and gradients, on several meshes.

Shape suffixes: B rows, T tokens, D model, V vocabulary, N heads, K kv heads, H head dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sft import parallel
from jax_sft.ops.attention import packed_attention

MESHES = [(8, 1, 1, 1), (1, 1, 8, 1), (1, 1, 2, 4), (2, 2, 2, 1), (1, 2, 2, 2)]


def make_mesh(sizes):
    return parallel.make_mesh(dict(zip(parallel.AXES, sizes, strict=True)))


def relative_error(found, wanted) -> float:
    """The largest error against the largest value."""
    wanted = np.asarray(wanted, np.float64)
    return np.abs(np.asarray(found, np.float64) - wanted).max() / np.abs(wanted).max()


B, N, K, H, S = 8, 8, 8, 6, 16  # S tokens in a row here
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
