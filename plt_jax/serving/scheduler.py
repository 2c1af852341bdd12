"""The scheduler: which request is in which slot, and which program runs next.

A tick admits waiting requests into free slots in the order of their arrival, prefills at most
`prefill_tokens` of prompts, and runs one decode step for all slots whose prompts are complete. So a
long prompt delays running texts by one chunk per token. The device is one tick ahead: while it
works, the scheduler reads what the tick before has drawn and tells the listeners. A request that
ends there has one more token drawn, which nobody reads.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from plt_jax.decoding.generation import NOT_FINITE
from plt_jax.errors import InputError
from plt_jax.serving.interfaces import DrawnTokens, Observer, Slots
from plt_jax.serving.prefix_cache import NO_TOKENS, PrefixCache, key_of
from plt_jax.serving.request import (
    Alternatives,
    Finish,
    NewToken,
    PromptScore,
    Request,
)

_logger = logging.getLogger(__name__)

MOST_LOADS = 16
"""Blocks of the prefix cache that are loaded between two steps."""


class QueueFullError(Exception):
    """Too many requests wait."""


@dataclasses.dataclass(eq=False)
class _Running:
    """A request in a slot."""

    request: Request
    slot: int
    arrived: float
    prefilled: int = 0
    """Tokens of the prompt that are in the cache, or will be before the next program."""
    pending: int = 0
    """Tokens that were drawn, or will be before the next program."""
    read: int = 0
    """Those of them that were read."""
    last_token_at: float | None = None
    has_begun: bool = False
    """Whether its prefill has begun."""
    key: bytes = NO_TOKENS
    """Of the prefix cache, for the blocks that are in the slot."""
    blocks: deque[tuple[bytes, Any]] = dataclasses.field(default_factory=deque)
    """Blocks of the prefix cache that are still to be loaded."""
    is_over: bool = False

    @property
    def is_prefilled(self) -> bool:
        return self.prefilled == len(self.request.prompt)

    @property
    def decodes(self) -> bool:
        """Whether a step may draw a further token for it."""
        return self.is_prefilled and self.pending < self.request.max_new_tokens


class _Sent(NamedTuple):
    """A program that was enqueued, and for whom."""

    drawn: DrawnTokens
    rows: list[tuple[_Running, int]]
    """Each request, and its row of `drawn`."""
    scored: _ScoredChunk | None = None


class _ScoredChunk(NamedTuple):
    run: _Running
    scores: Any
    """Of the chunk's tokens; see `slot_programs.Scores`."""
    count: int
    """The number of them that are tokens of the prompt."""
    is_last: bool


