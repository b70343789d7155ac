"""Parse the text of a compiled XLA module into plain dataclasses.

In: `compiled.as_text()` of a GPU or CPU module, or a dump after the `spmd-partitioning` pass. Out:
a Module in schedule order, the input of the other files of this package. Unknown syntax raises an
error; nothing is skipped. Does not need JAX.
"""

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

NAME = r"[\w.\-:]+"
_INSTRUCTION = re.compile(rf"(ROOT )?%?({NAME}) = (\(.*?\)|\S+) ([a-z][a-z0-9\-]*)\((.*)")
_COMPUTATION = re.compile(rf"(ENTRY )?%?({NAME}) ?(?:\(.*\) -> .*)?\{{")
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")  # tables of source lines
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_NESTING = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\](){}]|, ?')
_BITS = re.compile(r"(?:bf|[fsuc])(\d+)")
# Attributes that name computations.
_CALLEES = ("calls", "to_apply", "condition", "body", "called_computations")
_BRANCHES = ("true_computation", "false_computation", "branch_computations")
_ANY_CALLEE = re.compile("|".join(f"{key}=" for key in _CALLEES + _BRANCHES))
# Instructions that apply a computation to single elements. Its work belongs to the instruction.
PER_ELEMENT = frozenset(
    "reduce reduce-window all-reduce reduce-scatter scatter select-and-scatter sort map".split()
)


