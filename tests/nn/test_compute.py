"""What the backward pass keeps, and in which dtype gradients travel."""

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jax_sft import models
from jax_sft.nn import compute
from jax_sft.nn.model_def import ModelDef
from jax_sft.sharding import collectives, rules
from jax_sft.sharding.mesh import make_mesh, single_device_mesh
from jax_sft.training.step import value_and_grad
from jax_sft.weights import placement

RAW = {
    **{"model_type": "llama", "hidden_size": 64, "intermediate_size": 96},
    **{"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"vocab_size": 256, "max_position_embeddings": 512, "attention_bias": True},
}
ROWS, TOKENS = 4, 64


def run(dtype: str = "float32", **options):
    """(products of the gradient, its temporary bytes, loss, gradients, jaxpr) on 8 devices."""
    family = models.find("llama")
    model_def = ModelDef.of(family, family.Config.from_hf(RAW), dtype=dtype, **options)
    mesh = make_mesh({"fsdp": 2, "tensor": 2, "sequence": 2})
    rng = np.random.default_rng(0)
    shardings = placement.shardings(model_def.specs, mesh)
    params = {}
    for row in model_def.specs:
        noise = 0.1 * rng.standard_normal(row.shape(model_def.cfg.axis_sizes))
        params[row.path] = np.float32(noise + (not row.is_matrix))
    tokens = rng.integers(0, 256, (1, ROWS, TOKENS)).astype(np.int32)
    positions = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), tokens.shape)
    batch = dict(tokens=tokens, targets=tokens, weights=np.ones(tokens.shape, np.float32))
    batch |= dict(segment_ids=np.ones_like(tokens), positions=positions)

    def gradient(params, batch):
        return value_and_grad(model_def, params, batch)

    with jax.set_mesh(mesh):
        params = jax.device_put(params, shardings)
        batch = jax.device_put(batch, rules.sharding(mesh, "micro_batch", "batch", "token"))
        jaxpr = jax.make_jaxpr(gradient)(params, batch)
        compiled = jax.jit(gradient).lower(params, batch).compile()
        sums, grads = jax.device_get(compiled(params, batch))
    memory = compiled.memory_analysis().temp_size_in_bytes
    return str(jaxpr).count("dot_general"), memory, float(sums["loss"]), grads, jaxpr


@pytest.fixture(scope="module")
def kept_all():
    return run(remat="none")


@pytest.mark.slow
def test_policies_trade_products_for_memory_and_change_no_gradient(kept_all):
    found = {"none": kept_all}
    for remat in ("dots", "attn", "full", "qkv,attention,attention_lse,mlp"):
        found[remat] = run(remat=remat)
    products = {remat: one[0] for remat, one in found.items()}
    memory = {remat: one[1] for remat, one in found.items()}
    assert products["none"] <= products["dots"] < products["attn"] < products["full"]
    assert products["qkv,attention,attention_lse,mlp"] < products["attn"]
    assert memory["none"] > memory["dots"] > memory["attn"] > memory["full"]
    for _, _, loss, grads, _ in found.values():
        assert loss == pytest.approx(kept_all[2], rel=1e-6)
        for path, grad in grads.items():
            wanted = kept_all[3][path]
            np.testing.assert_allclose(grad, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


def test_no_gathered_weight_is_kept_where_everything_else_is(kept_all):
    loops = [e for e in kept_all[4].jaxpr.eqns if e.primitive.name == "scan"]
    kept = {variable.aval.shape for variable in loops[0].outvars}  # of the forward pass
    layers, features, wide = 3, 64, 96
    assert (layers, ROWS, TOKENS, wide) in kept  # gate and up
    assert not {(layers, features, wide), (layers, wide, features)} & kept


def test_offloaded_values_go_to_the_host_and_come_back_the_same(kept_all):
    _, _, loss, grads, jaxpr = run(remat="attn", offload=("residual", "attention"))
    assert "Host" in str(jaxpr) and "Host" not in str(kept_all[4])
    assert loss == pytest.approx(kept_all[2], rel=1e-6)
    for path, grad in grads.items():
        wanted = kept_all[3][path]
        np.testing.assert_allclose(grad, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize(("grad_dtype", "num_float32"), [("float32", 8), ("bfloat16", 1)])
def test_gradients_are_scattered_in_the_dtype_asked_for(grad_dtype, num_float32):
    # Seven kernels of a layer; and the head, whose gradient is float32 always.
    jaxpr = run(dtype="bfloat16", grad_dtype=grad_dtype, remat="full")[4]
    scattered = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "reduce_scatter"]
    dtypes = [equation.outvars[0].aval.dtype.name for equation in scattered]
    assert dtypes.count("float32") == num_float32
    assert dtypes.count("bfloat16") >= 8 - num_float32


def equations(jaxpr):
    """All equations, those of loops and shard_map regions too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.slow
def test_rounding_each_device_in_bfloat16_is_what_float32_sums_avoid(kept_all):
    exact, errors = kept_all[3], {}
    for grad_dtype in ("float32", "bfloat16"):
        grads = run(dtype="bfloat16", grad_dtype=grad_dtype, remat="full")[3]
        kernel = "layers.mlp.down.kernel"
        errors[grad_dtype] = np.abs(grads[kernel] - exact[kernel]).mean()
    assert errors["float32"] < errors["bfloat16"]


@pytest.mark.parametrize(
    ("remat", "offload", "message"),
    [
        ("some", (), r"model\.remat = 'some': use one of .*full.*qkv"),
        ("full", ("mlps",), r"model\.offload = \['mlps'\]: use names out of"),
        ("none", ("residual",), r"cannot be combined with model\.remat = 'none'"),
        ("", (), r"model\.remat = ''"),
    ],
)
def test_an_unknown_name_is_refused(remat, offload, message):
    with pytest.raises(ValueError, match=message):
        compute.policy(remat, offload)


@pytest.mark.parametrize("devices", [1, 8])
def test_what_devices_have_is_added_up_and_one_adds_up_nothing(devices):
    single = devices == 1
    mesh = single_device_mesh() if single else make_mesh({"fsdp": 8})
    x = np.arange(8, dtype=np.float32)

    def total(x):
        return collectives.psum(x.sum(), "fsdp")

    def own(x):
        return x.sum()

    with jax.set_mesh(mesh):
        adds = jax.jit(collectives.shard_map_region(total, jax.P("fsdp"), jax.P()))
        assert float(adds(x)) == 28.0
        # XLA on CPUs copies what it is told to add up over one device.
        assert ("all-reduce" in adds.lower(x).compile().as_text()) == (not single)
        if not single:  # a sum that was forgotten is found
            with pytest.raises(ValueError, match="fsdp"):
                jax.jit(collectives.shard_map_region(own, jax.P("fsdp"), jax.P()))(x)
