"""The schedule and AdamW against their formulas, moments in bfloat16, and the update's memory."""

import contextlib
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_sft import config, hardware, settings
from jax_sft.checkpoint import saving
from jax_sft.models import qwen2
from jax_sft.planning import targets
from jax_sft.sharding.mesh import make_mesh, single_device_mesh
from jax_sft.training import optim, program, state
from jax_sft.validate import validate
from jax_sft.weights import placement
from jax_sft.weights.param_spec import ParamSpec

STEPS = 50


def options(**changes):
    optimizer = config.default().optimizer
    optimizer.learning_rate, optimizer.warmup = 3e-4, 0.1
    for key, value in changes.items():
        optimizer[key] = value
    return optimizer


def rates(optimizer, num_steps: int = STEPS) -> np.ndarray:
    """Learning rates of steps 0..num_steps, as the compiled step computes them."""
    numbers = optim.hyperparams(optimizer, num_steps)
    steps = np.arange(num_steps + 1)
    return np.asarray(jax.vmap(jax.jit(optim.learning_rate), in_axes=(None, 0))(numbers, steps))


def formula(name: str, step: int, warmup: int, floor: float, decay_steps: float) -> float:
    """Share of the highest rate."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / (STEPS - warmup)
    if name == "cosine":
        return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2
    if name == "linear":
        return 1 - (1 - floor) * done
    if name == "wsd":
        return 1 - (1 - floor) * max(0.0, (step - STEPS + decay_steps) / decay_steps)
    return 1.0


@pytest.mark.parametrize("name", settings.SCHEDULES)
@pytest.mark.parametrize(("warmup", "warmup_steps"), [(0.0, 0), (0.1, 5), (1.0, 1), (12.0, 12)])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_the_schedule_follows_its_formula(name, warmup, warmup_steps, floor):
    optimizer = options(schedule=name, warmup=warmup, final_ratio=floor, decay_fraction=0.3)
    assert optim.warmup_steps(optimizer, STEPS) == warmup_steps
    wanted = [3e-4 * formula(name, step, warmup_steps, floor, 15) for step in range(STEPS + 1)]
    np.testing.assert_allclose(rates(optimizer), wanted, rtol=1e-6, atol=1e-6 * 3e-4)


@pytest.mark.parametrize("name", settings.SCHEDULES)
def test_no_step_trains_at_zero_and_the_end_is_final_ratio(name):
    found = rates(options(schedule=name))
    assert (found[:STEPS] > 0).all() and found.max() == np.float32(3e-4)
    assert found[STEPS] == pytest.approx(3e-4 if name == "constant" else 3e-5, rel=1e-6)
    assert (np.diff(found[:6]) > 0).all() and (np.diff(found[5:]) <= 0).all()


@pytest.mark.parametrize("name", settings.SCHEDULES)
def test_a_run_of_one_step_trains(name):
    assert rates(options(schedule=name, warmup=0.03), num_steps=1)[0] == np.float32(3e-4)
    assert rates(options(schedule=name, warmup=100.0), num_steps=1)[0] > 0


@pytest.mark.parametrize("name", settings.SCHEDULES)
@pytest.mark.parametrize("warmup", [STEPS, 100, 1e12])
def test_a_warmup_longer_than_the_run_keeps_its_ramp_and_says_so(name, warmup):
    optimizer = options(schedule=name, warmup=float(warmup))
    wanted = 3e-4 * (np.arange(STEPS) + 1) / (warmup + 1)
    np.testing.assert_allclose(rates(optimizer)[:STEPS], wanted, rtol=1e-6)
    (warning,) = optim.warnings(optimizer, STEPS)
    assert "optimizer.warmup" in warning and f"{wanted[-1]:.2e} at its last step" in warning


def test_only_a_rate_that_is_never_reached_is_warned_of():
    for changes in ({}, {"warmup": STEPS - 1.0}, {"schedule": "wsd"}, {"decay_fraction": 1.0}):
        optimizer = options(**changes)
        assert rates(optimizer).max() == np.float32(3e-4) and not optim.warnings(optimizer, STEPS)
    overlap = options(schedule="wsd", warmup=0.5, decay_fraction=0.8)
    assert rates(overlap).max() < 0.99 * 3e-4
    (warning,) = optim.warnings(overlap, STEPS)
    assert "optimizer.decay_fraction = 0.8" in warning


def test_wsd_stays_up_until_its_decay():
    found = rates(options(schedule="wsd", decay_fraction=0.2))
    assert (found[5:41] == np.float32(3e-4)).all() and (np.diff(found[40:]) < 0).all()


def test_the_rate_is_exact_at_large_steps():
    optimizer = options(schedule="linear", warmup=0.0, final_ratio=0.0)
    rate = optim.learning_rate(optim.hyperparams(optimizer, 1_000_000), jnp.int32(999_999))
    assert float(rate) == pytest.approx(3e-10, rel=0.05)


ROWS = (
    ParamSpec("embed.table", "embed", "vocab embed -> vocab embed"),
    ParamSpec("layers.q.kernel", "q.{layers}", "(heads head_dim) embed -> embed heads head_dim"),
    ParamSpec("layers.q.bias", "b.{layers}", "(heads head_dim) -> heads head_dim"),
    ParamSpec("layers.norm.scale", "n.{layers}", "norm -> norm"),
)
DIMS = {"vocab": 5, "embed": 4, "norm": 4, "layers": 2, "heads": 2, "head_dim": 3}


def arrays(seed: int, dims: dict[str, int] = DIMS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {row.path: np.float32(rng.standard_normal(row.shape(dims))) for row in ROWS}


def test_matrices_decay_and_norms_and_biases_do_not():
    optimizer = options(weight_decay=0.1, schedule="constant", warmup=0.0)
    params = arrays(0)
    numbers = optim.hyperparams(optimizer, STEPS)
    tx = optim.make(optimizer.moments_dtype, iter(ROWS))
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params, numbers=numbers)
    for path in ("embed.table", "layers.q.kernel"):
        np.testing.assert_allclose(updates[path], -3e-4 * 0.1 * params[path], rtol=1e-6)
    for path in ("layers.q.bias", "layers.norm.scale"):
        assert not np.any(updates[path])


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e6])
def test_adamw_equals_its_formula_in_float64(clip_norm):
    optimizer = options(clip_norm=clip_norm, weight_decay=0.1, learning_rate=1e-2)
    tx = optim.make(optimizer.moments_dtype, ROWS)
    numbers = optim.hyperparams(optimizer, STEPS)
    learning_rates = rates(optimizer)
    params = arrays(0)
    state = tx.init(params)
    wanted = {path: np.float64(p) for path, p in params.items()}
    first, second = ({path: np.zeros(p.shape) for path, p in params.items()} for _ in range(2))
    for step in range(3):
        grads = arrays(step + 1)
        updates, state = tx.update(grads, state, params, numbers=numbers)
        params = optax.apply_updates(params, updates)
        norm = math.sqrt(sum(np.square(np.float64(g)).sum() for g in grads.values()))
        factor = min(1.0, clip_norm / norm) if clip_norm else 1.0
        for path, grad in grads.items():
            grad = factor * np.float64(grad)
            first[path] = 0.9 * first[path] + 0.1 * grad
            second[path] = 0.95 * second[path] + 0.05 * grad**2
            mean, square = (
                first[path] / (1 - 0.9 ** (step + 1)),
                second[path] / (1 - 0.95 ** (step + 1)),
            )
            decay = 0.1 if path.endswith(("table", "kernel")) else 0.0
            change = mean / (np.sqrt(square) + 1e-8) + decay * wanted[path]
            wanted[path] -= float(learning_rates[step]) * change
    for path, param in params.items():
        np.testing.assert_allclose(param, wanted[path], rtol=1e-5, atol=1e-6)


# ---- the update of a sharded state ---------------------------------------------------------------

MESH = {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}
EVEN = DIMS | {"vocab": 6, "embed": 8}  # divided by the mesh


def updates(optimizer, param_dtype, num_steps: int):
    """Return [(state, norm of the gradient that led to it)] of so many updates on eight devices."""
    mesh = make_mesh(MESH)
    tx = optim.make(optimizer.moments_dtype, ROWS)
    numbers = optim.hyperparams(optimizer, STEPS)
    masters = {path: p.astype(param_dtype) for path, p in arrays(0, EVEN).items()}
    masters = jax.device_put(masters, placement.shardings(ROWS, mesh))
    with jax.set_mesh(mesh):
        current = state.create(tx, masters, ROWS, mesh)
        to = state.shardings(tx, masters, ROWS, mesh)
        step = jax.jit(
            lambda old, grads, numbers: state.update(tx, numbers, old, grads, jnp.float32(0), to)[
                :2
            ],
            donate_argnums=0,
        )
        found = [(jax.device_get(current), 0.0)]
        current = jax.device_put(current, to.step)  # replicated: the update itself splits it
        for number in range(1, num_steps + 1):
            current, norm = step(current, arrays(number, EVEN), numbers)
            assert all(
                array.sharding.is_equivalent_to(wanted, array.ndim)
                for array, wanted in zip(*map(jax.tree.leaves, (current, to)), strict=True)
            )
            found.append((jax.device_get(current), float(norm)))
    return found


def plain_optax(optimizer):
    """AdamW as optax has it, its moments in the dtype of what it is given."""
    numbers = optim.hyperparams(optimizer, STEPS)
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.adamw(
            lambda step: optim.learning_rate(numbers, step),
            b1=optimizer.b1,
            b2=optimizer.b2,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            mask={row.path: row.is_matrix for row in ROWS},
        ),
    )


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("moments_dtype", settings.MOMENTS_DTYPES)
def test_the_update_is_optax_in_float32_with_what_is_stored_rounded(param_dtype, moments_dtype):
    optimizer = options(moments_dtype=moments_dtype, learning_rate=0.05, weight_decay=2.0)
    tx = plain_optax(optimizer)
    states = updates(optimizer, param_dtype, 8)
    for number, ((old, _), (new, norm)) in enumerate(itertools.pairwise(states), start=1):
        grads = arrays(number, EVEN)
        params = {path: p.astype(np.float32) for path, p in old.params.items()}
        wide = jax.tree.map(lambda a, like: a.astype(like.dtype), old.opt_state, tx.init(params))
        changes, opt_state = tx.update(grads, wide, params)
        assert norm == pytest.approx(float(optax.tree.norm(grads)), rel=1e-6)
        assert int(new.step) == number
        jax.tree.map(
            equal_once_rounded,
            (new.params, new.opt_state),
            (optax.apply_updates(params, changes), opt_state),
        )
        assert {p.dtype for p in new.params.values()} == {jnp.dtype(param_dtype)}


def equal_once_rounded(found, wanted):
    """Equal in float32, up to its rounding; in bfloat16, what that range rounds to."""
    wanted = np.float64(wanted)
    slack = 2e-6 * np.abs(wanted) + 1e-9
    low, high = (np.float64((wanted + s).astype(found.dtype)) for s in (-slack, slack))
    found = np.float64(found)
    assert (low <= found).all() and (found <= high).all()


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_moments_take_half_the_bytes_whatever_the_parameters(param_dtype):
    sizes = {}
    for dtype in settings.MOMENTS_DTYPES:
        tx = optim.make(dtype, ROWS)
        mesh = make_mesh(MESH)
        abstract = state.abstract(tx, ROWS, EVEN, jnp.dtype(param_dtype), mesh)
        moments = [leaf for leaf in jax.tree.leaves(abstract.opt_state) if leaf.ndim]
        assert {leaf.dtype for leaf in moments} == {jnp.dtype(dtype)}
        sizes[dtype] = sum(leaf.size * leaf.dtype.itemsize for leaf in moments)
    num_params = sum(math.prod(row.shape(EVEN)) for row in ROWS)
    assert sizes == {"float32": 8 * num_params, "bfloat16": 4 * num_params}


# ---- memory of the update ------------------------------------------------------------------------

QWEN2_7B = qwen2.Config.from_hf(
    {
        **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
        **{"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
        **{"rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768},
        **{"tie_word_embeddings": False, "model_type": "qwen2"},
    }
)
needs_plugin = pytest.mark.skipif(
    targets.plugin_problem() is not None, reason=str(targets.plugin_problem())
)


def shard_bytes(tree) -> int:
    """What the shards of these abstract arrays take on a device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def test_the_update_copies_no_moment_on_cpus_and_is_bitwise_the_same():
    mesh, dims = single_device_mesh(), DIMS | {"vocab": 4096, "embed": 256, "norm": 256}
    tx = optim.make("float32", ROWS)
    numbers = optim.hyperparams(options(), STEPS)
    found, temporary = {}, {}
    with jax.set_mesh(mesh):
        to = state.shardings(tx, arrays(0, dims), ROWS, mesh)
        for name, told in (("ours", program.CPU_OPTIONS), ("plain", None)):
            current = state.create(tx, jax.device_put(arrays(0, dims), to.params), ROWS, mesh)
            update = jax.jit(
                lambda old, grads, numbers: state.update(
                    tx, numbers, old, grads, jnp.float32(0), to
                )[:2],
                donate_argnums=0,
                compiler_options=told,
            )
            compiled = update.lower(current, arrays(1, dims), numbers).compile()
            temporary[name] = compiled.memory_analysis().temp_size_in_bytes
            for number in (1, 2, 3):
                current, _ = compiled(current, arrays(number, dims), numbers)
            found[name] = jax.device_get(current)
    table = 4 * dims["vocab"] * dims["embed"]
    assert temporary["plain"] > 1.9 * table  # else XLA has learned it, and the option can go
    assert temporary["ours"] < temporary["plain"] - 0.9 * table
    for ours, plain in zip(*map(jax.tree.leaves, found.values()), strict=True):
        np.testing.assert_array_equal(ours, plain)


