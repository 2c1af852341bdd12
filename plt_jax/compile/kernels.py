"""The kernels of a program that is compiled for a GPU: which they are, and what they move.

A kernel belongs to the last layer whose weights or cache it reads, or what it reads has read.
Counts are those of the compiled program. On a card they may differ by a few, since XLA measures
there which form of a product is fastest.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from plt_jax.compile.hlo import Computation, Instruction, Program, executions
from plt_jax.compile.traffic import Traffic, traffic

OUTSIDE = -1
"""The layer of kernels before the first layer."""

_NO_KERNEL = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while"),
    *("conditional", "call", "opt-barrier", "optimization-barrier", "partition-id", "replica-id"),
}
_NOTHING_COMPUTED = {"parameter", "constant", "bitcast", "broadcast", "tuple", "iota", "convert"}
_LAYER = re.compile(r'op_name="[^"]*\b(?:layers|keys|values)\[(\d+)\]')
_OWN_CODE = "plt_jax/"


class Kernel(NamedTuple):
    """One kernel of a program."""

    name: str
    kind: str
    """What runs it: a library's product, Triton, one of XLA's own emitters, or an opcode."""
    layer: int
    """The layer that it belongs to, or OUTSIDE."""
    times: int
    """How often a step runs it."""
    traffic: Traffic
    """Bytes that one run reads and writes."""
    shape: str
    """What it makes, as XLA prints it."""
    sources: tuple[str, ...]
    """The lines of this package that it comes from, the most frequent first."""

    def as_json(self) -> dict[str, Any]:
        """The kernel in types that JSON has."""
        fields = self._asdict()
        moved = fields.pop("traffic")
        return fields | {"bytes_read": moved.read, "bytes_written": moved.written}


def read_kernels(program: Program, text: str, start: str | None = None) -> list[Kernel]:
    """The kernels of a program, in the order in which they run.

    Args:
      text: what `program` was parsed from; its tables name the lines of source code.
      start: the computation to begin with; None for the whole program. Without a known number of
        turns, a loop runs once.
    """
    lines, layers, kernels = SourceLines(text), _layers_of_inputs(program), []
    callers: dict[str, int] = {}
    for computation, times, _ in executions(program, start):
        known = dict(layers.get(computation.name, {}))
        caller = callers.get(computation.name, OUTSIDE)
        for one in computation.instructions:
            inherited = (known.get(name, OUTSIDE) for name in one.operands)
            layer = known.setdefault(one.name, max(inherited, default=caller))
            layer = max(layer, caller)
            # What a layer calls belongs to it, such as its loop over experts.
            callers |= {name: layer for name in _called(one) if name not in layers}
            if one.opcode in _NO_KERNEL or one.opcode.endswith(("-done", "-update")):
                continue
            moved = traffic(program, computation, one)
            sources = lines.of_kernel(program, one)
            kernels.append(Kernel(one.name, _kind(one), layer, times, moved, one.shape, sources))
    return kernels


def generation_loop(program: Program) -> str:
    """The body of the loop that generates tokens: the entry's, whose turns no constant counts."""
    entry = program.computations[program.entry]
    (body,) = (one.called("body") for one in entry.instructions if one.opcode == "while")
    assert body is not None
    return body


def total_traffic(kernels: Iterable[Kernel]) -> Traffic:
    """What all runs of kernels move."""
    read = written = 0
    for kernel in kernels:
        read += kernel.times * kernel.traffic.read
        written += kernel.times * kernel.traffic.written
    return Traffic(read, written)


def _kind(one: Instruction) -> str:
    backend = re.search(r'"kind":"(\w+)"', one.attributes)
    target = re.search(r'custom_call_target="([^"]+)"', one.attributes)
    if target and target[1].startswith("mosaic_gpu"):
        return "Mosaic GPU"
    if target:
        return target[1].strip("_").replace("$", " ")
    if backend and "triton" in backend[1]:
        return "Triton product" if "gemm" in backend[1] else "Triton"
    kind = re.search(r"kind=k(\w+)", one.attributes)
    return f"XLA {kind[1].lower()}" if kind else one.opcode


def _called(one: Instruction) -> list[str]:
    """The computations that an instruction runs, other than the body of a fusion."""
    if one.opcode == "fusion":
        return []
    names = (one.called(attribute) for attribute in ("body", "to_apply", "calls"))
    return [name for name in (*names, *one.branches(), one.callee()) if name]


def _layers_of_inputs(program: Program) -> dict[str, dict[str, int]]:
    """The layers of parameters in the entry, and of what loops in it are given, by computation."""
    entry = program.computations[program.entry]
    known: dict[str, int] = {}
    found = {program.entry: known}
    for one in entry.instructions:
        if one.opcode == "parameter":
            if match := _LAYER.search(one.attributes):
                known[one.name] = int(match[1])
        elif one.opcode in ("copy", "bitcast", "copy-start", "copy-done"):
            if one.operands and one.operands[0] in known:
                known[one.name] = known[one.operands[0]]
        elif one.opcode == "while":
            given = entry.by_name[one.operands[0]]
            body = program.computations.get(one.called("body") or "")
            if body is not None:
                found[body.name] = _of_elements(body, [known.get(n) for n in given.operands])
    return found


def _of_elements(body: Computation, layers: list[int | None]) -> dict[str, int]:
    """The layers of the elements of a loop's tuple, by the names that its body gives them."""
    named = {}
    for one in body.instructions:
        index = re.search(r"index=(\d+)", one.attributes)
        if one.opcode == "get-tuple-element" and index:
            layer = layers[int(index[1])] if int(index[1]) < len(layers) else None
            if layer is not None:
                named[one.name] = layer
    return named


class SourceLines:
    """The tables of a program's text that say from which line of source code it comes."""

    def __init__(self, text: str):
        self._tables: dict[str, dict[int, str]] = {}
        rows: dict[int, str] | None = None
        for line in text.splitlines():
            if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                rows = self._tables[line] = {}
            elif rows is not None and (match := re.match(r"(\d+) (.*)$", line)):
                rows[int(match[1])] = match[2]
            elif not line.strip():
                rows = None

    def of_kernel(self, program: Program, one: Instruction) -> tuple[str, ...]:
        """The lines that a kernel's instructions come from, the most frequent first."""
        body = program.computations.get(one.called("calls") or "")
        inside = body.instructions if body is not None else [one]
        computed = [part for part in inside if part.opcode not in _NOTHING_COMPUTED]
        lines = Counter(line for part in computed if (line := self._innermost(part)))
        return tuple(line for line, _ in lines.most_common())

    def _innermost(self, one: Instruction) -> str | None:
        """The innermost line of this package, as `file:line function`."""
        found = re.search(r"stack_frame_id=(\d+)", one.attributes)
        frame = int(found[1]) if found else 0
        while row := self._tables.get("StackFrames", {}).get(frame):
            place = self._tables["FileLocations"][_number(row, "file_location_id")]
            file = self._tables["FileNames"][_number(place, "file_name_id")].strip('"')
            if _OWN_CODE in file:
                name = self._tables["FunctionNames"][_number(place, "function_name_id")]
                short = file.rsplit(_OWN_CODE, 1)[1]
                return f"{short}:{_number(place, 'line')} {name.strip(chr(34)).rsplit('.', 1)[-1]}"
            parent = _number(row, "parent_frame_id")
            if parent == frame:
                break
            frame = parent
        return None


def _number(row: str, name: str) -> int:
    match = re.search(rf"\b{name}=(\d+)", row)
    return int(match[1]) if match else 0
