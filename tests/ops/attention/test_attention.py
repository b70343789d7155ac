"""Attention against float64 NumPy, values and gradients, by each backend that runs on a CPU.

Shape suffixes: B rows, T query tokens, S key tokens, N heads, K kv heads, H head dim.
"""

import dataclasses
import functools
import itertools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_sft.nn import compute
from jax_sft.ops.attention import blockwise, dispatch, reference
from jax_sft.ops.attention.dispatch import packed_attention
from jax_sft.sharding import rules
from jax_sft.sharding.mesh import make_mesh
from tests import tiers

BACKENDS = {"blockwise": blockwise.BACKEND, "reference": reference.BACKEND}
SHAPES = [s for s in itertools.product([1, 2, 4, 8], repeat=4) if math.prod(s) == 8]
SOME = [(8, 1, 1, 1), (1, 1, 1, 8), (1, 1, 2, 4), (1, 2, 2, 2)]
SPLIT, WHOLE = (1, 1, 2, 4), (8, 1, 1, 1)  # heads and rows are split, or a device has rows alone
BLOCK = 5  # tokens of a block here: it divides no row, and a row has several
B, N, K, H, T = 8, 8, 8, 6, 16
SCALE = 0.37
SOFT_CAP = 0.7  # scores have a deviation of 0.9


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "BLOCK", BLOCK)
        yield


def mesh_of(sizes):
    return make_mesh(dict(zip(rules.AXES, sizes, strict=True)))


def relative_error(found, wanted) -> float:
    """The largest error against the largest value."""
    wanted = np.asarray(wanted, np.float64)
    return np.abs(np.asarray(found, np.float64) - wanted).max() / np.abs(wanted).max()


def assert_close(found, wanted, real, tolerance=1e-5):
    """Compare (out, dq, dk, dv): the output where tokens are real, the gradients everywhere."""
    assert relative_error(found[0][real], wanted[0][real]) < tolerance
    for mine, other in zip(found[1:], wanted[1:], strict=True):
        assert relative_error(mine, other) < tolerance


# ---- problems and their solution in NumPy --------------------------------------------------------


def packed_ids(rows, num_tokens: int):
    """(segment ids, positions) of rows of segments; a length below 0 is padding, as is the rest."""
    segments, positions = np.zeros((2, len(rows), num_tokens), np.int32)
    for row, lengths in enumerate(rows):
        starts = np.cumsum([0, *map(abs, lengths)])
        for n, (start, length) in enumerate(zip(starts, lengths, strict=False)):
            if length > 0:
                segments[row, start : start + length] = n + 1
                positions[row, start : start + length] = np.arange(length)
    return segments, positions


def attention_problem(num_kv_heads: int = K, seed: int = 0):
    """q, k, v, segment ids and positions of packed rows; one row is padding alone."""
    rng = np.random.default_rng(seed)
    q, k, v = (np.float32(rng.standard_normal((B, T, n, H))) for n in (N, *[num_kv_heads] * 2))
    rows = [[T], [1] * T, [5, 7, 4], [3, 6], [], [-2, 4, -3, 5], [1, 14], [2, 2, -1, 2, 2, 2]]
    return q, k, v, *packed_ids(rows, T)


