"""Bytes that a compiled program reads from and writes to a device's main memory (HBM).

The sum is over instructions. Arrays in on-chip memory do not count. A fusion counts its inputs and
outputs only. If a slice of an array is read or written, only the slice counts. A kernel (Pallas)
counts its arguments and results once, though it may read an argument several times, so that the sum
is a lower bound there.
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
    """Bytes that one step moves on one device, without branches that it may not run."""
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
            return _fusion_bytes(body, computation, one)
    operands = [computation.by_name[name] for name in one.operands if name in computation.by_name]
    kind = one.opcode.removesuffix("-start")
    if kind in _SLICES:
        # The result of an asynchronous start is a tuple: operand, final result and context.
        result = one.arrays[-2 if kind != one.opcode else 0]
        read = result.bytes if any(map(_size, operands[:1])) else 0
        return read + result.hbm_bytes
    if one.opcode == "dynamic-update-slice":
        target, update = operands[:2]
        return _size(update) + (update.bytes if _size(target) else 0)
    if kind != one.opcode and kind in (*KINDS, "copy"):
        # The result of an asynchronous start is a pair: operand and final result.
        return sum(array.hbm_bytes for array in one.arrays[:2])
    return _size(one) + sum(map(_size, operands))


def _size(one: Instruction) -> int:
    return sum(array.hbm_bytes for array in one.arrays)


def _fusion_bytes(body: Computation, computation: Computation, fusion: Instruction) -> int:
    """Bytes that a fusion reads and writes."""
    total, outputs = 0, list(fusion.arrays)
    results = [body.root]
    if body.root.opcode == "tuple":
        results = [body.by_name[name] for name in body.root.operands]
    for result, array in zip(results, outputs, strict=False):
        total += _written(body, result, array.hbm_bytes)
    for parameter, name in zip(body.parameters, fusion.operands, strict=False):
        operand = computation.by_name.get(name)
        # The layout of a fusion's parameter does not name the memory space; its operand's does.
        size = _size(operand if operand is not None else parameter)
        total += min(size, _read(body, parameter, size))
    return total


def _written(body: Computation, result: Instruction, size: int) -> int:
    """Bytes written for a fusion's result; an update in place writes only what it changes."""
    while result.opcode == "bitcast":
        result = body.by_name[result.operands[0]]
    if result.opcode == "parameter":
        return 0
    if result.opcode == "dynamic-update-slice":
        return min(size, _size(body.by_name[result.operands[1]]))
    return size


def _read(body: Computation, value: Instruction, size: int) -> int:
    """Bytes read of a fusion's input: only slices if it is sliced, 0 if it is updated in place."""
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