@needs_plugin
@pytest.mark.parametrize(
    ("sizes", "moments_dtype", "param_dtype"),
    [
        ({"fsdp": 8}, "float32", "float32"),
        ({"fsdp": 8}, "bfloat16", "float32"),
        ({"data": 2, "fsdp": 4, "tensor": 2}, "bfloat16", "bfloat16"),
    ],
)
def test_the_update_of_a_7b_model_copies_nothing_on_gpus(sizes, moments_dtype, param_dtype):
    rows, dims = qwen2.weights(QWEN2_7B), QWEN2_7B.axis_sizes
    devices = targets.topology(hardware.find("h200"), math.prod(sizes.values()) // 8, 8)
    mesh = make_mesh(sizes, devices)
    tx = optim.make(moments_dtype, rows)
    numbers = optim.hyperparams(options(), STEPS)
    old = state.abstract(tx, rows, dims, jnp.dtype(param_dtype), mesh)
    to = state.shardings(tx, old.params, rows, mesh)
    sums = {
        path: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding)
        for path, p in old.params.items()
    }

    def step(old, sums, count, numbers):
        grads = {path: grad / count for path, grad in sums.items()}
        return state.update(tx, numbers, old, grads, jnp.float32(0), to)[:2]

    with jax.set_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=0).lower(old, sums, 1.0, numbers)
        memory = lowered.compile(compiler_options=targets.compiler_options()).memory_analysis()
    assert shard_bytes(old.params) > 1.8e9 and memory.temp_size_in_bytes < 2**20
    assert memory.alias_size_in_bytes == shard_bytes(old)  # all that is donated is written again


