"""Numbers for Prometheus."""

from __future__ import annotations

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from plt_jax.serving.prefix_cache import PrefixCache
from plt_jax.serving.request import Finish
from plt_jax.serving.scheduler import Scheduler

_SHORT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_LONG = (*_SHORT, 10, 20, 60, 120)


class Metrics:
    """Counts what the scheduler tells, as its `Observer`."""

    def __init__(self):
        self._registry = CollectorRegistry()
        self._queue = self._histogram("queue_seconds", "Waiting for a slot", _LONG)
        self._first = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token", _LONG
        )
        self._between = self._histogram("time_between_tokens_seconds", "Token to token", _SHORT)
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts")
        self._cached = self._counter("prompt_tokens_cached", "Those that the prefix cache had")
        self._new = self._counter("generated_tokens", "Tokens that were generated")
        self._ended = self._counter("requests_ended", "Requests that have ended", ["reason"])

    def watch(self, scheduler: Scheduler, prefix_cache: PrefixCache, cache_tokens: int) -> None:
        """Adds what a scheduler holds now.

        Args:
          cache_tokens: tokens that all slots have room for.
        """
        for name, text, read in (
            ("requests_running", "Requests in slots", lambda: scheduler.running),
            ("requests_waiting", "Requests that wait for a slot", lambda: scheduler.waiting),
            (
                "cache_use",
                "Share of the slots' tokens that are in use",
                lambda: scheduler.cached_tokens / cache_tokens,
            ),
            ("prefix_cache_bytes", "Bytes of the prefix cache", lambda: prefix_cache.bytes),
        ):
            Gauge(f"plt_{name}", text, registry=self._registry).set_function(read)

    def text(self) -> tuple[bytes, int, None, str]:
        """The numbers in Prometheus's format, as arguments of a Response."""
        return generate_latest(self._registry), 200, None, CONTENT_TYPE_LATEST

    def admitted(self, queued: float, prompt_tokens: int, cached_tokens: int) -> None:
        self._queue.observe(queued)
        self._prompt.inc(prompt_tokens)
        self._cached.inc(cached_tokens)

    def first_token(self, since_arrival: float) -> None:
        self._first.observe(since_arrival)
        self._new.inc()

    def next_token(self, since_last: float) -> None:
        self._between.observe(since_last)
        self._new.inc()

    def finished(self, why: Finish) -> None:
        self._ended.labels(why.value).inc()

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"plt_{name}", text, buckets=buckets, registry=self._registry)

    def _counter(self, name: str, text: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"plt_{name}", text, labels or [], registry=self._registry)
