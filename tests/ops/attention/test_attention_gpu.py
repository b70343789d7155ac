"""The GPU attention backends without a GPU: what kernels get, and what is made of their results.

cuDNN is stood in for by NumPy code that reads and writes flat memory as cuDNN does, and leaves
garbage elsewhere. tokamax has an implementation for CPU, used where the package is installed.
"""

import functools
import importlib.util
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sft.ops.attention import cudnn, dispatch, segments, self_test, tokamax
from jax_sft.sharding.mesh import make_mesh, single_device_mesh

GARBAGE = np.nan


def needs_tokamax(test):
    is_missing = importlib.util.find_spec("tokamax") is None
    test = pytest.mark.skipif(is_missing, reason="tokamax is not installed")(test)
    # Its derivative for CPU, which only these tests use, takes what JAX has moved.
    for text in ("jax.core.DropVar is deprecated", "core.Jaxpr is missing a DebugInfo"):
        test = pytest.mark.filterwarnings(f"ignore:{text}:DeprecationWarning")(test)
    return test


def row(*lengths: int, size: int, before: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Segments 1, 2.. of these lengths after some padding, and padding up to `size`."""
    ids = np.zeros((2, size), np.int32)
    start = before
    for n, length in enumerate(lengths):
        ids[0, start : start + length] = n + 1
        ids[1, start : start + length] = np.arange(length)
        start += length
    assert start <= size
    return ids[0], ids[1]


def batch(*rows: tuple[np.ndarray, np.ndarray]):
    return jnp.stack([r[0] for r in rows]), jnp.stack([r[1] for r in rows])


def attend_row(q_TNH, k_SKH, v_SKH, grad_TNH, query_ids, key_ids, scale, window):
    """(out, dq, dk, dv) in float64 from the definition, token by token; zeros for padding."""
    group = q_TNH.shape[1] // k_SKH.shape[1]
    out = np.zeros(q_TNH.shape)
    dq, dk, dv = np.zeros(q_TNH.shape), np.zeros(k_SKH.shape), np.zeros(v_SKH.shape)
    for t in range(len(q_TNH)):
        if not query_ids[0][t]:
            continue
        same = key_ids[0] == query_ids[0][t]
        keys = np.nonzero(same & (key_ids[1] <= query_ids[1][t]))[0]
        if window:
            keys = keys[key_ids[1][keys] > query_ids[1][t] - window]
        for n in range(q_TNH.shape[1]):
            scores = k_SKH[keys, n // group] @ q_TNH[t, n] * scale
            probs = np.exp(scores - scores.max())
            probs /= probs.sum()
            out[t, n] = probs @ v_SKH[keys, n // group]
            grad_probs = v_SKH[keys, n // group] @ grad_TNH[t, n]
            grad_scores = probs * (grad_probs - probs @ grad_probs) * scale
            dv[keys, n // group] += probs[:, None] * grad_TNH[t, n]
            dk[keys, n // group] += grad_scores[:, None] * q_TNH[t, n]
            dq[t, n] = grad_scores @ k_SKH[keys, n // group]
    return out, dq, dk, dv


def random_batch(query_ids, key_ids, heads=4, kv_heads=2, head_dim=8):
    rng = np.random.default_rng(0)
    (B, T), S = query_ids[0].shape, key_ids[0].shape[1]
    shapes = ((B, T, heads), (B, S, kv_heads), (B, S, kv_heads), (B, T, heads))
    return tuple(rng.standard_normal((*shape, head_dim)).astype(np.float32) for shape in shapes)


def check(backend, query_ids, key_ids, max_segments, tolerance, window=None):
    """Compare forward and backward with the definition; padding must be zero, also in gradients."""
    q, k, v, grad = random_batch(query_ids, key_ids)
    # What the model puts on padding is anything finite: no gradient reaches it through the loss.
    grad *= np.asarray(query_ids[0])[..., None, None] > 0
    options = dict(scale=0.3, max_segments=max_segments, window=window)

    @jax.jit
    def both(q, k, v, grad):
        out, lse = backend.forward(q, k, v, query_ids, key_ids, **options)
        assert (out.shape, out.dtype, len(lse), lse.ndim) == (q.shape, q.dtype, len(q), 3)
        grads = backend.backward(q, k, v, out, lse, grad, query_ids, key_ids, **options)
        return out, *grads

    out, *grads = both(q, k, v, grad)
    row_ids = zip(zip(*query_ids, strict=True), zip(*key_ids, strict=True), strict=True)
    wanted = [
        attend_row(*arrays, np.asarray(ids), np.asarray(others), 0.3, window)
        for *arrays, (ids, others) in zip(q, k, v, grad, row_ids, strict=True)
    ]
    for name, found, want in zip(
        ("out", "dq", "dk", "dv"), (out, *grads), zip(*wanted, strict=True), strict=True
    ):
        np.testing.assert_allclose(found, np.stack(want), atol=tolerance, err_msg=name)


class FakeCudnn:
    """Stands in for JAX's module: its primitives compute in NumPy on flat memory."""

    def __init__(self):
        self.calls = []
        self.MaskType = types.SimpleNamespace(PADDING_CAUSAL="padding and causal")
        self.AttentionLayout = types.SimpleNamespace(BTNH=types.SimpleNamespace(value=0))
        for name, results in (("fwd", self.forward), ("bwd", self.backward)):
            bind = functools.partial(self.bind, results)
            setattr(self, f"_dot_product_attention_{name}_p", types.SimpleNamespace(bind=bind))
            setattr(self, f"_dot_product_attention_{name}_cuda_lowering", lambda: None)

    def bind(
        self, results, q, k, v, *others, scale, variadic_args, mask_type, layout, **parameters
    ):
        assert variadic_args == (False, False) and mask_type == "padding and causal"
        assert layout == 0 and parameters.pop("dropout_rate") == 0
        window = parameters.pop("sliding_window_length")
        assert parameters.pop("seed") == 0 and (window is None or 0 < window < q.shape[1])
        num_slots, (longest, num_heads) = others[1].size, q.shape[1:3]
        if results == self.forward:
            assert parameters == {"is_training": True}
            shapes = (q, jax.ShapeDtypeStruct((num_slots, num_heads, longest), jnp.float32))
        else:
            assert not parameters
            shapes = (q, k, v)
        shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes)

        def compute(*operands):
            return results(*map(np.asarray, operands), scale=scale, window=window)

        return jax.pure_callback(compute, shapes, q, k, v, *others)

    def segments(self, q, k, v, *others):
        """For each used slot: (slot, index of its queries' elements, index of its keys')."""
        bias, lengths, kv_lengths, q_offsets, kv_offsets, pages, more_pages = others
        assert bias.size == pages.size == more_pages.size == 0
        lengths, q_offsets, kv_offsets = (np.ravel(x) for x in (lengths, q_offsets, kv_offsets))
        assert (lengths == np.ravel(kv_lengths)).all() and (lengths >= 0).all()
        rows, longest = q.shape[:2]
        assert lengths.size % rows == 0 and q_offsets.size == lengths.size + rows
        assert lengths.size > rows, "two slots for each row at least"
        self.calls.append((lengths, q_offsets, kv_offsets))
        for slot, length in enumerate(lengths):
            assert length <= longest
            if length == 0:
                assert q_offsets[slot] == q.size and kv_offsets[slot] == k.size
                continue
            per_token = [np.prod(x.shape[2:]) for x in (q, k)]
            queries = q_offsets[slot] + np.arange(length * per_token[0])
            keys = kv_offsets[slot] + np.arange(length * per_token[1])
            assert queries[-1] < q.size and keys[-1] < k.size
            yield slot, queries, keys

    @staticmethod
    def scores(flat_q, flat_k, q, k, scale, window):
        q_TNH = flat_q.reshape(-1, *q.shape[2:]).astype(np.float64)
        k_TNH = flat_k.reshape(-1, *k.shape[2:]).astype(np.float64)
        k_TNH = np.repeat(k_TNH, q.shape[2] // k.shape[2], axis=1)
        scores_NTS = np.einsum("TNH,SNH->NTS", q_TNH, k_TNH) * scale
        query, key = np.indices(scores_NTS.shape[1:])
        visible_TS = (key <= query) & (key > query - (window or len(q_TNH)))
        return q_TNH, k_TNH, np.where(visible_TS, scores_NTS, -np.inf)

    def forward(self, q, k, v, *others, scale, window):
        out = np.full(q.size, GARBAGE, q.dtype)
        num_slots, longest, num_heads = others[1].size, *q.shape[1:3]
        stats = np.full((num_slots, num_heads, longest), GARBAGE, np.float32)
        for slot, queries, keys in self.segments(q, k, v, *others):
            *_, scores = self.scores(q.flat[queries], k.flat[keys], q, k, scale, window)
            sums = np.exp(scores).sum(-1)
            v_TNH = v.flat[keys].reshape(-1, *v.shape[2:])
            v_TNH = np.repeat(v_TNH, q.shape[2] // v.shape[2], axis=1)
            out_TNH = np.einsum("NTS,SNH->TNH", np.exp(scores) / sums[..., None], v_TNH)
            out[queries] = out_TNH.ravel()
            stats[slot, :, : len(v_TNH)] = np.log(sums)
        return out.reshape(q.shape), stats

    def backward(self, q, k, v, *others, scale, window):
        *others, stats, out, grad = others
        assert stats.shape == (others[1].size, q.shape[2], q.shape[1]) and out.shape == q.shape
        grads = [np.full(x.size, GARBAGE, x.dtype) for x in (q, k, v)]
        for slot, queries, keys in self.segments(q, k, v, *others):
            q_TNH, k_TNH, scores = self.scores(q.flat[queries], k.flat[keys], q, k, scale, window)
            probs = np.exp(scores - stats[slot, :, : len(q_TNH), None])
            grad_TNH, out_TNH = (x.flat[queries].reshape(q_TNH.shape) for x in (grad, out))
            group = q.shape[2] // k.shape[2]
            v_TNH = np.repeat(v.flat[keys].reshape(-1, *v.shape[2:]), group, axis=1)
            grad_probs = np.einsum("TNH,SNH->NTS", grad_TNH, v_TNH)
            delta_NT = (grad_TNH * out_TNH).sum(-1).T
            grad_scores = probs * (grad_probs - delta_NT[..., None]) * scale
            found = (
                np.einsum("NTS,SNH->TNH", grad_scores, k_TNH),
                np.einsum("NTS,TNH->SNH", grad_scores, q_TNH),
                np.einsum("NTS,TNH->SNH", probs, grad_TNH),
            )
            grads[0][queries] = found[0].ravel()
            for flat, full in zip(grads[1:], found[1:], strict=True):
                grouped = full.reshape(len(full), -1, group, full.shape[-1])
                flat[keys] = grouped.sum(2).ravel()
        return tuple(g.reshape(x.shape) for g, x in zip(grads, (q, k, v), strict=True))


def forward(backend, ids, **options):
    """The backend's first result on random numbers."""
    q, k, v, _ = random_batch(ids, ids)
    options |= dict(scale=1.0, window=None)
    out = jax.jit(lambda *qkv: backend.forward(*qkv, ids, ids, **options)[0])(q, k, v)
    return np.asarray(out)


@pytest.fixture
def fake(monkeypatch):
    fake = FakeCudnn()
    monkeypatch.setattr(cudnn, "_private", lambda: fake)
    return fake


# --- cuDNN: classes of lengths ---------------------------------------------------------------


def test_classes_by_hand():
    classes = [(c.above, c.longest, c.slots) for c in cudnn.length_classes(8192, 256)]
    assert classes == [(2048, 8192, 3), (512, 2048, 4), (128, 512, 4), (0, 128, 4)]
    assert [c.num_slots(2 * 8192) for c in cudnn.length_classes(8192, 256)] == [6, 32, 128, 512]
    assert cudnn.length_classes(8192, 4) == (cudnn.LengthClass(0, 8192, 4),)
    assert [c.longest for c in cudnn.length_classes(8192, 5)] == [8192, 2048]
    assert [c.longest for c in cudnn.length_classes(8192, 17)] == [8192, 2048, 512]
    assert cudnn.length_classes(100, 1) == (cudnn.LengthClass(0, 100, 2),)


@pytest.mark.parametrize("max_segments", [1, 2, 5, 17, 64, 256])
@pytest.mark.parametrize("num_tokens", [64, 256, 1024, 4096])
def test_any_row_has_slots_for_its_segments(num_tokens, max_segments):
    classes = cudnn.length_classes(num_tokens, max_segments)
    assert [c.above for c in classes] == [c.longest for c in classes[1:]] + [0]
    assert classes[0].longest == num_tokens
    for c in classes:  # the worst row: as many segments as fit, as short as the class takes them
        most = min(max_segments, num_tokens // (c.above + 1))
        assert c.num_slots(num_tokens) >= most
        assert num_tokens % c.longest == 0 and c.slots >= 2
    # What the classes are for: no call sees more than this many tokens per row.
    at_most = max(6 * num_tokens, 2 * cudnn._SHORTEST * 4 * max_segments)
    assert max(c.num_slots(num_tokens) * c.longest for c in classes) <= at_most


def test_classes_divide_rows_of_any_length():
    for num_tokens in [*range(1, 5000, 7), 255, 256, 1021, 1024, 4093, 16381]:
        padded = num_tokens + -num_tokens % cudnn._multiple(num_tokens, 256)
        assert padded - num_tokens < 64
        assert not [c for c in cudnn.length_classes(padded, 256) if padded % c.longest]


def test_the_workspace_is_what_cudnn_states():
    # MiB that cuDNN 9.28.1 states for an H200 when its graphs are built for the same dimensions.
    sizes = dict(rows=1, num_tokens=8192, num_heads=28, num_kv_heads=4, head_dim=128)
    MiB = 2**20
    assert abs(cudnn.workspace_bytes(**sizes, max_segments=256) / MiB - 899.6) < 0.2
    assert abs(cudnn.workspace_bytes(**sizes, max_segments=4) / MiB - 899.5) < 0.2
    alike = sizes | dict(num_kv_heads=28)
    assert abs(cudnn.workspace_bytes(**alike, max_segments=4) / MiB - 451.5) < 0.2
    fixed = cudnn.workspace_bytes(**sizes, max_segments=256, deterministic=True)
    assert abs(fixed / MiB - 11090.6) < 0.2
    longer = sizes | dict(num_tokens=32768)
    fixed = cudnn.workspace_bytes(**longer, max_segments=256, deterministic=True)
    assert abs(fixed / MiB - 173386.5) < 0.2


# --- cuDNN: where the segments lie -----------------------------------------------------------


def test_offsets_and_lengths_by_hand(fake):
    ids = batch(row(2, 3, size=6), row(1, 1, 2, size=6))
    forward(cudnn.BACKEND, ids, max_segments=4)
    ((lengths, q_offsets, kv_offsets),) = fake.calls
    assert lengths.tolist() == [2, 3, 1, 1, 2, 0, 0, 0]
    firsts = np.array([0, 2, 6, 7, 8, 12, 12, 12, 12, 12])
    assert q_offsets.tolist() == (firsts * 4 * 8).tolist()
    assert kv_offsets.tolist() == (firsts * 2 * 8).tolist()


def test_each_segment_goes_to_the_call_of_its_class(fake):
    ids = batch(row(70, 64, 1, 65, 20, size=256))
    forward(cudnn.BACKEND, ids, max_segments=16)
    assert [lengths[lengths > 0].tolist() for lengths, *_ in fake.calls] == [[70, 65], [64, 1, 20]]
    starts = [q_offsets[: (n > 0).sum()] // 32 for n, q_offsets, _ in fake.calls]
    assert [s.tolist() for s in starts] == [[0, 135], [70, 134, 200]]


@pytest.mark.parametrize(
    ("ids", "max_segments"),
    [
        pytest.param(batch(row(3, 1, 4, size=8)), 3, id="as many segments as there may be"),
        pytest.param(batch(row(5, 2, size=9), row(9, size=9)), 8, id="padding after"),
        pytest.param(batch(row(3, 2, size=9, before=2), row(size=9)), 2, id="before, and alone"),
        pytest.param(batch(row(*[1] * 7, size=7)), 7, id="segments of one token"),
        pytest.param(batch(row(1, size=1)), 1, id="a row of one token"),
        pytest.param(
            batch(row(90, 1, 64, 65, 20, size=256), row(5, 130, *[2] * 20, size=256)),
            32,
            id="classes",
        ),
        pytest.param(
            batch(row(7, 100, 30, size=299), row(299, size=299)),
            32,
            id="classes that do not divide",
        ),
    ],
)
def test_cudnn_equals_the_definition(fake, ids, max_segments):
    check(cudnn.BACKEND, ids, ids, max_segments, tolerance=2e-5)


@pytest.mark.parametrize("window", [1, 2, 16, 63, 64, 65, 255])
def test_cudnn_is_told_the_window(fake, window):
    ids = batch(row(90, 1, 64, 65, 20, size=256), row(256, size=256))
    check(cudnn.BACKEND, ids, ids, 32, tolerance=2e-5, window=window)


def test_padding_between_segments_does_not_matter(fake):
    segments, positions = row(4, 3, 5, size=16)
    moved = np.array([0, 1, 2, 3, 13, 4, 5, 6, 14, 15, 7, 8, 9, 10, 11, 12])
    ids = batch((segments[moved], positions[moved]))
    assert ids[0].tolist() == [[1, 1, 1, 1, 0, 2, 2, 2, 0, 0, 3, 3, 3, 3, 3, 0]]
    check(cudnn.BACKEND, ids, ids, 4, tolerance=2e-5)


def test_too_many_segments_cannot_pass_unseen(fake):
    ids = batch(row(2, 2, 2, 2, size=8), row(4, 4, size=8))
    out = forward(cudnn.BACKEND, ids, max_segments=3)
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


def test_a_row_out_of_order_cannot_pass_unseen(fake):
    segments, positions = row(4, 4, size=8)
    order = np.array([0, 1, 4, 5, 2, 3, 6, 7])
    ids = batch((segments[order], positions[order]), (segments, positions))
    out = forward(cudnn.BACKEND, ids, max_segments=8)
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


def test_offsets_beyond_32_bits_are_refused():
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    ids = (jax.ShapeDtypeStruct((8, 32768), jnp.int32),) * 2
    args = (shape((8, 32768, 64, 128)), *(shape((8, 32768, 8, 128)),) * 2, ids, ids)
    options = dict(scale=1.0, max_segments=256, window=None)
    forward = functools.partial(cudnn.BACKEND.forward, **options)
    with pytest.raises(ValueError, match=r"8 rows of 32768 tokens .* lower batch.micro_rows"):
        jax.eval_shape(forward, *args)


def run_self_test(
    backend: str, has_window: bool = False, has_soft_cap: bool = False, **sizes: int
) -> None:
    mesh = make_mesh(sizes, devices=jax.devices()[: math.prod(sizes.values())])
    self_test.self_test.cache_clear()
    options = dict(num_heads_per_kv=3, head_dim=8)
    options |= dict(has_window=has_window, has_soft_cap=has_soft_cap)
    self_test.self_test(backend, dtype="float32", mesh=mesh, **options)


def test_cudnn_passes_the_self_test_in_several_classes(fake):
    run_self_test("cudnn", fsdp=1)
    assert len(fake.calls) == 4 and all((lengths > 0).any() for lengths, *_ in fake.calls)


def test_the_self_test_finds_a_window_that_is_not_heeded(fake, monkeypatch):
    run_self_test("cudnn", has_window=True, fsdp=1)
    right = fake.scores
    for other in (None, self_test._TEST_WINDOW + 1):
        monkeypatch.setattr(fake, "scores", lambda *args, other=other: right(*args[:-1], other))
        with pytest.raises(ValueError, match="'cudnn' computes wrongly .* and a sliding window"):
            run_self_test("cudnn", has_window=True, fsdp=1)


def test_the_self_test_finds_keys_of_the_wrong_segment(fake, monkeypatch):
    def shifted(*operands):
        for slot, queries, keys in right(*operands):
            yield slot, queries, keys - min(keys[0], 16)  # one token of 2 heads of 8 too early

    right = fake.segments
    monkeypatch.setattr(fake, "segments", shifted)
    with pytest.raises(ValueError, match="'cudnn' computes wrongly on this machine, in float32"):
        run_self_test("cudnn", fsdp=1)


# --- cuDNN: when it may be used --------------------------------------------------------------

GOOD = dict(platform="gpu", dtype="bfloat16", head_dim=128, sequence=1)


def test_cudnn_can_be_planned_for_without_a_gpu():
    assert cudnn.problems(**GOOD) == []
    assert cudnn.problems(**GOOD | dict(head_dim=256, dtype="float16")) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(platform="cpu"), "cuDNN needs an NVIDIA GPU, this runs on cpu"),
        (dict(dtype="float32"), "model.dtype is float32"),
        (dict(head_dim=100), "multiple of 8 up to 256, not 100"),
        (dict(head_dim=264), "multiple of 8 up to 256, not 264"),
        (dict(sequence=4), "mesh.sequence = 4"),
    ],
)
def test_cudnn_says_what_is_wrong(change, text):
    (problem,) = cudnn.problems(**GOOD | change)
    assert text in problem


@pytest.mark.parametrize(
    ("capability", "version", "head_dim", "text"),
    [
        ("9.0", 92801, 128, None),
        ("9.0", 92801, 256, None),
        ("10.0", 92801, 128, None),
        ("10.0", 92801, 192, "multiple of 8 up to 128, not 192"),
        ("8.0", 92801, 128, "compute capability 9.0 (Hopper) or newer, this GPU has 8.0"),
        ("gfx942", 92801, 128, "this GPU has 0"),
        ("9.0", 90501, 128, "cuDNN 9.6 or newer is needed, but the version is 90501"),
        ("10.3", 91000, 128, "cuDNN 9.11 or newer is needed, but the version is 91000"),
        ("9.0", None, 128, "cuDNN 9.6 or newer is needed, but the version is 0"),
    ],
)
def test_cudnn_asks_the_gpu_at_hand(monkeypatch, capability, version, head_dim, text):
    def cudnn_version():
        if version is None:
            raise RuntimeError("cuDNN is not detected.")
        return version

    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(cudnn._private(), "check_cudnn_version", cudnn_version)
    problems = cudnn.problems(**GOOD | dict(head_dim=head_dim))
    assert [bool(text and text in problem) for problem in problems] == [True] * (text is not None)


def test_cudnn_notices_another_jax(monkeypatch):
    def changed(ctx, query, scale, is_training, flavour):
        raise NotImplementedError

    monkeypatch.setattr(cudnn._private(), "_dot_product_attention_fwd_cuda_lowering", changed)
    (problem,) = cudnn.problems(**GOOD)
    assert "changed _dot_product_attention_fwd_cuda_lowering (flavour)" in problem
    monkeypatch.delattr(cudnn._private(), "_dot_product_attention_bwd_p")
    (problem,) = cudnn.problems(**GOOD)
    assert f"jax {jax.__version__} has no _dot_product_attention_bwd_p" in problem
    monkeypatch.setattr(cudnn, "_private", lambda: None)
    (problem,) = cudnn.problems(**GOOD)
    assert "has no _dot_product_attention_fwd_p" in problem


# --- cuDNN: what is compiled -----------------------------------------------------------------


def lowered_for_cuda(num_tokens: int, max_segments: int, window: int | None = None) -> str:
    def step(q, k, v, ids):
        options = dict(scale=0.1, max_segments=max_segments, window=window)
        out, lse = cudnn.BACKEND.forward(q, k, v, ids, ids, **options)
        return cudnn.BACKEND.backward(q, k, v, out, lse, out, ids, ids, **options)

    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    ids = (jax.ShapeDtypeStruct((2, num_tokens), jnp.int32),) * 2
    heads, kv_heads = shape((2, num_tokens, 28, 128)), shape((2, num_tokens, 4, 128))
    traced = jax.jit(step).trace(heads, kv_heads, kv_heads, ids)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_the_compiled_step_calls_cudnn_once_per_class_and_pass():
    text = lowered_for_cuda(8192, 256)
    assert len(re.findall(r"custom_call @__cudnn\$fmhaSoftmax\(", text)) == 4
    assert len(re.findall(r"custom_call @__cudnn\$fmhaSoftmaxBackward\(", text)) == 4
    assert text.count("PADDING_CAUSAL") == 8
    assert re.findall(r"max_seg_per_batch\\22: (\d+)", text) == ["3", "4", "4", "4"] * 2


@pytest.mark.parametrize(
    ("window", "told"),
    [
        (None, ["0", "0", "0", "0"]),
        (600, ["600", "600", "0", "0"]),  # segments of 512 tokens are within it
        (2048, ["2048", "0", "0", "0"]),
        (64, ["64"] * 4),
    ],
)
def test_the_compiled_step_tells_cudnn_the_window_where_segments_are_longer(window, told):
    text = lowered_for_cuda(8192, 256, window)
    assert text.count("PADDING_CAUSAL") == 8
    assert re.findall(r"sliding_window_length\\22: (\d+)", text) == told * 2


def test_the_compiled_step_has_cudnn_with_and_without_a_window_that_the_layer_decides():
    def step(q, k, v, ids, windowed):
        options = dict(scale=0.1, backend="cudnn", window=64, windowed=windowed)
        return dispatch.packed_attention(q, k, v, *ids, **options)

    q = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    ids = (jax.ShapeDtypeStruct((1, 256), jnp.int32),) * 2
    flag = jax.ShapeDtypeStruct((), jnp.bool)
    with jax.set_mesh(single_device_mesh()):
        traced = jax.jit(step).trace(q, q, q, ids, flag)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    found = re.findall(r"sliding_window_length\\22: (\d+)", text)
    assert set(found) == {"64", "0"} and text.count('"stablehlo.case"') == 1


def test_the_compiled_step_holds_no_square_of_the_row():
    shapes = set(re.findall(r"tensor<([0-9x]+)x(?:bf16|f32|i32|i1)>", lowered_for_cuda(8192, 256)))
    largest = max(np.prod([int(n) for n in shape.split("x")]) for shape in shapes)
    assert not [s for s in shapes if s.split("x").count("8192") > 1]
    assert largest <= 2 * 8192 * 28 * 128


# --- tokamax ---------------------------------------------------------------------------------


def test_ranges_of_keys_by_hand():
    ids = batch(row(3, 2, size=7, before=1))
    first, end = tokamax.visible_keys(ids, ids, is_natural=True)
    assert first.tolist() == [[0, 1, 1, 1, 4, 4, 6]] and end.tolist() == [[1, 2, 3, 4, 5, 6, 7]]

    # Rank 1 of 2: tokens 2, 3 and 6, 7 of 8. The keys lie by segment: padding, then 1, then 2.
    segments, positions = row(3, 4, size=8)
    mine, order = [2, 3, 6, 7], [7, 0, 1, 2, 3, 4, 5, 6]
    queries = batch((segments[mine], positions[mine]))
    keys = batch((segments[order], positions[order]))
    first, end = tokamax.visible_keys(queries, keys, is_natural=False)
    assert queries[0].tolist() == [[1, 2, 2, 0]]
    assert first.tolist() == [[1, 4, 4, 0]] and end.tolist() == [[4, 5, 8, 1]]
    padded = (jnp.pad(keys[0], ((0, 0), (0, 3))), jnp.pad(keys[1], ((0, 0), (0, 3))))
    assert tokamax.visible_keys(queries, padded, is_natural=False)[0].tolist() == first.tolist()


@pytest.mark.parametrize("window", [None, 1, 2, 5, 40])
def test_ranges_of_keys_are_what_the_definition_sees(window):
    segments, positions = row(9, 1, 17, 6, size=40, before=2)
    seen = (segments[:, None] == segments) & (positions[:, None] >= positions)
    if window:
        seen &= positions[:, None] - window < positions
    order = np.lexsort((positions, segments))  # where rows are split
    full = batch((segments, positions))
    ordered = batch((segments[order], positions[order]))
    for keys, is_natural, wanted in ((full, True, seen), (ordered, False, seen[:, order])):
        first, end = tokamax.visible_keys(full, keys, is_natural=is_natural, window=window)
        key = np.arange(40)
        found = (key >= first[0][:, None]) & (key < end[0][:, None])
        np.testing.assert_array_equal(found[segments > 0], wanted[segments > 0])
        assert found.any(axis=1).all()  # no softmax is empty


def test_natural_order_is_told():
    good = row(3, 2, size=7, before=1)
    order = [0, 1, 4, 2, 3, 5, 6]
    ids = batch(good, (good[0][order], good[1][order]), row(7, size=7), row(size=7))
    assert segments.in_natural_order(ids).tolist() == [True, False, True, True]


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(tokamax, "IMPLEMENTATION", "xla")


@needs_tokamax
@pytest.mark.parametrize("window", [None, 16, 100])
@pytest.mark.parametrize("size", [128, 150])
def test_tokamax_equals_the_definition(on_cpu, size, window):
    ids = batch(row(40, 1, 70, size=size), row(size, size=size))
    check(tokamax.BACKEND, ids, ids, 8, tolerance=2e-5, window=window)


@needs_tokamax
def test_tokamax_takes_interleaved_keys(on_cpu):
    full = batch(row(30, 1, 60, 20, size=128), row(128, size=128))
    gathered = np.concatenate([np.arange(128).reshape(-1, 16)[rank::2].ravel() for rank in (0, 1)])
    for mine in (gathered[:64], gathered[64:]):
        queries = (full[0][:, mine], full[1][:, mine])
        keys = (full[0][:, gathered], full[1][:, gathered])
        for window in (None, 20):
            check(tokamax.BACKEND, queries, keys, 8, tolerance=2e-5, window=window)


@needs_tokamax
@pytest.mark.parametrize("sizes", [dict(fsdp=2), dict(sequence=4), dict(sequence=2, tensor=2)])
def test_tokamax_passes_the_self_test(on_cpu, sizes):
    run_self_test("tokamax", **sizes)


@needs_tokamax
@pytest.mark.parametrize("sizes", [dict(fsdp=2), dict(sequence=2)])
def test_tokamax_passes_the_self_test_with_a_soft_cap(on_cpu, sizes):
    run_self_test("tokamax", has_window=True, has_soft_cap=True, **sizes)


@needs_tokamax
@pytest.mark.parametrize("windowed", [True, False])
def test_tokamax_takes_a_window_that_the_layer_decides(on_cpu, windowed):
    ids = batch(row(40, 1, 70, size=128))
    q, k, v, _ = random_batch(ids, ids)

    @functools.partial(jax.jit, static_argnames="window")
    def attend(windowed, window):
        options = dict(scale=0.3, backend="tokamax", windowed=windowed, window=window)
        return dispatch.packed_attention(q, k, v, *ids, **options)

    with jax.set_mesh(single_device_mesh()):
        found = attend(jnp.array(windowed), window=20)
        wanted = attend(None, window=20 if windowed else None)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@needs_tokamax
def test_tokamax_refuses_a_row_out_of_order(on_cpu):
    segments, positions = row(64, 64, size=128)
    mixed = np.arange(128).reshape(4, 32)[[0, 2, 1, 3]].ravel()
    ids = batch((segments[mixed], positions[mixed]), (segments, positions))
    out = forward(tokamax.BACKEND, ids, max_segments=8)
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


def fake_tokamax(monkeypatch, error: Exception | None = None, capability: str = ""):
    def package():
        if error:
            raise error

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(tokamax, "_package", package)
    if capability:
        device = types.SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "local_devices", lambda: [device])


