"""What the server counts, for Prometheus."""

import time
from collections import deque
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from exactivations.lit_modules.amplification.serving_engine import ServingEngine
from exactivations.lit_modules.amplification.serving_tickets import How

WINDOW_SECONDS = 10.0
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of requests, tokens, batches and rows. The engine tells it of its steps (it is its `Observer`)."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        known: dict[str, Any] = {"namespace": "exactivations", "registry": self._registry}
        self.requests = Counter("requests", "Requests that were answered.", ["endpoint", "status"], **known)
        self.seconds = Histogram("request_seconds", "From a request to the end of its answer.", ["endpoint"], **known)
        self._tokens = Counter("tokens", "Tokens of prompts that were read, and tokens that were generated.", ["kind"], **known)
        self._batch = Histogram("batch_rows", "Rows that got a token in a step.", buckets=BATCH_BUCKETS, **known)
        self._rows = Counter("rows_ended", "Completions by what ended them: cancelled and late ones were freed.", ["how"], **known)
        self._rate = Gauge("tokens_per_second", f"Tokens generated in the last {WINDOW_SECONDS:g} seconds.", **known)
        self._waiting = Gauge("queue_rows", "Completions that wait for a place in the batch.", **known)
        self._running = Gauge("running_rows", "Completions in the batch.", **known)
        self._recent: deque[tuple[float, int]] = deque()
        self._rate.set_function(self._tokens_per_second)

    def watch(self, engine: ServingEngine) -> None:
        """Shows this engine's queue and batch."""
        self._waiting.set_function(lambda: engine.n_waiting)
        self._running.set_function(lambda: engine.n_running)

    def text(self) -> bytes:
        """Returns all of it in Prometheus' own format."""
        return generate_latest(self._registry)

    def stepped(self, n_rows: int) -> None:
        """See `Observer`."""
        self._tokens.labels("generated").inc(n_rows)
        self._batch.observe(n_rows)
        self._recent.append((time.monotonic(), n_rows))
        self._forget()

    def admitted(self, n_prompt_tokens: int) -> None:
        """See `Observer`."""
        self._tokens.labels("prompt").inc(n_prompt_tokens)

    def ended(self, how: How) -> None:
        """See `Observer`."""
        self._rows.labels(how).inc()

    def _forget(self) -> None:
        while self._recent and self._recent[0][0] < time.monotonic() - WINDOW_SECONDS:
            self._recent.popleft()

    def _tokens_per_second(self) -> float:
        since = time.monotonic() - WINDOW_SECONDS
        return sum(n for at, n in list(self._recent) if at >= since) / WINDOW_SECONDS
