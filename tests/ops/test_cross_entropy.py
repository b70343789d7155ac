"""Cross-entropy against float64, values and gradients, on every mesh of 8 devices.

Shape suffixes: B rows, T tokens, D model, V vocabulary.
"""

import functools
import itertools
import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jax_sft.ops import cross_entropy as ce
from jax_sft.ops import head_chunks
from jax_sft.sharding import rules
from jax_sft.sharding.mesh import make_mesh, single_device_mesh
from tests import tiers

MESHES = [m for m in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(m) == 8]
TENSOR, MIXED = (1, 1, 8, 1), (1, 2, 2, 2)
OTHERS = [tiers.full(sizes) for sizes in MESHES if sizes not in (TENSOR, MIXED)]
B, T, D, V = 8, 24, 16, 40
CHUNKS = 14, 7  # divide the tokens of a device on none of the meshes: 24, 48, 96 or 192
NUM_SOURCES = 5  # the fourth has no token
QUICK = {"xla_backend_optimization_level": 0}  # of the machine code alone: compiles twice as fast
ALL: dict[str, Any] = {"z_loss": 1e-2, "label_smoothing": 0.1, "soft_cap": 2.0}
PLAIN_AND_ALL = pytest.mark.parametrize(
    "options", [tiers.full({}), ALL], ids=["plain", "all options"]
)


def mesh_of(sizes):
    return make_mesh(dict(zip(rules.AXES, sizes, strict=True)))


def relative_error(found, wanted) -> float:
    """The largest error against the largest value."""
    wanted = np.asarray(wanted, np.float64)
    return np.abs(np.asarray(found, np.float64) - wanted).max() / np.abs(wanted).max()


def loss_problem(scale: float = 1.0, shape=(B, T, D, V)):
    rng, (rows, tokens, features, ids) = np.random.default_rng(0), shape
    hidden_BTD = np.float32(scale * rng.standard_normal((rows, tokens, features)))
    head_VD = np.float32(rng.standard_normal((ids, features)))
    targets_BT = rng.integers(0, ids, (rows, tokens)).astype(np.int32)
    half = rng.choice([1.0, 0.5], (rows, tokens))
    weights_BT = np.float32(rng.integers(0, 2, (rows, tokens)) * half)
    return hidden_BTD, head_VD, targets_BT, weights_BT


def some_sources():
    return np.random.default_rng(1).choice([0, 1, 2, 4], (B, T)).astype(np.int32)


def with_weights(weights_BT):
    return (*loss_problem()[:3], np.float32(weights_BT))


# ---- the truth, twice: NumPy with gradients by hand, and JAX's derivative of the formula ---------


def dense_loss(hidden_BTD, head_VD, targets_BT, weights_BT):
    """(loss, weight, correct, gradient of hidden, gradient of head), all in float64."""
    hidden_BTD, head_VD, weights_BT = (
        np.asarray(x, np.float64) for x in (hidden_BTD, head_VD, weights_BT)
    )
    logits_BTV = hidden_BTD @ head_VD.T
    shifted_BTV = logits_BTV - logits_BTV.max(-1, keepdims=True)
    exp_BTV = np.exp(shifted_BTV)
    probs_BTV = exp_BTV / exp_BTV.sum(-1, keepdims=True)
    is_target_BTV = np.arange(len(head_VD)) == targets_BT[..., None]
    losses_BT = np.log(exp_BTV.sum(-1)) - (shifted_BTV * is_target_BTV).sum(-1)
    correct_BT = logits_BTV.argmax(-1) == targets_BT
    grad_BTV = (probs_BTV - is_target_BTV) * weights_BT[..., None]
    return (
        (losses_BT * weights_BT).sum(),
        weights_BT.sum(),
        (correct_BT * weights_BT).sum(),
        grad_BTV @ head_VD,
        np.tensordot(grad_BTV, hidden_BTD, ((0, 1), (0, 1))),
    )


