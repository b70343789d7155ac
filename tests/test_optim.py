"""The schedule and AdamW against their formulas in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_sft import config, optim
from jax_sft.models.spec import Weight

STEPS = 50


def options(**changes):
    optimizer = config.default().optimizer
    optimizer.learning_rate, optimizer.warmup = 3e-4, 0.1
    for key, value in changes.items():
        optimizer[key] = value
    return optimizer


def rates(optimizer, num_steps: int = STEPS) -> np.ndarray:
    """Learning rates of steps 0..num_steps, as the compiled step computes them."""
    return np.asarray(
        jax.vmap(jax.jit(optim.schedule(optimizer, num_steps)))(np.arange(num_steps + 1))
    )


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


@pytest.mark.parametrize("name", optim.SCHEDULES)
@pytest.mark.parametrize(("warmup", "warmup_steps"), [(0.0, 0), (0.1, 5), (1.0, 1), (12.0, 12)])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_the_schedule_follows_its_formula(name, warmup, warmup_steps, floor):
    optimizer = options(schedule=name, warmup=warmup, final_ratio=floor, decay_fraction=0.3)
    assert optim.warmup_steps(optimizer, STEPS) == warmup_steps
    wanted = [3e-4 * formula(name, step, warmup_steps, floor, 15) for step in range(STEPS + 1)]
    np.testing.assert_allclose(rates(optimizer), wanted, rtol=1e-6, atol=1e-6 * 3e-4)


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_no_step_trains_at_zero_and_the_end_is_final_ratio(name):
    found = rates(options(schedule=name))
    assert (found[:STEPS] > 0).all() and found.max() == np.float32(3e-4)
    assert found[STEPS] == pytest.approx(3e-4 if name == "constant" else 3e-5, rel=1e-6)
    assert (np.diff(found[:6]) > 0).all() and (np.diff(found[5:]) <= 0).all()


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_a_run_of_one_step_trains(name):
    assert rates(options(schedule=name, warmup=0.03), num_steps=1)[0] == np.float32(3e-4)
    assert rates(options(schedule=name, warmup=100.0), num_steps=1)[0] > 0


def test_wsd_stays_up_until_its_decay():
    found = rates(options(schedule="wsd", decay_fraction=0.2))
    assert (found[5:41] == np.float32(3e-4)).all() and (np.diff(found[40:]) < 0).all()


def test_the_rate_is_exact_at_large_steps():
    optimizer = options(schedule="linear", warmup=0.0, final_ratio=0.0)
    rate = optim.schedule(optimizer, 1_000_000)(jnp.int32(999_999))
    assert float(rate) == pytest.approx(3e-10, rel=0.05)


ROWS = (
    Weight("embed.table", "embed", "vocab embed -> vocab embed"),
    Weight("layers.q.kernel", "q.{layers}", "(heads head_dim) embed -> embed heads head_dim"),
    Weight("layers.q.bias", "b.{layers}", "(heads head_dim) -> heads head_dim"),
    Weight("layers.norm.scale", "n.{layers}", "norm -> norm"),
)
DIMS = {"vocab": 5, "embed": 4, "norm": 4, "layers": 2, "heads": 2, "head_dim": 3}


def arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {row.path: np.float32(rng.standard_normal(row.shape(DIMS))) for row in ROWS}


def test_matrices_decay_and_norms_and_biases_do_not():
    optimizer = options(weight_decay=0.1, schedule="constant", warmup=0.0)
    params = arrays(0)
    tx = optim.make(optimizer, STEPS, iter(ROWS))
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    for path in ("embed.table", "layers.q.kernel"):
        np.testing.assert_allclose(updates[path], -3e-4 * 0.1 * params[path], rtol=1e-6)
    for path in ("layers.q.bias", "layers.norm.scale"):
        assert not np.any(updates[path])


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e6])
def test_adamw_equals_its_formula_in_float64(clip_norm):
    optimizer = options(clip_norm=clip_norm, weight_decay=0.1, learning_rate=1e-2)
    tx = optim.make(optimizer, STEPS, ROWS)
    learning_rates = rates(optimizer)
    params = arrays(0)
    state = tx.init(params)
    wanted = {path: np.float64(p) for path, p in params.items()}
    first, second = ({path: np.zeros(p.shape) for path, p in params.items()} for _ in range(2))
    for step in range(3):
        grads = arrays(step + 1)
        updates, state = tx.update(grads, state, params)
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