def test_tokamax_says_what_is_wrong(monkeypatch):
    assert tokamax.problems(**GOOD | dict(platform="cpu")) == [
        "tokamax needs an NVIDIA GPU, this runs on cpu"
    ]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert tokamax.problems(**GOOD) == ["tokamax is not installed: pip install tokamax"]
    fake_tokamax(monkeypatch, error=ImportError("no einshape"))
    assert tokamax.problems(**GOOD) == [
        f"tokamax cannot be used with jax {jax.__version__}: no einshape"
    ]
    fake_tokamax(monkeypatch)
    assert tokamax.problems(**GOOD) == [
        "tokamax compiles for the GPU at hand only, and there is none"
    ]


@pytest.mark.parametrize(
    ("change", "capability", "text"),
    [
        ({}, "9.0", None),
        (dict(sequence=4), "10.0", None),
        ({}, "8.0", "compute capability 9 or 10, this GPU has 8.0"),
        (dict(dtype="float32"), "9.0", "model.dtype is float32"),
        (dict(head_dim=20), "9.0", "up to 256, not 20"),
    ],
)
def test_tokamax_asks_the_gpu_at_hand(monkeypatch, change, capability, text):
    fake_tokamax(monkeypatch, capability=capability)
    problems = tokamax.problems(**GOOD | change)
    assert [bool(text and text in problem) for problem in problems] == [True] * (text is not None)