def naive_attention(
    q, k, v, query_ids, grad_out, key_ids=None, scale=SCALE, window=None, soft_cap=0.0
):
    """(out, gradients of q, k, v) in float64, one segment and head at a time; padding stays 0."""
    key_ids = query_ids if key_ids is None else key_ids
    q, k, v = (np.float64(x) for x in (q, k, v))
    out = np.zeros_like(q)
    grads = [np.zeros_like(x) for x in (q, k, v)]
    for row in range(len(q)):
        for segment in set(query_ids[0][row]) - {0}:
            queries, keys = (np.flatnonzero(ids[0][row] == segment) for ids in (query_ids, key_ids))
            positions = query_ids[1][row, queries], key_ids[1][row, keys]
            visible = positions[0][:, None] >= positions[1]
            if window:
                visible &= positions[0][:, None] - positions[1] < window
            for head in range(q.shape[2]):
                at_q = row, queries, head
                at_k = row, keys, head // (q.shape[2] // k.shape[2])
                scores, slopes = scale * q[at_q] @ k[at_k].T, 1.0
                if soft_cap:
                    slopes = 1 / np.cosh(scores / soft_cap) ** 2
                    scores = soft_cap * np.tanh(scores / soft_cap)
                scores = np.where(visible, scores, -np.inf)
                probs = np.exp(scores - scores.max(-1, keepdims=True))
                probs /= probs.sum(-1, keepdims=True)
                out[at_q] = probs @ v[at_k]
                grad_probs = grad_out[at_q] @ v[at_k].T
                grad_scores = probs * (grad_probs - (grad_probs * probs).sum(-1, keepdims=True))
                grad_scores *= slopes
                grads[0][at_q] += scale * grad_scores @ k[at_k]
                grads[1][at_k] += scale * grad_scores.T @ q[at_q]
                grads[2][at_k] += probs.T @ grad_out[at_q]
    return out, *grads


def output_gradient(segments, num_heads=N, size=H) -> np.ndarray:
    grad = np.random.default_rng(9).standard_normal((*segments.shape, num_heads, size))
    return np.float32(grad * (segments > 0)[..., None, None])  # nobody reads padding


# ---- ours ----------------------------------------------------------------------------------------


@functools.cache  # compiled once per backend, mesh and shapes
def attention_and_gradients(backend, sizes, window=None, soft_cap=0.0):
    @jax.jit
    def run(q, k, v, segments, positions, grad_out, windowed=None):
        def attend(q, k, v):
            options = {"scale": SCALE, "backend": backend, "window": window}
            options |= {"windowed": windowed, "soft_cap": soft_cap}
            return packed_attention(q, k, v, segments, positions, **options)

        out, backward = jax.vjp(attend, q, k, v)
        return out, *backward(grad_out)

    return run


def sharded_attention(backend, sizes, problem, grad_out, window=None, windowed=None, soft_cap=0.0):
    """(out, gradients of q, k, v) of ours on a mesh."""
    with jax.set_mesh(mesh_of(sizes)):
        run = attention_and_gradients(backend, sizes, window, soft_cap)
        return jax.device_get(run(*problem, grad_out, windowed))


@functools.partial(jax.jit, static_argnames=("backend", "window"))
def local_attention(backend, q, k, v, query_ids, grad_out, key_ids=None, scale=SCALE, window=None):
    """(out, gradients of q, k, v, lse) of a backend alone."""
    key_ids = query_ids if key_ids is None else key_ids
    options = {"scale": scale, "max_segments": 256, "window": window}
    out, lse = BACKENDS[backend].forward(q, k, v, query_ids, key_ids, **options)
    grads = BACKENDS[backend].backward(q, k, v, out, lse, grad_out, query_ids, key_ids, **options)
    return out, *grads, lse


