"""The values that random configurations may give to each field: valid and invalid ones.

A field's type determines what may be drawn for it, so that a new field is drawn from its first day.
Where a type allows too much for a tiny run, or says too little, `known_values` says more.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from hypothesis import strategies as st

from plt_jax.config import RunConfig
from plt_jax.config.data import TaskName
from plt_jax.config.types import Section

Strategy = st.SearchStrategy


class Kind(NamedTuple):
    """A field's annotation, taken apart."""

    type: Any
    optional: bool = False
    bounds: tuple[Any, ...] = ()
    """Its limits: annotated_types' Gt, Ge, Lt and Le."""


def all_fields(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[tuple[str, Kind]]:
    """The dotted name and kind of every field below a section, except fields that are sections."""
    for name, field in section.model_fields.items():
        kind = kind_of(field.annotation, tuple(field.metadata))
        if isinstance(kind.type, type) and issubclass(kind.type, Section):
            yield from all_fields(kind.type, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def kind_of(annotation: Any, bounds: tuple[Any, ...] = ()) -> Kind:
    """Takes an annotation apart."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [bound for bound in arguments[1:] if not hasattr(bound, "metadata")]
        for info in arguments[1:]:
            inner += getattr(info, "metadata", [])
        return kind_of(arguments[0], (*bounds, *inner))
    if origin in (Union, types.UnionType):
        (other,) = [argument for argument in arguments if argument is not type(None)]
        return kind_of(other, bounds)._replace(optional=True)
    return Kind(annotation, bounds=tuple(bound for bound in bounds if _limits(bound)))


def _limits(bound: Any) -> dict[str, float]:
    names = ("gt", "ge", "lt", "le")
    return {name: getattr(bound, name) for name in names if getattr(bound, name, None) is not None}


class Limits(NamedTuple):
    """The limits of a number."""

    low: float = -math.inf
    low_allowed: bool = False
    high: float = math.inf
    high_allowed: bool = False


def limits_of(kind: Kind) -> Limits:
    """The limits that a number's bounds set."""
    limits = Limits()
    for name, value in (pair for bound in kind.bounds for pair in _limits(bound).items()):
        side = "low" if name in ("gt", "ge") else "high"
        limits = limits._replace(**{side: value, f"{side}_allowed": name in ("ge", "le")})
    return limits


def valid(name: str, kind: Kind, home: Path) -> Strategy:
    """Values that a field may have, also at its limits."""
    known = known_values(home)
    if name in known:
        return known[name]
    inner = valid_of_type(name, kind, home)
    return st.none() | inner if kind.optional else inner


def valid_of_type(name: str, kind: Kind, home: Path) -> Strategy:
    """Values that a field may have, judged by its type alone.

    Raises:
      TypeError: the type is unknown here.
    """
    low, low_allowed, high, high_allowed = limits_of(kind)
    if kind.type is bool:
        return st.booleans()
    if get_origin(kind.type) is Literal:
        return st.sampled_from(get_args(kind.type))
    if kind.type is int:
        least = 0 if low == -math.inf else int(low) + (not low_allowed)
        most = min(least + 4, math.inf if high == math.inf else int(high) - (not high_allowed))
        return st.integers(least, int(most))
    if kind.type is float:
        low = max(low, -2.0)
        inside = [low + (min(high, low + 4.0) - low) * part for part in (0.01, 0.3, 0.5, 0.9)]
        allowed = [low] * low_allowed + [high] * high_allowed
        edges = [edge for edge in allowed if abs(edge) < 1e6]  # with larger ones runs diverge
        return st.sampled_from(inside + edges)
    if kind.type is str:
        return st.sampled_from(["", "text"])
    if get_origin(kind.type) is tuple:
        item, _ = get_args(kind.type)
        return st.lists(valid_items(item, f"{name}.", home), max_size=2)
    raise TypeError(f"{name} has type {kind.type}: say in field_values.py what to draw for it")


def valid_items(section: type[Section], prefix: str, home: Path) -> Strategy:
    """Sections as dicts, in which fields that have a default may be missing."""
    required, optional = {}, {}
    for name, kind in all_fields(section):
        needed = section.model_fields[name].is_required()
        (required if needed else optional)[name] = valid(prefix + name, kind, home)
    return st.fixed_dictionaries(required, optional=optional)


def known_values(home: Path) -> dict[str, Strategy]:
    """The valid values of fields whose type says too little, by dotted name.

    Sizes stay tiny, numbers that cost nothing are sometimes large, and paths lead into `home`, a
    folder that `fuzz_worker.make` made.
    """
    pick = st.sampled_from
    levels = st.lists(pick([1, 1, 2, 3, 10**9]), max_size=3)
    tiny, often = pick([1, 2, 3]), pick([1, 2, 3, 10**9])
    huge = pick([1, 2, 7, 64, 2**31 - 1])
    corpus = [str(home / "corpus"), str(home / "long.txt")]
    return {
        "run_dir": st.none(),
        "start_from": pick([None, str(home / "trained"), str(home / "trained/checkpoints/2")]),
        "seed": pick([0, 1, 2**31, 2**32 - 1]),
        "model.vocab_size": pick([258, 270, 300, 400]),
        "model.max_length": pick([2, 5, 8, 16, 32]),
        "model.width": pick([8, 16, 24, 32]),
        "model.layers": tiny,
        "model.heads": pick([1, 2, 4, 6]),
        "model.kv_heads": pick([1, 2, 4]),
        "model.head_width": pick([None, 2, 4, 6, 8, 16]),
        "model.ffn_width": pick([1, 7, 16, 64]),
        "model.rope_theta": pick([1e-3, 1.0, 100.0, 1e6, 1e30]),
        "model.rope_scaling.factor": pick([1.0, 1.5, 8.0, 1e30]),
        "model.rope_scaling.low_frequency_factor": pick([0.5, 1.0, 3.9]),
        "model.rope_scaling.high_frequency_factor": pick([1.001, 4.0, 1e9]),
        "model.rope_scaling.original_length": huge,
        "model.norm_epsilon": pick([1e-12, 1e-6, 1.0, 1e6]),
        "model.attention": pick(["auto", "xla"]),
        "model.layer_unroll": pick([1, 2, 3, 10**9]),
        "model.loop.count": tiny,
        "model.loop.first_layer": pick([0, 0, 1]),
        "training.loop_losses": pick([[], [0.5], [0.0, 2.0]]),
        "training.loop_counts": pick([[], [1.0], [0.5, 0.0], [0, 1, 3]]),
        "training.exit_entropy": pick([None, None, 0.1]),
        "model.loop.last_layer": pick([None, None, 0, 1]),
        "model.loop.window": huge,
        "model.moe.experts": pick([0, 1, 2, 4, 8]),
        "model.moe.dense_layers": pick([0, 1]),
        "model.moe.experts_per_token": pick([1, 2, 4]),
        "model.moe.expert_width": pick([1, 3, 16]),
        "model.moe.grouped_product": pick(["auto", "ragged_dot", "blocks"]),
        "model.moe.bias_update_rate": pick([None, 0.0, 1e-3, 1.0]),
        "model.moe.load_balance_loss": pick([0.0, 0.01, 1.0]),
        "model.moe.router_z_loss": pick([0.0, 0.01, 1.0]),
        "data.source": pick(corpus),
        "data.sources.path": pick([str(home / "one"), str(home / "two")]),
        "data.sources.weight": pick([None, 1e-9, 0.5, 3.0, 1e9]),
        "data.sources.epochs": pick([None, None, 0.01, 2.0, 1e9]),
        "data.synthetic.task": pick(["none", "none", *get_args(TaskName)]),
        "data.synthetic.difficulties": levels,
        "data.synthetic.test_difficulties": levels,
        "data.synthetic.length": pick([1, 3, 8, 12, 10**6]),
        "data.synthetic.symbols": pick([None, None, 1, 2, 4, 9]),
        "data.validation_source": pick([None, *corpus]),
        "data.validation_fraction": pick([0.01, 0.25, 0.5, 0.99]),
        "data.sequence_length": pick([None, 1, 2, 5, 8, 16]),
        "data.cache_dir": pick([str(home / "cache"), str(home / "other" / "cache")]),
        "data.prefetch": pick([0, 1, 4, 64]),
        "tokenizer.path": pick([None, None, str(home / "tokenizer.json")]),
        "tokenizer.min_frequency": huge,
        "optimizer.learning_rate": pick([1e-30, 1e-4, 1e-2, 1.0]),
        "optimizer.epsilon": pick([1e-20, 1e-8, 1.0]),
        "optimizer.clip_norm": pick([None, 1e-6, 1.0, 1e30]),
        "training.steps": pick([1, 2]),
        "training.batch_size": pick([1, 2, 3, 4, 6, 8]),
        "training.accumulate": pick([1, 2, 4]),
        "training.log_every": often,
        "training.evaluate_every": often,
        "training.checkpoint_every": often,
        "training.hang_after": pick([None, 600.0, 1e9, 1e30]),
        "training.sample_prompt": pick(["", "the", "peace é ☃"]),
        "training.profile_from": pick([None, None, None, 2]),
        "training.wandb_project": pick([None]),  # needs a package, and an account
        "guard.spike_deviations": pick([None, 1e-6, 3.0, 1e30]),
        "guard.window": pick([8, 128, 2**31 - 1]),
        "guard.patience": pick([1, 8, 10**6]),
        "guard.rollbacks": pick([0, 3, 10**6]),
        **{f"mesh.{name}": pick([1, 1, 2, 4, -1]) for name in ("fsdp", "expert", "tensor")},
        "mesh.data": pick([-1, -1, 1, 2, 8]),
        "mesh.context": pick([1, 1, 1, 2, 4]),
        "processes.coordinator": st.none(),
        "processes.count": st.none(),
        "processes.index": st.none(),
        "processes.timeout": pick([1, 300, 10**6]),
        "checkpoint.keep": huge,
        "checkpoint.keep_best": huge,
        "checkpoint.keep_every": st.none() | huge,
        "evaluation.batch_size": pick([1, 2, 3, 8]),
        "evaluation.sequences": st.none() | huge,
    }


def invalid(name: str, kind: Kind, home: Path) -> Strategy:
    """Values beyond a field's limits, values of other types, and paths that lead nowhere. A
    few of them may be valid."""
    wrong: list[Any] = [[1], {"a": 1}]
    if not kind.optional:
        wrong.append(None)
    if kind.type is bool:
        wrong += ["perhaps", 7]
    elif get_origin(kind.type) is Literal:
        # Some of these are valid on other machines.
        wrong += ["nonsense", "", 3, *get_args(kind.type)]
    elif kind.type in (int, float):
        low, low_allowed, high, high_allowed = limits_of(kind)
        wrong += ["many", "", "1e", math.nan, math.inf, -math.inf]
        if low > -math.inf:
            wrong += [low - 1 - abs(low), -(10**40)] + [low] * (not low_allowed)
        if high < math.inf:
            wrong += [high + 1 + abs(high), 10**40] + [high] * (not high_allowed)
        wrong += [1.5, "0x10"] if kind.type is int else [1e300, 1e-300, 10**400]
    elif kind.type is str:
        wrong += [5, *strange_paths(home)]
    elif get_origin(kind.type) is tuple:
        wrong += ["[", "nonsense", "[1,", [{"path": home.name}], [{"weight": 1.0}], [None]]
        wrong += [[{"path": str(home / name)}] for name in ("strange", "unheld", "empty")]
        both = {"path": str(home / "one")}, {"path": str(home / "strange")}
        wrong += [[both[0] | {"weight": 1.0}, both[0]], list(both), [both[0] | {"wieght": 1.0}]]
        wrong += [[both[0] | {"epochs": value}] for value in (0, -1, math.inf, "x", 1e-300)]
    values = st.sampled_from(wrong)
    more = _known_invalid_values(home).get(name)
    return values if more is None else values | st.sampled_from(more)


def strange_paths(home: Path) -> list[str]:
    """Paths of nothing, of a file and of a folder, and impossible paths."""
    return [
        *["", " ", "nowhere/at all", "~nobody-is-called-so/x", "/proc/nowhere"],
        *["\0", "x" * 300, "a\nb", "é\udcff"],
        *[str(home / name) for name in ("", "file.txt", "empty", "latin.txt", "tokenizer.json")],
    ]


def _known_invalid_values(home: Path) -> dict[str, list[Any]]:
    """More invalid values of single fields, by dotted name."""
    return {
        "training.batch_size": [64, 10**6],
        "model.max_length": [1, 10**6],
        "model.vocab_size": [1, 257],
        "model.width": [9, 31],
        "model.head_width": [3],
        "model.heads": [5],
        "model.kv_heads": [3, 8],
        "model.moe.experts_per_token": [9, 10**30],
        "model.moe.dense_layers": [3, 10**30],
        "model.loop.first_layer": [3, 10**30],
        "model.loop.last_layer": [3, 10**30],
        "model.input_norms": [False],
        "training.loop_losses": [[1.0] * 9, [-1.0]],
        "training.loop_counts": [[1.0] * 9, [0.0], [-1.0]],
        "training.accumulate": [5, 10**30],
        "data.sequence_length": [33, 10**30],
        "data.source": [str(home / "short.txt")],
        "data.validation_source": [str(home / "short.txt")],
        "start_from": [str(home / "trained" / "checkpoints" / "1")],
        "tokenizer.path": [str(home / "unspecial.json"), str(home / "large.json")],
        "training.sample_prompt": ["peace and union " * 20],
        "mesh.data": [3, 10**30],
        "processes.coordinator": ["localhost", "localhost:x", "localhost:0"],
        "processes.count": [1],
        "processes.index": [0],
        "optimizer.warmup_fraction": [0.9],
        "optimizer.decay_fraction": [0.99],
    }
