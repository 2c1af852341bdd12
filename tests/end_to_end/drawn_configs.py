"""Random configurations of tiny runs, drawn over every field that the config's models declare.

A field's type says what may be drawn for it, so that a new field is drawn from its first day. Where
a type allows too much for a tiny run, or too little would come of it, FAIR says more. What a case
changes is a flat dict from dotted names to values, laid over a base that trains.
"""

from __future__ import annotations

import itertools
import math
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import hypothesis
from hypothesis import strategies as st

from plt_jax.config import RunConfig
from plt_jax.config.data import TaskName
from plt_jax.config.types import Section

Strategy = st.SearchStrategy
Values = dict[str, Any]
"""By dotted name."""


class Case(NamedTuple):
    """A configuration, and how its user gives it."""

    values: Values
    """What differs from the base."""
    options: frozenset[str]
    """Which of that is given on the command line; the rest is in the YAML file."""


class Kind(NamedTuple):
    """What a field's annotation says."""

    type: Any
    optional: bool = False
    bounds: tuple[Any, ...] = ()
    """annotated_types' Gt, Ge, Lt and Le."""


def all_fields(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[tuple[str, Kind]]:
    """Dotted name and kind of every field below a section that is no section itself."""
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
    """Of a number."""

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


def fair(name: str, kind: Kind, home: Path) -> Strategy:
    """Values that a field may well have, at its limits too."""
    known = fair_values(home)
    if name in known:
        return known[name]
    inner = fair_of_type(name, kind, home)
    return st.none() | inner if kind.optional else inner


def fair_of_type(name: str, kind: Kind, home: Path) -> Strategy:
    """The same, by type alone.

    Raises:
      TypeError: nothing is known of such a type.
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
        edges = [edge for edge in allowed if abs(edge) < 1e6]  # larger weights only diverge
        return st.sampled_from(inside + edges)
    if kind.type is str:
        return st.sampled_from(["", "text"])
    if get_origin(kind.type) is tuple:
        item, _ = get_args(kind.type)
        return st.lists(fair_items(item, f"{name}.", home), max_size=2)
    raise TypeError(f"{name} has type {kind.type}: say in drawn_configs.py what to draw for it")


def fair_items(section: type[Section], prefix: str, home: Path) -> Strategy:
    """Sections as dicts, in which fields that have a default may be missing."""
    required, optional = {}, {}
    for name, kind in all_fields(section):
        needed = section.model_fields[name].is_required()
        (required if needed else optional)[name] = fair(prefix + name, kind, home)
    return st.fixed_dictionaries(required, optional=optional)


def fair_values(home: Path) -> dict[str, Strategy]:
    """What more than its type is known of a field, `home` being made by `fuzz_worker.make`.

    Sizes stay tiny, numbers whose size says nothing are large at times, paths lead somewhere.
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


def unfair(name: str, kind: Kind, home: Path) -> Strategy:
    """Values beyond a field's limits, of other types, or that lead nowhere; few may be allowed."""
    wrong: list[Any] = [[1], {"a": 1}]
    if not kind.optional:
        wrong.append(None)
    if kind.type is bool:
        wrong += ["perhaps", 7]
    elif get_origin(kind.type) is Literal:
        # Those that another machine has, too.
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
    more = _unfair_values(home).get(name)
    return values if more is None else values | st.sampled_from(more)


def strange_paths(home: Path) -> list[str]:
    """Names of nothing, of a file, of a folder, and of what no file can be called."""
    return [
        *["", " ", "nowhere/at all", "~nobody-is-called-so/x", "/proc/nowhere"],
        *["\0", "x" * 300, "a\nb", "é\udcff"],
        *[str(home / name) for name in ("", "file.txt", "empty", "latin.txt", "tokenizer.json")],
    ]


def _unfair_values(home: Path) -> dict[str, list[Any]]:
    """More for single fields."""
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


def sections(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Dotted names of all sections."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield prefix + name
            yield from sections(field.annotation, f"{prefix}{name}.")


def base(home: Path) -> Values:
    """What every case starts from; it trains."""
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
    """So many different cases, the same for the same seed, of which about half should train.

    Args:
      home: a folder made by `fuzz_worker.make`.
      devices: that they train on.
    """
    seen = set()
    for batch in itertools.count(seed * 10**6):
        found: list[Case] = []

        # Behind its first ten examples hypothesis makes most by changing others a little.
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
    """Cases, see `drawn`."""
    kinds = dict(all_fields())

    @st.composite
    def draw_case(draw) -> Case:
        names = draw(_some(sorted(kinds), draw(st.sampled_from([4, 8, 12, 20]))))
        if draw(st.booleans()):
            names = [*dict.fromkeys(("model.loop.scheme", "model.moe.experts", *names))]
        values = {name: draw(fair(name, kinds[name], home)) for name in names}
        if draw(st.integers(0, 9)):  # the other tenth may contradict itself
            values = reconciled(values, home, devices)
        for name in draw(_some(sorted(kinds), draw(st.sampled_from([0, 0, 0, 1, 1, 2])))):
            values[name] = draw(unfair(name, kinds[name], home))
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
    """The same with those fair values changed that contradict one another."""
    base_values, defaults = base(home), flatten(RunConfig().model_dump())

    def at(name: str) -> Any:
        return values.get(name, base_values.get(name, defaults[name]))

    def fix(name: str, value: Any) -> None:
        if at(name) != value:
            values[name] = value

    if at("model.loop.scheme") == "no_loop":
        values["model.loop.count"] = 1
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


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def _reconcile_mesh(at: Callable, fix: Callable, devices: int) -> None:
    """A mesh of so many devices, and sizes that divide over it."""
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
    """Nested mappings as one from dotted names."""
    flat = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def nested(values: Values) -> dict[str, Any]:
    """Dotted names as nested mappings; a section's own value comes before those in it."""
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
