"""Renders chat templates in a process of its own, which template_process.py starts.

This file runs by itself, without plt_jax and JAX, so that it starts in a tenth of a second. Each
line of its input is a request in JSON, `{"source": ..., "variables": {...}}`. The first line of its
output says that it is ready. Each later one is an answer: `{"text": ...}`, or `{"refused": ...}`
from a template that does not take the messages, or `{"broken": ...}` from one that fails.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import resource
import sys
from collections.abc import Iterator
from typing import Any, ClassVar, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox


class _Generation(jinja2.ext.Extension):
    """Reads `{% generation %}`, by which transformers marks the assistant's tokens, as no tag."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _TooMuchError(Exception):
    """A template makes too long a text, or too large a number."""


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandbox in which products have bounds, since one operation ignores limits of time."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        size, times = (left, right) if hasattr(left, "__len__") else (right, left)
        if hasattr(size, "__len__"):
            _check_length(len(size) * times)
        if operator == "**" and abs(right) > 1000:
            raise _TooMuchError("it computes too large a power")
        return super().call_binop(context, operator, left, right)


_most_characters = 0.0


def _check_length(length: int) -> None:
    if length > _most_characters:
        raise _TooMuchError(f"it makes more than {_most_characters:,.0f} characters")


def _bounded(pieces: Iterator[str]) -> Iterator[str]:
    length = 0
    for piece in pieces:
        length += len(piece)
        _check_length(length)
        yield piece


@functools.lru_cache(8)
def _compile(source: str) -> jinja2.Template:
    """A template in the environment that transformers renders it in."""
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda layout: datetime.datetime.now().strftime(layout)
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Other arguments of json.dumps call what they are given, outside of the sandbox.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _answer(request: str) -> dict[str, str]:
    try:
        values = json.loads(request)
        pieces = _compile(values["source"]).generate(**values["variables"])
        return {"text": "".join(_bounded(pieces))}
    except (jinja2.TemplateError, RecursionError) as error:
        return {"refused": str(error)}
    except _TooMuchError as error:
        return {"broken": str(error)}
    except MemoryError:
        return {"broken": "it needs too much memory"}
    except Exception as error:  # a template can call methods of strings and lists wrongly
        return {"broken": f"{type(error).__name__}: {error}"}


def _reply(request: str) -> str:
    try:
        return json.dumps(_answer(request))
    except MemoryError:
        return json.dumps({"broken": "it needs too much memory"})


def main() -> None:
    """Answers every line: `template_sandbox.py MEMORY_BYTES MOST_CHARACTERS SECONDS`."""
    global _most_characters  # the limits are those of the process, which has no other use
    memory, _most_characters, seconds = map(float, sys.argv[1:])
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (int(memory), int(memory)))
    print("ready", flush=True)
    for line in sys.stdin:
        _limit_processor_time(seconds)
        print(_reply(line), flush=True)


def _limit_processor_time(seconds: float) -> None:
    """Ends this process if it computes longer, in case nobody is there any more to end it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = int(used.ru_utime + used.ru_stime + 2 * seconds) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    with contextlib.suppress(ValueError, OSError):  # a lower limit of its own
        resource.setrlimit(resource.RLIMIT_CPU, (most, hard))


if __name__ == "__main__":
    main()