@pytest.mark.parametrize(
    ("backend", "sizes"),
    tiers.fast(
        [("blockwise", SPLIT), ("blockwise", (1, 2, 2, 2)), ("reference", SPLIT)],
        [*(("blockwise", sizes) for sizes in SHAPES), *(("reference", sizes) for sizes in SOME)],
    ),
)
def test_attention_and_its_gradients_equal_the_naive_ones(backend, sizes):
    num_kv_heads = K if sizes in SOME else max(2, sizes[2])
    problem = attention_problem(num_kv_heads)
    grad_out = output_gradient(problem[3])
    wanted = naive_attention(*problem[:3], problem[3:], grad_out)
    found = sharded_attention(backend, sizes, problem, grad_out)
    assert_close(found, wanted, problem[3] > 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", tiers.fast([2 * BLOCK + 1], [2, BLOCK, 2 * BLOCK + 1]))
def test_a_window_and_its_gradients_equal_the_naive_ones(backend, window):
    problem = attention_problem(num_kv_heads=4)
    grad_out = output_gradient(problem[3])
    wanted = naive_attention(*problem[:3], problem[3:], grad_out, window=window)
    found = sharded_attention(backend, (1, 2, 2, 2), problem, grad_out, window)
    assert_close(found, wanted, problem[3] > 0)
    narrower = naive_attention(*problem[:3], problem[3:], grad_out, window=window - 1)
    assert relative_error(wanted[0], narrower[0]) > 1e-2


@pytest.mark.parametrize("backend", [*BACKENDS, "branches"])
def test_a_soft_cap_and_a_window_that_the_layer_decides_equal_the_naive_ones(backend, monkeypatch):
    # One program for layers with and without the window; "branches": as for cuDNN, whose window is
    # compiled in.
    branches = dataclasses.replace(reference.BACKEND, takes_traced_window=False)
    fake = types.SimpleNamespace(BACKEND=branches)
    monkeypatch.setitem(dispatch._MODULES, "branches", fake)
    problem = attention_problem(num_kv_heads=4)
    grad_out = output_gradient(problem[3])
    for window in (4, None):
        wanted = naive_attention(
            *problem[:3], problem[3:], grad_out, window=window, soft_cap=SOFT_CAP
        )
        windowed = np.array(window is not None)
        found = sharded_attention(
            *(backend, (1, 2, 2, 2), problem, grad_out), 4, windowed, SOFT_CAP
        )
        assert_close(found, wanted, problem[3] > 0)
        uncapped = naive_attention(*problem[:3], problem[3:], grad_out, window=window)
        assert min(map(relative_error, wanted, uncapped)) > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_of_the_whole_row_is_none(backend):
    problem = attention_problem()
    grad_out = output_gradient(problem[3])
    full = sharded_attention(backend, SPLIT, problem, grad_out)
    found = sharded_attention(backend, SPLIT, problem, grad_out, window=T)
    for mine, other in zip(found, full, strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("num_kv_heads", "sizes"),
    [(4, SPLIT), tiers.full(4, WHOLE), tiers.full(1, (4, 1, 1, 2))],  # 2, 4 and 1 on a device
)
def test_query_heads_share_kv_heads_in_order(backend, num_kv_heads, sizes):
    problem = attention_problem(num_kv_heads)
    grad_out = output_gradient(problem[3])
    wanted = naive_attention(*problem[:3], problem[3:], grad_out)
    found = sharded_attention(backend, sizes, problem, grad_out)
    assert found[2].shape == (B, T, num_kv_heads, H)
    assert_close(found, wanted, problem[3] > 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [SPLIT, tiers.full(WHOLE)])
def test_no_bit_of_a_segment_depends_on_another_one(backend, sizes):
    q, k, v, segments, positions = attention_problem()
    grad_out = output_gradient(segments)
    rng = np.random.default_rng(5)
    theirs = (segments == 2)[..., None, None]
    other = [np.float32(np.where(theirs, 50 * rng.standard_normal(x.shape), x)) for x in (q, k, v)]
    before = sharded_attention(backend, sizes, (q, k, v, segments, positions), grad_out)
    after = sharded_attention(backend, sizes, (*other, segments, positions), grad_out)
    for mine, changed in zip(before, after, strict=True):
        np.testing.assert_array_equal(mine[segments != 2], changed[segments != 2])
        assert (mine[segments == 2] != changed[segments == 2]).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [SPLIT, tiers.full(WHOLE)])
