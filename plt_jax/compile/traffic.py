"""Bytes that a compiled program reads from and writes to a device's main memory (HBM).

The sum is over instructions. Arrays in on-chip memory do not count. A fusion counts its inputs and
outputs only. If a slice of an array is read or written, only the slice counts. A kernel (Pallas)
counts its arguments and results once, though it may read an argument several times, so that the sum
is a lower bound there. What it updates in place counts as read alone.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from plt_jax.compile.collectives import KINDS
from plt_jax.compile.hlo import Computation, Instruction, Program, executions

_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("partition-id", "replica-id", "while", "conditional", "call", "call-start", "async-start"),
    *("custom-call-start",),
    *("opt-barrier", "optimization-barrier", "send", "send-done", "recv", "recv-done", "domain"),
}
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Which operand of an update in place holds what is written."""
_ALIASED = re.compile(r"\{(\d+)\}: \(\d+, \{[\d, ]*\}(?:, [\w-]+)?\)")
"""An output of a kernel that is one of its operands, in `output_to_operand_aliasing`."""
_GEMM = 'custom_call_target="__cublas$'


class Traffic(NamedTuple):
    """Bytes that an instruction moves between a device's main memory and its cores."""

    read: int
    written: int

    @property
    def bytes(self) -> int:
        """Both together."""
        return self.read + self.written


NONE = Traffic(0, 0)


def hbm_bytes(program: Program) -> int:
    """Bytes that one step moves on one device, without branches that it may not run."""
    return sum(
        times * sum(traffic(program, computation, one).bytes for one in computation.instructions)
        for computation, times, certain in executions(program)
        if certain
    )


def traffic(program: Program, computation: Computation, one: Instruction) -> Traffic:
    """What one run of an instruction moves."""
    if one.opcode in _FREE or one.opcode.endswith(("-done", "-update")):
        return NONE
    if one.opcode == "custom-call" and not one.operands:
        return NONE  # allocates a buffer
    if one.opcode == "fusion":
        body = program.computations.get(one.called("calls") or "")
        if body is not None:
            return _fusion_traffic(body, computation, one)
    operands = [computation.by_name[name] for name in one.operands if name in computation.by_name]
    kind = one.opcode.removesuffix("-start")
    if kind in _SLICES:
        # The result of an asynchronous start is a tuple: operand, final result and context.
        result = one.arrays[-2 if kind != one.opcode else 0]
        return Traffic(result.bytes if any(map(_size, operands[:1])) else 0, result.hbm_bytes)
    if one.opcode in _UPDATES:
        target, update = operands[0], operands[_UPDATES[one.opcode]]
        return Traffic(_size(update), update.bytes if _size(target) else 0)
    if kind != one.opcode and kind in (*KINDS, "copy"):
        # The result of an asynchronous start is a pair: operand and final result.
        return Traffic(*(array.hbm_bytes for array in one.arrays[:2]))
    results = one.arrays[:1] if _GEMM in one.attributes else one.arrays  # without its workspace
    # A kernel that returns an operand has updated it in place, in a part that is not known here.
    updated = {int(index) for index in _ALIASED.findall(one.attributes)}
    written = (array.hbm_bytes for index, array in enumerate(results) if index not in updated)
    return Traffic(sum(map(_size, operands)), sum(written))


def _size(one: Instruction) -> int:
    return sum(array.hbm_bytes for array in one.arrays)


def _fusion_traffic(body: Computation, computation: Computation, fusion: Instruction) -> Traffic:
    read = written = 0
    results = [body.root]
    if body.root.opcode == "tuple":
        results = [body.by_name[name] for name in body.root.operands]
    for result, array in zip(results, fusion.arrays, strict=False):
        written += _written(body, result, array.hbm_bytes)
    for parameter, name in zip(body.parameters, fusion.operands, strict=False):
        operand = computation.by_name.get(name)
        # The layout of a fusion's parameter does not name the memory space; its operand's does.
        size = _size(operand if operand is not None else parameter)
        read += min(size, _read(body, parameter, size))
    return Traffic(read, written)


def _written(body: Computation, result: Instruction, size: int) -> int:
    """Bytes written for a fusion's result; an update in place writes only what it changes."""
    while result.opcode == "bitcast":
        result = body.by_name[result.operands[0]]
    if result.opcode == "parameter":
        return 0
    if result.opcode in _UPDATES:
        return min(size, _size(body.by_name[result.operands[_UPDATES[result.opcode]]]))
    return size


def _read(body: Computation, value: Instruction, size: int) -> int:
    """Bytes read of a fusion's input: only slices if it is sliced, 0 if it is updated in place."""
    total = 0
    for user in body.users.get(value.name, ()):
        if user.opcode in _SLICES and user.operands[0] == value.name:
            total += sum(array.bytes for array in user.arrays)
        elif user.opcode in _UPDATES and user.operands[0] == value.name:
            continue
        elif user.opcode == "bitcast":
            total += _read(body, user, size)
        elif user.opcode != "tuple":
            return size
    return total