class Scheduler:
    """Requests wait in a queue, run in slots, and end.

    `submit`, `cancel` and the numbers may be used from any thread; `tick` from one.
    """

    def __init__(
        self,
        slots: Slots,
        prefix_cache: PrefixCache[Any],
        most_waiting: int,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Makes a scheduler of empty slots.

        Args:
          prefix_cache: of blocks of `slots.chunk` tokens.
          most_waiting: requests that may wait for a slot.
          observer: is told what happens when.
          clock: seconds, from any beginning.
        """
        self._slots, self._prefix_cache, self._most_waiting = slots, prefix_cache, most_waiting
        self._observer, self._clock = observer, clock
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Request, float]] = deque()
        self._cancelled: set[Request] = set()
        self._running: dict[int, _Running] = {}
        self._free = deque(range(slots.slots))
        self._sent: list[_Sent] = []
        """The programs of the last tick."""

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """The number of requests in slots."""
        return len(self._running)

    @property
    def most_at_once(self) -> int:
        """The number of requests that can be submitted together at most."""
        return self._most_waiting + self._slots.slots

    @property
    def is_idle(self) -> bool:
        """Whether a tick would do nothing."""
        return not (self._waiting or self._running or self._sent)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the running requests in the cache."""
        return sum(run.prefilled + run.pending for run in list(self._running.values()))

    def check(self, request: Request) -> None:
        """Raises InputError for a request that does not fit a slot."""
        prompt, new = len(request.prompt), request.max_new_tokens
        if prompt + new > self._slots.context:
            raise InputError(
                f"the prompt has {prompt} tokens and {new} new ones are asked for, but the context "
                f"holds {self._slots.context}"
            )
        if not prompt:
            raise InputError("the prompt is empty; give at least one token")
        if new < (0 if request.score_prompt else 1):
            raise InputError(f"{new} new tokens are asked for; ask for at least 1")

    def submit(self, requests: Sequence[Request]) -> None:
        """Lets requests wait for slots, in order, all or none of them.

        Raises:
          InputError: one does not fit; see `check`.
          QueueFullError: too many requests wait.
        """
        for request in requests:
            self.check(request)
        with self._lock:
            if len(self._waiting) + len(requests) > self._most_waiting + len(self._free):
                raise QueueFullError
            now = self._clock()
            self._waiting += [(request, now) for request in requests]

    def cancel(self, request: Request) -> None:
        """Ends a request before the next program, wherever it is; nothing if it has ended."""
        with self._lock:
            self._cancelled.add(request)

    def tick(self) -> None:
        """Enqueues the next programs, and reads what those of the tick before have drawn."""
        self._drop_cancelled()
        self._admit()
        before, self._sent = self._sent, [*self._prefill(), *self._step()]
        # Only now, so that the device has work while the host reads.
        for sent in before:
            self._read(sent)

    def end(self, why: Finish) -> None:
        """Ends all requests."""
        with self._lock:
            waiting, self._waiting = [request for request, _ in self._waiting], deque()
        for request in waiting:
            self._finish_request(request, why)
        for run in list(self._running.values()):
            self._finish(run, why)
        self._sent = []

    def _drop_cancelled(self) -> None:
        with self._lock:
            cancelled, self._cancelled = self._cancelled, set()
            if not cancelled:
                return
            waiting = [request for request, _ in self._waiting if request in cancelled]
            self._waiting = deque(entry for entry in self._waiting if entry[0] not in cancelled)
        for request in waiting:
            self._finish_request(request, Finish.CANCELLED)
        for run in [run for run in self._running.values() if run.request in cancelled]:
            self._finish(run, Finish.CANCELLED)

    def _admit(self) -> None:
        while self._free:
            with self._lock:
                if not self._waiting:
                    return
                request, arrived = self._waiting.popleft()
                slot = self._free.popleft()
                self._running[slot] = _Running(request, slot, arrived)

    def _prefill(self) -> list[_Sent]:
        """Prefills chunks of prompts in the order of their arrival."""
        sent, left, loads = [], self._slots.chunk, MOST_LOADS
        # Slots were taken in order, and a dictionary keeps it.
        for run in [run for run in self._running.values() if not run.is_prefilled]:
            if not run.has_begun:
                self._begin(run)
            while run.blocks:
                if loads == 0:
                    return sent
                loads -= 1
                self._load_block(run)
            while not run.is_prefilled:
                prompt, begin = run.request.prompt, run.prefilled
                tokens = prompt[begin : begin + self._slots.chunk]
                if (cost := self._slots.padded(len(tokens))) > left:
                    return sent
                left -= cost
                sent.append(self._prefill_chunk(run, begin, tokens))
        return sent

    def _begin(self, run: _Running) -> None:
        """Empties a request's slot, and brings the blocks into it that its prompt begins with.

        Requests with equal prompts arrive together if a client asks for several answers. The blocks
        are looked up here, where those of the request before are there already.
        """
        request, run.has_begun = run.request, True
        self._slots.start(run.slot, request.sampling, request.prompt)
        # The scores of a prompt come from its prefill.
        run.key = self._slots.beginning(request.sampling)
        if not request.score_prompt:
            run.blocks.extend(self._prefix_cache.find(request.prompt, run.key))
        if self._observer:
            cached = len(run.blocks) * self._prefix_cache.block_tokens
            self._observer.admitted(self._clock() - run.arrived, len(request.prompt), cached)

    def _load_block(self, run: _Running) -> None:
        run.key, block = run.blocks.popleft()
        self._slots.load_block(run.slot, run.prefilled, block)
        run.prefilled += self._prefix_cache.block_tokens

    def _prefill_chunk(self, run: _Running, begin: int, tokens: Sequence[int]) -> _Sent:
        request, end = run.request, begin + len(tokens)
        following = None
        if request.score_prompt:
            following = [*request.prompt[begin + 1 : end + 1], 0][: len(tokens)]
        run.prefilled = end
        drawn, scores = self._slots.prefill(run.slot, tokens, run.is_prefilled, following)
        if len(tokens) == self._prefix_cache.block_tokens:
            before, run.key = run.key, key_of(run.key, tokens)
            if self._prefix_cache.needs(before, run.key):
                self._prefix_cache.add(before, run.key, self._slots.save_block(run.slot, begin))
        rows = []
        if run.decodes:
            run.pending = 1
            rows = [(run, 0)]
        count = min(len(tokens), len(request.prompt) - 1 - begin)
        scored = _ScoredChunk(run, scores, count, run.is_prefilled) if following else None
        return _Sent(drawn, rows, scored)

    def _step(self) -> list[_Sent]:
        """Runs a decode step for all slots that can take one."""
        runs = [run for run in self._running.values() if run.decodes]
        if not runs:
            return []
        active_B = np.zeros(self._slots.slots, bool)
        for run in runs:
            active_B[run.slot] = True
            run.pending += 1
        asked = any(run.request.log_probabilities for run in runs)
        longest = max(run.prefilled + run.pending - 1 for run in runs)
        drawn = self._slots.step(active_B, asked, longest)
        return [_Sent(drawn, [(run, run.slot) for run in runs])]

    def _read(self, sent: _Sent) -> None:
        """Waits for a program and tells the listeners what it drew."""
        if sent.scored is not None:
            self._read_scores(sent.scored)
        # A chunk within a prompt is waited for, too, so that few programs are ahead of the next
        # request.
        tokens_B = np.asarray(sent.drawn.tokens_B)
        logs = None
        if any(run.request.log_probabilities for run, _ in sent.rows):
            arrays = (sent.drawn.logs_B, sent.drawn.likeliest_BA, sent.drawn.likeliest_logs_BA)
            logs = tuple(np.asarray(array) for array in arrays)
        now = self._clock()
        for run, row in sent.rows:
            if run.is_over:
                continue
            self._measure(run, now)
            new = NewToken(int(tokens_B[row]), None, None)
            if logs is not None and run.request.log_probabilities:
                alternatives = Alternatives(logs[1][row], logs[2][row])
                new = NewToken(new.token, float(logs[0][row]), alternatives)
            self._take(run, new)

    def _take(self, run: _Running, new: NewToken) -> None:
        request = run.request
        run.read += 1
        if new.token == NOT_FINITE:
            self._finish(run, Finish.FAILED)
        elif new.token in request.stop_tokens:
            told = _tell(request, new._replace(is_end=True))
            self._finish(run, Finish.FAILED if told is None else Finish.STOP)
        elif (goes_on := _tell(request, new)) is not True:
            self._finish(run, Finish.FAILED if goes_on is None else Finish.STOP)
        elif run.read == request.max_new_tokens:
            self._finish(run, Finish.LENGTH)

    def _read_scores(self, chunk: _ScoredChunk) -> None:
        run = chunk.run
        if run.is_over:
            return
        logs_C, tokens_CA, logs_CA = (np.asarray(array) for array in chunk.scores)
        run.request.listener.take_prompt(
            [
                PromptScore(float(logs_C[i]), Alternatives(tokens_CA[i], logs_CA[i]))
                for i in range(chunk.count)
            ]
        )
        if chunk.is_last and run.request.max_new_tokens == 0:
            self._finish(run, Finish.LENGTH)

    def _measure(self, run: _Running, now: float) -> None:
        if self._observer:
            if run.last_token_at is None:
                self._observer.first_token(now - run.arrived)
            else:
                self._observer.next_token(now - run.last_token_at)
        run.last_token_at = now

    def _finish(self, run: _Running, why: Finish) -> None:
        """Ends a running request; its slot is free for the next program."""
        run.is_over = True
        with self._lock:
            del self._running[run.slot]
            self._free.append(run.slot)
        self._finish_request(run.request, why)

    def _finish_request(self, request: Request, why: Finish) -> None:
        if self._observer:
            self._observer.finished(why)
        request.listener.finish(why)


def _tell(request: Request, new: NewToken) -> bool | None:
    """Tells a listener of a token; returns whether its request goes on, or None if it fails."""
    try:
        return request.listener.take(new)
    except BaseException:  # a panic of the tokenizers is no Exception
        _logger.exception("a request's token cannot be made text")
        return None
