"""The matrix products, memory traffic and buffers of the kernels of an HLO module.

In: a Module and its `executions`. All figures are per device.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jax_sft.planning.hlo.parser import COLLECTIVES, Computation, Instruction, Module, Shape

CUBLAS = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8")
CUDNN_CONVOLUTION = "__cudnn$convForward"
DOTS = ("dot", "scaled-dot")
# Custom calls that annotate or allocate but compute nothing.
_MARKERS = frozenset(
    """AllocateBuffer Sharding SPMDFullToShardShape SPMDShardToFullShape MoveToHost MoveToDevice
    annotate_device_placement LayoutConstraint""".split()
)
# Opcodes that only rename memory which an operand or the caller already holds.
_RENAMES = frozenset(
    """parameter tuple get-tuple-element bitcast while conditional call opt-barrier
    optimization-barrier after-all add-dependency domain""".split()
)
# Opcodes of communication, which are not kernels either.
_COMMUNICATION = frozenset(
    (*COLLECTIVES, "send", "recv", "infeed", "outfeed", "partition-id", "replica-id")
)
_SLICES = ("slice", "dynamic-slice", "gather")


@dataclass(frozen=True)
class Gemm:
    """A matrix product [batch, m, k] x [batch, k, n], or a convolution equivalent to one."""

    batch: int
    m: int
    n: int
    k: int
    lhs: str  # dtypes
    rhs: str
    out: str
    count: float  # times per step
    opcode: str  # dot, convolution or the target of a custom call
    op_name: str
    computation: str

    @property
    def flops(self) -> int:
        """FLOPs of one execution, two per multiply-add."""
        return 2 * self.batch * self.m * self.n * self.k

    @property
    def step_flops(self) -> float:
        return self.count * self.flops

    @property
    def is_float32(self) -> bool:
        """Whether both operands are float32: half of bfloat16's speed on Hopper even as TF32."""
        return self.lhs == self.rhs == "f32"


@dataclass(frozen=True)
class OpaqueCall:
    """A custom call whose work is not in the text, such as cuDNN attention or a Pallas kernel."""

    target: str
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    count: float
    op_name: str
    computation: str


