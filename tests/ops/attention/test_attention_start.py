"""Which attention runs, and the self-test that refuses one that computes wrongly."""

import functools
import json
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sft import inference
from jax_sft.ops.attention import blockwise, cudnn, dispatch, reference, self_test, tokamax
from jax_sft.ops.attention.backend import Backend
from jax_sft.sharding import rules
from jax_sft.sharding.mesh import make_mesh, single_device_mesh

HERE = {"platform": "cpu", "dtype": "float32", "head_dim": 64, "sequence": 1}
GPU = {**HERE, "platform": "gpu", "dtype": "bfloat16"}


def mesh_of(sizes):
    if sizes == (1, 1, 1, 1):
        return single_device_mesh()
    return make_mesh(dict(zip(rules.AXES, sizes, strict=True)))


# ---- resolve -------------------------------------------------------------------------------------


def test_an_unknown_attention_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match="'flash' is unknown: use one of .*'auto', 'cudnn'"
    ) as error:
        dispatch.resolve("flash", **HERE)
    assert str(error.value).startswith("model.attention = ")


@pytest.mark.parametrize("name", ["cudnn", "tokamax"])
def test_an_attention_that_cannot_run_is_refused_with_why_and_what_to_do(name):
    with pytest.raises(ValueError) as error:
        dispatch.resolve(name, **HERE)
    assert f"model.attention = '{name}' cannot be used: " in str(error.value)
    assert "runs on cpu" in str(error.value)
    assert 'model.attention = "auto"' in str(error.value)


@pytest.mark.parametrize("name", ["blockwise", "reference"])
def test_what_runs_everywhere_is_what_was_asked_for(name):
    assert dispatch.resolve(name, **HERE) == name
    assert dispatch.resolve(name, **GPU) == name


def test_auto_is_blockwise_on_a_cpu():
    assert dispatch.resolve("auto", **HERE) == "blockwise"


def test_auto_is_the_first_on_a_gpu_that_can_run(monkeypatch):
    able = {"cudnn", "tokamax"}

    def can_run(name, **situation):
        assert situation == {**GPU, "capability": None, "has_soft_cap": False}
        return [] if name in able else ["not today"]

    for name, module in (("cudnn", cudnn), ("tokamax", tokamax)):
        monkeypatch.setattr(module, "problems", functools.partial(can_run, name))
    assert dispatch.resolve("auto", **GPU) == "cudnn"
    able.remove("cudnn")
    assert dispatch.resolve("auto", **GPU) == "tokamax"
    able.remove("tokamax")
    assert dispatch.resolve("auto", **GPU) == "blockwise"


def test_auto_inside_a_model_is_told_by_the_devices_of_the_mesh(monkeypatch):
    asked = []
    monkeypatch.setattr(
        dispatch, "resolve", lambda name, **situation: asked.append(situation) or "reference"
    )
    x = jnp.zeros((8, 4, 2, 6), jnp.bfloat16)
    ids = jnp.zeros((8, 4), jnp.int32)
    with jax.set_mesh(mesh_of((2, 2, 1, 2))):
        jax.eval_shape(functools.partial(dispatch.packed_attention, scale=1.0), x, x, x, ids, ids)
    wanted = {"platform": "cpu", "dtype": "bfloat16", "head_dim": 6, "sequence": 2}
    assert asked == [wanted | {"has_soft_cap": False}]


def test_a_soft_cap_is_not_for_cudnn(monkeypatch):
    for module in (cudnn, tokamax):  # as on a GPU, whatever is installed here
        monkeypatch.setattr(module, "_missing_names", lambda: [], raising=False)
    planned = GPU | {"capability": (9, 0)}
    assert dispatch.resolve("auto", **planned) == "cudnn"
    assert dispatch.resolve("auto", **planned, has_soft_cap=True) == "blockwise"
    with pytest.raises(ValueError, match='no soft cap.* Or use model.attention = "auto"'):
        dispatch.resolve("cudnn", **planned, has_soft_cap=True)


# ---- self-test -----------------------------------------------------------------------------------


