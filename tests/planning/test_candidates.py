"""Candidates divide what they must, their memory and traffic follow hand arithmetic, and rank."""

import math

import jax
import jax.numpy as jnp
import pytest

from jax_sft import hardware
from jax_sft.models import qwen2
from jax_sft.planning import candidates, step_cost
from jax_sft.sharding import rules
from jax_sft.sharding.mesh import make_mesh

QWEN_7B = {
    **{"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944},
    **{"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
    **{"vocab_size": 152064, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6},
}
GIB = 2**30
H200 = hardware.find("h200")


def model(**changes) -> candidates.Model:
    cfg = qwen2.Config.from_hf(QWEN_7B | changes)
    return candidates.Model(qwen2.weights(cfg), cfg.axis_sizes, cfg.tied)


def setting(micro_rows: int = 8, remat: str = "full", **sizes) -> candidates.Setting:
    mesh = dict.fromkeys(rules.AXES, 1) | sizes
    return candidates.Setting(mesh, micro_rows, remat)


def ranked(hosts: int = 1, num_rows: int = 64, seq_len: int = 4096, **changes):
    options = {"attention": "cudnn", "row": step_cost.full_row(seq_len), "num_rows": num_rows}
    options |= {"hosts": hosts, "gpus_per_host": 8} | changes
    return candidates.candidates(model(), H200, **options)


# ---- which settings ----------------------------------------------------------------------------


def test_settings_divide_devices_rows_tokens_heads_and_weights():
    found = list(candidates.settings(model(), 16, 8, 48, 4096, ("full",)))
    assert len({(*one.mesh.values(), one.micro_rows) for one in found}) == len(found) > 20
    for one in found:
        mesh = one.mesh
        assert math.prod(mesh.values()) == 16
        assert 48 % one.micro_rows == 0 and one.micro_rows % (mesh["data"] * mesh["fsdp"]) == 0
        assert 4 % mesh["tensor"] == 0  # kv heads
        assert 4096 % (mesh["sequence"] * mesh["tensor"]) == 0
        assert 3584 % (mesh["fsdp"] * mesh["sequence"]) == 0
    assert {one.mesh["tensor"] for one in found} == {1, 2, 4}
    assert {one.mesh["sequence"] for one in found} == {1, 2, 4, 8, 16}


def test_what_does_not_divide_is_left_out():
    def axes(axis, **changes):
        options = {"num_devices": 8, "gpus_per_host": 8, "num_rows": 8, "seq_len": 4096}
        options |= changes
        found = candidates.settings(model(), **options, remats=("full",))
        return {one.mesh[axis] for one in found}

    assert axes("sequence", seq_len=4098) == {1, 2}
    assert axes("fsdp", num_rows=2) == {1, 2}
    assert axes("tensor", num_devices=6, gpus_per_host=6, num_rows=12) == {1, 2}
    # Over 4 GPUs per host `tensor` would leave the host.
    assert axes("tensor", num_devices=8, gpus_per_host=2) == {1, 2}
    assert axes("data", num_rows=3) == {1}


def test_a_search_on_1024_gpus_has_every_axis_and_ends():
    found = list(candidates.settings(model(), 1024, 8, 1024, 4096, ("full",)))
    assert max(one.mesh["data"] for one in found) == 1024
    assert 100 < len(found) < 2000


# ---- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [{"fsdp": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 2, "tensor": 2, "sequence": 2}, {"tensor": 4}],
)
def test_parameters_and_moments_are_the_shards_that_the_rules_give(sizes):
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    of_7b = model()
    shards = [
        math.prod(rules.sharding(mesh, *row.axes).shard_shape(row.shape(dict(of_7b.axis_sizes))))
        for row in of_7b.specs
    ]
    memory = candidates.analytic_memory(of_7b, setting(**sizes), 8, 4096)
    assert memory.parameters == 4 * sum(shards)
    assert memory.moments == 8 * sum(shards)
    assert memory.gradients == 4 * sum(shards)


def test_full_remat_keeps_a_layers_input_and_attn_its_attention_too():
    tokens, sizes = 8 * 4096 / 8, {"fsdp": 8}
    full, attn, named = (
        candidates.analytic_memory(model(), setting(remat=remat, **sizes), 8, 4096).residuals
        for remat in ("full", "attn", "qkv,attention,attention_lse,mlp")
    )
    assert full == 28 * tokens * 3584 * 2
    assert attn == full + 28 * tokens * (28 * 128 * 2 + 28 * 4)
    assert named == attn + 28 * tokens * 2 * ((28 + 2 * 4) * 128 + 2 * 18944)


@pytest.mark.parametrize(
    ("name", "remat", "micro_rows", "micro_batches", "seq_len", "sizes", "compiled_gib"),
    [
        ("7b", "full", 8, 1, 4096, {"fsdp": 8}, 18.13),
        ("7b", "full", 32, 1, 4096, {"fsdp": 8}, 23.55),
        ("7b", "attn", 32, 1, 4096, {"fsdp": 8}, 26.66),
        ("7b", "qkv,attention,attention_lse,mlp", 16, 1, 4096, {"fsdp": 8}, 38.75),
        ("7b", "none", 8, 1, 4096, {"fsdp": 8}, 84.89),
        ("7b", "full", 8, 1, 4096, {"fsdp": 2, "tensor": 2, "sequence": 2}, 17.60),
        ("7b", "full", 1, 1, 131072, {"sequence": 16}, 12.96),
        ("32b", "full", 8, 2, 4096, {"fsdp": 8}, 88.02),
        ("72b", "attn", 64, 1, 4096, {"fsdp": 64}, 35.18),
    ],
)
def test_the_estimate_is_near_what_was_compiled(
    name, remat, micro_rows, micro_batches, seq_len, sizes, compiled_gib
):
    # Blockwise attention, for H200, with jax 0.10.2; nothing was run.
    changes = {
        "7b": {},
        "32b": {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64}
        | {"num_attention_heads": 40, "num_key_value_heads": 8},
        "72b": {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80}
        | {"num_attention_heads": 64, "num_key_value_heads": 8},
    }[name]
    one = setting(micro_rows, remat, **sizes)
    found = candidates.analytic_memory(model(**changes), one, micro_rows * micro_batches, seq_len)
    assert found.peak / GIB == pytest.approx(compiled_gib, rel=0.10)


def test_more_devices_and_more_remat_take_less_memory_and_bfloat16_moments_less_still():
    peaks = [
        candidates.analytic_memory(model(), setting(micro_rows=n, fsdp=n), n, 4096).peak
        for n in (2, 4, 8, 16, 32)
    ]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > 4 * peaks[-1]
    by_remat = [
        candidates.analytic_memory(model(), setting(remat=remat, fsdp=8), 8, 4096).peak
        for remat in candidates.REMATS
    ]
    assert by_remat == sorted(by_remat, reverse=True) and len(set(by_remat)) == len(by_remat)
    half = candidates.Model(model().specs, model().axis_sizes, False, moment_bytes=2)
    assert candidates.analytic_memory(half, setting(fsdp=8), 8, 4096).moments == pytest.approx(
        candidates.analytic_memory(model(), setting(fsdp=8), 8, 4096).moments / 2
    )


def test_more_remat_takes_more_time():
    times = {}
    for one in ranked():
        if one.setting.mesh["fsdp"] == 8 and one.setting.micro_rows == 8:
            times[one.setting.remat] = one.prediction.step_time_s
    in_order = [times[remat] for remat in candidates.REMATS]
    assert in_order == sorted(in_order)


# ---- traffic -----------------------------------------------------------------------------------


def traffic_of(gpus_per_host: int = 8, num_rows: int = 8, **sizes):
    of_7b, one = model(), setting(**sizes)
    cost = step_cost.step_cost(
        of_7b.specs,
        of_7b.axis_sizes,
        False,
        step_cost.full_row(4096),
        num_rows=num_rows,
        micro_batches=num_rows // one.micro_rows,
        remat="full",
        attention="cudnn",
        sizes=one.mesh,
    )
    return candidates.analytic_traffic(of_7b, one, cost, num_rows, 4096, gpus_per_host)


LAYER = 2 * 3584 * 28 * 128 + 2 * 3584 * 4 * 128 + 3 * 3584 * 18944  # weights in matrices


def test_fsdp_sends_each_weight_twice_in_bfloat16_and_its_gradient_once_in_float32():
    gather, scatter, *tables = traffic_of(fsdp=8, num_rows=16)
    assert gather.kind == "all-gather" and gather.count == 2 * 2 * 28
    assert gather.bytes_fast == 2 * 2 * 28 * LAYER * 2 * 7 / 8 and gather.bytes_slow == 0
    assert scatter.kind == "reduce-scatter" and scatter.bytes_fast == 2 * 28 * LAYER * 4 * 7 / 8
    assert [(one.kind, one.axis) for one in tables] == [
        ("all-gather", ("fsdp", "sequence")),
        ("reduce-scatter", ("fsdp", "sequence")),
        ("all-to-all", ("fsdp", "sequence")),
    ]
    assert tables[0].bytes_fast == 2 * 152064 * 3584 * 2 * 7 / 8
    assert not gather.blocking and not scatter.blocking and all(one.blocking for one in tables)


def test_a_ring_leaves_a_host_once_per_host():
    whole, split = traffic_of(fsdp=8)[0], traffic_of(fsdp=8, gpus_per_host=4)[0]
    assert split.bytes_slow == whole.bytes_fast * 2 / 8
    assert split.bytes_fast + split.bytes_slow == whole.bytes_fast


def test_data_over_hosts_sends_only_its_own_gradients_over_the_network():
    found = traffic_of(data=2, fsdp=4, gpus_per_host=4)
    slow = [one for one in found if one.bytes_slow]
    (reduce,) = slow
    assert (reduce.kind, reduce.axis, reduce.bytes_fast) == ("all-reduce", ("data",), 0)
    of_7b = model()
    local = candidates.analytic_memory(of_7b, setting(data=2, fsdp=4), 8, 4096).gradients
    assert reduce.bytes_slow == 2 * local / 2


def test_one_device_sends_nothing():
    assert traffic_of() == []


# ---- ranking -----------------------------------------------------------------------------------


def test_what_fits_comes_first_and_each_part_by_time():
    found = ranked(num_rows=64)
    fits = [one.fits for one in found]
    assert True in fits and False in fits and fits == sorted(fits, reverse=True)
    for wanted in (True, False):
        times = [one.prediction.step_time_s for one in found if one.fits == wanted]
        assert times == sorted(times)
    best = found[0]
    assert best.memory.peak <= 0.9 * H200.memory_bytes
    assert best.setting.mesh == {"data": 1, "fsdp": 8, "tensor": 1, "sequence": 1}


def test_a_row_of_131072_tokens_is_split_to_fit():
    found = ranked(hosts=2, num_rows=1, seq_len=131072, remats=("full",))
    assert found[0].fits and found[0].setting.mesh["sequence"] >= 4
    assert all(one.setting.mesh["data"] * one.setting.mesh["fsdp"] == 1 for one in found)


def test_more_headroom_lets_fewer_fit():
    counts = [sum(one.fits for one in ranked(headroom=share)) for share in (0.0, 0.3, 0.9)]
    assert counts[0] > counts[1] > counts[2]


def test_bfloat16_gradients_halve_what_is_reduced():
    half = candidates.Model(model().specs, model().axis_sizes, False, grad_bytes=2)
    one = setting(fsdp=8)
    cost = step_cost.step_cost(
        half.specs,
        half.axis_sizes,
        False,
        step_cost.full_row(4096),
        num_rows=8,
        micro_batches=1,
        remat="full",
        attention="cudnn",
        sizes=one.mesh,
    )
    scatter = candidates.analytic_traffic(half, one, cost, 8, 4096, 8)[1]
    assert scatter.bytes_fast == traffic_of(fsdp=8)[1].bytes_fast / 2
    assert jnp.dtype("bfloat16").itemsize == candidates.COMPUTE_BYTES
