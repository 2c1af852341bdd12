"""Many requests of all kinds, good and bad, to a server on this machine.

python -m benchmarks.serve_load --requests 10000

It imports a small model that writes a known text, starts `plt_jax.serve` on it, and sends requests:
whole and streamed ones, clients that go away or read slowly, bodies that are no JSON, prompts over
the context, parameters out of range. Every answer must be the right one, or a refusal with the
right status. At the end nothing may be left in the server, and its memory must be what it was after
the first tenth of the requests.
"""

from __future__ import annotations

import asyncio
import collections
import json
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx

from benchmarks.server_process import ServerProcess, server_process
from plt_jax.benchmarks.machine import machine
from plt_jax.commands.parser import CommandParser, run_command
from plt_jax.errors import FailedError
from tests.serving.served import TEXT, import_model

WHOLE = TEXT.removeprefix("the")
SLOTS = 8
CLIENTS = 32
"""Requests that are under way at a time."""
MOST_GROWTH = 1.05


class WrongAnswerError(Exception):
    """An answer that is not as it should be."""


class Sender:
    """Sends requests of random kinds."""

    def __init__(self, url: str, seed: int):
        self._url, self._random = url, random.Random(seed)
        self.client = httpx.AsyncClient(
            timeout=120, limits=httpx.Limits(max_connections=2 * CLIENTS)
        )
        self.counts: collections.Counter[str] = collections.Counter()

    async def send(self) -> None:
        """Sends one request and looks at what comes back."""
        kinds: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (8, self.whole),
            (6, self.streamed),
            (3, self.chat),
            (4, self.gone),
            (2, self.slow),
            (3, self.broken),
            (3, self.refused),
            (2, self.scored),
        ]
        weights = [weight for weight, _ in kinds]
        ((_, kind),) = self._random.choices(kinds, weights)
        await kind()
        self.counts[kind.__name__] += 1

    def _body(self) -> dict:
        body = {"prompt": "the", "max_tokens": 60}
        extra = [
            {},
            {"temperature": 0},
            {"temperature": 0.7, "top_p": 0.9, "seed": 3},
            {"top_k": 3, "min_p": 0.1},
            {"presence_penalty": 0.1, "frequency_penalty": 0.1},
            {"logprobs": 3},
        ]
        return body | self._random.choice(extra)

    async def whole(self) -> None:
        count = self._random.choice([1, 1, 1, 2])
        answer = await self._post("completions", self._body() | {"n": count})
        if answer.status_code == 429:
            return
        texts = [choice["text"] for choice in _json(answer, 200)["choices"]]
        _expect(texts == [WHOLE] * count, texts)

    async def streamed(self) -> None:
        body = self._body() | {"stream": True, "stop": ["dog"]}
        text, last = await self._stream(body)
        _expect(last == "[DONE]" and text == WHOLE.partition("dog")[0], (text, last))

    async def chat(self) -> None:
        words = " ".join(self._random.choices(["hi", "<s>", "ok", "é"], k=5))
        body = {"messages": [{"role": "user", "content": words}], "temperature": 0}
        answer = await self._post("chat/completions", body)
        if answer.status_code != 429:
            text = _json(answer, 200)["choices"][0]["message"]["content"]
            _expect(text == WHOLE, text)

    async def gone(self) -> None:
        """A client that goes away, before or in the middle of its answer."""
        body = self._body() | {"stream": self._random.random() < 0.5, "ignore_eos": True}
        try:
            async with asyncio.timeout(self._random.uniform(0.001, 0.3)):
                await self._stream(body)
        except (TimeoutError, httpx.HTTPError):
            pass

    async def slow(self) -> None:
        body = self._body() | {"stream": True}
        text, last = await self._stream(body, wait=0.02)
        _expect(last == "[DONE]" and text == WHOLE, (text, last))

    async def broken(self) -> None:
        contents = [b"", b"{", b"[]", b"\xff\xfe", b'{"prompt": 1}', b'{"prompt": ["a", 2]}']
        contents += [json.dumps(self._body()).encode()[:-2], b"[" * 10_000, b"null"]
        answer = await self.client.post(
            f"{self._url}/completions", content=self._random.choice(contents)
        )
        _json(answer, 400)

    async def refused(self) -> None:
        wrong = [
            {"prompt": "the " * 1000},
            {"max_tokens": 10**6},
            {"temperature": -1},
            {"n": 10**6},
            {"logit_bias": {"10000": 1}},
            {"stop": ["x"] * 100},
            {"loops": 9},
            {"model": "nobody"},
        ]
        body = self._body() | self._random.choice(wrong)
        answer = await self._post("completions", body)
        _json(answer, 404 if "model" in body else 400)

    async def scored(self) -> None:
        body = {"prompt": "the quick brown", "max_tokens": 1, "logprobs": 1, "echo": True}
        answer = await self._post("completions", body)
        if answer.status_code == 429:
            return
        choice = _json(answer, 200)["choices"][0]
        logs = choice["logprobs"]["token_logprobs"]
        _expect(choice["text"].startswith("the quick brown") and logs[0] is None, choice)
        _expect(all(log > -0.01 for log in logs[2:]), logs)

    async def _post(self, path: str, body: dict) -> httpx.Response:
        return await self.client.post(f"{self._url}/{path}", json=body)

    async def _stream(self, body: dict, wait: float = 0.0) -> tuple[str, str]:
        """The text of a stream, and its last event."""
        text, last = "", ""
        while True:
            url = f"{self._url}/completions"
            async with self.client.stream("POST", url, json=body) as answer:
                if answer.status_code == 429:
                    await asyncio.sleep(0.1)
                    continue
                _expect(answer.status_code == 200, answer.status_code)
                async for line in answer.aiter_lines():
                    await asyncio.sleep(wait)
                    if line:
                        last = line.removeprefix("data: ")
                        text += "" if last == "[DONE]" else json.loads(last)["choices"][0]["text"]
                return text, last


