import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from dsv4serve.obs.metrics import FrontendMetrics
from dsv4serve.obs.requests import RequestTimer, arrived, traceparent
from dsv4serve.obs.traces import Tracer
from dsv4serve.types import ConfigError, Request, RequestOutput, SamplingParams


@pytest.fixture
def collector():
    """Where traces go, and the spans that came."""
    spans = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
    server.shutdown()
    thread.join()
    server.server_close()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("dsv4serve.obs.requests.time.perf_counter", clock)
    monkeypatch.setattr("time.time", lambda: 1000 + clock.now)
    return clock


def run(tracer, clock, queue_s, times, reason) -> None:
    """A request that arrives at 0, is submitted at 1, gets tokens at `times` and ends with the last of them."""
    arrived.set(0.0)
    clock.now = 1.0
    request = Request(request_id="r", prompt_ids=[1, 2], sampling=SamplingParams(max_tokens=9))
    timer = RequestTimer(request, FrontendMetrics(), tracer)
    for clock.now in times:
        timer.output(RequestOutput(request_id="r", token_ids=[1], queue_s=queue_s))
    timer.end(reason, {})


def test_a_request_is_a_span_with_its_phases_as_children(collector, clock):
    endpoint, spans = collector
    tracer = Tracer(endpoint)
    run(tracer, clock, 2.0, [5.0, 7.0], "stop")
    tracer.close()
    seconds = {span.name: (span.start_time_unix_nano / 1e9, span.end_time_unix_nano / 1e9) for span in spans}
    assert seconds == {"request": (1000, 1007), "queue": (1001, 1003), "prefill": (1003, 1005), "decode": (1005, 1007)}
    (root,) = (span for span in spans if span.name == "request")
    assert {span.parent_span_id for span in spans if span is not root} == {root.span_id}
    assert {span.trace_id for span in spans} == {root.trace_id}
    values = {item.key: item.value.string_value or item.value.int_value for item in root.attributes}
    assert values == {
        "dsv4serve.engine_request_id": "r",
        "dsv4serve.finish_reason": "stop",
        "dsv4serve.prompt_tokens": 2,
        "dsv4serve.output_tokens": 2,
        "dsv4serve.cached_tokens": 0,
    }


def test_the_request_is_a_child_of_the_clients_span(collector, clock):
    endpoint, spans = collector
    tracer = Tracer(endpoint)
    for header in (f"00-{'ab' * 16}-{'cd' * 8}-01", "nonsense"):
        traceparent.set(header)
        run(tracer, clock, None, [], "abort")
    traceparent.set("")
    tracer.close()
    known, unknown = (span for span in spans if span.name == "request")
    assert (known.trace_id.hex(), known.parent_span_id.hex()) == ("ab" * 16, "cd" * 8)
    assert not unknown.parent_span_id


def test_a_request_that_never_got_a_token_only_waited(collector, clock):
    endpoint, spans = collector
    tracer = Tracer(endpoint)
    run(tracer, clock, None, [], "abort")
    tracer.close()
    assert [span.name for span in spans] == ["queue", "request"]


def test_without_the_extra_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ConfigError, match=r"otlp_endpoint.*pip install 'dsv4serve\[otel\]'"):
        Tracer("http://127.0.0.1:1/v1/traces")


def test_the_sdk_is_not_imported_when_traces_are_off():
    code = "import sys, dsv4serve.api.app; assert 'opentelemetry.sdk' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
