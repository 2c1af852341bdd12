"""Random configurations of tiny runs, drawn over all fields that the configuration declares.

A case changes some fields of a base that trains; field_values.py has the values to choose from.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
from hypothesis import strategies as st

from plt_jax.config import RunConfig
from plt_jax.config.types import Section
from tests.end_to_end.field_values import Strategy, all_fields, invalid, valid

Values = dict[str, Any]
"""The values of fields, by dotted name."""


class Case(NamedTuple):
    """A configuration, and how its user passes it."""

    values: Values
    """The fields that differ from the base."""
    options: frozenset[str]
    """The fields that are given on the command line; the others are in the YAML file."""


def sections(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[str]:
    """The dotted names of all sections."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield prefix + name
            yield from sections(field.annotation, f"{prefix}{name}.")


def base(home: Path) -> Values:
    """The configuration that every case changes. It trains."""
    return {
        "model.vocab_size": 270,
        "model.max_length": 16,
        "model.width": 8,
        "model.layers": 1,
        "model.heads": 2,
        "model.kv_heads": 1,
        "model.ffn_width": 12,
        "model.moe.expert_width": 8,
        "data.source": str(home / "corpus"),
        "data.validation_fraction": 0.25,
        "data.cache_dir": str(home / "cache"),
        "training.steps": 2,
        "training.batch_size": 8,
        "evaluation.batch_size": 8,
    }