def dense_loss_with_options(problem, z_loss=0.0, label_smoothing=0.0, soft_cap=math.inf):
    """(loss, gradient of hidden, gradient of head): the formulas as the papers write them."""
    with jax.enable_x64(True):
        as_float64 = [jnp.asarray(x, jnp.float64) for x in problem[:2]]
        options = jnp.asarray([z_loss, label_smoothing, min(soft_cap, 1e9)], jnp.float64)
        value, grads = papers_loss_and_gradients(*as_float64, *problem[2:], options)
        return jax.device_get((value, *grads))


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1))
def papers_loss_and_gradients(hidden_BTD, head_VD, targets_BT, weights_BT, options):
    z_loss, label_smoothing, soft_cap = options
    logits_BTV = soft_cap * jnp.tanh(hidden_BTD @ head_VD.T / soft_cap)
    num_ids = len(head_VD)
    wanted_BTV = jax.nn.one_hot(targets_BT, num_ids, dtype=jnp.float64) * (1 - label_smoothing)
    log_probs_BTV = jax.nn.log_softmax(logits_BTV)
    losses_BT = -((wanted_BTV + label_smoothing / num_ids) * log_probs_BTV).sum(-1)
    losses_BT += z_loss * jnp.log(jnp.exp(logits_BTV).sum(-1)) ** 2
    return (losses_BT * weights_BT).sum()


# ---- ours ----------------------------------------------------------------------------------------


@functools.cache  # compiled once for each mesh, setting and what a test has `changed`
def compiled(
    sizes,
    chunks=CHUNKS,
    sources=False,
    gradients=True,
    scale=1.0,
    counts=True,
    changed=(),
    **options,
):
    num_sources = (NUM_SOURCES,) if sources else ()

    def loss(hidden_BTD, head_VD, weights_BT, targets_BT, *sources_BT):
        of_tokens = (targets_BT, weights_BT, *sources_BT)
        loss, *others = ce.cross_entropy(hidden_BTD, head_VD, *of_tokens, *num_sources, **options)
        return scale * loss, others if counts else ()

    run = jax.value_and_grad(loss, (0, 1, 2), has_aux=True) if gradients else loss
    return jax.jit(run, compiler_options=QUICK)


def on_mesh(
    sizes,
    problem,
    *sources_BT,
    chunks: tuple[int, ...] = CHUNKS,
    gradients: bool = True,
    **settings: Any,
) -> tuple[Any, ...]:
    """(loss, weight, correct[, two more by source], gradients of hidden and head) of ours."""
    hidden_BTD, head_VD, targets_BT, weights_BT = problem
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh_of(sizes)):
        patch.setitem(head_chunks.CHUNKS, "cpu", chunks)
        run = compiled(sizes, chunks, bool(sources_BT), gradients, **settings)
        found = run(hidden_BTD, head_VD, weights_BT, targets_BT, *sources_BT)
        (value, others), grads = jax.device_get(found if gradients else (found, ()))
    assert not gradients or not grads[2].any()  # weights are data
    return value, *others, *grads[:2]


@pytest.mark.parametrize("sizes", [TENSOR, MIXED, *OTHERS])
def test_sums_and_gradients_equal_the_dense_ones(sizes):
    problem, sources_BT = loss_problem(), some_sources()
    wanted, found = dense_loss(*problem), on_mesh(sizes, problem, sources_BT)
    assert relative_error(found[0], wanted[0]) < 1e-6
    assert found[1] == wanted[1] and found[2] == wanted[2]
    assert relative_error(found[5], wanted[3]) < 1e-5
    assert relative_error(found[6], wanted[4]) < 1e-5
    for source in range(NUM_SOURCES):
        alone = np.where(sources_BT == source, problem[3], np.float32(0))
        wanted_loss, wanted_weight, *_ = dense_loss(*problem[:3], alone)
        assert found[3][source] == pytest.approx(wanted_loss, rel=1e-6)
        assert found[4][source] == wanted_weight
    assert found[3].tolist()[3] == 0.0 and found[3].dtype == found[4].dtype == np.float32