@dataclass(frozen=True)
class Work:
    """FLOPs of matrix products, and bytes read and written by all other kernels."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, count: float) -> "Work":
        return Work(self.flops * count, self.bytes * count)


@dataclass(frozen=True)
class Buffer:
    """An array that kernels write to memory; `count` instructions write this shape."""

    bytes: int
    dtype: str
    dims: tuple[int, ...]
    on_host: bool
    count: int
    opcode: str  # this and the fields below describe the first instruction
    op_name: str
    computation: str


def gemms(module: Module, executions: Mapping[str, float]) -> list[Gemm]:
    """Return every matrix product that runs, including those in fusions and custom calls.

    Raises:
        ValueError: an instruction looks like a matrix product but has no known form.
    """
    return [
        _gemm(computation, instruction, executions[name])
        for name, computation in module.computations.items()
        if name in executions
        for instruction in computation.instructions
        if _is_gemm(instruction)
    ]


def opaque_calls(module: Module, executions: Mapping[str, float]) -> list[OpaqueCall]:
    """Return the custom calls that `gemms` cannot count, so that none goes unreported."""
    return [
        OpaqueCall(
            target=_target(instruction),
            operands=tuple(s for o in computation.operands(instruction) for s in o.shapes),
            results=instruction.results,
            count=executions[name],
            op_name=instruction.op_name,
            computation=name,
        )
        for name, computation in module.computations.items()
        if name in executions
        for instruction in computation.instructions
        if instruction.opcode in ("custom-call", "custom-call-start")
        if not _is_gemm(instruction) and _target(instruction) not in _MARKERS
    ]


def computation_work(
    module: Module, executions: Mapping[str, float], computation: Computation
) -> Work:
    """Return the work of one execution of a computation."""
    parts = (work(module, executions, computation, i) for i in computation.instructions)
    return sum(parts, Work())


def work(
    module: Module,
    executions: Mapping[str, float],
    computation: Computation,
    instruction: Instruction,
) -> Work:
    """Return the work of one execution of an instruction, including everything it calls.

    A fusion with a matrix product counts by its FLOPs, any other fusion by the bytes it reads and
    writes. An operand that is only sliced counts as the slice. A fusion around a collective is
    communication and counts as no work.

    Raises:
        ValueError: another instruction calls the same loop or branch computation, so that its count
            for this instruction is unknown. Compiled modules have no such computations.
    """
    if _is_gemm(instruction):
        return Work(flops=_gemm(computation, instruction, 1.0).flops)
    if instruction.opcode in ("while", "conditional"):
        total = Work()
        for name in dict.fromkeys(instruction.callees):
            if module.num_callers[name] > 1:
                raise ValueError(f"{instruction.name} shares {name} with another instruction")
            times = executions[name] / (executions[computation.name] or 1.0)
            callee = module.computations[name]
            total += computation_work(module, executions, callee).times(times)
        return total
    if instruction.base in ("call", "async", "fusion") and instruction.callees:
        callee = module.computations[instruction.callees[0]]
        inner = computation_work(module, executions, callee)
        if instruction.base != "fusion":
            return inner
        if inner.flops:
            return Work(flops=inner.flops)
        if any(i.opcode in COLLECTIVES for i in callee.instructions):
            return Work()
        on_host = any(shape.on_host for shape in instruction.shapes)
        return Work() if on_host else Work(bytes=_fusion_bytes(callee))
    return Work(bytes=_bytes(computation, instruction))


def buffers(module: Module, at_least_bytes: int = 0) -> list[Buffer]:
    """Return the arrays that kernels write and the arguments of the step, largest first.

    Arrays of the same shape are one entry with a count. Values inside a kernel are not buffers.
    Many arrays share memory, over time or in place, so do not add up their sizes.
    """
    all_buffers = _buffers(_held(module, renamed=False))
    return [buffer for buffer in all_buffers if buffer.bytes >= at_least_bytes]


def with_dims(module: Module, dims: Sequence[int], at_least_bytes: int = 0) -> list[Buffer]:
    """Return the buffers that have all of `dims` among their dimensions; `(T, T)` needs T twice.

    Other views of a buffer count too: [B, T, N * T] that is later read as [B, T, N, T] matches.
    """
    all_buffers = _buffers(_held(module, renamed=True))
    return [
        buffer
        for buffer in all_buffers
        if buffer.bytes >= at_least_bytes and not Counter(dims) - Counter(buffer.dims)
    ]


def _held(module: Module, renamed: bool) -> Iterator[tuple[Shape, Instruction, str]]:
    """Yield every buffer with its instruction and the name of the computation.

    Args:
        renamed: also yield instructions that only give existing memory another name or shape.
    """
    for name, computation in module.computations.items():
        if name in module.fused:
            continue
        for instruction in computation.instructions:
            argument = instruction.opcode == "parameter" and name == module.entry
            holds = argument or renamed or instruction.opcode not in _RENAMES
            # A -done holds the result; its -start only repeats the operands.
            if holds and not instruction.opcode.endswith(("-start", "-update")):
                for shape in instruction.shapes:
                    yield shape, instruction, name


def _buffers(held: Iterator[tuple[Shape, Instruction, str]]) -> list[Buffer]:
    alike = defaultdict(list)
    for shape, instruction, name in held:
        alike[shape.dtype, shape.dims, shape.on_host].append((shape, instruction, name))
    entries = []
    for (dtype, dims, on_host), same in alike.items():
        shape, first, name = same[0]
        origin = (first.opcode, first.op_name, name)
        entries.append(Buffer(shape.bytes, dtype, dims, on_host, len(same), *origin))
    return sorted(entries, key=lambda buffer: (-buffer.bytes, buffer.dtype, buffer.dims))


# ---- matrix products --------------------------------------------------------------------------


def _target(instruction: Instruction) -> str:
    return instruction.attributes.get("custom_call_target", "").strip('"')


def _is_gemm(instruction: Instruction) -> bool:
    if instruction.opcode.endswith(("-update", "-done")):
        return False
    if instruction.base == "custom-call":
        target = _target(instruction)
        if target in CUBLAS or target == CUDNN_CONVOLUTION:
            return True
        if target.startswith(("__cublas", "__cudnn$conv")):
            raise ValueError(f"{instruction.name} calls {target}: its FLOPs are not known")
    if instruction.base == "ragged-dot":
        raise ValueError(f"{instruction.name} is a ragged-dot: its FLOPs are not known")
    return instruction.base in (*DOTS, "convolution")


def _gemm(computation: Computation, instruction: Instruction, count: float) -> Gemm:
    operands = [operand.shapes[0] for operand in computation.operands(instruction)]
    lhs, rhs, out = operands[0], operands[1], instruction.results[0]
    opcode = _target(instruction) or instruction.base
    if opcode in ("convolution", CUDNN_CONVOLUTION):
        batch, m, n, k = _convolution_sizes(instruction, rhs, out)
    else:
        batch, m, n, k = _dot_sizes(instruction, lhs, rhs)
    if batch * m * n != out.elements:
        raise ValueError(
            f"{instruction.name}: a product of {lhs.dims} and {rhs.dims} read as {batch} x {m} x "
            f"{n} x {k} does not give {out.dims}"
        )
    op_name = instruction.op_name
    dtypes = (lhs.dtype, rhs.dtype, out.dtype)
    return Gemm(batch, m, n, k, *dtypes, count, opcode, op_name, computation.name)


def _dot_sizes(instruction: Instruction, lhs: Shape, rhs: Shape) -> tuple[int, int, int, int]:
    batch_dims, contracting, right_batch, right_contracting = _dot_dims(instruction)
    batch = math.prod(lhs.dims[dim] for dim in batch_dims)
    k = math.prod(lhs.dims[dim] for dim in contracting)
    right = (
        math.prod(rhs.dims[dim] for dim in right_batch),
        math.prod(rhs.dims[dim] for dim in right_contracting),
    )
    if right != (batch, k):
        raise ValueError(f"{instruction.name}: {lhs.dims} and {rhs.dims} do not contract")
    return batch, lhs.elements // (batch * k or 1), rhs.elements // (batch * k or 1), k


def _dot_dims(instruction: Instruction) -> list[list[int]]:
    """Return the left batch and contracting dimensions, then the right ones."""
    keys = [(side, kind) for side in ("lhs", "rhs") for kind in ("batch", "contracting")]
    if instruction.base == "custom-call":
        numbers = instruction.config["gemm_backend_config"]["dot_dimension_numbers"]
        return [[int(dim) for dim in numbers[f"{s}_{kind}_dimensions"]] for s, kind in keys]
    texts = [instruction.attributes.get(f"{side}_{kind}_dims", "") for side, kind in keys]
    return [[int(dim) for dim in re.findall(r"\d+", text)] for text in texts]


def _convolution_sizes(
    instruction: Instruction, kernel: Shape, out: Shape
) -> tuple[int, int, int, int]:
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", instruction.attributes["dim_labels"])
    if not labels:
        raise ValueError(f"{instruction.name} has unknown dim_labels")
    n = kernel.dims[labels[2].index("o")]
    return 1, out.elements // n, n, kernel.elements // n


# ---- bytes ------------------------------------------------------------------------------------


def _bytes(computation: Computation, instruction: Instruction) -> int:
    """Return the bytes that an instruction outside fusions reads and writes; 0 if it only waits."""
    opcode = instruction.opcode
    if opcode in _RENAMES or opcode in _COMMUNICATION or opcode == "constant":
        return 0
    if opcode.endswith(("-start", "-update", "-done")) or _target(instruction) in _MARKERS:
        return 0
    if any(shape.on_host for shape in instruction.shapes):
        return 0
    if opcode in _SLICES:
        return 2 * instruction.bytes
    operands = computation.operands(instruction)
    if opcode == "dynamic-update-slice":
        return 2 * operands[1].bytes
    return instruction.bytes + sum(operand.bytes for operand in operands)


def _fusion_bytes(fused: Computation) -> int:
    """Return the bytes that a fusion reads and writes; slices and in-place updates count partly."""
    read = sum(_read_bytes(fused, parameter, parameter.bytes) for parameter in fused.parameters)
    root = fused.root
    results = fused.operands(root) if root.opcode == "tuple" else [root]
    written = sum(_written_bytes(fused, result) for result in results)
    return read + written


def _read_bytes(fused: Computation, source: Instruction, most: int) -> int:
    total = 0
    for user in fused.users[source.name]:
        if user.opcode == "bitcast":
            total += _read_bytes(fused, user, most)
        elif user.opcode in _SLICES and user.operands[0] == source.name:
            total += user.bytes
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != source.name:
            return most
    return min(total, most)


def _written_bytes(fused: Computation, result: Instruction) -> int:
    while result.opcode == "bitcast":
        result = fused.by_name[result.operands[0]]
    if result.opcode == "dynamic-update-slice":
        return fused.by_name[result.operands[1]].bytes
    return result.bytes
