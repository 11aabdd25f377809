"""What a frontend counts and times, as Prometheus metrics.

The launcher sets PROMETHEUS_MULTIPROC_DIR for its frontends (prometheus_client's multiprocess mode): each keeps its
numbers in files of that folder, so every frontend answers with the sum over all of them, also of those that died.
Without it, in a process of its own, the numbers are this process's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, disable_created_metrics
from prometheus_client.multiprocess import MultiProcessCollector

PREFIX = "dsv4serve:"
MULTIPROCESS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client reads it when it is imported
TTFT, ITL = PREFIX + "time_to_first_token_seconds", PREFIX + "inter_token_latency_seconds"
LOOP_LAG = PREFIX + "event_loop_lag_seconds"

# Seconds, a factor of about 1.5 apart, because quantiles are read off them.
TOKEN_BUCKETS = (
    *(0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0),
)
REQUEST_BUCKETS = (
    *(0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5),
    *(10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
LAG_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1.0, 5.0)

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
        self.loop_lag = histogram(
            "event_loop_lag_seconds",
            "how much too late a frontend's event loop wakes from a sleep of 10 ms",
            LAG_BUCKETS,
        )
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