def test_one_device_gathers_and_scatters_nothing():
    hidden_BTD, head_VD, targets_BT, weights_BT = loss_problem()
    found = {}
    for axis, mesh in (("none", single_device_mesh()), ("fsdp", mesh_of((1, 8, 1, 1)))):
        with jax.set_mesh(mesh):
            lowered = compiled((), CHUNKS).lower(hidden_BTD, head_VD, weights_BT, targets_BT)
        found[axis] = [name in lowered.as_text() for name in ("all_gather", "reduce_scatter")]
    assert found == {"none": [False, False], "fsdp": [True, True]}


def test_every_mesh_of_eight_devices_is_tried():
    assert len(set(MESHES)) == 20


def test_the_error_is_below_a_millionth_at_a_real_vocabulary():
    problem = loss_problem(scale=0.2, shape=(4, 52, 256, 32_768))  # logits of -3.2 to 3.2
    wanted, found = dense_loss(*problem), on_mesh(MIXED, problem, chunks=(32,))
    assert np.count_nonzero(problem[3]) > 80
    # In norm: float32 logits alone give the gradient of a single number an error of 1e-6.
    pairs = [(np.asarray(found[i], np.float64), wanted[i]) for i in (0, 3, 4)]
    errors = [np.linalg.norm(ours - truth) / np.linalg.norm(truth) for ours, truth in pairs]
    assert max(errors) < 1e-6, errors
    assert found[2] == wanted[2]


@pytest.mark.parametrize("embed", [("fsdp",), tiers.full(("fsdp", "sequence"))])
def test_the_head_may_be_split_over_either_set_of_axes(embed, monkeypatch):
    monkeypatch.setitem(rules.RULES, "embed", embed)
    problem = loss_problem()
    wanted, found = dense_loss(*problem), on_mesh(MIXED, problem, changed=embed)
    assert max(relative_error(found[i], wanted[i]) for i in (0, 3, 4)) < 1e-5


# ---- options -------------------------------------------------------------------------------------

SOME = [names for n in (1, 2) for names in itertools.combinations(ALL, n)]


@pytest.mark.parametrize("names", [tuple(ALL), *map(tiers.full, SOME)], ids="+".join)
def test_options_and_their_combinations_follow_the_papers(names):
    problem, options = loss_problem(), {name: ALL[name] for name in names}
    wanted, plain = dense_loss_with_options(problem, **options), dense_loss(*problem)
    found = on_mesh(MIXED, problem, **options)
    assert relative_error(found[0], wanted[0]) < 1e-6
    assert found[1] == plain[1] and found[2] == plain[2]
    assert relative_error(found[3], wanted[1]) < 1e-5
    assert relative_error(found[4], wanted[2]) < 1e-5
    assert relative_error(wanted[2], plain[4]) > 1e-2  # the options do something here


@PLAIN_AND_ALL
def test_the_loss_without_gradients_is_the_same(options):
    problem = loss_problem()
    found = on_mesh(MIXED, problem, gradients=False, **options)
    np.testing.assert_array_equal(found, on_mesh(MIXED, problem, **options)[:3])


@PLAIN_AND_ALL
@pytest.mark.parametrize("sizes", [TENSOR, tiers.full(MIXED)])
def test_padding_of_the_vocabulary_changes_nothing(sizes, options):
    num_ids = 33  # of 40: on TENSOR one device has padding alone
    hidden_BTD, head_VD, *of_tokens = loss_problem(shape=(B, T, D, num_ids))
    wanted = dense_loss_with_options((hidden_BTD, head_VD, *of_tokens), **options)
    correct = dense_loss(hidden_BTD, head_VD, *of_tokens)[2]
    stored_VD = np.pad(head_VD, [(0, V - num_ids), (0, 0)])
    found = on_mesh(sizes, (hidden_BTD, stored_VD, *of_tokens), num_ids=num_ids, **options)
    assert relative_error(found[0], wanted[0]) < 1e-6 and found[2] == correct
    assert relative_error(found[3], wanted[1]) < 1e-5
    assert relative_error(found[4][:num_ids], wanted[2]) < 1e-5
    assert not found[4][num_ids:].any()


@pytest.mark.parametrize("sizes", [tiers.full((8, 1, 1, 1)), MIXED])
def test_asking_for_the_loss_of_each_source_changes_nothing_else(sizes):
    problem = loss_problem()
    asked, plain = on_mesh(sizes, problem, some_sources()), on_mesh(sizes, problem)
    for with_sources, without in zip((*asked[:3], *asked[5:]), plain, strict=True):
        np.testing.assert_array_equal(with_sources, without)


