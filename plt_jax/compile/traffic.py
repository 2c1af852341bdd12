"""Bytes that a compiled program moves between a device's arithmetic and its main memory (HBM).

Counted instruction by instruction: what each reads and writes, arrays in on-chip memory left out.
Within a fusion nothing touches memory but its inputs and outputs. Of an array of which a slice is
read or written, the slice counts. Kernels (Pallas) count their arguments and results once, though
they may read an argument several times: the sum is a lower bound there.
"""

from __future__ import annotations

from plt_jax.compile.collectives import KINDS
from plt_jax.compile.hlo import Computation, Instruction, Program, executions

_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("partition-id", "replica-id", "while", "conditional", "call", "call-start", "async-start"),
    *("custom-call-start",),
    *("opt-barrier", "optimization-barrier", "send", "send-done", "recv", "recv-done", "domain"),
}
_SLICES = ("dynamic-slice", "slice", "gather")


def hbm_bytes(program: Program) -> int:
    """Bytes that one step reads and writes on one device; branches that it may leave out aside."""
    return sum(
        times * sum(_moved(program, computation, one) for one in computation.instructions)
        for computation, times, certain in executions(program)
        if certain
    )


def _moved(program: Program, computation: Computation, one: Instruction) -> int:
    if one.opcode in _FREE or one.opcode.endswith(("-done", "-update")):
        return 0
    if one.opcode == "custom-call" and not one.operands:
        return 0  # allocates a buffer
    if one.opcode == "fusion":
        body = program.computations.get(one.called("calls") or "")
        if body is not None:
            return _of_fusion(body, computation, one)
    operands = [computation.by_name[name] for name in one.operands if name in computation.by_name]
    kind = one.opcode.removesuffix("-start")
    if kind in _SLICES:
        # Started, it makes a tuple of its operand, its result and a context.
        result = one.arrays[-2 if kind != one.opcode else 0]
        read = result.bytes if any(map(_size, operands[:1])) else 0
        return read + result.hbm_bytes
    if one.opcode == "dynamic-update-slice":
        target, update = operands[:2]
        return _size(update) + (update.bytes if _size(target) else 0)
    if kind != one.opcode and kind in (*KINDS, "copy"):
        # The pair of its operand and its result.
        return sum(array.hbm_bytes for array in one.arrays[:2])
    return _size(one) + sum(map(_size, operands))


def _size(one: Instruction) -> int:
    return sum(array.hbm_bytes for array in one.arrays)


def _of_fusion(body: Computation, computation: Computation, fusion: Instruction) -> int:
    """What a fusion reads and writes."""
    total, outputs = 0, list(fusion.arrays)
    results = [body.root]
    if body.root.opcode == "tuple":
        results = [body.by_name[name] for name in body.root.operands]
    for result, array in zip(results, outputs, strict=False):
        total += _written(body, result, array.hbm_bytes)
    for parameter, name in zip(body.parameters, fusion.operands, strict=False):
        operand = computation.by_name.get(name)
        # The fusion's own parameter does not tell the memory in which its caller has it.
        size = _size(operand if operand is not None else parameter)
        total += min(size, _read(body, parameter, size))
    return total


def _written(body: Computation, result: Instruction, size: int) -> int:
    """Of a fusion's result: an update in place writes no more than it changes."""
    while result.opcode == "bitcast":
        result = body.by_name[result.operands[0]]
    if result.opcode == "parameter":
        return 0
    if result.opcode == "dynamic-update-slice":
        return min(size, _size(body.by_name[result.operands[1]]))
    return size


def _read(body: Computation, value: Instruction, size: int) -> int:
    """Of an input: where only slices of it are used, those; where it is updated in place, none."""
    total = 0
    for user in body.users.get(value.name, ()):
        if user.opcode in _SLICES and user.operands[0] == value.name:
            total += sum(array.bytes for array in user.arrays)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue
        elif user.opcode == "bitcast":
            total += _read(body, user, size)
        elif user.opcode != "tuple":
            return size
    return total