def test_no_bit_of_a_token_depends_on_a_later_one(backend, sizes):
    q, k, v, segments, positions = attention_problem()
    grad_out = output_gradient(segments)
    later = (positions >= 3)[..., None, None]
    changed_kv = [np.float32(np.where(later, 7.0, x)) for x in (k, v)]
    before = sharded_attention(backend, sizes, (q, k, v, segments, positions), grad_out)[0]
    after = sharded_attention(backend, sizes, (q, *changed_kv, segments, positions), grad_out)[0]
    early = (positions < 3) & (segments > 0)
    np.testing.assert_array_equal(before[early], after[early])
    assert (before[positions >= 3] != after[positions >= 3]).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [SPLIT, tiers.full(WHOLE)])
def test_padding_gives_no_nan_and_no_gradient(backend, sizes):
    problem = attention_problem()
    padding = problem[3] == 0
    assert padding[4].all()  # a row of padding alone
    found = sharded_attention(backend, sizes, problem, output_gradient(problem[3]))
    assert all(np.isfinite(value).all() for value in found)
    assert all(not value[padding].any() for value in found[1:])


def test_blockwise_takes_no_gradient_from_padding():
    problem = attention_problem()
    padding = problem[3] == 0
    grad_out = output_gradient(problem[3])
    quiet = local_attention("blockwise", *problem[:3], problem[3:], grad_out)
    grad_out[padding] = 9
    loud = local_attention("blockwise", *problem[:3], problem[3:], grad_out)
    for mine, other in zip(quiet, loud, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert not np.asarray(quiet[0])[padding].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["reversed", "interleaved", "random"])
