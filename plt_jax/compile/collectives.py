"""The collectives of a compiled program: how many, how large, and over which mesh axes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from plt_jax.compile.hlo import Computation, Instruction, Program, executions

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)


@dataclass(frozen=True)
class Collective:
    """The collectives of one kind among the same devices, in one step."""

    kind: str
    group: tuple[int, ...]
    """One of the groups that communicate: indices of devices in the mesh order of one slice."""
    slices: int
    """Slices that communicate over the data-center network; 1 if it stays within each slice."""
    count: int
    """Collectives of this kind in one step."""
    bytes: int
    """Bytes of all of them on one device: the whole array of a gather, reduction or scatter; of the
    other kinds what a device sends, its own part included."""
    certain: bool = True
    """False in a branch of the program that a step may not run."""
    pairs: tuple[tuple[int, int], ...] = ()
    """Source and target devices of a permutation."""
    gathered_bytes: int = 0
    """The part of `bytes` in all-reduces of arrays that are zero outside the device's own part.
    They are gathers of shards that are narrower than a TPU's 128 lanes."""


def read_collectives(program: Program, devices: int = 1) -> list[Collective]:
    """The collectives of a step, equal ones merged; the largest first.

    Args:
      devices: devices of one slice; a collective without groups is among all of them.
    """
    merged: dict[Collective, Collective] = {}
    for computation, times, certain in executions(program):
        for found in _collectives(program, computation, devices):
            key = replace(found, count=0, bytes=0, gathered_bytes=0, certain=certain)
            before = merged.get(key, key)
            merged[key] = replace(
                before,
                count=before.count + times * found.count,
                bytes=before.bytes + times * found.bytes,
                gathered_bytes=before.gathered_bytes + times * found.gathered_bytes,
            )
    return sorted(merged.values(), key=lambda one: -one.bytes)


def _collectives(program: Program, caller: Computation, devices: int) -> Iterator[Collective]:
    """The collectives of one execution of a computation, those in its fusions included."""
    chains = set()
    for one in caller.instructions:
        within, instructions = caller, [one]
        if one.opcode == "fusion":
            within = program.computations.get(one.called("calls") or "", caller)
            instructions = within.instructions if within is not caller else []
        for instruction in instructions:
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS or _between_slices(instruction):
                # A TPU program may hold one asynchronous collective in several fusions, which run
                # while it communicates; they share the number of a chain.
                chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
                if chain and chain[1] in chains:
                    continue
                chains.update(chain.groups() if chain else ())
                yield _collective(program, within, instruction, devices)


def _between_slices(instruction: Instruction) -> str | None:
    """The kind of a collective over the data-center network; None if it is none."""
    if instruction.opcode != "send":
        return None
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    return kind and kind[1].lower().replace("_", "-")


def _collective(
    program: Program, within: Computation, one: Instruction, devices: int
) -> Collective:
    between = _between_slices(one)
    if between:
        target = re.search(r'_xla_megascale_target="\{([\d,]+)\}', one.attributes)
        slices = target[1].count(",") + 1 if target else 2
        return Collective(between, (), slices, 1, one.arrays[0].bytes)
    kind = one.opcode.removesuffix("-start")
    group = first_group(one.attributes) or tuple(range(devices))
    operands = [within.by_name[name] for name in one.operands if name in within.by_name]
    if kind == "reduce-scatter":
        size = sum(operand.bytes for operand in operands)
    elif kind == "ragged-all-to-all":
        # The operands are the buffers to send from and to receive into; no more can be sent than
        # the smaller one holds.
        size = min(operand.bytes for operand in operands[:2])
    elif kind == "collective-permute" or one.opcode == "all-gather-start":
        # The result of an asynchronous start is a pair: the operand and the final result.
        size = max(array.bytes for array in one.arrays)
    else:
        size = one.bytes
    gathered = 0
    if kind == "all-reduce" and len(group) > 1:
        own = (operand for operand in operands if _holds_own_part(program, within, operand))
        gathered = sum(operand.bytes for operand in own)
    pairs = source_target_pairs(one.attributes)
    return Collective(kind, group, 1, 1, size, pairs=pairs, gathered_bytes=gathered)


def _holds_own_part(program: Program, within: Computation, one: Instruction) -> bool:
    """Whether an array is the result of writing the device's own part into a larger array."""
    while one.opcode in ("copy-done", "copy-start", "copy", "bitcast"):
        before = within.by_name.get(one.operands[0])
        if before is None:
            return False
        one = before
    if one.opcode == "fusion":
        body = program.computations.get(one.called("calls") or "")
        one = body.root if body is not None else one
    return one.opcode == "dynamic-update-slice"


def first_group(attributes: str) -> tuple[int, ...] | None:
    """The first group of devices that an instruction's attributes list; None if they list none.

    The attributes have one of these forms: `{{0,1},{2,3}}`; `[2,2]<=[4]`, or transposed
    `[2,2]<=[2,2]T(1,0)`; axes of a mesh, `mesh['data'=2,'fsdp'=2] {'fsdp'}`; and for permutations
    pairs of source and target.
    """
    pairs = source_target_pairs(attributes)
    if pairs:
        return _cycle(pairs)
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return tuple(int(number) for number in listed[1].split(","))
    counted = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if counted:
        return _iota_group(*(_numbers(text) for text in counted.groups()))
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        used = re.findall(r"'([^']+)'", mesh[2])
        grid = np.arange(np.prod(list(sizes.values()))).reshape(list(sizes.values()))
        return tuple(
            grid[tuple(slice(None) if axis in used else 0 for axis in sizes)].flatten().tolist()
        )
    return None


def source_target_pairs(attributes: str) -> tuple[tuple[int, int], ...]:
    """The pairs of source and target that an instruction's attributes list."""
    listed = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
    found = re.findall(r"(\d+),(\d+)", listed[1]) if listed else ()
    return tuple((int(source), int(target)) for source, target in found)


def _cycle(pairs: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The devices that data of the first moving device reaches if the permutation is repeated."""
    targets = dict(pairs)
    start = next((source for source, target in pairs if source != target), pairs[0][0])
    reached = [start]
    while targets.get(reached[-1], start) not in reached:
        reached.append(targets[reached[-1]])
    return tuple(sorted(reached))


def _numbers(text: str | None) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",")) if text else ()


def _iota_group(
    groups: tuple[int, ...], dims: tuple[int, ...], order: tuple[int, ...]
) -> tuple[int, ...]:
    """The first group of the form `[groups]<=[dims]T(order)`."""
    numbers = np.arange(np.prod(dims)).reshape(dims)
    numbers = numbers.transpose(order) if order else numbers
    return tuple(numbers.reshape(groups)[0].flatten().tolist())


def axes_between(group: Sequence[int], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which a group's devices differ.

    Args:
      group: indices of devices in mesh order.
      sizes: the mesh's axes and their sizes, in order.
    """
    places = np.stack(np.unravel_index(np.asarray(group), tuple(sizes.values())))
    differs = (places != places[:, :1]).any(axis=1)
    return tuple(axis for axis, apart in zip(sizes, differs, strict=True) if apart)
