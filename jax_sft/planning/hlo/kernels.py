"""What the kernels of an HLO module compute and hold: matrix products, bytes moved, buffers.

In: a Module and its `executions`. All figures are of one device.
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
# Custom calls that mark or allocate and compute nothing.
_MARKERS = frozenset(
    """AllocateBuffer Sharding SPMDFullToShardShape SPMDShardToFullShape MoveToHost MoveToDevice
    annotate_device_placement LayoutConstraint""".split()
)
# Opcodes that give another name to memory that an operand or the caller already holds.
_RENAMES = frozenset(
    """parameter tuple get-tuple-element bitcast while conditional call opt-barrier
    optimization-barrier after-all add-dependency domain""".split()
)
# Opcodes that are no kernel either.
_COMMUNICATION = frozenset(
    (*COLLECTIVES, "send", "recv", "infeed", "outfeed", "partition-id", "replica-id")
)
_SLICES = ("slice", "dynamic-slice", "gather")


@dataclass(frozen=True)
class Gemm:
    """A matrix product [batch, m, k] x [batch, k, n]; a convolution as the product that it is."""

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
        """Of one execution: two per multiply-add."""
        return 2 * self.batch * self.m * self.n * self.k

    @property
    def step_flops(self) -> float:
        return self.count * self.flops

    @property
    def is_float32(self) -> bool:
        """Whether both operands are float32: on Hopper half of bfloat16's speed even as TF32."""
        return self.lhs == self.rhs == "f32"


@dataclass(frozen=True)
class OpaqueCall:
    """A custom call whose work the text does not tell: cuDNN attention, a Pallas kernel, ..."""

    target: str
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    count: float
    op_name: str
    computation: str


@dataclass(frozen=True)
class Work:
    """FLOPs of matrix products, and bytes that all other kernels read and write."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, count: float) -> "Work":
        return Work(self.flops * count, self.bytes * count)


@dataclass(frozen=True)
class Buffer:
    """An array that kernels write to memory; `count` instructions write one of this shape."""

    bytes: int
    dtype: str
    dims: tuple[int, ...]
    on_host: bool
    count: int
    opcode: str  # of the first of them, as the rest
    op_name: str
    computation: str


def gemms(module: Module, executions: Mapping[str, float]) -> list[Gemm]:
    """Return every matrix product that runs, those in fusions and custom calls included.

    Raises:
        ValueError: an instruction that looks like a product and is of no known form.
    """
    return [
        _gemm(computation, instruction, executions[name])
        for name, computation in module.computations.items()
        if name in executions
        for instruction in computation.instructions
        if _is_gemm(instruction)
    ]


def opaque_calls(module: Module, executions: Mapping[str, float]) -> list[OpaqueCall]:
    """Return the custom calls that `gemms` cannot count, so that none is forgotten."""
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
    """Return the work of one execution of an instruction, all that it calls included.

    A fusion with a matrix product in it counts by its FLOPs, any other by what it reads and writes:
    of an operand that it only slices, the slice. A fusion around a collective is communication and
    counts as no work.

    Raises:
        ValueError: a loop or branch whose computation another instruction calls as well, which
            compiled modules do not have: how often it runs here is not known.
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
    """Return the arrays that kernels, and arguments of the step, hold; the largest first.

    Arrays of one shape are one entry with a count. Inside of kernels nothing is held. Many arrays
    share memory, over time or in place: this is what to look at, not a sum to make.
    """
    found = _buffers(_held(module, renamed=False))
    return [buffer for buffer in found if buffer.bytes >= at_least_bytes]


def with_dims(module: Module, dims: Sequence[int], at_least_bytes: int = 0) -> list[Buffer]:
    """Return the buffers that have all of `dims` among their dimensions: `(T, T)` needs two of T.

    Other views of a buffer count too: [B, T, N * T] that is later read as [B, T, N, T] is found.
    """
    found = _buffers(_held(module, renamed=True))
    return [
        buffer
        for buffer in found
        if buffer.bytes >= at_least_bytes and not Counter(dims) - Counter(buffer.dims)
    ]


def _held(module: Module, renamed: bool) -> Iterator[tuple[Shape, Instruction, str]]:
    """Yield every array held, with its instruction and the computation of that.

    Args:
        renamed: also what only gives memory that is held another name or shape.
    """
    for name, computation in module.computations.items():
        if name in module.fused:
            continue
        for instruction in computation.instructions:
            argument = instruction.opcode == "parameter" and name == module.entry
            holds = argument or renamed or instruction.opcode not in _RENAMES
            # The -done has the result of a -start; the -start names its operands again.
            if holds and not instruction.opcode.endswith(("-start", "-update")):
                for shape in instruction.shapes:
                    yield shape, instruction, name


def _buffers(held: Iterator[tuple[Shape, Instruction, str]]) -> list[Buffer]:
    alike = defaultdict(list)
    for shape, instruction, name in held:
        alike[shape.dtype, shape.dims, shape.on_host].append((shape, instruction, name))
    found = []
    for (dtype, dims, on_host), same in alike.items():
        shape, first, name = same[0]
        of_first = (first.opcode, first.op_name, name)
        found.append(Buffer(shape.bytes, dtype, dims, on_host, len(same), *of_first))
    return sorted(found, key=lambda buffer: (-buffer.bytes, buffer.dtype, buffer.dims))


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
    """Bytes that an instruction outside of fusions reads and writes; 0 if it only waits."""
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
    """Bytes that a fusion reads and writes: of what it slices or updates in place, that part."""
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
