"""One request from its arrival to its end: observed, logged and traced. A request is one sequence."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextvars import ContextVar

from dsv4serve.obs.metrics import FrontendMetrics
from dsv4serve.obs.traces import Tracer
from dsv4serve.types import FinishReason, Request, RequestOutput

logger = logging.getLogger(__name__)

# When the HTTP request that is being answered came (time.perf_counter).
arrived: ContextVar[float] = ContextVar("arrived")
# Its header of that name (W3C Trace Context): the client's span, whose child the request is.
traceparent: ContextVar[str] = ContextVar("traceparent", default="")


class RequestTimer:
    """Feed it every output, and the end."""

    def __init__(self, request: Request, metrics: FrontendMetrics, tracer: Tracer | None) -> None:
        self._request, self._metrics, self._tracer = request, metrics, tracer
        self._arrived, self._submitted = arrived.get(), time.perf_counter()
        self._first = self._last = 0.0  # when the first and the last token came
        self._queue_s: float | None = None
        self._num_tokens = self._num_cached = 0

    def output(self, output: RequestOutput) -> None:
        """Take one engine output as it comes."""
        num_tokens = len(output.token_ids)
        if not num_tokens:
            return
        now = time.perf_counter()
        self._num_tokens += num_tokens
        if not self._first:
            self._first = now
            self._metrics.ttft.observe(now - self._arrived)
            self._queue_s, self._num_cached = output.queue_s, output.num_cached_tokens or 0
            if output.queue_s is not None:
                self._metrics.queue.observe(output.queue_s)
        else:
            for _ in range(num_tokens):  # tokens of one output came together: they share the time
                self._metrics.itl.observe((now - self._last) / num_tokens)
        self._last = now

    def end(self, finish_reason: str, malformed: Mapping[str, int]) -> None:
        """The request is over; `malformed` is what its parser counted."""
        now, metrics = time.perf_counter(), self._metrics
        metrics.e2e.observe(now - self._arrived)
        metrics.requests.labels(finish_reason).inc()
        if finish_reason == FinishReason.ABORT:
            metrics.aborted.inc()
        for kind, count in malformed.items():
            if kind == "reasoning_not_closed":
                metrics.reasoning_not_closed.inc(count)
            else:
                metrics.malformed.labels(kind).inc(count)
        ttft_s = round(self._first - self._arrived, 6) if self._first else None
        facts: dict[str, str | int] = {
            "engine_request_id": self._request.request_id,
            "finish_reason": str(finish_reason),
            "prompt_tokens": len(self._request.prompt_ids),
            "output_tokens": self._num_tokens,
            "cached_tokens": self._num_cached,
        }
        logger.info(
            "%s after %.3f s: %d tokens, the first after %s s",
            *(finish_reason, now - self._arrived, self._num_tokens, ttft_s),
            extra={"fields": {**facts, "ttft_s": ttft_s, "e2e_s": round(now - self._arrived, 6)}},
        )
        if self._tracer is not None:
            attributes = {f"dsv4serve.{name}": value for name, value in facts.items()}
            self._tracer.record(self._phases(now), attributes, traceparent.get())

    def _phases(self, now: float) -> list[tuple[str, float, float]]:
        """Names, begins and ends (time.perf_counter), the whole first; what was not reached is not there."""
        phases = [("request", self._arrived, now)]
        if not self._first:
            return [*phases, ("queue", self._submitted, now)]
        started = self._submitted + (self._queue_s or 0.0)
        return [
            *phases,
            ("queue", self._submitted, started),
            ("prefill", started, self._first),
            ("decode", self._first, now),
        ]