# ---- moments in bfloat16 -------------------------------------------------------------------------


def second_moments(b2: float, dtype: str, grads: np.ndarray) -> np.ndarray:
    """The second moment after each of these gradients [steps, values], from 1."""
    tx = optim.store_moments(optax.scale_by_adam(b2=b2), jnp.dtype(dtype))
    start = tx.init(grads[0])
    start = start._replace(nu=jnp.ones_like(start.nu))

    def step(opt_state, grad):
        _, opt_state = tx.update(grad, opt_state)
        return opt_state, opt_state.nu.astype(jnp.float32)

    return np.asarray(jax.jit(lambda: jax.lax.scan(step, start, grads)[1])())


def test_a_second_moment_in_bfloat16_is_unbiased_up_to_the_highest_b2_allowed():
    grads = np.float32(np.random.default_rng(0).standard_normal((1500, 1000)))

    def bias(b2: float) -> float:
        found, wanted = (second_moments(b2, dtype, grads) for dtype in ("bfloat16", "float32"))
        return float(found[500:].mean() / wanted[500:].mean()) - 1

    assert abs(bias(0.95)) < 0.001
    assert abs(bias(settings.MAX_BFLOAT16_DECAY)) < 0.01
    assert 0.02 < abs(bias(0.99)) < 0.1 and bias(0.999) > 0.1  # why there is a highest


