"""Count how often each computation of an HLO module runs: loops, branches, calls.

In: a Module. Out: {computation: times per step}, the multipliers of `kernels` and `collectives`.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jax_sft.planning.hlo.parser import Computation, Instruction, Module


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Return the trip count of a `while` of `computation`, or None if it depends on data."""
    known = loop.config.get("known_trip_count", {}).get("n")
    if known is not None:
        return int(known)
    body = module.computations[loop.callee("body")]
    condition = module.computations[loop.callee("condition")]
    test = _value(module, condition, condition.root, None)
    initial = computation.by_name[loop.operands[0]]
    if not isinstance(test, _Test) or initial.opcode != "tuple" or body.root.opcode != "tuple":
        return None
    start = _value(module, computation, computation.by_name[initial.operands[test.index]], None)
    after = _value(module, body, body.by_name[body.root.operands[test.index]], None)
    if not isinstance(start, int) or not isinstance(after, _Carried) or after.index != test.index:
        return None
    return test.trips(start, after.offset)


def executions(
    module: Module,
    dynamic: Callable[[Instruction], float] | None = None,
    branches: Callable[[Instruction], Sequence[float]] | None = None,
) -> dict[str, float]:
    """Return {computation: executions per step} for the computations that the entry reaches.

    Includes loop bodies, branches, fused and asynchronous computations. A loop's condition runs
    once more than its body.

    Args:
        dynamic: returns the expected trip count of a `while` whose trip count depends on data.
        branches: returns how often each branch of a `conditional` is taken. By default each is
            taken once, which is an upper bound.

    Raises:
        ValueError: a trip count depends on data, and `dynamic` is None.
    """

    counts = {module.entry: 1.0}
    for name in _callers_first(module):
        computation = module.computations[name]
        for instruction in computation.instructions:
            for callee, times in _calls(module, computation, instruction, dynamic, branches):
                counts[callee] = counts.get(callee, 0.0) + times * counts[name]
    return counts


def _calls(
    module: Module, computation: Computation, instruction: Instruction, dynamic, branches
) -> Iterator[tuple[str, float]]:
    """Yield (computation, times) for each computation that one execution calls."""
    if instruction.opcode == "while":
        trips = trip_count(module, computation, instruction)
        if trips is None and dynamic is None:
            raise ValueError(
                f"the trip count of {instruction.name} ({instruction.op_name}) depends on data: "
                "pass `dynamic` to say how many trips are expected"
            )
        times = float(dynamic(instruction) if trips is None else trips)
        yield instruction.callee("condition"), times + 1
        yield instruction.callee("body"), times
    elif instruction.opcode == "conditional" and branches is not None:
        yield from zip(instruction.callees, branches(instruction), strict=True)
    else:
        yield from ((callee, 1.0) for callee in instruction.callees)


@dataclass(frozen=True)
class _Carried:
    """Element `index` of a loop's tuple, plus a constant."""

    index: int
    offset: int


@dataclass(frozen=True)
class _Test:
    """The loop condition: element `index` of the loop's tuple + `offset` is LT, LE, ... `limit`."""

    index: int
    offset: int
    direction: str
    limit: int

    def trips(self, start: int, step: int) -> int | None:
        gap = self.limit - start - self.offset
        if self.direction in ("GT", "GE"):
            gap, step = -gap, -step
        if self.direction in ("LE", "GE"):
            gap += 1
        if self.direction == "NE" and (step == 0 or gap % step or gap // step < 0):
            return None
        if self.direction == "NE":
            return gap // step
        if gap <= 0:
            return 0
        return -(-gap // step) if step > 0 else None


def _value(
    module: Module,
    computation: Computation,
    instruction: Instruction,
    arguments: list[Any] | None,
) -> int | _Carried | _Test | None:
    """Evaluate an integer scalar of a loop; None if the text does not determine it.

    Args:
        arguments: values of the computation's parameters, or None if its only parameter is the
            loop's tuple.
    """
    opcode = instruction.opcode
    operands = computation.operands(instruction)
    if opcode == "constant":
        return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else None
    if opcode == "parameter":
        return arguments[int(instruction.literal)] if arguments is not None else None
    if opcode == "get-tuple-element" and arguments is None and operands[0].opcode == "parameter":
        return _Carried(int(instruction.attributes["index"]), 0)
    if opcode not in ("copy", "bitcast", "add", "subtract", "compare", "fusion", "call"):
        return None
    values = [_value(module, computation, operand, arguments) for operand in operands]
    if opcode in ("copy", "bitcast"):
        return values[0]
    if opcode in ("fusion", "call"):
        inner = module.computations[instruction.callees[0]]
        return _value(module, inner, inner.root, values)
    return _arithmetic(instruction, values[0], values[1])


def _arithmetic(instruction: Instruction, left: Any, right: Any) -> int | _Carried | _Test | None:
    if instruction.opcode == "compare":
        if isinstance(left, _Carried) and isinstance(right, int):
            direction = instruction.attributes["direction"]
            return _Test(left.index, left.offset, direction, right) if direction != "EQ" else None
        return None
    sign = 1 if instruction.opcode == "add" else -1
    if isinstance(left, int) and isinstance(right, int):
        return left + sign * right
    if isinstance(left, _Carried) and isinstance(right, int):
        return _Carried(left.index, left.offset + sign * right)
    if isinstance(left, int) and isinstance(right, _Carried) and sign == 1:
        return _Carried(right.index, right.offset + left)
    return None


def _callers_first(module: Module) -> list[str]:
    """Return the computations that the entry reaches, each after all of its callers."""
    order, entered = [], {module.entry}
    stack = [(module.entry, _all_callees(module, module.entry))]
    while stack:
        name, callees = stack[-1]
        callee = next(callees, None)
        if callee is None:
            order.append(stack.pop()[0])
        elif callee not in entered:
            entered.add(callee)
            stack.append((callee, _all_callees(module, callee)))
    return order[::-1]


def _all_callees(module: Module, name: str) -> Iterator[str]:
    return (callee for i in module.computations[name].instructions for callee in i.callees)
