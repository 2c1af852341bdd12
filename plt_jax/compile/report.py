"""An estimate as text."""

from __future__ import annotations

from plt_jax.compile.estimate import Estimate
from plt_jax.compile.roofline import Times
from plt_jax.config import RunConfig
from plt_jax.distributed.chips import GIB
from plt_jax.model.costs import describe_loops
from plt_jax.model.kernels import LANES


def report(config: RunConfig, estimate: Estimate) -> str:
    """The report that `python -m plt_jax.compile` prints."""
    sections = [_heading(config, estimate), _memory(estimate)]
    if estimate.times is not None:
        times = _times(estimate, estimate.times)
        sections += [_collectives(estimate), _arithmetic(estimate), times]
    return "\n\n".join("\n".join(lines) for lines in (*sections, _verdict(config, estimate)))


def _heading(config: RunConfig, estimate: Estimate) -> list[str]:
    topology, chip = estimate.topology, estimate.topology.chip
    moe = config.model.moe
    kind = f"{moe.experts_per_token} of {moe.experts} experts" if moe.experts else "dense"
    axes = ", ".join(f"{axis} {size}" for axis, size in estimate.mesh.items() if size > 1)
    slices = f" x {topology.slices} slices" if topology.slices > 1 else ""
    per_device = f", {chip.devices} devices each" if chip.devices > 1 else ""
    numbers = [
        f"{chip.flops / 1e12:g} TFLOP/s bfloat16",
        f"{chip.hbm_bytes / GIB:g} GiB at {chip.hbm_bandwidth / 1e9:g} GB/s",
        f"{2 * chip.dimensions} links of {chip.link_bandwidth / 1e9:g} GB/s each way",
        f"network {chip.network_bandwidth / 1e9:g} GB/s",
    ]
    took = (f"{name} took {taken:.1f} s" for name, taken in estimate.compiled.seconds.items())
    return [
        f"{describe_loops(config.model)} of width {config.model.width}, {kind}, "
        f"remat {config.model.remat}",
        f"{topology.name}{slices}: {topology.chips} chips{per_device}",
        f"mesh: {axes or 'one device'}",
        f"a chip: {', '.join(numbers)}",
        ", ".join(took),
    ]


def _memory(estimate: Estimate) -> list[str]:
    memory = estimate.compiled.memory
    lines = ["memory of a device                                 GiB"]

    def row(name: str, size: int, note: str = "") -> None:
        lines.append(f"  {name:<40}{size / GIB:>12.3f}" + (f"  {note}" if note else ""))

    for name, size in memory.parts.items():
        row(name, size)
    if memory.refused is None:
        row("these in the compiler's layouts", memory.arguments)
    if memory.temporaries:
        row("temporaries", memory.temporaries)
    if memory.refused is None:
        row("outputs", memory.outputs)
        row("program", memory.code)
    row("total", memory.needed)
    row("available", estimate.hbm_capacity)
    if estimate.activations is not None:
        lines.append(
            "kept for the backward pass, in the traced program; the compiler may keep less"
        )
        row("activations of a micro-batch's layers", estimate.activations.layers)
        row("gradient of the head", estimate.activations.head_gradient)
    return lines


def _collectives(estimate: Estimate) -> list[str]:
    if not estimate.collectives:
        return ["collectives: none"]
    lines = [
        f"{'collectives of a step':<24}{'over':<20}{'devices':>8}{'count':>8}{'GB':>10}{'ms':>10}"
    ]
    for one in estimate.collectives:
        note = ""
        if one.gathered_bytes:
            note = f"  {one.gathered_bytes / 1e9:.3f} GB of this are gathers of narrow shards"
        if not one.certain:
            note += "  (in a branch that a step may not run; not in any sum)"
        lines.append(
            f"  {one.kind:<22}{' x '.join(one.axes):<20}{one.devices:>8}{one.count:>8}"
            f"{one.bytes / 1e9:>10.3f}{1e3 * one.seconds:>10.3f}{note}"
        )
    return lines


def _arithmetic(estimate: Estimate) -> list[str]:
    flops, chips = estimate.flops, estimate.topology.chips
    lines = ["TFLOPs of a chip and step"]
    for index, count in enumerate(flops.by_loop):
        lines.append(f"  loop {index + 1:<35}{count / chips / 1e12:>12.3f}")
    for name, value, note in (
        ("  model, all loops", flops.model / chips / 1e12, "MFU counts these"),
        (
            "  executed",
            flops.executed / chips / 1e12,
            "with rematerialisation, and with what attention masks in its blocks",
        ),
        (
            "HBM traffic of a device and step, GB",
            estimate.hbm_bytes / 1e9,
            "from the program; a kernel's arguments count once",
        ),
    ):
        lines.append(f"{name:<42}{value:>12.3f}  {note}")
    return lines