def test_a_second_moment_in_bfloat16_falls_up_to_the_highest_b2_allowed():
    zeros = np.zeros((500, 1), np.float32)
    assert second_moments(settings.MAX_BFLOAT16_DECAY, "bfloat16", zeros)[-1] < 1e-4
    assert second_moments(0.999, "bfloat16", zeros)[-1] == 1.0


def test_bfloat16_moments_reach_the_loss_of_float32_ones():
    rng = np.random.default_rng(0)
    inputs = np.float32(rng.standard_normal((200, 32, 16)))
    hidden = np.float32(rng.standard_normal((16, 8)))
    targets = np.tanh(inputs @ hidden) + 0.1 * np.float32(rng.standard_normal((200, 32, 8)))
    row = ParamSpec("w", "w", "outputs inputs -> inputs outputs")

    def losses(moments_dtype: str) -> np.ndarray:
        optimizer = options(learning_rate=0.02, weight_decay=0.01)
        tx = optim.make(moments_dtype, [row])
        numbers = optim.hyperparams(optimizer, len(inputs))

        def loss(params, x, y):
            return jnp.square(jnp.tanh(x @ params["w"]) - y).mean()

        def step(carry, batch):
            params, opt_state = carry
            found, grads = jax.value_and_grad(loss)(params, *batch)
            changes, opt_state = tx.update(grads, opt_state, params, numbers=numbers)
            return (optax.apply_updates(params, changes), opt_state), found

        params = {"w": jnp.zeros((16, 8))}
        run = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), (inputs, targets))[1])
        return np.asarray(run())

    found, wanted = losses("bfloat16"), losses("float32")
    assert wanted[-20:].mean() < 0.1 * wanted[0]
    np.testing.assert_allclose(found, wanted, rtol=0.02)
    assert found[-20:].mean() == pytest.approx(wanted[-20:].mean(), rel=2e-3)
    assert np.any(found != wanted)


