"""Groups of devices: XLA's spellings of them, the mesh axes they span, the links they use.

Devices are numbered by their place in the mesh, row-major, as compiled modules number them. Hosts
are taken to hold consecutive numbers, which is how `make_mesh` lays a mesh out.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence

Groups = tuple[tuple[int, ...], ...]


def replica_groups(text: str, num_devices: int) -> Groups:
    """Read any of XLA's spellings; {} means one group of all devices.

    {{0,1},{2,3}}; [2,4]<=[4,2]T(1,0); mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b':(2)2},
    where 'b':(2)2 is the part of size 2 of axis b that a part of size 2 precedes.

    Raises:
        ValueError: another form; a device twice.
    """
    groups = _read(text, num_devices)
    devices = [device for group in groups for device in group]
    if len(set(devices)) != len(devices):
        raise ValueError(f"replica groups name a device twice: {text}")
    return groups


def permute_groups(pairs: Iterable[tuple[int, int]]) -> Groups:
    """Return the sets of devices that (source, target) pairs join, a device's own pair left out."""
    group_of: dict[int, list[int]] = {}
    for source, target in pairs:
        if source != target:
            left, right = group_of.get(source, [source]), group_of.get(target, [target])
            joined = left if left is right else left + right
            group_of.update(dict.fromkeys(joined, joined))
    groups = {id(group): tuple(sorted(group)) for group in group_of.values()}
    return tuple(sorted(groups.values()))


def axis_of(groups: Sequence[Sequence[int]], mesh_sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Return the mesh axes along which the devices of some group differ, in the mesh's order.

    A group that covers a part of an axis counts as spanning it. Groups of one device span none.

    Raises:
        ValueError: a device that the mesh does not have.
    """
    sizes = list(mesh_sizes.values())
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    if any(not 0 <= device < math.prod(sizes) for group in groups for device in group):
        raise ValueError(f"groups {groups} have devices that a mesh of {dict(mesh_sizes)} has not")
    return tuple(
        axis
        for axis, size, stride in zip(mesh_sizes, sizes, strides, strict=True)
        if any(len({device // stride % size for device in group}) > 1 for group in groups)
    )


def crosses(groups: Sequence[Sequence[int]], devices_per_host: int) -> bool:
    """Return whether some group has devices of several hosts."""
    return any(len({device // devices_per_host for device in group}) > 1 for group in groups)


def ring_share(groups: Sequence[Sequence[int]], devices_per_host: int) -> float:
    """Return the share of the hops between hosts, over rings that visit each host once.

    Of n devices on h > 1 hosts h of the n hops leave a host: NCCL orders its rings so. All hops
    carry the same bytes, so it is the share of bytes on slow links, averaged over devices.
    """
    devices = slow = 0
    for group in groups:
        hosts = len({device // devices_per_host for device in group})
        devices += len(group)
        slow += hosts if hosts > 1 else 0
    return slow / devices if devices else 0.0


def pair_share(groups: Sequence[Sequence[int]], devices_per_host: int) -> float:
    """Return the share of ordered pairs of a group's devices on two hosts: of an all-to-all."""
    pairs = slow = 0
    for group in groups:
        hosts = [device // devices_per_host for device in group]
        same = sum(hosts.count(host) ** 2 for host in set(hosts))
        pairs += len(group) * (len(group) - 1)
        slow += len(group) ** 2 - same
    return slow / pairs if pairs else 0.0


# ---- spellings --------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _read(text: str, num_devices: int) -> Groups:
    if text == "{}":
        return (tuple(range(num_devices)),)
    if re.fullmatch(r"\{\{\d+(,\d+)*\}(,\{\d+(,\d+)*\})*\}", text):
        return tuple(_numbers(group) for group in re.findall(r"[\d,]*\d", text))
    if found := re.fullmatch(r"\[(\d+),(\d+)\]<=(\[.*)", text):
        devices, size = _device_order(found[3]), int(found[2])
        if len(devices) == int(found[1]) * size:
            return tuple(devices[i : i + size] for i in range(0, len(devices), size))
    if found := re.fullmatch(r"mesh\[(.*?)\](?:, ?device_ids=\((.*)\))? ?\{(.*)\}", text):
        return _mesh_groups(found[1], found[2], found[3])
    raise ValueError(f"replica groups of an unknown form: {text}")


def _device_order(text: str) -> tuple[int, ...]:
    """Read `[4,2]T(1,0)`, 0 to 7 reshaped and transposed, or a plain list of numbers."""
    found = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not found:
        return _numbers(text)
    sizes = _numbers(found[1])
    order = _numbers(found[2]) if found[2] else tuple(range(len(sizes)))
    if sorted(order) != list(range(len(sizes))):
        raise ValueError(f"not an order of devices: {text}")
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    return _combinations([(strides[axis], sizes[axis]) for axis in order])


def _mesh_groups(axes: str, device_ids: str | None, along: str) -> Groups:
    sizes = {name: int(size) for name, size in (_named(a, r"=(\d+)") for a in axes.split(","))}
    devices = _device_order(device_ids or f"[{math.prod(sizes.values())}]")
    if len(devices) != math.prod(sizes.values()):
        raise ValueError(f"mesh[{axes}] is not the size of its device_ids ({device_ids})")
    names = list(sizes)
    parts = []  # (stride, size) of each part along which groups extend
    for part in along.split(",") if along else []:
        name, before, size = _named(part, r"(?::\((\d+)\)(\d+))?")
        if name not in sizes:
            raise ValueError(f"mesh[{axes}] has no axis {name}")
        size = int(size or sizes[name])
        inner = math.prod(list(sizes.values())[names.index(name) + 1 :])
        parts.append((inner * (sizes[name] // (int(before or 1) * size)), size))
    starts = [p for p in range(len(devices)) if all(p // s % n == 0 for s, n in parts)]
    return tuple(tuple(devices[p + m] for m in _combinations(parts)) for p in starts)


def _combinations(parts: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Return all sums of multiples of the strides of (stride, size) parts, the last fastest."""
    sums = [0]
    for stride, size in parts:
        sums = [total + i * stride for total in sums for i in range(size)]
    return tuple(sums)


def _named(text: str, value: str) -> tuple[str, ...]:
    """Read an axis, quoted or not, and what follows it."""
    found = re.fullmatch(rf"['\"]?([\w.\-]+)['\"]?{value}", text.strip())
    if not found:
        raise ValueError(f"not an axis of a mesh: {text!r}")
    return found.groups()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))