def _json(answer: httpx.Response, status: int) -> dict:
    _expect(answer.status_code == status, (status, answer.status_code, answer.text[:300]))
    values = answer.json()
    _expect(("error" in values) == (status != 200), values)
    return values


def _expect(is_right: bool, found: object) -> None:
    if not is_right:
        raise WrongAnswerError(repr(found))


def main() -> None:
    parser = CommandParser(prog="python -m benchmarks.serve_load", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="requests in all")
    parser.add_argument("--seed", type=int, default=0, help="seed of their kinds")
    parser.add_argument("--out", help="file for the figures, as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = import_model(Path(folder))
        words = ("--slots", SLOTS, "--prefill_tokens", 16, "--queue", 64)
        with server_process(run, *words) as server:
            report = asyncio.run(load(server, arguments.requests, arguments.seed))
    report["machine"] = machine()
    report["command"] = f"python -m benchmarks.serve_load --requests {arguments.requests}"
    print(json.dumps(report, indent=1))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if report["left_running"] or report["growth"] > MOST_GROWTH:
        raise FailedError("the server leaks")


async def load(server: ServerProcess, requests: int, seed: int) -> dict:
    """Sends all requests; returns what was sent, and the server's memory in MB."""
    process, url = server
    sender = Sender(url, seed)
    memory: list[float] = []
    turns = iter(range(requests))

    async def work() -> None:
        for turn in turns:
            await sender.send()
            if turn % max(1, requests // 20) == 0:
                memory.append(resident_mb(process.pid))

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(CLIENTS)))
    seconds = time.perf_counter() - began
    await asyncio.sleep(2)
    numbers = (await sender.client.get(url.removesuffix("/v1") + "/metrics")).text
    values = dict(
        line.rsplit(" ", 1) for line in numbers.splitlines() if line and not line.startswith("#")
    )
    await sender.client.aclose()
    settled = memory[2:] or memory
    return {
        "requests": dict(sender.counts),
        "seconds": seconds,
        "memory_mb": memory,
        "growth": settled[-1] / settled[0],
        "left_running": float(values["plt_requests_running"]),
        "ended": {name: float(value) for name, value in values.items() if "ended_total" in name},
    }


def resident_mb(pid: int) -> float:
    """The memory of a process, as Linux tells it."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise FailedError("the server has ended")


if __name__ == "__main__":
    run_command(main)
