"""Steps compiled for a GPU that is not here, and their programs' kernels, bytes and bounds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from plt_jax.compile.hlo import parse_program
from plt_jax.compile.kernels import (
    OUTSIDE,
    Kernel,
    generation_loop,
    read_kernels,
    total_traffic,
)
from plt_jax.compile.program import (
    Compiled,
    compile_step,
    generation_step,
    gpu_mesh,
    train_step,
)
from plt_jax.compile.shapes import DecodeShape
from plt_jax.compile.traffic import Traffic
from plt_jax.config import ModelConfig, RunConfig
from plt_jax.distributed.chips import GIB
from plt_jax.distributed.gpus import Gpu, GpuTopology
from plt_jax.model.costs import layers_of_loop
from plt_jax.training.program import TrainProgram

KERNEL_SECONDS = 1.3e-6
"""What a kernel costs beside its bytes, in a CUDA graph; measured on an H100 by Hazy Research
("Look Ma, No Bubbles", 2025)."""


def middle_of(model: ModelConfig) -> int:
    """The layer in the middle of those that loop, counted from 0."""
    return model.looped_layers[len(model.looped_layers) // 2]


@dataclass(frozen=True)
class GpuProgram:
    """A compiled step of one device, and its kernels."""

    label: str
    config: RunConfig
    batch: int
    context: int | None
    """Positions of the decode step's cache; None for a train step."""
    gpu: Gpu
    compiled: Compiled
    step_kernels: list[Kernel]
    """All kernels of a step, in the order in which they run."""

    @property
    def kernels(self) -> int:
        """How many kernels a step runs."""
        return sum(kernel.times for kernel in self.step_kernels)

    @property
    def middle_layer(self) -> list[Kernel]:
        """The kernels of a layer in the middle of a decode step."""
        middle = middle_of(self.config.model)
        return [kernel for kernel in self.step_kernels if kernel.layer == middle]

    @property
    def kernels_per_layer(self) -> float:
        """Kernels of a middle layer, in the first pass where loops take turns; of a train step, all
        kernels by the number of layers and loops."""
        model = self.config.model
        if self.context is not None:
            return sum(kernel.times for kernel in self.middle_layer)
        layers = sum(layers_of_loop(model, index) for index in range(model.loop.count))
        return round(self.kernels / layers, 1)

    @property
    def traffic(self) -> Traffic:
        """What a step reads and writes."""
        return total_traffic(self.step_kernels)

    @property
    def bandwidth_seconds(self) -> float:
        """The time in which the card can move the step's bytes."""
        return self.traffic.bytes / self.gpu.hbm_bandwidth

    @property
    def bound_seconds(self) -> float:
        """That time and the kernels' own."""
        return self.bandwidth_seconds + self.kernels * KERNEL_SECONDS

    def as_json(self) -> dict[str, Any]:
        """The program in types that JSON has."""
        memory = self.compiled.memory
        return {
            "label": self.label,
            "scheme": self.config.model.loop.scheme,
            "loops": self.config.model.loop.count,
            "layers": self.config.model.layers,
            "batch": self.batch,
            "context": self.context,
            "kernels": self.kernels,
            "kernels_per_layer": self.kernels_per_layer,
            "bytes_read": self.traffic.read,
            "bytes_written": self.traffic.written,
            "memory_bytes": memory.needed,
            "refused": memory.refused,
            "seconds": {"bandwidth": self.bandwidth_seconds, "with_kernels": self.bound_seconds},
            "middle_layer": [kernel.as_json() for kernel in self.middle_layer],
        }


def compile_for_gpu(
    labels: dict[str, RunConfig], topology: GpuTopology, decode: Sequence[DecodeShape]
) -> list[GpuProgram]:
    """Compiles each configuration's step for a card.

    Args:
      labels: configurations by the names that reports use.
      decode: the decode steps; empty for the train step.

    Raises:
      InputError: the compiler is missing, or a configuration does not fit the devices.
    """
    made = []
    for label, config in labels.items():
        mesh = gpu_mesh(config, topology)
        if not decode:
            compiled = compile_step(train_step(TrainProgram.build(config, mesh)), mesh)
            batch = config.training.batch_size
            made.append(_program(label, config, (batch, None), topology.gpu, compiled))
        for shape in decode:
            compiled = compile_step(generation_step(config, mesh, shape), mesh)
            sizes = (shape.batch, shape.context)
            made.append(_program(label, config, sizes, topology.gpu, compiled))
    return made


def _program(
    label: str, config: RunConfig, shape: tuple[int, int | None], gpu: Gpu, compiled: Compiled
) -> GpuProgram:
    kernels: list[Kernel] = []
    if compiled.text is not None:
        program = parse_program(compiled.text)
        start = None if shape[1] is None else generation_loop(program)
        kernels = read_kernels(program, compiled.text, start)
    return GpuProgram(label, config, *shape, gpu, compiled, kernels)


# ---- as text ----


