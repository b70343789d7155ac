"""Groups of devices: XLA's notations for them, the mesh axes they span, the links they use.

Devices are numbered by their position in the mesh, row-major, as in compiled modules. Each host is
assumed to hold consecutive numbers, which is how `make_mesh` orders devices.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence

Groups = tuple[tuple[int, ...], ...]


def replica_groups(text: str, num_devices: int) -> Groups:
    """Parse any of XLA's notations for replica groups; {} means one group of all devices.

    {{0,1},{2,3}}; [2,4]<=[4,2]T(1,0); mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b':(2)2},
    where 'b':(2)2 is the sub-axis of size 2 of axis b that follows a sub-axis of size 2.

    Raises:
        ValueError: the notation is unknown, or a device appears twice.
    """
    groups = _read(text, num_devices)
    devices = [device for group in groups for device in group]
    if len(set(devices)) != len(devices):
        raise ValueError(f"replica groups name a device twice: {text}")
    return groups


def permute_groups(pairs: Iterable[tuple[int, int]]) -> Groups:
    """Return the sets of devices joined by (source, target) pairs, without pairs of one device."""
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
        ValueError: a device is not in the mesh.
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
    """Return whether any group has devices on several hosts."""
    return any(len({device // devices_per_host for device in group}) > 1 for group in groups)


def ring_share(groups: Sequence[Sequence[int]], devices_per_host: int) -> float:
    """Return the share of hops between hosts, in rings that visit each host once.

    NCCL orders its rings so that h of the n hops leave a host, for n devices on h > 1 hosts. All
    hops carry the same bytes, so this is also the share of bytes on slow links, averaged over
    devices.
    """
    devices = slow = 0
    for group in groups:
        hosts = len({device // devices_per_host for device in group})
        devices += len(group)
        slow += hosts if hosts > 1 else 0
    return slow / devices if devices else 0.0


def pair_share(groups: Sequence[Sequence[int]], devices_per_host: int) -> float:
    """Return the share of ordered device pairs that are on two hosts, for an all-to-all."""
    pairs = slow = 0
    for group in groups:
        hosts = [device // devices_per_host for device in group]
        same = sum(hosts.count(host) ** 2 for host in set(hosts))
        pairs += len(group) * (len(group) - 1)
        slow += len(group) ** 2 - same
    return slow / pairs if pairs else 0.0


# ---- notations --------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _read(text: str, num_devices: int) -> Groups:
    if text == "{}":
        return (tuple(range(num_devices)),)
    if re.fullmatch(r"\{\{\d+(,\d+)*\}(,\{\d+(,\d+)*\})*\}", text):
        return tuple(_numbers(group) for group in re.findall(r"[\d,]*\d", text))
    if match := re.fullmatch(r"\[(\d+),(\d+)\]<=(\[.*)", text):
        devices, size = _device_order(match[3]), int(match[2])
        if len(devices) == int(match[1]) * size:
            return tuple(devices[i : i + size] for i in range(0, len(devices), size))
    if match := re.fullmatch(r"mesh\[(.*?)\](?:, ?device_ids=\((.*)\))? ?\{(.*)\}", text):
        return _mesh_groups(match[1], match[2], match[3])
    raise ValueError(f"replica groups of an unknown form: {text}")


def _device_order(text: str) -> tuple[int, ...]:
    """Parse `[4,2]T(1,0)` (0 to 7 reshaped and transposed) or a plain list of numbers."""
    match = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not match:
        return _numbers(text)
    sizes = _numbers(match[1])
    order = _numbers(match[2]) if match[2] else tuple(range(len(sizes)))
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
    """Parse an axis name, quoted or not, followed by `value`. Return the name and the groups."""
    match = re.fullmatch(rf"['\"]?([\w.\-]+)['\"]?{value}", text.strip())
    if not match:
        raise ValueError(f"not an axis of a mesh: {text!r}")
    return match.groups()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))