def test_the_gradient_of_a_multiple_is_the_multiple_of_the_gradient():
    problem, times = loss_problem(), np.float32(0.25)
    whole, part = on_mesh(MIXED, problem), on_mesh(MIXED, problem, scale=0.25)
    for index in (0, 3, 4):
        np.testing.assert_array_equal(part[index], whole[index] * times)


# ---- which tokens are computed -------------------------------------------------------------------


def share_of_tokens(share: float) -> np.ndarray:
    return np.random.default_rng(2).permutation(np.arange(B * T) < share * B * T).reshape(B, T)


COUNTS = [0, 1, 6, 7, 8, 14, 15, 24]  # of trained tokens, about the edges of chunks of 7
SHARES = {
    "one token": np.arange(B * T).reshape(B, T) == 100,
    "10%": share_of_tokens(0.1),
    "all": np.ones((B, T)),
    "another number in each row": np.arange(T)[::-1] < np.array(COUNTS)[:, None],
    "fractions": share_of_tokens(0.4) * np.random.default_rng(3).random((B, T)),
}


@pytest.mark.parametrize("sizes", [tiers.full((8, 1, 1, 1)), MIXED])
@pytest.mark.parametrize("weights_BT", SHARES.values(), ids=SHARES)
def test_any_share_of_trained_tokens_gives_the_dense_sums(sizes, weights_BT):
    problem = with_weights(weights_BT)
    wanted, found = dense_loss(*problem), on_mesh(sizes, problem)
    assert relative_error(found[0], wanted[0]) < 1e-6
    np.testing.assert_allclose(found[1:3], wanted[1:3], rtol=1e-6)
    assert relative_error(found[3], wanted[3]) < 1e-5
    assert relative_error(found[4], wanted[4]) < 1e-5


@PLAIN_AND_ALL
def test_a_batch_without_weights_has_no_loss_and_no_gradient(options):
    found = on_mesh(MIXED, with_weights(np.zeros((B, T))), **options)
    assert all(not np.any(value) for value in found)


def test_tokens_without_weight_get_no_gradient():
    problem = loss_problem()
    grad_BTD = on_mesh(MIXED, problem)[3]
    assert not grad_BTD[problem[3] == 0].any()
    assert grad_BTD[problem[3] > 0].any(axis=-1).all()