def drawn(home: Path, count: int, seed: int, devices: int = 1) -> Iterator[Case]:
    """`count` different cases, the same for the same seed. About half of them should train.

    Args:
      home: a folder that `fuzz_worker.make` made.
      devices: number of devices that they train on.
    """
    seen = set()
    for batch in itertools.count(seed * 10**6):
        found: list[Case] = []

        # After its first ten examples hypothesis makes most examples by small changes of others.
        @hypothesis.seed(batch)
        @hypothesis.settings(
            max_examples=10,
            deadline=None,
            database=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(cases(home, devices))
        def draw(case: Case) -> None:
            found.append(case)  # noqa: B023 - called before the next batch

        draw()
        for case in found:
            if repr(case.values) in seen:
                continue
            seen.add(repr(case.values))
            yield case
            if len(seen) == count:
                return


def cases(home: Path, devices: int = 1) -> Strategy:
    """Cases as `drawn` yields them."""
    kinds = dict(all_fields())

    @st.composite
    def draw_case(draw) -> Case:
        names = draw(_some(sorted(kinds), draw(st.sampled_from([4, 8, 12, 20]))))
        if draw(st.booleans()):
            names = [*dict.fromkeys(("model.loop.scheme", "model.moe.experts", *names))]
        values = {name: draw(valid(name, kinds[name], home)) for name in names}
        if draw(st.integers(0, 9)):  # the other tenth may contradict itself
            values = reconciled(values, home, devices)
        for name in draw(_some(sorted(kinds), draw(st.sampled_from([0, 0, 0, 1, 1, 2])))):
            values[name] = draw(invalid(name, kinds[name], home))
        if draw(st.integers(0, 39)) == 39:
            name = draw(st.sampled_from(sorted(sections())))
            values = {
                other: value for other, value in values.items() if not other.startswith(f"{name}.")
            }
            values[name] = draw(st.sampled_from([5, "text", [1], None, "{", {"wdth": 3}]))
        if draw(st.integers(0, 39)) == 39:
            values[f"{draw(st.sampled_from(sorted(kinds)))}s"] = 3
        return Case(values, frozenset(name for name in values if draw(st.booleans())))

    return draw_case()


def _some(names: list[str], count: int) -> Strategy:
    return st.lists(st.sampled_from(names), unique=True, min_size=count, max_size=count)


def reconciled(values: Values, home: Path, devices: int) -> Values:
    """The same values, with those changed that contradict one another."""
    base_values, defaults = base(home), flatten(RunConfig().model_dump())

    def at(name: str) -> Any:
        return values.get(name, base_values.get(name, defaults[name]))

    def fix(name: str, value: Any) -> None:
        if at(name) != value:
            values[name] = value

    if at("model.loop.scheme") == "no_loop":
        values["model.loop.count"] = 1
        fix("model.loop.exit_gate", False)
        fix("model.loop.first_layer", 0)
        fix("model.loop.last_layer", None)
    fix("model.loop.first_layer", min(at("model.loop.first_layer"), at("model.layers") - 1))
    if at("model.loop.last_layer") is not None:
        last = max(at("model.loop.last_layer"), at("model.loop.first_layer"))
        fix("model.loop.last_layer", min(last, at("model.layers") - 1))
    if not at("model.loop.exit_gate"):
        fix("training.exit_entropy", None)
    if at("model.loop.scheme") not in ("clp", "clp_kv_share", "plt"):
        fix("model.loop.learned_hidden_scale", False)
        fix("training.hidden_scale_warmup", 0.0)
    _reconcile_loop_losses(at, fix)
    if not at("model.input_norms"):
        fix("model.attention_output_norm", True)
        fix("model.ffn_output_norm", True)
    fix("training.batch_size", _multiple(at("training.batch_size"), at("training.accumulate")))
    _reconcile_mesh(at, fix, devices)
    heads = at("model.heads")
    fix("model.kv_heads", heads if heads % at("model.kv_heads") else at("model.kv_heads"))
    if at("model.head_width") is None and at("model.width") % (2 * heads):
        values["model.width"] = 2 * heads * max(at("model.width") // (2 * heads), 1)
    if not at("model.moe.experts"):
        fix("model.moe.dense_layers", 0)
        fix("model.moe.bias_update_rate", None)
    else:
        fix(
            "model.moe.experts_per_token",
            min(at("model.moe.experts_per_token"), at("model.moe.experts")),
        )
        fix("model.moe.dense_layers", min(at("model.moe.dense_layers"), at("model.layers") - 1))
    if not at("model.moe.shared_width"):
        fix("model.moe.shared_gate", False)
    if at("data.sequence_length") is not None:
        fix("data.sequence_length", min(at("data.sequence_length"), at("model.max_length")))
    if at("data.sources"):
        fix("data.validation_source", None)
        if len({source.get("weight") is None for source in at("data.sources")}) > 1:
            for source in at("data.sources"):
                source.pop("weight", None)
    if at("checkpoint.skip_damaged"):
        fix("checkpoint.verify", True)
    fix("guard.patience", min(at("guard.patience"), at("guard.window")))
    shares = at("optimizer.warmup_fraction") + at("optimizer.decay_fraction")
    if at("optimizer.schedule") == "wsd" and shares > 1:
        fix("optimizer.warmup_fraction", 0.0)
    fix("model.rope_scaling.low_frequency_factor", 0.5)
    return values


def _reconcile_loop_losses(at: Callable[[str], Any], fix: Callable[[str, Any], None]) -> None:
    """At most one way to weigh the loops' losses, with a number for each loop."""
    ways = {"loop_losses": at("model.loop.count") - 1, "loop_counts": at("model.loop.count")}
    last, experts = at("model.loop.last_layer"), at("model.moe.experts")
    # Routers behind the loops would be balanced by the last loop's states alone.
    taken = experts > 0 and last is not None and last < at("model.layers") - 1
    if taken:
        fix("training.exit_entropy", None)
    taken = taken or at("training.exit_entropy") is not None
    for name, length in ways.items():
        numbers = list(at(f"training.{name}"))
        if taken or not numbers or not length:
            fix(f"training.{name}", [])
            continue
        fix(f"training.{name}", [*numbers, *[1.0] * length][-length:])
        taken = True
    if at("training.loop_counts"):
        fix("guard.spike_deviations", None)


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def _reconcile_mesh(at: Callable, fix: Callable, devices: int) -> None:
    """Sets a mesh of `devices` devices, and sizes that its axes divide."""
    left = devices
    for axis in ("tensor", "context", "expert", "fsdp"):
        size = at(f"mesh.{axis}")
        size = size if size > 0 and left % size == 0 else 1
        fix(f"mesh.{axis}", size)
        left //= size
    fix("mesh.data", -1)
    rows = devices // (at("mesh.tensor") * at("mesh.context"))
    fix(
        "training.batch_size",
        _multiple(at("training.batch_size"), rows * at("training.accumulate")),
    )
    for axis, names in {
        "tensor": (
            "vocab_size",
            "heads",
            "kv_heads",
            "ffn_width",
            "moe.expert_width",
            "moe.shared_width",
        ),
        "context": ("max_length",),
        "expert": ("moe.experts",),
        "fsdp": ("width",),
    }.items():
        for name in names:
            fix(f"model.{name}", _multiple(at(f"model.{name}"), at(f"mesh.{axis}")))
    if at("data.sequence_length") is not None:
        fix("data.sequence_length", _multiple(at("data.sequence_length"), at("mesh.context")))


def flatten(nested: Mapping[str, Any], prefix: str = "") -> Values:
    """Nested mappings as one mapping from dotted names."""
    flat = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def nested(values: Values) -> dict[str, Any]:
    """A mapping from dotted names as nested ones. A section's own value replaces those in it."""
    result: dict[str, Any] = {}
    for name, value in sorted(values.items()):
        *parents, leaf = name.split(".")
        inside = result
        for parent in parents:
            inside = inside.setdefault(parent, {})
            if not isinstance(inside, dict):
                break
        else:
            inside[leaf] = value
    return result