# Instructions that move data between devices. A kernel that contains one is communication.
COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclass(frozen=True)
class Shape:
    """An array. `layout` is the text in the braces: minor-to-major order, tiles, memory space."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Logical size: no tile padding; types narrower than a byte share bytes."""
        return -(-self.elements * _bits(self.dtype) // 8)

    @property
    def on_host(self) -> bool:
        """Whether the array is offloaded to host memory and uses no device memory."""
        return "S(5)" in self.layout


@dataclass(frozen=True)
class Instruction:
    """One instruction. `literal` is the text in the parentheses of a parameter or a constant."""

    name: str
    type: Any  # a Shape, or a tuple of types
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes_text: str
    is_root: bool

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The result arrays, with nested tuples flattened."""
        return tuple(_leaves(self.type))

    @property
    def results(self) -> tuple[Shape, ...]:
        """The result arrays, without the operands in the (operands, results, ...) of a -start."""
        if self.opcode.endswith("-start") and self.base != "all-reduce":
            return tuple(_leaves(self.type[1]))
        return self.shapes

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @cached_property
    def attributes(self) -> dict[str, str]:
        return _attributes(self.attributes_text)

    @property
    def op_name(self) -> str:
        """The JAX operation that the instruction came from, or "" if XLA has dropped it."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes.get("metadata", ""))
        return _unescaped(match[1]) if match else ""

    @cached_property
    def config(self) -> dict[str, Any]:
        """The backend_config if it is JSON, else {}."""
        text = self.attributes.get("backend_config", "")
        if text.startswith('"'):
            text = _unescaped(text[1:-1])
        return json.loads(text) if text.startswith("{") else {}

    @cached_property
    def callees(self) -> tuple[str, ...]:
        """The computations that it calls, without those it applies to single elements."""
        if self.base in PER_ELEMENT or self.opcode.endswith(("-done", "-update")):
            return ()
        return self._named(_CALLEES + _BRANCHES)

    @cached_property
    def applied(self) -> tuple[str, ...]:
        """The computations that it applies to single elements."""
        return self._named(_CALLEES) if self.base in PER_ELEMENT else ()

    @property
    def base(self) -> str:
        """The opcode without -start, -update or -done."""
        return _base(self.opcode)

    def callee(self, key: str) -> str:
        return self.attributes[key].removeprefix("%")

    def _named(self, keys: Sequence[str]) -> tuple[str, ...]:
        if not _ANY_CALLEE.search(self.attributes_text):
            return ()
        texts = [self.attributes[key] for key in keys if key in self.attributes]
        return tuple(name for text in texts for name in re.findall(NAME, text))


@dataclass(frozen=True)
class Computation:
    """A list of instructions, in execution order if the module is scheduled."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """{instruction name: the instructions that read its result}."""
        users = {instruction.name: [] for instruction in self.instructions}
        for instruction in self.instructions:
            for name in dict.fromkeys(instruction.operands):
                users[name].append(instruction)
        return users

    @cached_property
    def root(self) -> Instruction:
        return next(i for i in self.instructions if i.is_root)

    @cached_property
    def parameters(self) -> list[Instruction]:
        parameters = [i for i in self.instructions if i.opcode == "parameter"]
        return sorted(parameters, key=lambda parameter: int(parameter.literal))

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.by_name[name] for name in instruction.operands]


@dataclass(frozen=True)
class Alias:
    """An output that reuses the memory of a donated argument. Indices are tuple indices."""

    output: tuple[int, ...]
    parameter: int
    parameter_index: tuple[int, ...]
    kind: str  # may-alias or must-alias


@dataclass(frozen=True)
class Module:
    """A whole module. Devices are numbered by their position in the mesh, row-major."""

    name: str
    computations: dict[str, Computation]
    entry: str
    is_scheduled: bool
    num_devices: int
    aliases: tuple[Alias, ...]

    @cached_property
    def num_callers(self) -> Counter[str]:
        """{computation: number of instructions that call it}."""
        calls = (i for c in self.computations.values() for i in c.instructions)
        return Counter(callee for i in calls for callee in dict.fromkeys(i.callees))

    @cached_property
    def fused(self) -> frozenset[str]:
        """Computations inside kernels, whose results are never separate buffers."""
        calls = [i for c in self.computations.values() for i in c.instructions]
        inside = {name for i in calls if i.base == "fusion" for name in i.callees}
        return frozenset(inside | {name for i in calls for name in i.applied})


def parse(text: str) -> Module:
    """Parse a module.

    Raises:
        ValueError: a line has unknown syntax (the message has its number), or the module has
            several replicas.
    """
    header, computations, entry = {}, {}, None
    name, instructions = None, []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line:
            continue
        if name is not None and line.startswith("}"):
            computations[name] = _computation(name, instructions)
            name, instructions = None, []
        elif name is not None:
            instructions.append(_instruction(line, number))
        elif line.startswith("HloModule "):
            title, _, rest = line.removeprefix("HloModule ").partition(", ")
            header = {"name": title, **_attributes(rest)}
        elif match := _COMPUTATION.fullmatch(line):
            name = match[2]
            entry = name if match[1] else entry
            if name in computations:
                raise ValueError(f"line {number}: a second HLO computation {name}")
        elif not (line in _TABLES or line[0].isdigit()):
            raise ValueError(f"line {number} of the HLO text is not understood: {line[:200]}")
    if entry is None or name is not None or not header:
        raise ValueError("the HLO text is incomplete: no HloModule line, or no end of its ENTRY")
    if header.get("replica_count", "1") != "1":
        raise ValueError("an HLO module of several replicas is not supported: only partitions are")
    _check_callees(computations)
    return Module(
        name=header["name"],
        computations=computations,
        entry=entry,
        is_scheduled=header.get("is_scheduled") == "true",
        num_devices=int(header.get("num_partitions", 1)),
        aliases=tuple(_aliases(header.get("input_output_alias", ""))),
    )


def parse_type(text: str) -> Any:
    """Parse `f32[8,4]{1,0}` into a Shape, `(f32[], (s32[2]{0}))` into nested tuples of Shapes."""
    type_, rest = _type(text)
    if rest:
        raise ValueError(f"not an HLO shape: {text!r}")
    return type_


# ---- text -------------------------------------------------------------------------------------


def _instruction(line: str, number: int) -> Instruction:
    if "/*index=" in line:
        line = re.sub(r"/\*index=\d+\*/", "", line)
    match = _INSTRUCTION.fullmatch(line)
    if not match:
        raise ValueError(f"line {number} of the HLO text is not an instruction: {line[:200]}")
    root, name, type_, opcode, rest = match.groups()
    end = rest.find(")")
    if end < 0 or "(" in rest[:end] or '"' in rest[:end]:
        end = _end_of_operands(rest, number)
    inside, attributes = rest[:end], rest[end + 1 :]
    if attributes and not attributes.startswith(", "):
        raise ValueError(f"line {number} of the HLO text ends in an unknown way: {line[:200]}")
    leaf = opcode in ("parameter", "constant")
    operands = () if leaf else tuple(_operand(part) for part in _split(inside))
    return Instruction(
        name,
        _cached_type(type_),
        opcode,
        operands,
        inside if leaf else "",
        attributes[2:],
        bool(root),
    )


def _operand(text: str) -> str:
    """Return the name of an operand: a for `%a`, `a` and `f32[8]{0} %a`, a#1 for `%a#1`."""
    return text.rpartition(" ")[2].removeprefix("%")


def _end_of_operands(rest: str, number: int) -> int:
    depth = 1
    for token in _NESTING.finditer(rest):
        depth += {"(": 1, ")": -1}.get(token[0], 0)
        if depth == 0:
            return token.start()
    raise ValueError(f"line {number} of the HLO text has no end of operands: {rest[:200]}")


def _computation(name: str, instructions: list[Instruction]) -> Computation:
    computation = Computation(name, tuple(_with_elements(instructions)))
    roots = sum(instruction.is_root for instruction in instructions)
    if roots != 1 or len(computation.by_name) != len(computation.instructions):
        raise ValueError(f"HLO computation {name} has {roots} roots or two instructions of a name")
    for instruction in computation.instructions:
        for operand in instruction.operands:
            if operand not in computation.by_name:
                raise ValueError(
                    f"{instruction.name} of {name} reads {operand}, which is not there"
                )
    return computation


def _with_elements(instructions: list[Instruction]) -> Iterator[Instruction]:
    """Insert the get-tuple-elements that the compact form omits, each before its first reader.

    Dumps of jaxlib 0.11 and newer (XLA's flag xla_dump_compact_gte) have no line for them: the
    operand `a#1` is element 1 of the tuple a, and `a#1#0` is element 0 of that element.
    """
    by_name: dict[str, Instruction] = {}
    for instruction in instructions:
        for operand in instruction.operands:
            source, *indices = operand.split("#")
            for index in indices:
                name = f"{source}#{index}"
                if name not in by_name and source in by_name:
                    element = _element(by_name[source], name, index)
                    by_name[name] = element
                    yield element
                source = name
        by_name[instruction.name] = instruction
        yield instruction


def _element(source: Instruction, name: str, index: str) -> Instruction:
    types = source.type if isinstance(source.type, tuple) else ()
    if not index.isdecimal() or int(index) >= len(types):
        raise ValueError(f"{name} is not an element of a tuple: {source.name} is {source.type}")
    type_, attributes = types[int(index)], f"index={index}"
    return Instruction(name, type_, "get-tuple-element", (source.name,), "", attributes, False)


def _check_callees(computations: dict[str, Computation]) -> None:
    for computation in computations.values():
        for instruction in computation.instructions:
            for name in instruction.callees + instruction.applied:
                if name not in computations:
                    raise ValueError(f"{instruction.name} calls {name}, which is not in the text")


def _attributes(text: str) -> dict[str, str]:
    """Split `key=value, key={...}` into a dict. Mesh-form replica groups contain a comma."""
    attributes = {}
    for part in _split(text):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"not an attribute of an HLO instruction: {part[:200]}")
        if key == "device_ids":
            attributes["replica_groups"] += ", " + part
        else:
            attributes[key] = value
    return attributes