def test_decays_too_slow_for_bfloat16_moments_are_refused(make_config):
    cfg = make_config(**{"optimizer.b1": 0.999, "optimizer.b2": 0.999})
    validate(cfg, 8)
    cfg.optimizer.moments_dtype = "bfloat16"
    with pytest.raises(ValueError, match="2 problem") as refused:
        validate(cfg, 8)
    for key in ("b1", "b2"):
        assert f"optimizer.{key} = 0.999 is too slow for bfloat16 moments" in str(refused.value)
        cfg.optimizer[key] = settings.MAX_BFLOAT16_DECAY
    validate(cfg, 8)
    cfg.optimizer.moments_dtype = "float16"
    with pytest.raises(ValueError, match=r"moments_dtype = 'float16': use one of \['float32', 'bf"):
        validate(cfg, 8)


@pytest.mark.parametrize("resumed_dtype", settings.MOMENTS_DTYPES)
def test_a_checkpoint_gives_bfloat16_moments_back_bitwise_or_widened(tmp_path, resumed_dtype):
    mesh = make_mesh(MESH)
    tx = optim.make("bfloat16", ROWS)
    saved, _ = updates(options(moments_dtype="bfloat16"), "float32", 3)[-1]
    to = state.shardings(tx, saved.params, ROWS, mesh)
    keep = config.default().checkpoint
    with contextlib.closing(saving.Checkpoints(tmp_path, keep)) as checkpoints:
        checkpoints.save(3, jax.device_put(saved, to).named(), {})
    resumed = optim.make(resumed_dtype, ROWS)
    wanted = state.abstract(resumed, ROWS, EVEN, jnp.dtype("float32"), mesh)
    checkpoints = saving.Checkpoints(tmp_path, keep)
    stored = checkpoints.start(config.to_dict(config.default()))
    assert stored
    arrays, _ = checkpoints.restore(stored, wanted.named())
    found = wanted.from_named(stored.step, arrays)
    for array, like, old in zip(*map(jax.tree.leaves, (found, wanted, saved)), strict=True):
        assert (array.dtype, array.sharding) == (like.dtype, like.sharding)
        np.testing.assert_array_equal(np.float32(array), np.float32(old))
    moments = [leaf for leaf in jax.tree.leaves(found.opt_state) if leaf.ndim]
    assert {leaf.dtype for leaf in moments} == {jnp.dtype(resumed_dtype)}
