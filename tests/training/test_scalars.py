"""The numbers of a run are arguments of its step: a sweep over them compiles one program."""

import dataclasses

import jax
import numpy as np
import pytest

from jax_sft.settings import Optimizer
from jax_sft.sharding.mesh import make_mesh
from jax_sft.training import state
from jax_sft.training.program import Program, program
from jax_sft.validate import validate
from tests.inputs import write_config, write_model

# Experts and dropout, so that the step has every number.
MODEL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
BASE = {
    **{"lora.rank": 2, "lora.dropout": 0.2, "loss.router_aux": 0.1, "batch.rows": 2},
    **{"data.seq_len": 32, "optimizer.schedule": "wsd", "optimizer.learning_rate": 1e-2},
    **{"optimizer.warmup": 1.0, "optimizer.decay_fraction": 0.5, "optimizer.clip_norm": 0.1},
    **{"optimizer.weight_decay": 0.1, "train.steps": 4},
}
# One change of each number, which must show within four steps.
CHANGES = {
    "train.steps": 6,
    "seed": 2**40 + 1,
    "loss.router_aux": 0.0,
    "optimizer.learning_rate": 2e-2,
    "optimizer.schedule": "cosine",
    "optimizer.warmup": 0.0,
    "optimizer.final_ratio": 0.5,
    "optimizer.decay_fraction": 0.25,
    "optimizer.weight_decay": 0.0,
    "optimizer.b1": 0.8,
    "optimizer.b2": 0.999,
    "optimizer.eps": 1e-3,
    "optimizer.clip_norm": 0.0,
}
SWEEP = [
    {"optimizer.learning_rate": 3e-4, "optimizer.warmup": 0.1},
    {"optimizer.schedule": "linear", "optimizer.final_ratio": 0.0, "optimizer.clip_norm": 1.0},
    {"optimizer.schedule": "constant", "optimizer.clip_norm": 0.0, "train.steps": 1000},
    {"optimizer.weight_decay": 0.0, "optimizer.b1": 0.8, "optimizer.b2": 0.999, "seed": 1},
    {"optimizer.decay_fraction": 0.9, "optimizer.eps": 1e-6, "loss.router_aux": 0.0},
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return a function from changes of `BASE` to the program of the run."""
    folder = tmp_path_factory.mktemp("sweep")
    model = write_model(folder, **MODEL)

    def of(changes) -> Program:
        cfg = write_config(folder, model, **BASE | changes)
        settings = validate(cfg, 1)
        mesh = make_mesh(settings.mesh_shape, jax.devices()[:1])
        return program(settings, mesh, settings.train.steps)

    return of


def test_every_point_of_a_sweep_is_the_same_program(built):
    texts = set()
    for changes in SWEEP:
        point = built(changes)
        with jax.set_mesh(point.mesh):
            lowered = point.train_step.lower(point.state, point.batch, point.scalars)
        texts.add(lowered.as_text())
    assert len(texts) == 1


def first_state(base: Program) -> state.TrainState:
    """Return the state before the first step, of small random weights."""
    rng = np.random.default_rng(1)
    weights = {
        path: jax.device_put(0.1 * rng.standard_normal(like.shape), like.sharding).astype(
            like.dtype
        )
        for path, like in base.state.weights.items()
    }
    rows = base.model_def.stored_specs
    return state.create(base.tx, weights, rows, base.mesh, base.model_def.frozen_dtypes)


def test_every_number_of_a_sweep_changes_the_update_and_compiles_nothing(built):
    base = built({})
    shape = base.batch["tokens"].shape
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(0, 200, shape),
        "targets": rng.integers(0, 200, shape),
        "weights": np.ones(shape),
        "segment_ids": np.ones(shape),
        "positions": np.broadcast_to(np.arange(shape[-1]), shape),
    }
    batch = {name: batch[name].astype(like.dtype) for name, like in base.batch.items()}

    def trained(scalars) -> np.ndarray:
        current = first_state(base)
        for _ in range(4):
            current, _ = base.train_step(current, batch, scalars)
        return np.concatenate([np.ravel(leaf) for leaf in current.params.values()])

    numbers = {f"optimizer.{field.name}" for field in dataclasses.fields(Optimizer)}
    assert numbers - CHANGES.keys() == {"optimizer.name", "optimizer.moments_dtype"}
    with jax.set_mesh(base.mesh):
        unchanged = trained(base.scalars)
        np.testing.assert_array_equal(trained(base.scalars), unchanged)
        for key, value in CHANGES.items():
            assert np.any(trained(built({key: value}).scalars) != unchanged), key
    assert base.train_step._cache_size() == 1