def test_the_layout_of_tokens_permutes_the_output_alone(backend, layout):
    q, k, v, segments, positions = attention_problem()
    order = {
        "reversed": np.arange(T)[::-1],
        "interleaved": np.arange(T).reshape(4, -1).T.ravel(),  # every sequence shard gets all parts
        "random": np.random.default_rng(1).permutation(T),
    }[layout]
    grad_out = output_gradient(segments)
    problem = (q, k, v, segments, positions)
    straight = sharded_attention(backend, (1, 1, 2, 4), problem, grad_out)
    moved = tuple(x[:, order] for x in problem)
    permuted = sharded_attention(backend, (1, 1, 2, 4), moved, grad_out[:, order])
    for mine, other in zip(permuted, straight, strict=True):
        assert relative_error(mine, other[:, order]) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_attention_is_within_rounding(backend):
    q, k, v, segments, positions = attention_problem()
    rounded = tuple(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    grad_out = jnp.asarray(output_gradient(segments), jnp.bfloat16)
    wanted = naive_attention(*rounded, (segments, positions), np.float64(grad_out))
    problem = (*rounded, segments, positions)
    found = sharded_attention(backend, (1, 2, 2, 2), problem, grad_out)
    assert all(value.dtype == jnp.bfloat16 for value in found)
    assert_close(found, wanted, segments > 0, tolerance=1e-2)


# ---- one device's part ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "num_tokens", "num_heads", "num_kv_heads"),
    tiers.fast(
        [("blockwise", BLOCK + 1, 6, 3), ("reference", 37, 4, 2)],
        [
            ("blockwise", 1, 2, 1),
            ("blockwise", BLOCK, 3, 3),
            ("blockwise", BLOCK + 1, 6, 3),
            ("blockwise", 37, 4, 1),
            ("reference", 37, 4, 2),
        ],
    ),
)
def test_rows_of_any_length_have_the_naive_attention(backend, num_tokens, num_heads, num_kv_heads):
    rng = np.random.default_rng(num_tokens)
    q, k, v, grad_out = (
        np.float32(rng.standard_normal((1, num_tokens, n, H)))
        for n in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    )
    ids = packed_ids([[(num_tokens + 2) // 3, num_tokens // 3]], num_tokens)
    grad_out *= (ids[0] > 0)[..., None, None]
    *found, lse = local_attention(backend, q, k, v, ids, grad_out)
    wanted = naive_attention(q, k, v, ids, grad_out)
    real = ids[0] > 0
    assert relative_error(found[0][real], wanted[0][real]) < 1e-5
    for mine, other in zip(found[1:], wanted[1:], strict=True):
        # The gradients of a segment of one token are 0.
        assert np.abs(mine - other).max() < 1e-5 * max(1, np.abs(other).max())
    first = ids[1] == 0
    scores = SCALE * (q.reshape(1, num_tokens, num_kv_heads, -1, H) * k[:, :, :, None]).sum(-1)
    np.testing.assert_allclose(
        lse[first & real], scores.reshape(lse.shape)[first & real], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("backend", "num_queries"), [("blockwise", 7), tiers.full("blockwise", 1), ("reference", 7)]
)
def test_some_queries_attend_to_the_keys_of_the_whole_row(backend, num_queries):
    q, k, v, *ids = attention_problem(num_kv_heads=4)
    grad_out = output_gradient(ids[0])
    some = np.random.default_rng(2).permutation(T)[:num_queries]
    some_ids = tuple(x[:, some] for x in ids)
    problem = (q[:, some], k, v, some_ids, grad_out[:, some])
    *found, _ = local_attention(backend, *problem, key_ids=tuple(ids))
    wanted = naive_attention(*problem, key_ids=ids)
    assert_close(found, wanted, some_ids[0] > 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-6, 300.0])
def test_scores_of_any_size_give_the_naive_attention(backend, scale):
    q, k, v, *ids = attention_problem()
    grad_out = output_gradient(ids[0])
    *found, _ = local_attention(backend, q, k, v, tuple(ids), grad_out, scale=scale)
    wanted = naive_attention(q, k, v, ids, grad_out, scale=scale)
    # exp() turns the rounding of scores in the thousands into 1e-4 of the weights.
    assert_close(found, wanted, ids[0] > 0, tolerance=1e-5 if scale < 1 else 5e-4)


NUM_RANDOM = 23


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(-4, 12), max_size=NUM_RANDOM),
    seed=st.integers(0, 2**31),
    is_shuffled=st.booleans(),
    window=st.sampled_from([None, 1, 2, 4, 7]),
)
def test_blockwise_equals_the_naive_attention_on_random_rows(lengths, seed, is_shuffled, window):
    rng = np.random.default_rng(seed)
    q, k, v, grad_out = np.float32(rng.standard_normal((4, 1, NUM_RANDOM, 2, 3)))
    ends = itertools.accumulate(map(abs, lengths))
    fitting = [n for n, end in zip(lengths, ends, strict=True) if end <= NUM_RANDOM]
    segments, positions = packed_ids([fitting], NUM_RANDOM)
    if is_shuffled:  # ids in another order than the tokens, with holes, and tokens in any order
        names = np.int32([0, *(3 + rng.permutation(2 * NUM_RANDOM))])
        order = rng.permutation(NUM_RANDOM)
        segments, positions = names[segments][:, order], positions[:, order]
    ids = segments, positions
    *found, _ = local_attention("blockwise", q, k, v, ids, grad_out, window=window)
    grad_out = grad_out * (ids[0] > 0)[..., None, None]
    wanted = naive_attention(q, k, v, ids, grad_out, window=window)
    for mine, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)


# ---- what blockwise does not do ------------------------------------------------------------------


def num_pairs(ids, window=None) -> int:
    """Pairs of blocks that are computed for the first row."""
    row = blockwise._id_blocks(tuple(jnp.asarray(x[0]) for x in ids))
    return int(blockwise._needed(row, row, window).sum())


