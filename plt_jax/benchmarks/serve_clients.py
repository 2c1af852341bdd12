"""The clients of the serving benchmark, and the requests that they send."""

from __future__ import annotations

import argparse
import dataclasses
import random
import time
from collections.abc import Callable, Sequence

import numpy as np

from plt_jax.serving.engine import Engine
from plt_jax.serving.request import Finish, NewToken, PromptScore, Request, SlotSampling


@dataclasses.dataclass(eq=False)
class Client:
    """Sends one request, notes when its tokens come, and then does what comes next."""

    prompt: list[int]
    new_tokens: int
    next: Callable[[], None] = lambda: None
    """Is called when the request has ended."""
    on_token: Callable[[int], None] = lambda count: None
    """Is called with the number of tokens that have come."""
    sent: float = 0.0
    times: list[float] = dataclasses.field(default_factory=list)
    failure: Finish | None = None

    def send(self, engine: Engine) -> None:
        self.sent = time.perf_counter()
        engine.submit([Request(self.prompt, self.new_tokens, SlotSampling(), self)])

    def take(self, new: NewToken) -> bool:
        self.times.append(time.perf_counter())
        self.on_token(len(self.times))
        return True

    def take_prompt(self, scores: Sequence[PromptScore]) -> None:
        raise AssertionError("no scores were asked for")

    def finish(self, why: Finish) -> None:
        self.failure = None if why is Finish.LENGTH else why
        self.next()


class Load:
    """The requests of a round: the same for every scheme."""

    def __init__(self, arguments: argparse.Namespace, vocab_size: int):
        drawn = random.Random(0)
        self._requests = [
            (
                [drawn.randrange(vocab_size) for _ in range(drawn.randint(*arguments.prompt))],
                drawn.randint(*arguments.output),
            )
            for _ in range(arguments.requests)
        ]
        self._gaps = [drawn.expovariate(1.0) for _ in self._requests]

    def clients(self) -> list[Client]:
        """A new client for each request."""
        return [Client(prompt, new) for prompt, new in self._requests]

    def arrivals(self, rate: float) -> list[float]:
        """When each request arrives, in seconds, at a mean rate of requests per second."""
        return np.cumsum(np.array(self._gaps) / rate).tolist()

    @property
    def new_tokens(self) -> int:
        return sum(new for _, new in self._requests)