def _times(estimate: Estimate, times: Times) -> list[str]:
    names = {
        "compute": "arithmetic at peak",
        "hbm": "memory",
        "ici": "links",
        "dcn": "network between slices",
    }
    lines = ["seconds of a step, lower bounds"]
    lines += [
        f"  {names[name]:<40}{taken:>12.6f}"
        for name, taken in times._asdict().items()
        if taken or name != "dcn"
    ]
    for name, taken in (
        ("if all of these overlap", times.fastest),
        ("if none overlaps", times.slowest),
    ):
        lines.append(
            f"  {name:<40}{taken:>12.6f}  MFU {100 * estimate.mfu(taken):.1f} %, "
            f"{estimate.tokens_per_second(taken):,.0f} tokens/s a chip"
        )
    lines.append(
        "  (bounds from the chip's published numbers, without latencies; not a measurement)"
    )
    return lines


def _verdict(config: RunConfig, estimate: Estimate) -> list[str]:
    left = estimate.hbm_capacity - estimate.compiled.memory.needed
    if not estimate.fits:
        memory = estimate.compiled.memory
        lines = [f"verdict: does not fit, {-left / GIB:.2f} GiB too much"]
        if memory.refused and not memory.needed:
            lines = [f"verdict: does not fit: {memory.refused[:300]}"]
        return [*lines, f"hint: {memory_hint(config, estimate)}"]
    lines = [
        f"verdict: fits, {left / GIB:.2f} GiB left; {estimate.dominating} takes most of the time"
    ]
    hint = speed_hint(config, estimate)
    return [*lines, f"hint: {hint}"] if hint else lines


def memory_hint(config: RunConfig, estimate: Estimate) -> str:
    """A change that makes a step need less memory."""
    memory = estimate.compiled.memory
    held = sum(memory.parts.values())
    if "cache" in memory.parts:
        return "lower --batch or --context, or raise mesh.tensor, mesh.context or mesh.fsdp"
    if held > estimate.hbm_capacity / 2:
        axes = "mesh.fsdp or mesh.expert" if config.model.moe.experts else "mesh.fsdp"
        return f"parameters and optimizer state take {held / GIB:.1f} GiB; raise {axes}"
    if config.model.remat != "full":
        return "set model.remat to full"
    rows = estimate.tokens // config.sequence_length
    split = 1
    for axis in ("data", "fsdp", "expert"):
        split *= estimate.mesh[axis]
    accumulate = 2 * config.training.accumulate
    if rows % (accumulate * split) == 0:
        return f"set training.accumulate to {accumulate} or more"
    return "one sequence per device is too much; use more devices along mesh.context or mesh.tensor"


def speed_hint(config: RunConfig, estimate: Estimate) -> str | None:
    """A change that makes a step faster, if one is known for what takes most of its time."""
    gathered = [one for one in estimate.collectives if one.certain and one.gathered_bytes]
    wasted = sum(one.seconds * one.gathered_bytes / one.bytes for one in gathered)
    fsdp, width = estimate.mesh["fsdp"], config.model.width
    if estimate.times is None or estimate.dominating is None:
        return None
    if wasted > 0.1 * estimate.times.slowest and width // fsdp < LANES:
        return (
            f"shards of width {width} / mesh.fsdp {fsdp} are {width // fsdp} numbers wide, fewer "
            f"than a vector's {LANES}, so gathers are all-reduces of twice the traffic; set "
            f"mesh.fsdp to {max(width // LANES, 1)} or less, and mesh.data to the rest"
        )
    term = estimate.dominating
    if term.endswith("over slices"):
        if config.training.accumulate > 1:
            return "lower training.accumulate: slices meet in every micro-batch"
        return "raise training.batch_size: what slices exchange does not grow with it"
    if term.startswith(("all-gather", "reduce-scatter")) and config.training.accumulate > 1:
        return "lower training.accumulate: weights are gathered for every micro-batch"
    if term.startswith(("all-to-all", "ragged-all-to-all")):
        return "lower mesh.expert, so that tokens are sent less far"
    return None