def test_work_is_that_of_the_segments():
    num_blocks = 12
    size = num_blocks * BLOCK

    def pairs(*lengths):
        return num_pairs(packed_ids([lengths], size))

    assert pairs(size) == num_blocks * (num_blocks + 1) // 2
    assert pairs(*[BLOCK] * num_blocks) == num_blocks
    assert pairs(*[3 * BLOCK] * 4) == 4 * (1 + 2 + 3)
    assert pairs(*[1] * size) == num_blocks
    assert pairs(2 * BLOCK) == 3  # the rest is padding
    assert pairs() == 0
    assert pairs(BLOCK + 1, -BLOCK, BLOCK) == 3 + 3  # in blocks 0 and 1, and 2 and 3
    assert pairs(BLOCK + 1, 2 * BLOCK - 1) == 1 + 2 + 2  # block 1 has the end of the first

    natural = packed_ids([[5 * BLOCK, 7 * BLOCK]], size)
    blocks = np.arange(size).reshape(num_blocks, BLOCK)
    interleaved = blocks.reshape(3, 4, BLOCK).swapaxes(0, 1).ravel()
    assert num_pairs([x[:, interleaved] for x in natural]) == num_pairs(natural) == 15 + 28


def test_work_is_that_of_the_window():
    num_blocks = 12
    one = packed_ids([[num_blocks * BLOCK]], num_blocks * BLOCK)
    assert num_pairs(one, window=1) == num_blocks
    # The first query of a block sees the end of the block before, and in two tokens more its end.
    assert num_pairs(one, window=2) == num_pairs(one, window=BLOCK + 1) == 2 * num_blocks - 1
    assert num_pairs(one, window=BLOCK + 2) == 3 * num_blocks - 3
    two = packed_ids([[5 * BLOCK, 7 * BLOCK]], num_blocks * BLOCK)
    assert num_pairs(two, window=BLOCK) == 2 * num_blocks - 2
    assert num_pairs(two, window=num_blocks * BLOCK) == num_pairs(two)


def test_blocks_of_other_segments_are_not_even_read():
    q, k, v, *ids = attention_problem()
    segments, positions = packed_ids([[2 * BLOCK, T - 2 * BLOCK]] * B, T)
    k[:, : 2 * BLOCK], v[:, : 2 * BLOCK] = np.nan, np.nan  # 0 x nan is nan
    q[:, : 2 * BLOCK] = np.nan
    found = local_attention("blockwise", q, k, v, (segments, positions), output_gradient(segments))
    assert all(np.isfinite(value[:, 2 * BLOCK :]).all() for value in found)
    assert all(np.isnan(value[:, : 2 * BLOCK]).any() for value in found)


