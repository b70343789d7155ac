"""Mixture of experts: grouped products, what config.json and the config may say, what is counted.

That losses, gradients and training equal torch's is shown in test_models and test_parity.
"""

import functools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.extend.core import jaxprs_in_params
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import jax_sft
from jax_sft import hardware, models, plan
from jax_sft.nn.experts import Routing, balance_loss
from jax_sft.nn.model_def import ModelDef
from jax_sft.ops import grouped
from jax_sft.planning import step_cost, targets
from jax_sft.sharding import rules
from jax_sft.sharding.mesh import make_mesh, single_device_mesh
from jax_sft.training import metrics, program
from jax_sft.training.step import batch_sums, value_and_grad
from jax_sft.validate import validate

SIZES: dict[str, Any] = {
    **{"vocab_size": 272, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
}
FAMILIES = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 28},
}
BOTH = pytest.mark.parametrize("name", FAMILIES)


def read_config(name: str, **changes):
    return models.find(name).Config.from_hf(SIZES | {"model_type": name} | FAMILIES[name] | changes)


# ---- grouped products ----------------------------------------------------------------------------

M, D, F = 100, 12, 20
GROUPS = {
    "uneven": [40, 0, 3, 30, 17, 10],
    "some_rows_without_a_group": [40, 0, 3, 30, 17, 5],
    "one_has_all": [0, 0, 100, 0, 0, 0],
    "none": [0, 0, 0, 0, 0, 0],
}


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
def test_grouped_products_equal_a_product_per_group(sizes):
    block = grouped.block_rows(M, len(sizes))
    assert block == 16  # so that the largest groups take several rounds
    x_MD, y_MF, kernel = random(M, D), random(M, F), random(len(sizes), D, F)
    group_of_row = np.repeat([*range(len(sizes)), -1], [*sizes, M - sum(sizes)])
    x_MD[group_of_row < 0] = y_MF[group_of_row < 0] = np.inf  # of no concern to anyone
    forward, back = np.zeros((M, F)), np.zeros((M, D))
    outer = np.zeros(kernel.shape)
    for group, matrix in enumerate(kernel.astype(np.float64)):
        own = group_of_row == group
        forward[own], back[own] = x_MD[own] @ matrix, y_MF[own] @ matrix.T
        outer[group] = x_MD[own].T.astype(np.float64) @ y_MF[own]
    sizes_G = jnp.array(sizes, jnp.int32)
    for found, expected in (
        (grouped.matmul(jnp.array(x_MD), kernel, sizes_G, over=1), forward),
        (grouped.matmul(jnp.array(y_MF), kernel, sizes_G, over=2), back),
        (grouped.outer(jnp.array(x_MD), jnp.array(y_MF), sizes_G, jnp.float32), outer),
    ):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_gradients_of_bfloat16_rows_are_formed_in_float32():
    sizes_G = jnp.array([60, 0, 40], jnp.int32)
    x_MD, y_MF = (jnp.array(part, jnp.bfloat16) for part in (random(M, D), random(M, F)))
    exact = grouped.outer(x_MD.astype(jnp.float32), y_MF.astype(jnp.float32), sizes_G, jnp.float32)
    found = grouped.outer(x_MD, y_MF, sizes_G, jnp.float32)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5)
    rounded = grouped.outer(x_MD, y_MF, sizes_G, jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16 and np.abs(rounded - exact).max() > 1e-3


# .ci/run installs JAX's CUDA compiler, so these run there; the core of the suite must not need it.
needs_plugin = pytest.mark.skipif(
    targets.plugin_problem() is not None, reason=str(targets.plugin_problem())
)


@needs_plugin
@pytest.mark.parametrize("product", ["matmul", "outer"])
def test_a_gpu_holds_no_copy_of_the_rows_for_each_expert(product):
    # Of Qwen3-30B-A3B: 8,192 tokens that take 8 of 128 experts. `ragged_dot` holds them 128 times;
    # where it no longer does, it may take the place of `grouped`.
    num_rows, num_experts, features, mlp = 65_536, 128, 2048, 768
    mesh = make_mesh({}, targets.topology(hardware.find("h200"), 1, 1))
    everywhere = rules.sharding(mesh)

    def shape(*sizes: int, dtype: Any = jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=everywhere)

    def temporary_bytes(function, *arguments) -> int:
        compiled = jax.jit(function, compiler_options=options).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    options = targets.compiler_options() | program.gpu_options("blockwise")
    x_MD, sizes_G = shape(num_rows, features), shape(num_experts, dtype=jnp.int32)
    rows_bytes = 2 * num_rows * features
    if product == "matmul":
        kernel = shape(num_experts, features, mlp)
        found = temporary_bytes(lambda *a: grouped.matmul(*a, over=1), x_MD, kernel, sizes_G)
        dense = temporary_bytes(jax.lax.ragged_dot, x_MD, kernel, sizes_G)
        assert dense > num_experts * rows_bytes
    else:
        y_MF = shape(num_rows, mlp)
        found = temporary_bytes(lambda *a: grouped.outer(*a, jnp.float32), x_MD, y_MF, sizes_G)
    assert found < rows_bytes


# ---- the layer -----------------------------------------------------------------------------------


def test_the_balance_of_tokens_that_are_not_padding_is_that_of_transformers():
    layers, tokens, experts, chosen = 3, 40, 6, 2
    logits = 2 * random(layers, tokens, experts)
    is_real = np.arange(tokens) % 3 > 0
    theirs = load_balancing_loss_func(
        tuple(torch.tensor(logits)), experts, chosen, torch.tensor(is_real)[None]
    )
    probs = np.array(jax.nn.softmax(logits))
    taken = probs >= np.sort(probs)[..., -chosen, None]
    routing = Routing(
        jnp.array(taken[:, is_real].sum(1), jnp.float32),
        jnp.array(probs[:, is_real].sum(1)),
        jnp.full(layers, is_real.sum(), jnp.float32),
    )
    assert float(balance_loss(routing)) == pytest.approx(float(theirs), rel=1e-6)
    even = Routing(
        *(jnp.full(shape, n) for shape, n in (((3, 6), 20.0), ((3, 6), 10.0), (3, 60.0)))
    )
    assert float(balance_loss(even)) == pytest.approx(chosen)
    nobody = Routing(jnp.zeros((3, 6)), jnp.zeros((3, 6)), jnp.zeros(3))
    assert float(balance_loss(nobody)) == 0


def test_what_remat_keeps_of_the_experts_is_not_computed_again():
    # Forward: gate, up and down. Backward: three of kernels, two to x, one through down. Again:
    # gate and up, never down.
    assert {remat: grouped_products(remat) for remat in ("mlp", "dots", "full")} == {
        **{"mlp": 3 + 6, "dots": 3 + 6, "full": 3 + 6 + 2}
    }


def test_only_what_is_trained_has_the_balance():
    model_def, params, batch = abstract("none")
    with jax.set_mesh(single_device_mesh()):
        for objective, has_balance in ((None, False), ({"router_aux": 0.1}, True)):
            sums, _ = jax.eval_shape(
                functools.partial(value_and_grad, model_def, objective=objective), params, batch
            )
            assert ("router_loss" in sums) == has_balance
            micro = {name: array.update(shape=array.shape[1:]) for name, array in batch.items()}
            sums = jax.eval_shape(functools.partial(batch_sums, model_def), params, micro)
            assert "router_loss" not in sums  # as in evaluation


def abstract(remat: str):
    """Return (model_def, params, batch) in shapes."""
    cfg = read_config("mixtral")
    model_def = ModelDef.of(models.find("mixtral"), cfg, dtype="bfloat16", remat=remat)
    params = {
        row.path: jax.ShapeDtypeStruct(row.shape(cfg.axis_sizes), jnp.float32)
        for row in model_def.specs
    }
    batch = {
        name: jax.ShapeDtypeStruct((1, 4, 64), jnp.float32 if name == "weights" else jnp.int32)
        for name in ("tokens", "targets", "weights", "segment_ids", "positions")
    }
    return model_def, params, batch


def grouped_products(remat: str) -> int:
    model_def, params, batch = abstract(remat)
    with jax.set_mesh(make_mesh({"fsdp": 2, "tensor": 2, "sequence": 2})):
        jaxpr = jax.make_jaxpr(lambda p, b: value_and_grad(model_def, p, b))(params, batch)
    loops = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "while"]
    return sum(grouped.LOOP in str(loop.source_info.name_stack) for loop in loops)


