"""What a frontend counts and times, as Prometheus metrics.

The launcher sets PROMETHEUS_MULTIPROC_DIR for its frontends (prometheus_client's multiprocess mode): each keeps its
numbers in files of that folder, so every frontend answers with the sum over all of them, also of those that died.
Without it, in a process of its own, the numbers are this process's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from contextvars import ContextVar

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, disable_created_metrics
from prometheus_client.multiprocess import MultiProcessCollector

from dsv4serve.types import FinishReason, RequestOutput

PREFIX = "dsv4serve:"
MULTIPROCESS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client reads it when it is imported
TTFT, ITL = PREFIX + "time_to_first_token_seconds", PREFIX + "inter_token_latency_seconds"

# Seconds, a factor of about 1.5 apart, because quantiles are read off them.
TOKEN_BUCKETS = (
    *(0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0),
)
REQUEST_BUCKETS = (
    *(0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5),
    *(10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)

# When the HTTP request that is being answered came (time.perf_counter).
arrived: ContextVar[float] = ContextVar("arrived")

disable_created_metrics()  # type: ignore[no-untyped-call]


class FrontendMetrics:
    """Requests, answers and parser findings. A request is one sequence: a call with n = 3 counts three."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, text, registry=registry, buckets=buckets)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=registry)

        self.ttft = histogram(
            "time_to_first_token_seconds", "from the HTTP request's arrival to the first token", REQUEST_BUCKETS
        )
        self.itl = histogram("inter_token_latency_seconds", "between two tokens of a request", TOKEN_BUCKETS)
        self.e2e = histogram(
            "e2e_request_latency_seconds", "from the HTTP request's arrival to the request's end", REQUEST_BUCKETS
        )
        self.queue = histogram("queue_time_seconds", "from a request's submission to its first slot", REQUEST_BUCKETS)
        self.requests = counter("requests", "requests that ended, by finish_reason", "finish_reason")
        self.aborted = counter("num_aborted_requests", "requests that ended because their client left or asked for it")
        self.responses = counter("http_responses", "HTTP answers, by route and status", "route", "status")
        self.malformed = counter("malformed_outputs", "places where an output left the format of calls", "kind")
        self.reasoning_not_closed = counter("reasoning_not_closed", "outputs that ended while still thinking")

    def collect(self) -> Iterable[Metric]:
        """The metrics of all frontends."""
        registry = self._registry
        if MULTIPROCESS_FOLDER in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return registry.collect()


class RequestTimer:
    """Observes one request from the arrival of its HTTP request, `arrived` (time.perf_counter), to its end."""

    def __init__(self, metrics: FrontendMetrics, arrived: float) -> None:
        self._metrics, self._arrived = metrics, arrived
        self._last = 0.0  # when the last token came

    def output(self, output: RequestOutput) -> None:
        """Take one engine output as it comes."""
        num_tokens = len(output.token_ids)
        if not num_tokens:
            return
        now = time.perf_counter()
        if not self._last:
            self._metrics.ttft.observe(now - self._arrived)
            if output.queue_s is not None:
                self._metrics.queue.observe(output.queue_s)
        else:
            for _ in range(num_tokens):  # tokens of one output came together: they share the time
                self._metrics.itl.observe((now - self._last) / num_tokens)
        self._last = now

    def end(self, finish_reason: str, malformed: Mapping[str, int]) -> None:
        """The request is over; `malformed` is what its parser counted."""
        metrics = self._metrics
        metrics.e2e.observe(time.perf_counter() - self._arrived)
        metrics.requests.labels(finish_reason).inc()
        if finish_reason == FinishReason.ABORT:
            metrics.aborted.inc()
        for kind, count in malformed.items():
            if kind == "reasoning_not_closed":
                metrics.reasoning_not_closed.inc(count)
            else:
                metrics.malformed.labels(kind).inc(count)
