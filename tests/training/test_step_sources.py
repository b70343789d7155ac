"""The loss of each source in the compiled step, against steps of one source alone."""

import functools
import importlib.metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jax_sft import config, models, tiny
from jax_sft.data.batches.examples import Encoded, Examples
from jax_sft.data.batches.loader import Loader
from jax_sft.nn.model_def import ModelDef
from jax_sft.sharding import rules
from jax_sft.sharding.mesh import make_mesh
from jax_sft.training import optim, state
from jax_sft.training.step import (
    Scalars,
    make_eval_step,
    make_train_step,
    no_sums,
    value_and_grad,
)
from jax_sft.weights import hf_folder, hf_reader, placement

MESHES = [(8, 1, 1, 1), (1, 2, 2, 2)]
NUM_SOURCES = 3


def examples_of_sources() -> Examples:
    """Three sources of very different lengths and weights."""
    rng = np.random.default_rng(0)

    def some(num: int, low: int, high: int, weight: float) -> list[Encoded]:
        lengths = rng.integers(low, high, num)
        return [
            Encoded(
                rng.integers(0, 256, n).astype(np.int32), np.float32(weight * (rng.random(n) < 0.7))
            )
            for n in lengths
        ]

    return Examples.in_memory(
        {"long": some(9, 30, 60, 1), "short": some(30, 3, 9, 1), "light": some(8, 10, 30, 0.25)}
    )


def on_mesh(folder: Path, sizes: tuple[int, ...], per_source: bool):
    """(model_def, params, first batch, mesh)."""
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = make_mesh(dict(zip(rules.AXES, sizes, strict=True)), devices)
    raw = hf_folder.read_json(folder / "config.json")
    family = models.find(raw["model_type"])
    model_def = ModelDef.of(family, family.Config.from_hf(raw), dtype="float32")
    rows, dims = model_def.specs, model_def.cfg.axis_sizes
    tensors = hf_reader.check(folder, rows, dims, model_def.cfg.tied)
    shardings = placement.shardings(rows, mesh)
    params = hf_reader.load(tensors, rows, dims, shardings, np.float32, progress=False)
    cfg = config.default()
    cfg.data.seq_len = 64
    options = {"rows": 16, "micro_rows": 8, "mesh": mesh, "shuffle": True, "seed": 0}
    loader = Loader(examples_of_sources(), cfg.data, None, **options, per_source=per_source)
    (batch,) = loader.batches(0, 1)
    return model_def, params, batch, mesh


@functools.cache  # compiled once per mesh
def train_one_step(folder: Path, sizes: tuple[int, ...], num_sources: int, as_users: bool = False):
    """(sums, params) after one step.

    Args:
        as_users: compile it as users do. Without emitters, as the tests compile, fusions round
            otherwise; with them, it takes three times as long.
    """
    model_def, params, batch, mesh = on_mesh(folder, sizes, num_sources > 0)
    cfg, rows = config.default().optimizer, model_def.specs
    tx, scalars = optim.make(cfg.moments_dtype, rows), Scalars(optim.hyperparams(cfg, 10))
    with jax.set_mesh(mesh):
        current = state.create(tx, params, rows, mesh)
        shardings = state.shardings(tx, params, rows, mesh)
        step = make_train_step(model_def, tx, shardings, mesh, num_sources)
        # Later versions always use emitters and know no such option.
        has_option = as_users and importlib.metadata.version("jaxlib").startswith("0.10.")
        options: dict[str, Any] = {"xla_cpu_use_fusion_emitters": True} if has_option else {}
        compiled = step.lower(current, batch, scalars).compile(options)
        current, sums = compiled(current, batch, scalars)
    return jax.device_get((sums, current.params))


def sums_of_one_source(folder: Path) -> list[dict[str, float]]:
    """The sums of the same batch, each time with the weights of one source alone."""
    model_def, params, batch, mesh = on_mesh(folder, (1, 1, 1, 1), per_source=True)
    sources = batch.pop("sources")
    found = []
    with jax.set_mesh(mesh):
        step = make_eval_step(model_def, mesh)
        for source in range(NUM_SOURCES):
            alone = batch | {"weights": batch["weights"] * (sources == source)}
            found.append(jax.device_get(step(params, alone, no_sums())))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    model = {
        **{"model_type": "qwen2", "vocab_size": 272, "hidden_size": 64, "intermediate_size": 80},
        **{"max_position_embeddings": 256, "num_hidden_layers": 1},
        **{"num_attention_heads": 4, "num_key_value_heads": 2},
        **{"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True},
    }
    folder = tmp_path_factory.mktemp("model")
    tiny.write_model(folder, model, seed=0, dtype="F32")
    return folder


def test_each_source_has_the_loss_of_a_batch_without_the_others(folder):
    wanted = sums_of_one_source(folder)
    for sizes in MESHES:
        # The step of the next test, which is compiled anyway, on the mesh that it has.
        sums, _ = train_one_step(folder, sizes, NUM_SOURCES, as_users=sizes == MESHES[1])
        for source, alone in enumerate(wanted):
            assert sums["loss_by_source"][source] == pytest.approx(alone["loss"], rel=1e-5)
            assert sums["weight_by_source"][source] == alone["weight"] > 0
        assert sums["loss_by_source"].sum() == pytest.approx(sums["loss"], rel=1e-6)
        assert sums["weight_by_source"].sum() == sums["weight"]


def test_a_step_that_tells_sources_apart_trains_bitwise_the_same(folder):
    plain_sums, plain_params = train_one_step(folder, MESHES[1], 0, as_users=True)
    sums, params = train_one_step(folder, MESHES[1], NUM_SOURCES, as_users=True)
    assert set(sums) - set(plain_sums) == {"loss_by_source", "weight_by_source"}
    for name in plain_sums:
        np.testing.assert_array_equal(sums[name], plain_sums[name])
    for path in plain_params:
        np.testing.assert_array_equal(params[path], plain_params[path])


def test_weights_of_less_than_one_in_all_give_the_same_gradient(folder):
    model_def, params, batch, mesh = on_mesh(folder, (1, 1, 1, 1), per_source=False)
    with jax.set_mesh(mesh):
        gradient = jax.jit(lambda params, batch: value_and_grad(model_def, params, batch))
        _, whole = gradient(params, batch)
        sums, light = gradient(params, batch | {"weights": batch["weights"] / 1024})
    assert sums["weight"] < 1
    for path in whole:
        np.testing.assert_allclose(light[path], whole[path], rtol=1e-5, atol=1e-7)