def run_self_test(
    backend="blockwise",
    dtype="float32",
    group=2,
    head_dim=8,
    sizes=(1, 1, 1, 1),
    window=False,
    soft_cap=False,
):
    shape = {"num_heads_per_kv": group, "head_dim": head_dim, "has_window": window}
    shape |= {"has_soft_cap": soft_cap}
    self_test.self_test(backend, dtype=dtype, mesh=mesh_of(sizes), **shape)


@pytest.mark.parametrize(
    ("backend", "dtype", "group", "sizes"),
    [
        ("blockwise", "float32", 1, (1, 1, 1, 1)),
        ("blockwise", "float16", 3, (1, 1, 1, 1)),
        ("blockwise", "bfloat16", 2, (2, 1, 2, 2)),
        ("reference", "bfloat16", 2, (1, 1, 1, 1)),
        ("auto", "float32", 2, (1, 4, 1, 2)),
    ],
)
def test_a_right_backend_passes(backend, dtype, group, sizes):
    run_self_test(backend, dtype, group, sizes=sizes)


@pytest.mark.parametrize("backend", ["blockwise", "reference"])
def test_a_right_backend_passes_with_a_window(backend):
    run_self_test(backend, "bfloat16", window=True)


def test_a_backend_that_does_not_heed_the_soft_cap_is_refused(monkeypatch):
    run_self_test("reference", "bfloat16", soft_cap=True)
    run_self_test("blockwise", "bfloat16", window=True, soft_cap=True)

    def forward(*args, soft_cap, **options):
        return reference.BACKEND.forward(*args, **options)

    faulty = Backend(forward, reference.BACKEND.backward)
    monkeypatch.setitem(dispatch._MODULES, "tokamax", types.SimpleNamespace(BACKEND=faulty))
    with pytest.raises(ValueError, match="'tokamax' computes wrongly .* and a soft cap: out"):
        run_self_test("tokamax", soft_cap=True)


@pytest.mark.parametrize("change", [None, 1, -1])  # None: it knows no window
def test_a_backend_that_counts_the_window_otherwise_is_refused(change, monkeypatch):
    def forward(*args, window, **options):
        other = None if change is None or window is None else window + change
        return reference.BACKEND.forward(*args, window=other, **options)

    faulty = Backend(forward, reference.BACKEND.backward)
    monkeypatch.setitem(dispatch._MODULES, "tokamax", types.SimpleNamespace(BACKEND=faulty))
    run_self_test("tokamax")
    self_test.self_test.cache_clear()
    with pytest.raises(ValueError, match="'tokamax' computes wrongly .* and a sliding window: out"):
        run_self_test("tokamax", window=True)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rounding_takes_less_than_a_third_of_what_is_allowed(dtype, monkeypatch):
    monkeypatch.setitem(self_test.TOLERANCE, dtype, self_test.TOLERANCE[dtype] / 3)
    run_self_test(dtype=dtype, group=4, head_dim=16)


def same_segment(forward, backward):
    """Segment ids are ignored."""

    def blind(ids):
        return jnp.ones_like(ids[0]), ids[1]

    def wrong_forward(q, k, v, query_ids, key_ids, **options):
        return forward(q, k, v, blind(query_ids), blind(key_ids), **options)

    return wrong_forward, backward


