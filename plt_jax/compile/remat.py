"""The train step with every policy of rematerialisation, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from plt_jax.compile.command import compile_config
from plt_jax.compile.estimate import Estimate
from plt_jax.config import RunConfig
from plt_jax.config.model import Remat
from plt_jax.distributed.chips import GIB, Topology
from plt_jax.reports.tables import table_of

POLICIES: tuple[str, ...] = get_args(Remat)

COLUMNS = (
    ("activations", "activations kept, GiB", "{:.2f}"),
    ("temporaries", "temporaries, GiB", "{:.2f}"),
    ("total", "total, GiB", "{:.2f}"),
    ("fits", "fits", "{}"),
    ("executed", "executed TFLOPs", "{:.0f}"),
    ("hbm", "HBM traffic, GB", "{:.0f}"),
    ("fastest", "fastest s", "{:.3f}"),
    ("slowest", "slowest s", "{:.3f}"),
)


def with_every_policy(config: RunConfig) -> dict[str, RunConfig]:
    """The configuration with each value of model.remat."""
    return {
        remat: config.model_copy(update={"model": config.model.model_copy(update={"remat": remat})})
        for remat in POLICIES
    }


def compare_policies(config: RunConfig, topology: Topology) -> dict[str, Estimate]:
    """The estimates of the train step by policy; see `compile_config`."""
    return {
        remat: compile_config(one, topology) for remat, one in with_every_policy(config).items()
    }


def report_policies(estimates: Mapping[str, Estimate]) -> str:
    """A table of memory, arithmetic and the bounds of the step's time, by policy."""
    first = next(iter(estimates.values()))
    axes = ", ".join(f"{axis} {size}" for axis, size in first.mesh.items() if size > 1)
    lines = (
        f"train step on {first.topology.name}, mesh {axes or 'of one device'}, by model.remat; "
        "memory and traffic of a device, arithmetic of a chip",
        table_of(COLUMNS, [_row(remat, one) for remat, one in estimates.items()]),
        "activations are those of the traced program; times are lower bounds, no measurements",
    )
    return "\n".join(lines)


def _row(remat: str, estimate: Estimate) -> dict[str, Any]:
    memory, times = estimate.compiled.memory, estimate.times
    row: dict[str, Any] = {
        "label": remat,
        "total": memory.needed / GIB,
        "fits": "yes" if estimate.fits else "no",
        "executed": estimate.flops.executed / estimate.topology.chips / 1e12,
    }
    if estimate.activations is not None:
        row["activations"] = estimate.activations.layers / GIB
    if memory.temporaries:
        row["temporaries"] = memory.temporaries / GIB
    if times is not None:
        row |= {"fastest": times.fastest, "slowest": times.slowest, "hbm": estimate.hbm_bytes / 1e9}
    return row
