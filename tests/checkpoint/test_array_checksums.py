"""Checksums of arrays: one number whatever the mesh, another for every flipped bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sft.checkpoint import array_checksums
from jax_sft.sharding import rules
from jax_sft.sharding.mesh import make_mesh

DTYPES = (np.float32, jnp.bfloat16, np.float16, np.int32, np.int8, jnp.float8_e4m3fn, np.bool_)


def of_jax(array) -> int:
    return array_checksums.read(["a"], array_checksums.start({"a": array}))["a"]


def random(shape, dtype) -> np.ndarray:
    return np.asarray((50 * np.random.default_rng(0).standard_normal(shape)).astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_mesh_and_numpy_give_the_same_checksum(dtype, monkeypatch):
    monkeypatch.setattr(array_checksums, "_CHUNK", 100)  # in several parts
    array = random((16, 24, 8), dtype)
    expected = array_checksums.checksum(array)
    for sizes, axes in (
        ({"data": 1, "fsdp": 8, "tensor": 1, "sequence": 1}, ("embed", "features", "features")),
        ({"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}, ("layers", "embed", "mlp")),
        ({"data": 8, "fsdp": 1, "tensor": 1, "sequence": 1}, ("layers", "embed", "mlp")),
    ):
        mesh = make_mesh(sizes)
        assert of_jax(jax.device_put(array, rules.sharding(mesh, *axes))) == expected
    assert of_jax(jnp.asarray(array)) == expected
    assert of_jax(jnp.asarray(array[0, 0, 0])) == array_checksums.checksum(array[0, 0, 0])


@pytest.mark.parametrize("dtype", DTYPES[:-1])
def test_every_single_bit_that_is_flipped_changes_the_checksum(dtype):
    array = random((3, 5), dtype)
    expected = array_checksums.checksum(array)
    for bit in range(8 * array.nbytes):
        raw = bytearray(array.tobytes())
        raw[bit // 8] ^= 1 << bit % 8
        flipped = np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)
        assert array_checksums.checksum(flipped) != expected


def test_changed_signs_and_places_change_the_checksum():
    array = random((64,), np.float32)
    expected = array_checksums.checksum(array)
    for first, second in ((0, 1), (5, 60), (7, 9)):
        signs, places = array.copy(), array.copy()
        signs[[first, second]] *= -1  # which a sum of bits times an odd weight does not see
        places[[first, second]] = places[[second, first]]
        assert array_checksums.checksum(signs) != expected
        assert array_checksums.checksum(places) != expected
    weights = 2 * np.arange(64, dtype=np.uint32) + 1
    assert np.sum(array.view(np.uint32) * weights, dtype=np.uint32) == np.sum(
        signs.view(np.uint32) * weights, dtype=np.uint32
    )


def test_a_checksum_is_of_the_array_before_it_was_donated():
    array = jnp.arange(1 << 20, dtype=jnp.float32)
    expected = array_checksums.checksum(np.asarray(array).copy())
    sums = array_checksums.start({"a": array})
    changed = jax.jit(lambda x: x + 1, donate_argnums=0)(array)
    assert array_checksums.read(["a"], sums) == {"a": expected}
    assert of_jax(changed) != expected