def other_heads(forward, backward):
    """Query head n reads kv head n % K instead of n // G."""

    def wrong_forward(q, k, v, *args, **options):
        B, T, N, H = q.shape
        K = k.shape[2]
        swapped = q.reshape(B, T, N // K, K, H).swapaxes(2, 3).reshape(q.shape)
        out, lse = forward(swapped, k, v, *args, **options)
        return out.reshape(B, T, K, N // K, H).swapaxes(2, 3).reshape(q.shape), lse

    return wrong_forward, backward


def sees_the_next_token(forward, backward):
    def wrong_forward(q, k, v, query_ids, key_ids, **options):
        return forward(q, k, v, (query_ids[0], query_ids[1] + 1), key_ids, **options)

    return wrong_forward, backward


def sees_not_itself(forward, backward):
    def wrong_forward(q, k, v, query_ids, key_ids, **options):
        return forward(q, k, v, (query_ids[0], query_ids[1] - 1), key_ids, **options)

    return wrong_forward, backward


def no_gradient_of_k(forward, backward):
    def wrong_backward(*args, **options):
        dq, dk, dv = backward(*args, **options)
        return dq, jnp.zeros_like(dk), dv

    return forward, wrong_backward


def no_scale_in_dq(forward, backward):
    def wrong_backward(*args, scale, **options):
        dq, dk, dv = backward(*args, scale=scale, **options)
        return dq / scale, dk, dv

    return forward, wrong_backward


def gradient_of_one_head(forward, backward):
    """Of the heads that share a kv head, the last gives v no gradient."""

    def wrong_backward(q, k, v, out, lse, grad_out, *args, **options):
        dq, dk, _ = backward(q, k, v, out, lse, grad_out, *args, **options)
        group = q.shape[2] // k.shape[2]
        last = (jnp.arange(q.shape[2]) % group == group - 1)[:, None]
        grads = backward(q, k, v, out, lse, jnp.where(last, 0, grad_out), *args, **options)
        return dq, dk, grads[2]

    return forward, wrong_backward


def nan_at_padding(forward, backward):
    def wrong_forward(q, k, v, query_ids, *args, **options):
        out, lse = forward(q, k, v, query_ids, *args, **options)
        return jnp.where((query_ids[0] == 0)[..., None, None], jnp.nan, out), lse

    return wrong_forward, backward


def one_token(forward, backward):
    """A single token of a single row is wrong."""

    def wrong_forward(*args, **options):
        out, lse = forward(*args, **options)
        return out.at[1, 130].mul(1.5), lse

    return wrong_forward, backward


def one_device(forward, backward):
    def wrong_forward(*args, **options):
        out, lse = forward(*args, **options)
        is_last = jax.lax.axis_index(("data", "fsdp", "sequence")) == 7
        return jnp.where(is_last, out / 2, out), lse

    return wrong_forward, backward


@pytest.mark.parametrize(
    ("fault", "dtype", "sizes", "wrong"),
    [
        (same_segment, "bfloat16", (1, 1, 1, 1), "out"),
        (other_heads, "bfloat16", (1, 1, 1, 1), "out"),
        (sees_the_next_token, "float32", (1, 1, 1, 1), "out"),
        (sees_not_itself, "bfloat16", (1, 1, 1, 1), "out"),
        (no_gradient_of_k, "bfloat16", (1, 1, 1, 1), "dk"),
        (no_scale_in_dq, "float32", (1, 1, 1, 1), "dq"),
        (gradient_of_one_head, "bfloat16", (1, 1, 1, 1), "dv"),
        (nan_at_padding, "float32", (1, 1, 1, 1), "out"),
        (one_token, "bfloat16", (1, 1, 1, 1), "out"),
        (one_device, "float32", (2, 1, 1, 4), "out"),
    ],
)
def test_a_wrong_backend_is_refused_and_named(fault, dtype, sizes, wrong, monkeypatch):
    faulty = Backend(*fault(reference.BACKEND.forward, reference.BACKEND.backward))
    monkeypatch.setitem(dispatch._MODULES, "tokamax", types.SimpleNamespace(BACKEND=faulty))
    with pytest.raises(ValueError, match=r"model\.attention = 'tokamax' computes wrongly") as error:
        run_self_test("tokamax", dtype, sizes=sizes)
    message = str(error.value)
    named = [name for name in ("out", "dq", "dk", "dv") if f"{name} by " in message]
    # A wrong output and log-sum-exp may spoil gradients too.
    assert named[:1] == ["out"] if wrong == "out" else named == [wrong]
    assert dtype in message and "Nothing was trained" in message


# ---- what "auto" falls back to -------------------------------------------------------------------


def fails_with(error: Exception):
    def call(*args, **options):
        raise error

    return Backend(call, reference.BACKEND.backward)


def wrong_everywhere(*args, **options):
    out, lse = reference.BACKEND.forward(*args, **options)
    return 2 * out, lse


WRONG = Backend(wrong_everywhere, reference.BACKEND.backward)
RIGHT = reference.BACKEND


def choose(name: str, say=lambda line: None) -> str:
    mesh = mesh_of((1, 1, 1, 1))
    return self_test.choose(
        name, say=say, mesh=mesh, dtype="float32", head_dim=8, num_heads_per_kv=2
    )


@pytest.fixture
def plant(monkeypatch):
    """Put backends in the place of those of a GPU, and let the CPU pass for one."""

    def plant(**backends: Backend):
        for name, backend in backends.items():
            module = types.SimpleNamespace(BACKEND=backend, problems=lambda **situation: [])
            monkeypatch.setitem(dispatch._MODULES, name, module)
        as_on_a_gpu = functools.partial(
            lambda real, name, **s: real(name, **s | {"platform": "gpu"}), dispatch.candidates
        )
        monkeypatch.setattr(self_test, "candidates", as_on_a_gpu)

    self_test.self_test.cache_clear()
    yield plant
    self_test.self_test.cache_clear()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            jax.errors.JaxRuntimeError("INTERNAL: no kernel\nand a dump"),
            "JaxRuntimeError: INTERNAL",
        ),
        (NotImplementedError("this GPU"), "NotImplementedError: this GPU"),
        (ImportError("libcudnn.so.9"), "ImportError: libcudnn.so.9"),
        (KeyError("sm_120"), "KeyError: 'sm_120'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_auto_passes_over_a_backend_that_fails_and_says_why(plant, error, reason):
    plant(cudnn=fails_with(error), tokamax=RIGHT)
    lines = []
    assert choose("auto", lines.append) == "tokamax"
    (line,) = lines
    assert line.startswith("WARNING model.attention = 'cudnn' fails on this machine")
    assert reason in line and "dump" not in line and "Nothing was trained" not in line
    with pytest.raises(ValueError, match=rf"'cudnn' fails .*{reason}.*Nothing was trained: use"):
        choose("cudnn")


def test_auto_goes_on_to_what_runs_everywhere_and_what_is_named_is_not_replaced(plant):
    plant(cudnn=WRONG, tokamax=fails_with(RuntimeError("x")), blockwise=RIGHT)
    lines = []
    assert choose("auto", lines.append) == "blockwise"
    assert ["computes wrongly" in line for line in lines] == [True, False]
    for name in ("cudnn", "tokamax"):
        with pytest.raises(ValueError, match=f"model.attention = '{name}' "):
            choose(name)


def test_auto_is_refused_with_all_reasons_where_nothing_computes_rightly(plant):
    plant(**dict.fromkeys(("cudnn", "tokamax", "blockwise", "reference"), WRONG))
    with pytest.raises(ValueError, match=r"no attention .*'cudnn'.*'tokamax'.*'blockwise'.*'refer"):
        choose("auto")


def test_all_processes_take_what_passes_on_each_of_them(plant, monkeypatch):
    plant(cudnn=RIGHT, tokamax=RIGHT, blockwise=RIGHT)

    def exchange(what, text, timeout_s=60.0):
        """A second process, that has no cudnn and whose tokamax does not compile."""
        others = {
            "attention": json.dumps(["tokamax", "blockwise", "reference"]),
            "attention, compiled": json.dumps(["Boom: x"] if not asked else []),
        }
        if what == "attention, compiled":
            asked.append(what)
        return [text, others.get(what, text)]

    asked, lines = [], []
    monkeypatch.setattr(self_test.cluster, "exchange", exchange)
    assert choose("auto", lines.append) == "blockwise"
    (line,) = lines
    assert "'tokamax' fails" in line and "Boom: x [process 1]" in line


def test_blocks_of_the_self_test_are_several():
    assert self_test._TEST_TOKENS > blockwise.BLOCK


@pytest.mark.parametrize("platform, expected", [("gpu", "tested"), ("cpu", "auto")])
def test_a_loaded_model_tests_its_attention_on_gpus(monkeypatch, platform, expected):
    monkeypatch.setattr(self_test, "choose", lambda name, **_: "tested")
    devices = np.array([types.SimpleNamespace(platform=platform)])
    mesh: Any = types.SimpleNamespace(devices=devices)
    cfg = types.SimpleNamespace(
        head_dim=8, num_heads=4, num_kv_heads=2, window=None, attention_soft_cap=0.0
    )
    assert inference._attention("auto", cfg, "float32", mesh) == expected
