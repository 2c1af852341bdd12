"""What HTTP, text and scheduling cost: a server's streams beside the device's steps alone.

python -m benchmarks.serve_http RUN --clients 8

It starts `plt_jax.serve` on a run and opens as many streams at once as there are clients. Beside it
the engine serves the same requests within this process, to listeners that only count, and the
device runs the same prefills and as many decode steps with no scheduler. All three are measured in
turn, round by round.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np

from benchmarks.server_process import server_process
from plt_jax.benchmarks.machine import machine
from plt_jax.benchmarks.rounds import interleave, ratios, spread
from plt_jax.commands.parser import CommandParser, run_command
from plt_jax.decoding.weights import prepare_for_decode
from plt_jax.errors import FailedError
from plt_jax.runs.directory import open_trained
from plt_jax.serving.engine import Engine
from plt_jax.serving.prefix_cache import PrefixCache
from plt_jax.serving.request import Finish, NewToken, PromptScore, Request, SlotSampling
from plt_jax.serving.scheduler import Scheduler
from plt_jax.serving.slots import SlotModel

CHUNK = 32
PROMPT = "The state of the union is"


class Counter:
    """A listener that counts tokens."""

    def __init__(self, ended: threading.Semaphore):
        self._ended, self.count = ended, 0

    def take(self, new: NewToken) -> bool:
        self.count += 1
        return True

    def take_prompt(self, scores: Sequence[PromptScore]) -> None:
        raise AssertionError("no scores were asked for")

    def finish(self, why: Finish) -> None:
        self._ended.release()


def main() -> None:
    parser = CommandParser(
        prog="python -m benchmarks.serve_http",
        description="Measure what HTTP, text and scheduling add to the device's steps.",
    )
    parser.add_argument("path", help="a run directory, or one of its checkpoints/STEP folders")
    parser.add_argument("--clients", type=int, default=8, help="streams at once, and slots")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each stream")
    parser.add_argument("--context", type=int, default=512, help="the server's context")
    parser.add_argument("--rounds", type=int, default=5, help="how many times each is measured")
    parser.add_argument("--out", help="JSON file for the figures")
    arguments = parser.parse_args()
    trained = open_trained(arguments.path)
    config, clients = trained.config.model, arguments.clients
    weights = prepare_for_decode(config, trained.params)
    model = SlotModel(config, weights, clients, arguments.context, CHUNK)
    model.compile()
    prompt = trained.tokenizer.encode_prompt(PROMPT)

    def steps() -> float:
        began = time.perf_counter()
        for slot in range(clients):
            model.start(slot, SlotSampling(), prompt)
            model.prefill(slot, prompt, is_last=True)
        active = np.ones(clients, bool)
        # The prefills drew the first one. The scheduler admits one prompt between two steps, so the
        # last stream ends that many steps behind the first.
        for index in range(arguments.tokens - 1 + clients - 1):
            drawn = model.step(active, False, len(prompt) + 1 + index)
        jax.block_until_ready(drawn)
        return time.perf_counter() - began

    def engine() -> float:
        served = Engine(Scheduler(model, PrefixCache(CHUNK, 1, 0), clients))
        served.start()
        ended = threading.Semaphore(0)
        listeners = [Counter(ended) for _ in range(clients)]
        new = arguments.tokens
        requests = [Request(prompt, new, SlotSampling(), listener) for listener in listeners]
        began = time.perf_counter()
        served.submit(requests)
        for _ in requests:
            ended.acquire()
        seconds = time.perf_counter() - began
        served.stop(within=10)
        if any(listener.count != new for listener in listeners):
            raise FailedError("a request ended early")
        return seconds

    words = ("--slots", clients, "--context", arguments.context)
    words += ("--prefill_tokens", CHUNK, "--prefix_cache_mb", 0)
    with server_process(arguments.path, *words) as server:
        timers = {
            "steps": steps,
            "engine": engine,
            "server": lambda: asyncio.run(stream_all(server.url, arguments)),
        }
        seconds = interleave(timers, arguments.rounds)
    report: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.serve_http", *sys.argv[1:]]),
        "machine": machine(),
        "scheme": f"{config.loop.scheme}, {config.loop.count} loops",
        "dtype": config.dtype,
        "clients": clients,
        "tokens": arguments.tokens,
        "steps": spread("ms", [1e3 * one / arguments.tokens for one in seconds["steps"]]),
    }
    for name in ("engine", "server"):
        report[name] = {
            **spread("ms", [1e3 * one / arguments.tokens for one in seconds[name]]),
            **spread("ratio_to_steps", ratios(seconds[name], seconds["steps"])),
        }
    report["server"] |= spread("ratio_to_engine", ratios(seconds["server"], seconds["engine"]))
    print(json.dumps({name: report[name] for name in timers}, indent=1))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


async def stream_all(url: str, arguments) -> float:
    """Seconds until all streams have ended."""
    body = {"prompt": PROMPT, "max_tokens": arguments.tokens, "temperature": 0}
    body |= {"stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}

    async def one(client: httpx.AsyncClient) -> int:
        made = 0
        async with client.stream("POST", f"{url}/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    usage = json.loads(line.removeprefix("data: ")).get("usage")
                    made = usage["completion_tokens"] if usage else made
        return made

    async with httpx.AsyncClient(timeout=600) as client:
        began = time.perf_counter()
        made = await asyncio.gather(*(one(client) for _ in range(arguments.clients)))
        seconds = time.perf_counter() - began
    if set(made) != {arguments.tokens}:
        raise FailedError(f"streams had {sorted(set(made))} tokens")
    return seconds


if __name__ == "__main__":
    run_command(main)
