"""Serving under load, scheme by scheme.

python -m plt_jax.benchmarks.serve CONFIG --slots 1,4,8 --schemes no_loop,plt,vanilla_loop

The engine serves requests of random prompts, whose lengths and numbers of new tokens are drawn from
the ranges that are given. In a closed loop every slot has a client that sends its next request when
it has its answer; with --rate requests arrive at random times (a Poisson process), whatever the
server does. Beside it `generate` answers the same requests one after another. Every round measures
every scheme once, and each round begins with another one. With --long_prompt the time between
tokens is measured while a prompt of that length is admitted to a slot beside running texts.
"""

from __future__ import annotations

import argparse
import functools
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from plt_jax.benchmarks import serve_report
from plt_jax.benchmarks.machine import machine
from plt_jax.benchmarks.prepared import PreparedVariant, add_weights, prepare_all
from plt_jax.benchmarks.rounds import interleave, positive_integers, ratios, spread
from plt_jax.benchmarks.serve_clients import Client, Load
from plt_jax.commands.parser import CommandParser, run_command
from plt_jax.config import ModelConfig
from plt_jax.config.variants import NO_LOOP, variants_of
from plt_jax.decoding.generation import GenerationRequest, generate_all
from plt_jax.decoding.options import DTYPES
from plt_jax.errors import InputError
from plt_jax.model.costs import count_parameters
from plt_jax.runs.configuration import load_config
from plt_jax.serving.engine import Engine
from plt_jax.serving.prefix_cache import PrefixCache
from plt_jax.serving.request import SlotSampling
from plt_jax.serving.scheduler import Scheduler
from plt_jax.serving.slots import SlotModel

ONE_AT_A_TIME = "generate, one at a time"
PERCENTS = (50, 95, 99)
STEPS = 32
"""Decode steps of which the time without a scheduler is the mean."""