def _split(text: str) -> list[str]:
    """Split at commas outside strings, brackets, braces and parentheses."""
    parts, depth, start = [], 0, 0
    for token in _NESTING.finditer(text):
        first = token[0][0]
        if first in "[{(":
            depth += 1
        elif first in "]})":
            depth -= 1
        elif first == "," and depth == 0:
            parts.append(text[start : token.start()])
            start = token.end()
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


@functools.lru_cache(maxsize=65536)
def _cached_type(text: str) -> Any:
    return parse_type(text)


def _type(text: str) -> tuple[Any, str]:
    """Parse a shape at the start of `text`. Return it and the remaining text."""
    if not text.startswith("("):
        match = _ARRAY.match(text)
        if not match:
            raise ValueError(f"not an HLO shape: {text[:200]!r}")
        _bits(match[1])
        dims = tuple(int(dim.removeprefix("<=")) for dim in match[2].split(",") if dim)
        return Shape(match[1], dims, match[3] or ""), text[match.end() :]
    elements, rest = [], text[1:]
    while not rest.startswith(")"):
        element, rest = _type(rest)
        elements.append(element)
        rest = rest.removeprefix(",").lstrip()
    return tuple(elements), rest[1:]


def _leaves(type_: Any) -> Iterator[Shape]:
    if isinstance(type_, Shape):
        yield type_
    else:
        for element in type_:
            yield from _leaves(element)


def _bits(dtype: str) -> int:
    if dtype in ("token", "opaque"):
        return 0
    match = _BITS.match(dtype)
    if not match and dtype != "pred":
        raise ValueError(f"unknown HLO element type {dtype!r}")
    return int(match[1]) if match else 8


@functools.cache
def _base(opcode: str) -> str:
    return re.sub(r"-(start|update|done)$", "", opcode)


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


def _aliases(text: str) -> Iterator[Alias]:
    pattern = r"\{([\d, ]*)\}: \((\d+), \{([\d, ]*)\}(?:, ([\w\-]+))?\)"
    for output, parameter, index, kind in re.findall(pattern, text):
        yield Alias(_numbers(output), int(parameter), _numbers(index), kind or "may-alias")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number.strip())
