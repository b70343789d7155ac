"""The collectives of a compiled module: wire bytes, devices, counts and overlapping work.

In: a Module and its `executions`. Bytes are per device and per execution unless stated otherwise.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from jax_sft.planning.hlo.device_groups import (
    Groups,
    axis_of,
    pair_share,
    permute_groups,
    replica_groups,
    ring_share,
)
from jax_sft.planning.hlo.kernels import Work, work
from jax_sft.planning.hlo.parser import COLLECTIVES, Computation, Instruction, Module, Shape

# Kinds whose groups are numbered by replica or by partition, depending on two attributes.
_BY_ATTRIBUTES = ("all-gather", "reduce-scatter", "all-reduce")


@dataclass(frozen=True)
class Collective:
    """One collective instruction, with several arrays where XLA has combined collectives.

    `blocking` is None in a module without a schedule. `overlap` is the work between start and done
    in the schedule. Two collectives in flight at the same time both count the work they share;
    `window`, the positions of start and done in the computation, shows which do.
    """

    kind: str
    arrays: tuple[Shape, ...]  # results
    operand_bytes: int
    groups: Groups
    pairs: tuple[tuple[int, int], ...]  # (source, target) of a permute
    count: float  # times per step
    op_name: str  # its own, or the nearest one among its inputs
    name: str
    computation: str
    blocking: bool | None
    overlap: Work = Work()
    window: tuple[int, int] | None = None  # None: a synchronous form, or no schedule
    sliced: bool = False  # an all-reduce whose result each device slices to its own part

    @property
    def dtypes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(array.dtype for array in self.arrays))

    @property
    def result_bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    @property
    def group_size(self) -> int:
        return max((len(group) for group in self.groups), default=1)

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends: (n-1)/n of the whole array, in a ring of n devices.

        The whole array is the result of an all-gather or the operand of a reduce-scatter. An
        all-reduce is a reduce-scatter and an all-gather. A permute or broadcast sends its array
        once.
        """
        n = self.group_size
        share = (n - 1) / n
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.result_bytes if n > 1 else 0)
        if self.kind == "reduce-scatter":
            return share * self.operand_bytes
        return share * self.result_bytes * (2 if self.kind == "all-reduce" else 1)

    @property
    def step_wire_bytes(self) -> float:
        return self.count * self.wire_bytes

    @property
    def exposed(self) -> bool | None:
        """Whether no work overlaps with it; None without a schedule."""
        return self.blocking if self.blocking is not False else self.overlap == Work()

    def slow_share(self, devices_per_host: int) -> float:
        """Return the share of `wire_bytes` sent between hosts, averaged over devices."""
        if self.pairs:
            between_devices = [(a, b) for a, b in self.pairs if a != b]
            slow = sum(a // devices_per_host != b // devices_per_host for a, b in between_devices)
            return slow / len(between_devices) if between_devices else 0.0
        if self.kind in ("all-to-all", "ragged-all-to-all"):
            return pair_share(self.groups, devices_per_host)
        return ring_share(self.groups, devices_per_host)


def collectives(module: Module, executions: Mapping[str, float]) -> list[Collective]:
    """Return every collective of the module in text order, a start and its done as one.

    Raises:
        ValueError: a collective is in a computation that never runs, a start has no done, or there
            is a send or recv between devices, whose bytes are not modeled.
    """
    wrappers = {
        callee: (computation, instruction)
        for computation in module.computations.values()
        for instruction in computation.instructions
        if instruction.opcode in ("async-start", "fusion-start")
        for callee in instruction.callees
    }
    results = []
    for computation in module.computations.values():
        for instruction in computation.instructions:
            if _is_collective(instruction):
                if computation.name not in executions:
                    raise ValueError(
                        f"{instruction.name} is in {computation.name}, which nothing runs"
                    )
                wrapper = wrappers.get(computation.name)
                results.append(_collective(module, executions, computation, instruction, wrapper))
    return results


def gradient_all_reduces(
    ops: Collection[Collective],
    mesh_sizes: Mapping[str, int],
    at_least_elements: int,
    allowed: Collection[tuple[str, ...]] = (("data",),),
) -> list[Collective]:
    """Return the all-reduces of large arrays over axes that are not `allowed`.

    Gradients of sharded parameters must be reduce-scattered; only over `data` may they be
    all-reduced. An all-reduce of activations over `tensor` is legitimate: allow ("tensor",), or
    set `at_least_elements` above the size of an activation.
    """
    return [
        collective
        for collective in ops
        if collective.kind == "all-reduce"
        and collective.group_size > 1
        and any(array.elements >= at_least_elements for array in collective.arrays)
        and axis_of(collective.groups, mesh_sizes) not in set(allowed)
    ]


def _is_collective(instruction: Instruction) -> bool:
    host = instruction.attributes_text.find("is_host_transfer=true") >= 0
    if instruction.opcode in ("send", "recv") and not host:
        raise ValueError(f"{instruction.name} is a {instruction.opcode}: its bytes are not counted")
    return instruction.base in COLLECTIVES and not instruction.opcode.endswith(("-done", "-update"))


def _collective(
    module: Module,
    executions: Mapping[str, float],
    computation: Computation,
    instruction: Instruction,
    wrapper: tuple[Computation, Instruction] | None,
) -> Collective:
    start_in, start = wrapper or (computation, instruction)
    blocking, overlap, window = True if module.is_scheduled else None, Work(), None
    result = instruction
    if start.opcode.endswith("-start"):
        done = _done(start_in, start)
        result = instruction if wrapper else done
        configs = [i.config.get("collective_backend_config", {}) for i in (start, instruction)]
        if module.is_scheduled:
            blocking = any(config.get("is_sync", False) for config in configs)
            window = start_in.instructions.index(start), start_in.instructions.index(done)
            between = start_in.instructions[window[0] + 1 : window[1]]
            overlap = sum((work(module, executions, start_in, i) for i in between), Work())
    pairs = _pairs(instruction)
    is_permute = instruction.base == "collective-permute"
    groups = permute_groups(pairs) if is_permute else _groups(module, instruction)
    return Collective(
        kind=instruction.base,
        arrays=result.shapes,
        operand_bytes=sum(operand.bytes for operand in computation.operands(instruction)),
        groups=groups,
        pairs=pairs,
        count=executions[computation.name],
        op_name=_op_name(start_in, start) if wrapper else _op_name(computation, instruction),
        name=start.name,
        computation=start_in.name,
        blocking=blocking,
        overlap=overlap,
        window=window,
        sliced=_is_sliced(computation, instruction, groups),
    )


def _done(computation: Computation, start: Instruction) -> Instruction:
    """Return the -done of a -start, after any number of -update instructions."""
    last = start
    while True:
        following = [
            user
            for user in computation.users[last.name]
            if user.base in (start.base, "async") and user.opcode.endswith(("-update", "-done"))
        ]
        if len(following) != 1:
            raise ValueError(f"{start.name} of {computation.name} has no done of its own there")
        last = following[0]
        if last.opcode.endswith("-done"):
            return last


def _groups(module: Module, instruction: Instruction) -> Groups:
    """Return the groups of a collective as devices of the mesh.

    Without use_global_device_ids, replica_groups count replicas. An instruction with a channel_id
    then joins all partitions of a replica. One without a channel_id joins replicas, and the module
    has only one.
    """
    attributes = instruction.attributes
    groups = replica_groups(attributes.get("replica_groups", "{}"), module.num_devices)
    all_devices = (tuple(range(module.num_devices)),)
    if instruction.base in _BY_ATTRIBUTES and attributes.get("use_global_device_ids") != "true":
        if "channel_id" not in attributes:
            return tuple((device,) for device in all_devices[0])
        return all_devices
    sizes = {len(group) for group in groups}
    if len(sizes) != 1 or any(d >= module.num_devices for group in groups for d in group):
        raise ValueError(
            f"{instruction.name}: groups {groups} are not of one size over the module's "
            f"{module.num_devices} devices"
        )
    return groups


def _pairs(instruction: Instruction) -> tuple[tuple[int, int], ...]:
    text = instruction.attributes.get("source_target_pairs", "")
    if instruction.base != "collective-permute" or text == "{}":
        return ()
    pairs = [pair.split(",") for pair in text.strip("{}").split("},{")]
    return tuple((int(source), int(target)) for source, target in pairs)


def _op_name(computation: Computation, instruction: Instruction) -> str:
    """Return the instruction's op_name or, as XLA drops some, the nearest one among its inputs."""
    level, seen = [instruction], {instruction.name}
    while level:
        for candidate in level:
            if candidate.op_name:
                return candidate.op_name
        names = dict.fromkeys(name for candidate in level for name in candidate.operands)
        level = [computation.by_name[name] for name in names if name not in seen]
        seen.update(names)
    return ""


def _is_sliced(computation: Computation, instruction: Instruction, groups: Groups) -> bool:
    """Whether the only user of an all-reduce is a slice of one device's size.

    XLA turns such a pair into a reduce-scatter for GPUs, but not for CPUs.
    """
    users = computation.users[instruction.name]
    if instruction.opcode != "all-reduce" or len(users) != 1 or not groups:
        return False
    size = users[0].shapes[0].elements * len(groups[0])
    return users[0].opcode == "dynamic-slice" and size == instruction.shapes[0].elements
