"""The compiled program as data: parses the text of an optimized, scheduled HLO module.

Only what the account of costs needs: computations, instructions with their shapes, who calls whom, trip counts, and
the source line each instruction comes from.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8, "s4": 0.5, "u4": 0.5, "f8e4m3fn": 1, "f8e5m2": 1, "token": 0}
_LEAF = re.compile(r"(?P<dtype>[a-z][a-z0-9]*)\[(?P<dims>[\d,]*)\](?:\{(?P<layout>[^{}]*)\})?")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_OPERAND = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: dtype, dimensions, and where it lies."""

    dtype: str
    dims: tuple[int, ...]
    memory_space: int  # 0 HBM, 1 VMEM, 5 the host's; others are small

    @property
    def bytes(self) -> int:
        """Its size without padding."""
        return int(_BYTES[self.dtype] * math.prod(self.dims))

    @property
    def in_hbm(self) -> bool:
        """Whether reading or writing it crosses the memory bus."""
        return self.memory_space == 0

    @property
    def in_host(self) -> bool:
        """Whether it lies in the memory of the machine that the chips are in."""
        return self.memory_space == 5


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result; several for a tuple
    operands: tuple[str, ...]
    attributes: str  # the rest of the line
    is_root: bool

    def called(self, *keys: str) -> list[str]:
        """The computations named by these attributes (`calls`, `body`, `condition`, `to_apply`)."""
        found = (re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes) for key in keys)
        return [match[1] for match in found if match]

    @property
    def branches(self) -> list[str]:
        """The computations of a `conditional` with an index; as each may run, all are counted."""
        found = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        return re.findall(r"[\w.\-]+", found[1]) if found else []

    @property
    def estimated_cycles(self) -> int:
        """The compiler's own estimate; 0 where it has none."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(match[1]) if match else 0

    @property
    def op_name(self) -> str:
        """The JAX operation it comes from."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1].replace("\\'", "'") if match else ""


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    entry: str
    computations: dict[str, tuple[Instruction, ...]]
    frames: dict[int, tuple[str, int, int]]  # stack frame -> file, line, parent frame

    @functools.cached_property
    def instructions(self) -> dict[str, Instruction]:
        """Every instruction by its name."""
        return {i.name: i for body in self.computations.values() for i in body}

    def trip_count(self, loop: Instruction) -> int:
        """How often a `while` runs its body: a constant of its condition.

        Raises:
            ValueError: the condition is none that a scan makes.
        """
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(match[1])
        (condition,) = loop.called("condition")
        constants = [
            int(match[1])
            for i in self.computations[condition]
            if i.opcode == "constant" and (match := re.match(r"(\d+)\)", i.attributes))
        ]
        if len(constants) != 1:
            raise ValueError(f"the trip count of {loop.name} cannot be read from its condition {condition}")
        return constants[0]

    def source(self, instruction: Instruction, root: str) -> str:
        """file:line of the innermost frame below `root`, or the operation's name where there is none."""
        match = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        frame = int(match[1]) if match else 0
        while frame in self.frames:
            file, line, parent = self.frames[frame]
            if file.startswith(root):
                return f"{file.removeprefix(root).lstrip('/')}:{line}"
            frame = parent
        return instruction.op_name

    def is_matmul(self, instruction: Instruction) -> bool:
        """Whether it is a matrix product, or a fusion with one in it."""
        products = ("convolution", "dot")
        if instruction.opcode in products:
            return True
        called = instruction.called("calls")
        return bool(called) and any(i.opcode in products or self.is_matmul(i) for i in self.computations[called[0]])

    def scheduled(self) -> Iterator[tuple[Instruction, int]]:
        """Every instruction that is executed, in the order of the schedule, and how often."""

        def walk(computation: str, times: int) -> Iterator[tuple[Instruction, int]]:
            for instruction in self.computations[computation]:
                yield instruction, times
                if instruction.opcode == "while":
                    yield from walk(instruction.called("body")[0], times * self.trip_count(instruction))
                elif instruction.opcode in ("call", "conditional"):
                    for called in instruction.called("to_apply", "true_computation", "false_computation"):
                        yield from walk(called, times)
                    for called in instruction.branches:
                        yield from walk(called, times)

        return walk(self.entry, 1)


def parse(text: str) -> Module:
    """The module that `jax.stages.Compiled.as_text()` describes."""
    computations: dict[str, list[Instruction]] = {}
    tables: dict[str, dict[int, str]] = {}
    entry, body, table = "", None, None
    for line in text.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = tables.setdefault(line, {})
        elif table is not None and (row := re.match(r"(\d+) (.*)", line)):
            table[int(row[1])] = row[2]
        elif match := _COMPUTATION.match(line):
            table, body = None, computations.setdefault(match["name"], [])
            entry = match["name"] if match["entry"] else entry
        elif body is not None and (match := _INSTRUCTION.match(line)):
            body.append(_instruction(match["name"], match["rest"], match["root"] is not None))
    return Module(entry, {name: tuple(lines) for name, lines in computations.items()}, _frames(tables))


def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a shape, which may be a tuple."""
    found = []
    for leaf in _LEAF.finditer(text):
        space = re.search(r"S\((\d+)\)", leaf["layout"] or "")
        dims = tuple(int(size) for size in leaf["dims"].split(",") if size)
        found.append(Shape(leaf["dtype"], dims, int(space[1]) if space else 0))
    return tuple(found)


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    split = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, call = rest[:split], rest[split:].lstrip()
    opcode, _, tail = call.partition("(")
    end = _closing(tail, 1)
    operands = tuple(_OPERAND.findall(tail[:end]))
    # A constant has its value where others have operands.
    attributes = tail if opcode in ("constant", "parameter") else tail[end + 1 :]
    return Instruction(name, opcode, shapes(shape), operands, attributes, is_root)


def _closing(text: str, depth: int) -> int:
    """The index of the parenthesis that closes the outermost one."""
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return index
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _frames(tables: dict[str, dict[int, str]]) -> dict[int, tuple[str, int, int]]:
    def field(row: str, key: str) -> int:
        match = re.search(rf"\b{key}=(\d+)", row)
        return int(match[1]) if match else 0

    files = {number: json.loads(name) for number, name in tables.get("FileNames", {}).items()}
    locations = tables.get("FileLocations", {})
    frames = {}
    for number, row in tables.get("StackFrames", {}).items():
        location = locations.get(field(row, "file_location_id"), "")
        frames[number] = (
            files.get(field(location, "file_name_id"), ""),
            field(location, "line"),
            field(row, "parent_frame_id") - 1,
        )
    return frames