class Served:
    """One scheme with one number of slots."""

    def __init__(self, row: PreparedVariant, slots: int, arguments: argparse.Namespace):
        self.slots = slots
        longest = max(arguments.prompt[1], arguments.long_prompt) + arguments.output[1]
        context = -(-longest // 64) * 64
        self.model = SlotModel(
            row.config, row.weights, slots, context, arguments.prefill_tokens, arguments.cache_dtype
        )
        self.model.compile()
        self._arguments = arguments

    def run(self, clients: Sequence[Client], arrivals: Sequence[float] | None) -> float:
        """Serves all clients; returns the seconds that it took.

        Args:
          arrivals: when each request is sent; None for a closed loop of as many clients as slots.
        """
        scheduler = Scheduler(self.model, PrefixCache(self.model.chunk, 1, 0), len(clients))
        engine = Engine(scheduler)
        engine.start()
        left = threading.Semaphore(0)
        waiting = iter(clients)

        def send_next() -> None:
            left.release()
            if arrivals is None and (client := next(waiting, None)) is not None:
                # Not by the engine's own thread, which holds no lock here but must not wait.
                client.send(engine)

        for client in clients:
            client.next = send_next
        began = time.perf_counter()
        if arrivals is None:
            for client in [next(waiting) for _ in range(min(self.slots, len(clients)))]:
                client.send(engine)
        else:
            for client, at in zip(clients, arrivals, strict=True):
                time.sleep(max(0.0, began + at - time.perf_counter()))
                client.send(engine)
        for _ in clients:
            left.acquire()
        seconds = time.perf_counter() - began
        engine.stop(within=60)
        if failed := [client for client in clients if client.failure is not None]:
            raise InputError(f"a request ended as {failed[0].failure}")
        return seconds

    def chunk_seconds(self) -> float:
        """Seconds of a prefill of one chunk, without a scheduler."""
        chunk = [1] * self.model.chunk
        self.model.start(0, SlotSampling(), chunk)
        jax.block_until_ready(self.model.prefill(0, chunk, is_last=False))
        count = max(1, min(STEPS, self.model.context // len(chunk) - 1))
        began = time.perf_counter()
        for _ in range(count):
            drawn = self.model.prefill(0, chunk, is_last=False)
        jax.block_until_ready(drawn)
        return (time.perf_counter() - began) / count

    def step_seconds(self, longest: int) -> float:
        """Seconds of a decode step of all slots, without a scheduler.

        Args:
          longest: see `SlotModel.step`.
        """
        for slot in range(self.slots):
            self.model.start(slot, SlotSampling(), [1])
            self.model.prefill(slot, [1], is_last=True)
        active = np.ones(self.slots, bool)
        jax.block_until_ready(self.model.step(active, False, longest))
        began = time.perf_counter()
        for _ in range(STEPS):
            drawn = self.model.step(active, False, longest)
        jax.block_until_ready(drawn)
        return (time.perf_counter() - began) / STEPS

    def stall(self) -> dict[str, float]:
        """The time between tokens of running texts, before and while a long prompt is admitted."""
        new = self._arguments.output[1]
        clients = [Client([1 + index], new) for index in range(self.slots - 1)]
        long = Client(list(range(1, 1 + self._arguments.long_prompt)), 1)
        reached = threading.Event()

        def watch(count: int) -> None:
            if count == new // 4:
                reached.set()

        clients[0].on_token = watch
        scheduler = Scheduler(self.model, PrefixCache(self.model.chunk, 1, 0), len(clients))
        engine = Engine(scheduler)
        ended = threading.Semaphore(0)
        for client in [*clients, long]:
            client.next = ended.release
        engine.start()
        for client in clients:
            client.send(engine)
        reached.wait()
        long.send(engine)
        for _ in [*clients, long]:
            ended.acquire()
        engine.stop(within=60)
        before, during = [], []
        for client in clients:
            for earlier, later in zip(client.times, client.times[1:], strict=False):
                admitted = long.sent < later and earlier < long.times[0]
                (during if admitted else before).append(later - earlier)
        figures = percentiles("steady_ms", before) | percentiles("admitting_ms", during)
        return figures | {"ratio": figures["admitting_ms_99"] / figures["steady_ms_50"]}


def percentiles(name: str, seconds: Iterable[float]) -> dict[str, float]:
    """Percentiles in milliseconds, by names that end with the percent."""
    values = np.percentile(list(seconds) or [0.0], PERCENTS)
    return {
        f"{name}_{percent}": 1e3 * float(value)
        for percent, value in zip(PERCENTS, values, strict=True)
    }


def main() -> None:
    arguments = parse()
    base = base_config(arguments)
    rows = prepare_all(variants_of(arguments.schemes, arguments.loops), base, arguments.weights)
    load = Load(arguments, base.vocab_size)
    report = {
        "command": " ".join(["python -m plt_jax.benchmarks.serve", *sys.argv[1:]]),
        "machine": machine(),
        "model": base.model_dump(mode="json"),
        "parameters": count_parameters(NO_LOOP.apply(base)).total,
        "dtype": base.dtype,
        "requests": arguments.requests,
        "new_tokens": load.new_tokens,
        "rows": [],
    }
    alone = one_at_a_time(rows, load, arguments) if arguments.alone else []
    report["rows"] += alone
    for slots in arguments.slots:
        report["rows"] += measure(rows, slots, load, arguments)
        print(serve_report.table(report), flush=True)
        if arguments.out:
            serve_report.write(report, Path(arguments.out))


def measure(
    rows: Sequence[PreparedVariant], slots: int, load: Load, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """The figures of every scheme with a number of slots."""
    served = {row.label: Served(row, slots, arguments) for row in rows}
    longest = arguments.prompt[1] + arguments.output[1]
    seen: dict[str, list[Client]] = {label: [] for label in served}
    arrivals = load.arrivals(arguments.rate) if arguments.rate else None

    def run(label: str) -> float:
        clients = load.clients()
        seconds = served[label].run(clients, arrivals)
        seen[label] += clients
        return seconds

    timers = {label: functools.partial(run, label) for label in served}
    seconds = interleave(timers, arguments.rounds)
    found = []
    for row in rows:
        clients = seen[row.label][load_size(load) :]  # the first round warmed up
        rates = [load.new_tokens / value for value in seconds[row.label]]
        figures: dict[str, Any] = {
            "label": row.label,
            "slots": slots,
            "arrivals": f"{arguments.rate}/s" if arguments.rate else "closed loop",
            **spread("tokens_per_second", rates),
            **percentiles("first_ms", (client.times[0] - client.sent for client in clients)),
            **percentiles(
                "between_ms",
                (
                    later - earlier
                    for client in clients
                    for earlier, later in zip(client.times, client.times[1:], strict=False)
                ),
            ),
            "step_ms": 1e3 * served[row.label].step_seconds(longest),
            "whole_step_ms": 1e3 * served[row.label].step_seconds(served[row.label].model.context),
            "chunk_ms": 1e3 * served[row.label].chunk_seconds(),
        }
        if "no_loop" in seconds:
            slower = ratios(seconds[row.label], seconds["no_loop"])
            figures |= spread("seconds_to_no_loop", slower)
        if arguments.long_prompt and slots > 1:
            figures["stall"] = served[row.label].stall()
        found.append(figures)
    return found


def load_size(load: Load) -> int:
    return len(load.clients())


def one_at_a_time(
    rows: Sequence[PreparedVariant], load: Load, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """The figures of `generate`, which answers one request after another."""

    def run(row: PreparedVariant) -> float:
        began = time.perf_counter()
        for client in load.clients():
            request = GenerationRequest(
                [client.prompt], client.new_tokens, cache_dtype=arguments.cache_dtype
            )
            generate_all(row.config, row.weights, request)
        return time.perf_counter() - began

    timers = {row.label: functools.partial(run, row) for row in rows}
    seconds = interleave(timers, arguments.rounds)
    return [
        {
            "label": row.label,
            "slots": 1,
            "arrivals": ONE_AT_A_TIME,
            **spread(
                "tokens_per_second", [load.new_tokens / value for value in seconds[row.label]]
            ),
        }
        for row in rows
    ]


def parse() -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m plt_jax.benchmarks.serve",
        description="Measure throughput and latency of serving, scheme by scheme.",
    )
    parser.add_argument("config", help="YAML file, whose model is measured with every scheme")
    parser.add_argument(
        "--slots", type=positive_integers, default=[8], help="numbers of slots, such as 1,4,8"
    )
    parser.add_argument(
        "--schemes",
        type=lambda text: text.split(","),
        default=["no_loop", "vanilla_loop", "plt"],
        help="looping schemes",
    )
    parser.add_argument(
        "--loops", type=positive_integers, default=[2], help="numbers of loops, but of no_loop"
    )
    parser.add_argument("--requests", type=int, default=32, help="requests of a round")
    parser.add_argument(
        "--prompt", type=_range, default=(32, 128), help="least and most tokens of a prompt"
    )
    parser.add_argument("--output", type=_range, default=(32, 64), help="least and most new tokens")
    parser.add_argument(
        "--rate", type=float, default=0.0, help="requests per second; 0 for a closed loop"
    )
    parser.add_argument(
        "--alone",
        action="store_true",
        help="measure `generate` beside it, one request after another",
    )
    parser.add_argument(
        "--long_prompt",
        type=int,
        default=0,
        help="tokens of a prompt that is admitted beside running texts; 0 for none",
    )
    parser.add_argument(
        "--prefill_tokens", type=int, default=16, help="tokens of prompts between two steps"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="compute dtype; default the config's"
    )
    parser.add_argument(
        "--cache_dtype", choices=DTYPES, help="dtype of keys and values; default the compute dtype"
    )
    add_weights(parser)
    parser.add_argument(
        "--rounds", type=int, default=3, help="how many times each scheme is measured"
    )
    parser.add_argument("--out", help="folder for serve.json, serve.txt and the plot")
    arguments = parser.parse_args()
    for name in ("requests", "rounds", "prefill_tokens"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} is {getattr(arguments, name)}; it must be at least 1")
    return arguments


def base_config(arguments: argparse.Namespace) -> ModelConfig:
    """The config's model, with room for the longest request."""
    model = load_config(arguments.config).model
    room = max(arguments.prompt[1], arguments.long_prompt) + arguments.output[1] + 512
    settings = model.model_dump() | {"max_length": room}
    return ModelConfig(**settings | ({"dtype": arguments.dtype} if arguments.dtype else {}))


def _range(text: str) -> tuple[int, int]:
    """Parses an option's value: two numbers, the first at most the second."""
    values = positive_integers(text)
    if len(values) != 2 or values[0] > values[1]:
        raise argparse.ArgumentTypeError(f"{text} is not a range, such as 32,128")
    return values[0], values[1]


if __name__ == "__main__":
    run_command(main)