def equations(jaxpr):
    """All equations, those of inner functions and loops included."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for inner in jax.tree.leaves(eqn.params, is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                yield from equations(inner)


def is_jaxpr(x) -> bool:
    return hasattr(getattr(x, "jaxpr", x), "eqns")


def test_a_row_of_8192_tokens_needs_memory_for_its_tokens_and_not_their_square(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 256)
    size, heads, kv_heads, head_dim = 8192, 4, 2, 16
    rng = np.random.default_rng(0)
    q, k, v = (
        np.float32(rng.standard_normal((1, size, n, head_dim))) for n in (heads, kv_heads, kv_heads)
    )
    ids = packed_ids([[5000, 1, 2000, 1100]], size)
    # The reference attends for some queries; the loss reads these alone.
    some = np.sort(np.append(rng.choice(8000, 62, replace=False), [4999, 5000]))
    grad_out = np.zeros_like(q)
    grad_out[:, some] = rng.standard_normal(q[:, some].shape)

    problem = (q, k, v, ids, grad_out)
    lowered = local_attention.lower("blockwise", *problem)
    of_all_scores = size * size * heads * 4
    assert lowered.compile().memory_analysis().temp_size_in_bytes < of_all_scores / 40
    jaxpr = jax.make_jaxpr(functools.partial(local_attention, "blockwise"))(*problem)
    sizes = [math.prod(v.aval.shape) for eqn in equations(jaxpr) for v in eqn.outvars]
    assert len(sizes) > 100 and max(sizes) <= q.size < size * size / 100

    *found, lse = local_attention("blockwise", *problem)
    some_ids = tuple(x[:, some] for x in ids)
    of_some = (q[:, some], k, v, some_ids, grad_out[:, some])
    *wanted, wanted_lse = local_attention("reference", *of_some, key_ids=ids)
    assert relative_error(found[0][:, some], wanted[0]) < 1e-5
    assert relative_error(found[1][:, some], wanted[1]) < 1e-5
    assert relative_error(found[2], wanted[2]) < 1e-5
    assert relative_error(found[3], wanted[3]) < 1e-5
    real = some_ids[0] > 0
    assert relative_error(np.asarray(lse)[:, some][real], np.asarray(wanted_lse)[real]) < 1e-5


# ---- collectives, and what the backward pass keeps -----------------------------------------------


def primitives(function, *args, sizes) -> list[str]:
    with jax.set_mesh(mesh_of(sizes)):
        jaxpr = jax.make_jaxpr(function)(*args)
    return [eqn.primitive.name for eqn in equations(jaxpr)]


def loss(q, k, v, segments, positions, backend="blockwise"):
    out = packed_attention(q, k, v, segments, positions, scale=SCALE, backend=backend)
    return (out * jnp.float32(2)).sum()


COLLECTIVES = (
    "all_gather",
    "reduce_scatter",
    "psum",
    "ppermute",
    "all_to_all",
    "all_gather_invariant",
)


def test_keys_and_values_travel_in_the_compute_dtype_and_only_over_sequence():
    problem = attention_problem()
    rounded = (*(jnp.asarray(x, jnp.bfloat16) for x in problem[:3]), *problem[3:])
    gradients = jax.grad(loss, argnums=(0, 1, 2))
    names = primitives(gradients, *rounded, sizes=(2, 2, 2, 1))
    assert not set(names) & set(COLLECTIVES)

    with jax.set_mesh(mesh_of((2, 1, 1, 4))):
        found = [
            (eqn.primitive.name, [(v.aval.dtype.name, v.aval.shape) for v in eqn.invars])
            for eqn in equations(jax.make_jaxpr(gradients)(*rounded))
            if eqn.primitive.name in COLLECTIVES
        ]
    shard, row = (4, 4, K, H), (4, T, K, H)
    ids = [("all_gather", [("int32", shard[:2])])] * 2
    gathers = sorted([*ids, *[("all_gather", [("bfloat16", shard)])] * 2])
    gathered = [(name, [v]) for name, vs in found if name == "all_gather" for v in vs]
    assert sorted(gathered) == sorted(gathers * 2)  # forward and backward
    scattered = [(name, v) for name, vs in found if name == "reduce_scatter" for v in vs]
    assert scattered == [("reduce_scatter", ("bfloat16", row))] * 2
    assert {name for name, _ in found} == {"all_gather", "reduce_scatter"}


@pytest.mark.parametrize(
    ("remat", "num_regions"),
    # forward, forward again, backward
    [
        ("full", 3),
        tiers.full("attention", 3),
        tiers.full("attention_lse", 3),
        tiers.full("none", 2),
        ("attn", 2),
    ],
)
def test_the_backward_pass_attends_again_only_where_nothing_was_kept(remat, num_regions):
    q, k, v, *ids = attention_problem()

    def layer(q, scale):
        return packed_attention(q * scale, k, v, *ids, scale=SCALE, backend="blockwise"), None

    def last(scales, q):
        policy = compute.policy(remat)
        body = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        return jnp.square(jax.lax.scan(body, q, scales)[0]).sum()

    args = (np.float32([1.1, 0.9]), q)
    names = primitives(jax.grad(last), *args, sizes=(8, 1, 1, 1))
    assert names.count("while") == num_regions  # each has one over the blocks that it needs
    if remat in ("full", "attn"):
        with jax.set_mesh(mesh_of((8, 1, 1, 1))):
            compiled = jax.jit(jax.grad(last)).lower(*args).compile()
        # Two in a region, since XLA removes the one over the single row of a device; and two over
        # the layers, forward and back.
        assert compiled.as_text().count(" while(") == 2 * num_regions + 2