def equations(jaxpr):
    """All equations, those of loops and shard_map regions too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


# ---- what is counted -----------------------------------------------------------------------------


def test_flops_are_those_of_the_experts_that_a_token_takes():
    cfg = read_config("qwen3_moe", head_dim=16)
    rows = models.find("qwen3_moe").weights(cfg)
    # q and out 48 x 64, k and v 48 x 32; the router 48 x 5; gate, up and down 48 x 28 of 2 experts.
    attention, experts = 2 * 48 * 64 + 2 * 48 * 32, 48 * 5 + 2 * 3 * 48 * 28
    found = step_cost.model_flops(rows, cfg.axis_sizes, cfg.tied, 100, 700, 100)
    assert found["attention_projections"] == 6 * 3 * attention * 100
    assert found["mlp"] == pytest.approx(6 * 3 * experts * 100)
    head, scores = 272 * 48, 3 * 4 * (4 * 16) * 700
    assert metrics.step_flops(rows, cfg.axis_sizes, cfg.tied, 100, 700) == pytest.approx(
        3 * (2 * (3 * (attention + experts) + head) * 100 + scores)
    )


STACK_A_GPU = 12 * 128 * 2048 * 768 // 16  # elements of one kernel of all experts and layers


@pytest.mark.slow
@needs_plugin
def test_the_plan_of_a_30b_model_scatters_its_gradients_and_copies_no_stack_of_layers(
    make_config, tmp_path
):
    folder = tmp_path / "qwen3-30b-a3b"
    folder.mkdir()
    sizes = {
        "hidden_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 32,
        "head_dim": 128,
    }
    sizes |= {"num_key_value_heads": 4, "vocab_size": 151_936, "max_position_embeddings": 40_960}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", **sizes}))
    cfg = make_config(folder, **{"data.seq_len": 4096, "batch.rows": 64, "model.dtype": "bfloat16"})
    found = plan.plan(cfg, target="h200", hosts=2, gpus_per_host=8)
    assert found["warnings"] == []
    assert any("busiest expert" in line for line in found["predicted"]["assumptions"])
    kernels = [one for one in found["communication"] if "gradient.experts" in one["what"]]
    assert {(one["kind"], one["dtype"]) for one in kernels} == {("reduce-scatter", "f32")}
    assert sum(one["count"] for one in kernels) == 3 * 12
    stacks = [one["shape"] for one in found["memory"]["largest"] if one["bytes"] == 4 * STACK_A_GPU]
    assert set(stacks) == {"f32[12, 128, 128, 768]"}  # another order of dimensions were a copy


# ---- config.json ---------------------------------------------------------------------------------


@BOTH
def test_what_config_json_leaves_out_is_as_in_transformers(name):
    theirs = transformers.AutoConfig.for_model(name)
    cfg = models.find(name).Config.from_hf(SIZES | {"model_type": name, "hidden_size": 64})
    assert cfg.num_experts == theirs.num_experts
    assert cfg.num_chosen == theirs.num_experts_per_tok
    assert cfg.router_aux == theirs.router_aux_loss_coef
    assert cfg.norm_eps == theirs.rms_norm_eps
    theta = theirs.rope_parameters["rope_theta"]
    assert cfg.rope.inv_freq[1] == pytest.approx(theta ** (-2 / cfg.head_dim))
    assert cfg.head_dim == 64 // 4 and cfg.window is None


@BOTH
def test_the_number_of_experts_has_two_names(name):
    plain = SIZES | {"model_type": name}
    read = models.find(name).Config.from_hf
    assert read(plain | {"num_experts": 9}) == read(plain | {"num_local_experts": 9})
    with pytest.raises(ValueError, match="num_experts = 9 and num_local_experts = 10"):
        read(plain | {"num_experts": 9, "num_local_experts": 10})


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
        ("mixtral", {"num_experts_per_tok": 6}, "num_experts_per_tok = 6 is over the 5 experts"),
        ("mixtral", {"router_aux_loss_coef": -0.1}, "router_aux_loss_coef = -0.1"),
        ("mixtral", {"router_aux_loss_coef": "0.1"}, "router_aux_loss_coef = '0.1'"),
        ("mixtral", {"norm_topk_prob": True}, "norm_topk_prob = True"),  # it always does
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers = \[1\]"),
        ("qwen3_moe", {"num_experts": 0}, "num_experts = 0"),
    ],
)
def test_what_is_not_implemented_or_cannot_be_is_refused_by_name(name, changes, words):
    with pytest.raises(ValueError, match=words):
        read_config(name, **changes)


# ---- the config key ------------------------------------------------------------------------------


def weight_of(cfg) -> float:
    """The weight of the balance in the objective of a run."""
    settings = validate(cfg, 1)
    return program.objective(settings.loss, settings.model_cfg)["router_aux"]


def test_the_weight_of_the_balance_is_the_models_unless_given(make_model, make_config):
    options = {"model_type": "mixtral", **FAMILIES["mixtral"], "router_aux_loss_coef": 0.02}
    cfg = make_config(make_model(**options))
    dense = make_config(make_model("dense"))
    for given, weight, of_dense in ((-1.0, 0.02, 0.0), (0.0, 0.0, 0.0), (0.5, 0.5, None)):
        cfg.loss.router_aux = dense.loss.router_aux = given
        assert weight_of(cfg) == weight
        if of_dense is None:
            with pytest.raises(ValueError, match=r"router_aux = 0\.5 is for models with experts"):
                validate(dense, 1)
        else:
            assert weight_of(dense) == of_dense
    for wrong in (-0.5, math.nan, math.inf):
        cfg.loss.router_aux = wrong
        with pytest.raises(ValueError, match=r"loss\.router_aux = .*: use 0 or more, or -1"):
            validate(cfg, 1)


def test_the_balance_is_shown_beside_the_loss_and_is_no_part_of_it():
    meter = metrics.Meter(
        **{"every_steps": 1, "num_steps": 9, "start_step": 0, "epoch_of": float, "peak": None},
        flops=lambda sums: 0.0,
    )
    sums = {"loss": 120.0, "weight": 60.0, "tokens": 150.0, "pairs": 900.0, "router_loss": 126.0}
    sums |= {"grad_norm": 2.0, "learning_rate": 1e-5, "skipped": 0.0}
    meter.add({name: np.float32(value) for name, value in sums.items()}, 200)
    found = meter.read()
    assert (found["loss"], found["router_loss"]) == (2.0, pytest.approx(2.1))
    assert "| loss 2.0000 | router 2.1000 |" in meter.line(found)


@pytest.mark.slow
def test_a_run_reports_the_balance_and_evaluates_without_it(make_model, make_config, tmp_path):
    options = {"model_type": "qwen3_moe", **FAMILIES["qwen3_moe"]}
    cfg = make_config(make_model(**options), **{"train.steps": 2, "loss.router_aux": 100.0})
    cfg.data.eval.same = cfg.data.train.main
    cfg.update({"mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "batch": {"micro_rows": 4}})
    jax_sft.train(cfg, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval/loss" in line]
    # Nothing is learned yet: the loss is that of guessing among 272 tokens, the balance the 2 of
    # almost equal experts.
    for loss in (steps[0]["loss"], evaluations[0]["eval/loss"]):
        assert loss == pytest.approx(math.log(272), abs=0.1)
    assert steps[0]["router_loss"] == pytest.approx(2, abs=0.1)
    assert not any("router" in name for line in evaluations for name in line)