def report(topology: GpuTopology, programs: Sequence[GpuProgram]) -> str:
    """The report that `python -m plt_jax.compile --topology h100` prints."""
    sections = [_heading(topology), _table(programs)]
    for program in programs:
        sections += [_by_kind(program), _middle_layer(program)]
        if program.context is not None and program.label != programs[0].label:
            plain = next(one for one in programs if one.batch == program.batch)
            sections.append(_difference(plain, program))
    return "\n\n".join("\n".join(lines) for lines in sections)


def _heading(topology: GpuTopology) -> list[str]:
    gpu = topology.gpu
    return [
        f"{gpu.name} x {topology.devices}: {gpu.flops / 1e12:g} TFLOP/s bfloat16, "
        f"{gpu.hbm_bytes / 1e9:g} GB at {gpu.hbm_bandwidth / 1e9:g} GB/s",
        "Compiled for a card that is not here, and not measured. Products have default forms:",
        "on a card XLA tries several, so counts may differ there by about 3 a layer.",
    ]


def _table(programs: Sequence[GpuProgram]) -> list[str]:
    lines = [
        f"{'':<24}{'batch':>6}{'kernels':>9}{'a layer':>9}{'MB read':>11}{'written':>9}"
        f"{'ms, bytes':>11}{'and kernels':>13}{'ratio':>7}{'GiB':>8}"
    ]
    for one in programs:
        memory = one.compiled.memory
        if memory.refused is not None:
            lines.append(f"  {one.label:<22}{one.batch:>6}  does not fit: {memory.refused[:200]}")
            continue
        plain = next(each for each in programs if each.batch == one.batch)
        ratio = one.bound_seconds / plain.bound_seconds if plain.kernels else float("nan")
        lines.append(
            f"  {one.label:<22}{one.batch:>6}{one.kernels:>9}{one.kernels_per_layer:>9g}"
            f"{one.traffic.read / 1e6:>11.1f}{one.traffic.written / 1e6:>9.1f}"
            f"{1e3 * one.bandwidth_seconds:>11.3f}{1e3 * one.bound_seconds:>13.3f}{ratio:>7.3f}"
            f"{memory.needed / GIB:>8.2f}"
        )
    return [
        *lines,
        f"  (bounds: bytes over the card's bandwidth; and {1e6 * KERNEL_SECONDS:g} us more for each"
        " kernel)",
    ]


def _name(program: GpuProgram) -> str:
    return f"{program.label}, batch {program.batch}"


def _by_kind(program: GpuProgram) -> list[str]:
    counts: Counter[str] = Counter()
    for kernel in program.step_kernels:
        counts[kernel.kind] += kernel.times
    outside = sum(one.times for one in program.step_kernels if one.layer == OUTSIDE)
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    before = f"; {outside} before the first layer" if program.context is not None else ""
    return [f"{_name(program)}: {kinds}{before}"]


def _middle_layer(program: GpuProgram) -> list[str]:
    if program.context is None:
        return _largest(program)
    middle = middle_of(program.config.model)
    lines = [f"{_name(program)}, layer {middle + 1}: {'MB read':>41}{'written':>9}  makes, from"]
    return lines + [_line(kernel) for kernel in program.middle_layer]


def _largest(program: GpuProgram) -> list[str]:
    """The kernels that move most, of a train step, whose layers are turns of a loop."""
    by_bytes = sorted(
        program.step_kernels, key=lambda one: one.times * one.traffic.bytes, reverse=True
    )
    lines = [f"{_name(program)}, the 20 kernels that move most, times their number of runs:"]
    return lines + [f"{_line(kernel)}  x {kernel.times}" for kernel in by_bytes[:20]]


def _line(kernel: Kernel) -> str:
    shape = kernel.shape if len(kernel.shape) <= 44 else kernel.shape[:41] + "..."
    return (
        f"  {kernel.kind:<40}{kernel.traffic.read / 1e6:>12.3f}{kernel.traffic.written / 1e6:>9.3f}"
        f"  {shape:<44}  {'; '.join(kernel.sources[:2])}"
    )


def _difference(plain: GpuProgram, program: GpuProgram) -> list[str]:
    """The kernels of a middle layer that one program has, and the other has not, by function."""

    def by_function(one: GpuProgram) -> Counter[str]:
        # A line is `file:line function`; forms of one function differ in their lines.
        sources = (kernel.sources[0] if kernel.sources else "" for kernel in one.middle_layer)
        return Counter(re.sub(r":\d+", "", source) or "not named" for source in sources)

    ours, theirs = by_function(program), by_function(plain)
    more, less = ours - theirs, theirs - ours
    lines = [f"{_name(program)}: a layer's kernels beside {plain.label}, by where they come from"]
    lines += [f"  {count} more of {name}" for name, count in more.items()]
    lines += [f"  {count} fewer of {name}" for name, count in less.items()]
    return lines if more or less else [f"{lines[0]}: the same"]