def test_what_a_token_without_weight_holds_changes_no_bit():
    hidden_BTD, head_VD, targets_BT, weights_BT = problem = loss_problem()
    idle = weights_BT == 0
    strange_BTD = np.where(idle[..., None], np.float32(np.nan), hidden_BTD)
    for target in (-1, V, -(2**31), 2**31 - 1):
        strange = strange_BTD, head_VD, np.where(idle, np.int32(target), targets_BT), weights_BT
        for found, wanted in zip(on_mesh(MIXED, strange), on_mesh(MIXED, problem), strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_the_same_inputs_give_the_same_bits():
    first, *others = (on_mesh(MIXED, loss_problem()) for _ in range(4))
    for other in others:
        for one, same in zip(first, other, strict=True):
            np.testing.assert_array_equal(one, same)


def test_trained_tokens_come_first_in_their_order_and_no_place_twice():
    weights_N = np.array([0, 1, 0, 0.5, 1, 0, 0, 1], np.float32)
    index_M = np.asarray(ce.trained_first(jnp.asarray(weights_N), chunk=3))
    assert index_M[:4].tolist() == [1, 3, 4, 7] and len(index_M) == 9
    assert (np.diff(index_M) > 0).all() and index_M[4] >= 8
    assert ce.trained_first(jnp.ones(8), 4).tolist() == list(range(8))


@pytest.mark.parametrize("sizes", [tiers.full((8, 1, 1, 1)), (4, 1, 2, 1)])
def test_each_device_computes_as_many_chunks_as_its_trained_tokens_fill(sizes, monkeypatch):
    computed, chunk_of = Counter(), ce._chunk

    def counting(*arguments):
        device = jax.lax.axis_index(rules.AXES)
        jax.debug.callback(lambda device: computed.update([int(device)]), device)
        return chunk_of(*arguments)

    monkeypatch.setattr(ce, "_chunk", counting)
    on_mesh(sizes, with_weights(SHARES["another number in each row"]), changed="counting")
    jax.effects_barrier()
    rows = B // sizes[0]
    trained = [sum(COUNTS[first : first + rows]) for first in range(0, B, rows)]
    sevens = [-(-count // 7) for count in trained for _ in range(sizes[2])]
    wanted = [number // 2 + number % 2 for number in sevens]
    assert [computed[device] for device in range(8)] == wanted
    assert min(wanted) == int(rows > 1)  # a device without trained tokens computes nothing


@pytest.mark.parametrize(
    "trained, counts",
    [(0, [0, 0, 0]), (1, [0, 0, 1]), (7, [0, 0, 1]), (8, [0, 1, 0]), (14, [0, 1, 0])]
    + [(15, [0, 1, 1]), (21, [0, 1, 1]), (22, [1, 0, 0]), (28, [1, 0, 0]), (76, [2, 1, 1])],
)
def test_chunks_are_as_few_as_leave_less_than_the_smallest_empty(trained, counts):
    assert head_chunks.num_chunks(trained, (28, 14, 7)) == counts
    of_array = head_chunks.num_chunks(jnp.asarray(trained), (28, 14, 7))
    assert [int(count) for count in of_array] == counts


@pytest.mark.parametrize("chunks", [tiers.full((1,)), tiers.full((4096,)), (16, 4, 2)])
def test_the_size_of_chunks_changes_rounding_alone(chunks):
    problem = loss_problem()
    wanted, found = dense_loss(*problem), on_mesh(MIXED, problem, chunks=chunks)
    assert relative_error(found[0], wanted[0]) < 1e-6 and found[2] == wanted[2]
    assert relative_error(found[4], wanted[4]) < 1e-5


@pytest.mark.parametrize(
    "num_ids, num_tokens, chunks",
    [
        (152_064, 8192, (1024, 512, 256)),
        (19_008, 131_072, (1024, 512, 256)),
        (152_064, 300, (256,)),
        (152_064, 100, (100,)),
        (600_000, 8192, (256,)),
        (2_000_000, 8192, (128,)),
    ],
)
def test_the_logits_of_a_chunk_stay_below_a_gibibyte(num_ids, num_tokens, chunks):
    assert head_chunks.chunk_sizes(num_ids, num_tokens, "gpu") == chunks
    assert 4 * num_ids * chunks[0] <= 2**30


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_each_size_of_chunks_is_a_multiple_of_the_next(platform):
    sizes = head_chunks.CHUNKS[platform]
    assert all(large % small == 0 for large, small in itertools.pairwise(sizes))


# ---- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [TENSOR, MIXED])
def test_huge_logits_do_not_overflow(sizes):
    problem = loss_problem(scale=1e4)
    wanted, found = dense_loss(*problem), on_mesh(sizes, problem)
    assert wanted[0] / wanted[1] > 1e4
    assert relative_error(found[0], wanted[0]) < 1e-6 and found[2] == wanted[2]
    assert all(np.isfinite(value).all() for value in found)


@pytest.mark.parametrize("head", [tiers.full(jnp.float32), jnp.bfloat16])
def test_bfloat16_loss_is_rounded_in_its_inputs_alone(head):
    hidden_BTD, head_VD, *of_tokens = loss_problem()
    hidden_BTD, rounded = jnp.asarray(hidden_BTD, jnp.bfloat16), jnp.asarray(head_VD, jnp.bfloat16)
    wanted = dense_loss(hidden_BTD, rounded, *of_tokens)
    found = on_mesh(MIXED, (hidden_BTD, jnp.asarray(head_VD, head), *of_tokens))
    assert relative_error(found[0], wanted[0]) < 1e-6 and found[2] == wanted[2]
    assert found[3].dtype == jnp.bfloat16 and found[4].dtype == head
    assert relative_error(found[3], wanted[3]) < 2e-2
    assert relative_error(found[4], wanted[4]) < 1e-2


def test_a_model_that_prefers_nothing_is_not_right_everywhere():
    hidden_BTD, *others = loss_problem()
    found = on_mesh(TENSOR, (0 * hidden_BTD, *others))
    assert found[2] == (others[2] * (others[1] == 0)).sum()  # as argmax would have it


# ---- what the program holds and sends ------------------------------------------------------------

LARGE = (8, 512, 16, 512)  # logits of all tokens on a device: 4096 x 64 over 8 devices of `tensor`


def traced(sizes, dtype=jnp.float32, shape=LARGE, **settings):
    """The program before it is compiled; the head is float32 and sharded as it is stored."""
    rows, tokens, features, ids = shape
    mesh = mesh_of(sizes)

    def array(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rules.sharding(mesh, *axes))

    hidden_BTD = array((rows, tokens, features), dtype, "batch", "residual", "features")
    head_VD = array((ids, features), jnp.float32, "vocab", "embed")
    of_tokens = (rows, tokens), ("batch", "token")
    weights_BT, targets_BT, sources_BT = (
        array(of_tokens[0], kind, *of_tokens[1]) for kind in (jnp.float32, jnp.int32, jnp.int32)
    )
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
        patch.setitem(head_chunks.CHUNKS, "cpu", CHUNKS)
        run = compiled(sizes, CHUNKS, **settings)
        sources = (sources_BT,) if settings.get("sources") else ()
        return run.trace(hidden_BTD, head_VD, weights_BT, targets_BT, *sources)


def equations(jaxpr, in_loop: bool = False):
    """(equation, whether it is within a loop) of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation, in_loop
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner, in_loop or equation.primitive.name == "while")


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all options"])
def test_no_array_holds_the_logits_of_all_tokens(gradients, options):
    program = traced(TENSOR, gradients=gradients, sources=True, **options).jaxpr.jaxpr
    sizes = [getattr(out.aval, "size", 0) for eqn, _ in equations(program) for out in eqn.outvars]
    assert max(sizes) == 4096 * 16  # the hidden states
    assert {chunk * 64 for chunk in CHUNKS} <= {*sizes}  # the logits of a chunk


@pytest.mark.parametrize("sizes", [(2, 2, 2, 1), MIXED])
def test_only_small_sums_over_tensor_are_sent_within_the_loop(sizes):
    sent = Counter()
    for equation, in_loop in equations(traced(sizes, jnp.bfloat16).jaxpr.jaxpr):
        name = equation.primitive.name
        axes = equation.params.get("axes") or equation.params.get("axis_name") or ()
        if name in ("axis_index", "pvary") or not any(axis in rules.AXES for axis in axes):
            continue
        if in_loop:
            assert axes == ("tensor",) and equation.invars[0].aval.size <= 2 * max(CHUNKS), equation
        else:
            sent[name, axes, str(equation.invars[0].aval.dtype)] += 1
    embed = rules.RULES["embed"]
    assert sent.pop(("all_gather", embed, "bfloat16")) == 1  # the head, in the compute dtype
    assert sent.pop(("reduce_scatter", embed, "float32")) == 1  # its gradient
    for name in ("all_gather", "reduce_scatter"):  # hidden states and their gradient
        assert sent.pop((name, ("tensor",), "bfloat16")) == 1
    assert all(name.startswith("psum") for name, *_ in sent)


def compiled_text(program) -> str:
    return program.lower().compile().as_text() or ""


def test_the_compiler_adds_no_gather_and_no_scatter():
    text = compiled_text(traced(MIXED))
    names = ("all-gather", "reduce-scatter", "all-to-all", "collective-permute")
    assert [text.count(f" {name}(") for name in names] == [2, 2, 0, 0]


def test_counting_right_predictions_costs_nothing_where_it_is_not_asked_for():
    counting = f" s32[{CHUNKS[0]}]{{0}} all-reduce("  # over tensor, in each chunk
    assert counting in compiled_text(traced(TENSOR))
    assert counting not in compiled_text(traced(TENSOR, counts=False))
