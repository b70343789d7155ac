"""Groups of devices in every spelling; the axes that they span and the links that they use."""

import itertools
import math

import numpy as np
import pytest

from jax_sft.planning.hlo import device_groups


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("{{0,4,1,5}}", [[0, 4, 1, 5]]),
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("[4,2]<=[2,2,2]T(0,2,1)", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['x'=2,'y'=4] {'y'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['x'=2,'y'=4] {'x'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['x'=2,'y'=4] {'y','x'}", [[0, 4, 1, 5, 2, 6, 3, 7]]),
        ("mesh[x=2,y=4] {y:(1)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh[x=2,y=4] {y:(2)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['x'=4], device_ids=(2,0,3,1) {'x'}", [[2, 0, 3, 1]]),
        ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['x'=2] {}", [[0], [1]]),
    ],
)
def test_every_spelling_of_groups(text, groups):
    assert device_groups.replica_groups(text, 8) == tuple(tuple(group) for group in groups)


def test_mesh_groups_equal_those_of_a_transposed_array():
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = [int(size) for size in rng.choice([1, 2, 3, 4, 8], size=rng.integers(1, 5))]
        total = math.prod(sizes)
        order = [int(axis) for axis in rng.permutation(len(sizes))]
        devices = np.arange(total).reshape(sizes).transpose(order)
        shape = list(devices.shape)
        along = [int(a) for a in rng.permutation(len(shape))[: rng.integers(1, len(shape) + 1)]]
        others = [axis for axis in range(len(shape)) if axis not in along]
        size = math.prod(shape[axis] for axis in along)
        expected = devices.transpose(others + along).reshape(-1, size).tolist()
        axes = ",".join(f"'axis_{i}'={n}" for i, n in enumerate(shape))
        ids = f"([{','.join(map(str, sizes))}]T({','.join(map(str, order))}))"
        names = ",".join(f"'axis_{axis}'" for axis in along)
        for device_ids in (ids, f"({','.join(map(str, devices.ravel()))})"):
            text = f"mesh[{axes}], device_ids={device_ids} {{{names}}}"
            groups = device_groups.replica_groups(text, total)
            assert [list(group) for group in groups] == expected
        iota = device_groups.replica_groups(f"[{total // size},{size}]<={ids[1:-1]}", total)
        assert [list(group) for group in iota] == devices.reshape(-1, size).tolist()


def test_parts_of_an_axis_equal_those_of_a_reshaped_array():
    for before, size, after in itertools.product((1, 2, 4), (2, 3), (1, 2, 4)):
        n = before * size * after
        array = np.arange(2 * n * 2).reshape(2, before, size, after, 2)
        expected = array.transpose(0, 1, 3, 4, 2).reshape(-1, size).tolist()
        part = f"b:({before})2" if size == 2 else f"b:({before})3"
        groups = device_groups.replica_groups(f"mesh[a=2,b={n},c=2] {{{part}}}", 4 * n)
        assert [list(group) for group in groups] == expected


@pytest.mark.parametrize(
    "text",
    [
        "{{0,1},{1,2}}",
        "{{0,1},{2,3}",
        "{0,1}",
        "[2,4]<=[4]",
        "[2,2]<=[2,2]T(0,0)",
        "mesh['x'=2] {'y'}",
        "mesh['x'=4], device_ids=(0,1) {'x'}",
        "mesh['x'=2] {'x':2}",
        "maximal_mesh[device_id=0] {}",
    ],
)
def test_groups_of_no_known_form_raise(text):
    with pytest.raises(ValueError):
        device_groups.replica_groups(text, 8)


def test_the_axes_of_groups_equal_those_that_made_them():
    rng = np.random.default_rng(1)
    axes = ("data", "fsdp", "tensor", "sequence")
    for sizes in itertools.product((1, 2, 4), repeat=4):
        array = np.arange(math.prod(sizes)).reshape(sizes)
        along = [axis for axis in range(4) if rng.integers(2)]
        others = [axis for axis in range(4) if axis not in along]
        size = math.prod(sizes[axis] for axis in along)
        groups = array.transpose(others + along).reshape(-1, size).tolist()
        expected = tuple(axes[axis] for axis in along if sizes[axis] > 1)
        assert device_groups.axis_of(groups, dict(zip(axes, sizes, strict=True))) == expected
    with pytest.raises(ValueError, match="devices that a mesh of"):
        device_groups.axis_of([[0, 8]], {"data": 2, "fsdp": 4})


def test_the_share_of_slow_links():
    one_of_each_host, two_hosts, one_host = [[0, 8], [1, 9]], [list(range(16))], [[0, 1, 2, 3]]
    assert device_groups.crosses(one_of_each_host, 8) and device_groups.crosses(two_hosts, 8)
    assert not device_groups.crosses(one_host, 8) and device_groups.crosses(one_host, 2)
    assert device_groups.ring_share(one_of_each_host, 8) == 1.0
    assert device_groups.ring_share(two_hosts, 8) == 2 / 16  # 2 of 16 hops leave a host
    assert device_groups.ring_share(one_host, 8) == 0.0
    assert device_groups.ring_share([[0, 1], [6, 8]], 8) == 0.5
    assert device_groups.pair_share(two_hosts, 8) == 8 / 15  # 8 of the 15 others are elsewhere
    assert device_groups.pair_share(one_host, 8) == 0.0


def test_a_permute_joins_the_devices_of_its_cycles():
    pairs = [(0, 2), (2, 4), (4, 0), (1, 3), (3, 1), (5, 5), (7, 6)]
    assert device_groups.permute_groups(pairs) == ((0, 2, 4), (1, 3), (6, 7))
