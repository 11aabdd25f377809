"""Traces: one span a request with a child for each phase, sent to an OpenTelemetry collector over OTLP/HTTP.

OpenTelemetry comes with the extra `otel` and is imported only when an endpoint is configured.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from dsv4serve import __version__
from dsv4serve.types import ConfigError

EXPORT_TIMEOUT_S = 3.0  # also what a collector that is gone costs a drain


class Tracer:
    """Sends spans to `endpoint`, a URL with its path, in a thread of its own. Raises ConfigError without the extra."""

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ModuleNotFoundError as error:
            raise ConfigError(f"otlp_endpoint: {error}; pip install 'dsv4serve[otel]'") from None
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "dsv4serve", "service.version": __version__})
        )
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("dsv4serve")
        self._in_span, self._extract = trace.set_span_in_context, TraceContextTextMapPropagator().extract

    def record(
        self, phases: Sequence[tuple[str, float, float]], attributes: Mapping[str, str | int], traceparent: str
    ) -> None:
        """A span of the first of `phases` (name, begin, end by time.perf_counter) and the others as its children.

        `traceparent` is the client's header, or empty; one that is malformed is ignored.
        """
        offset = time.time() - time.perf_counter()
        (name, begin, end), *children = phases
        parent = self._extract({"traceparent": traceparent})
        span = self._tracer.start_span(name, parent, start_time=_ns(begin + offset), attributes=dict(attributes))
        for child, child_begin, child_end in children:
            inner = self._tracer.start_span(child, self._in_span(span), start_time=_ns(child_begin + offset))
            inner.end(_ns(child_end + offset))
        span.end(_ns(end + offset))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
