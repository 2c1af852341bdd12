"""Parses the text of a compiled program (HLO), and counts how often each computation runs.

XLA's own `cost_analysis()` counts the body of a loop once, however often it runs.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

ITEM_BITS = {"pred": 8, "token": 0}
"""Bits of the types whose names do not contain their size."""

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_TILE = re.compile(r"T\(([\d,]+)\)")


class Array(NamedTuple):
    """An array's type and its layout in memory."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""
    """As printed: dimensions from minor to major, tiles, and the memory space."""

    @property
    def item_bytes(self) -> float:
        digits = re.search(r"\d+", self.dtype)
        bits = ITEM_BITS.get(self.dtype, int(digits[0]) if digits else 0)
        return 2 * bits / 8 if self.dtype.startswith("c") else bits / 8

    @property
    def bytes(self) -> int:
        """Bytes of its elements, without padding."""
        return int(math.prod(self.dims) * self.item_bytes)

    @property
    def hbm_bytes(self) -> int:
        """Bytes that it takes in a device's main memory, padded to whole tiles.

        0 if it lies in another memory: `S(1)` is a TPU's on-chip vector memory, others hold scalars
        and flags.
        """
        if re.search(r"S\([1-9]\d*\)", self.layout):
            return 0
        order, _, rest = self.layout.partition(":")
        tile = _TILE.search(rest)
        if tile is None or not order:
            return self.bytes
        dims = [self.dims[int(axis)] for axis in order.split(",")]
        for index, size in enumerate(reversed(tile[1].split(","))):
            if index < len(dims):
                dims[index] = -(-dims[index] // int(size)) * int(size)
        return int(math.prod(dims) * self.item_bytes)


def parse_arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a printed type; those of a tuple in order."""
    return tuple(
        Array(dtype, tuple(int(size.lstrip("<=")) for size in dims.split(",") if size), layout)
        for dtype, dims, layout in _ARRAY.findall(shape)
    )


@dataclass
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    argument: str
    """The text between the parentheses: a constant's value, a parameter's number."""
    attributes: str
    root: bool

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        return parse_arrays(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of the elements of all its arrays."""
        return sum(array.bytes for array in self.arrays)

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute such as `body` names."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return match and match[1]

    def callee(self) -> str:
        """The computation that `called_computations` names; empty if there is none."""
        match = re.search(r"called_computations=\{%?([\w.\-]+)", self.attributes)
        return match[1] if match else ""

    def branches(self) -> list[str]:
        """The computations of a conditional's branches."""
        match = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if match:
            return _NAME.findall(match[1])
        both = (self.called("true_computation"), self.called("false_computation"))
        return [name for name in both if name]


@dataclass
class Computation:
    """A named list of instructions."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """For each instruction's name, the instructions that read its result."""
        users = defaultdict(list)
        for instruction in self.instructions:
            for operand in set(instruction.operands):
                users[operand].append(instruction)
        return users

    @cached_property
    def root(self) -> Instruction:
        marked = (instruction for instruction in self.instructions if instruction.root)
        return next(marked, self.instructions[-1])

    @cached_property
    def parameters(self) -> list[Instruction]:
        found = [one for one in self.instructions if one.opcode == "parameter"]
        return sorted(found, key=lambda one: int(one.argument))


@dataclass
class Program:
    """The compiled program that each device runs."""

    computations: dict[str, Computation]
    entry: str


def parse_program(text: str) -> Program:
    """Parses the text that `compiled.as_text()` returns."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        if not line:
            continue
        if not line[0].isspace():
            header = _HEADER.match(line)
            if header:
                current = computations[header[2]] = Computation(header[2])
                entry = header[2] if header[1] else entry
            continue
        match = _INSTRUCTION.match(line)
        if match and current is not None:
            current.instructions.append(_instruction(line, match))
    return Program({name: one for name, one in computations.items() if one.instructions}, entry)


def _instruction(line: str, match: re.Match) -> Instruction:
    depth, end = 1, len(line)
    for bracket in re.finditer(r"[()]", line[match.end() :]):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            end = match.end() + bracket.start()
            break
    argument = line[match.end() : end]
    operands = tuple(_NAME.findall(argument))
    return Instruction(
        match[2], match[3], match[4], operands, argument, line[end + 1 :], bool(match[1])
    )


class Execution(NamedTuple):
    """A computation that a step runs, and how often."""

    computation: Computation
    times: int
    certain: bool
    """False in a branch that a step may not run."""


def executions(program: Program, start: str | None = None) -> Iterator[Execution]:
    """The computations that a step runs: the entry, bodies of loops, branches, and what they call.

    A computation appears once for each instruction that calls it. The bodies of fusions are left
    out. The branch of a conditional that does least is certain, the others are not.

    Args:
      start: the computation to begin with, instead of the entry.
    """
    yield from _executions(program, start or program.entry, 1, True)


def _executions(program: Program, name: str, times: int, certain: bool) -> Iterator[Execution]:
    computation = program.computations.get(name)
    if computation is None:
        return
    yield Execution(computation, times, certain)
    for one in computation.instructions:
        if one.opcode == "while":
            turns = trip_count(program, computation, one)
            yield from _executions(program, one.called("body") or "", times * (turns or 1), certain)
        elif one.opcode == "conditional":
            names = sorted(one.branches(), key=lambda branch: work(program, branch))
            for index, branch in enumerate(names):
                yield from _executions(program, branch, times, certain and not index)
        elif one.opcode in ("call", "call-start", "async-start", "custom-call-start"):
            # A TPU's sparse cores run some collectives in such calls.
            callee = one.called("to_apply") or one.called("calls")
            yield from _executions(program, callee or one.callee(), times, certain)


def work(program: Program, name: str) -> int:
    """Instructions that a computation and all it calls run: a measure to compare branches by."""
    return sum(
        len(execution.computation.instructions) * execution.times
        for execution in _executions(program, name, 1, True)
    )


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """How often a loop's body runs; None if the text does not say so."""
    known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = program.computations.get(loop.called("condition") or "")
    found = condition and _limit(program, condition)
    if not found:
        return None
    limit, index = found
    return max(limit - _initial_value(computation, loop, index), 0)


def _limit(program: Program, condition: Computation) -> tuple[int, int] | None:
    """The limit of a condition's counter, and the counter's index in the loop's tuple."""
    compare, body, arguments = condition.root, None, {}
    if compare.opcode == "fusion":
        body = program.computations[compare.called("calls") or ""]
        parameters = (parameter.name for parameter in body.parameters)
        arguments = dict(zip(parameters, compare.operands, strict=True))
        compare = body.root
    direction = re.search(r"direction=(\w\w)", compare.attributes)
    if compare.opcode != "compare" or direction is None or direction[1] not in ("LT", "LE", "NE"):
        return None
    limit = counter = None
    for operand in compare.operands:
        one = condition.by_name.get(arguments.get(operand, operand))
        if one is None and body is not None:
            one = body.by_name.get(operand)
        if one is not None and one.opcode == "constant" and one.argument.lstrip("-").isdigit():
            limit = int(one.argument)
        elif one is not None and one.opcode == "get-tuple-element":
            index = re.search(r"index=(\d+)", one.attributes)
            counter = int(index[1]) if index else None
    if limit is None or counter is None:
        return None
    return limit + (direction[1] == "LE"), counter


def _initial_value(computation: Computation, loop: Instruction, index: int) -> int:
    """The value that a loop's counter starts with; 0 if the text does not say so."""
    one = computation.by_name.get(loop.operands[0])
    if one is not None and one.opcode == "tuple":
        one = computation.by_name.get(one.operands[index])
    while one is not None and one.opcode in ("copy", "bitcast", "convert"):
        one = computation.by_name.get(one.operands[0])
    if one is not None and one.opcode == "constant" and one.argument.isdigit():
        return int(one.argument)
    return 0
