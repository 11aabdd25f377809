"""GET /metrics: what is counted, and that every frontend answers for all."""

import os
import subprocess
import sys

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.api import STATS, ids_answer

from dsv4serve.types import FinishReason, RequestOutput

PREFIX = "dsv4serve:"


def scrape(server) -> dict[tuple[str, ...], float]:
    """(name without prefix, label values...) -> value."""
    response = httpx.get(server.url + "/metrics")  # its own connection: after a 500 the server closes it
    assert response.headers["content-type"].startswith("text/plain; version=")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            assert sample.name.startswith(PREFIX)
            found[(sample.name.removeprefix(PREFIX), *sample.labels.values())] = sample.value
    return found


def test_engine_numbers(server):
    found = scrape(server)
    assert found["engine_up",] == 1
    assert found["num_running_reqs",] == STATS.num_running
    assert found["num_queue_reqs",] == STATS.num_waiting
    assert found["token_usage",] == 4 / 64
    assert found["num_used_slots",] == 1
    assert found["num_cached_pages",] == 10
    assert found["prompt_tokens_total",] == 1500
    assert found["cached_tokens_total",] == 500
    assert found["generation_tokens_total",] == 300
    assert found["step_time_seconds_count", "execute"] == 0
    assert found["ready_seconds",] == 12.5
    assert found["kernels_compiled_total", "start-up"] == 3
    assert found["kernels_loaded_total", "start-up"] == 150
    assert found["kernels_compiled_total", "serving"] == found["kernels_loaded_total", "serving"] == 0


def test_without_an_engine_only_the_frontends_are_counted(server):
    server.engine.is_ready = False
    server.engine.info = None
    found = scrape(server)
    assert found["engine_up",] == 0
    assert ("num_running_reqs",) not in found
    assert found["e2e_request_latency_seconds_count",] == 0


def test_metrics_need_no_key_and_are_served_during_a_drain(serve):
    server = serve(api_key=("secret",))
    server.app.state.frontend.draining = True
    assert scrape(server)["engine_up",] == 1


def test_refused_and_failed_calls_are_counted_too(serve):
    server = serve(api_key=("secret",))
    assert server.chat().status_code == 401
    server.client.headers["Authorization"] = "Bearer secret"

    def fails(request):
        raise RuntimeError("odd")

    server.engine.answer = fails
    assert server.chat().status_code == 500
    found = scrape(server)
    assert found["requests_total", "error"] == 1
    assert found["http_responses_total", "other", "401"] == 1
    assert found["http_responses_total", "/v1/chat/completions", "500"] == 1


def test_requests_are_timed_and_counted_by_how_they_end(server):
    server.say("</think>one two three")
    assert server.chat(n=2).status_code == 200
    server.say("</think>one two three", finish=FinishReason.LENGTH)
    assert server.chat(stream=True).status_code == 200
    server.engine.answer = lambda request: [
        RequestOutput(request_id=request.request_id, token_ids=[5], queue_s=0.2),
        RequestOutput(request_id=request.request_id, finish_reason=FinishReason.ABORT),
    ]
    server.chat()
    server.engine.answer = lambda request: [
        RequestOutput(request_id=request.request_id, finish_reason=FinishReason.ERROR, error="e", error_status=429)
    ]
    assert server.chat().status_code == 429
    assert server.client.get("/no/such/route").status_code == 404
    found = scrape(server)
    reasons = {key[1]: value for key, value in found.items() if key[0] == "requests_total"}
    assert reasons == {"stop": 2, "length": 1, "abort": 1, "error": 1}
    assert found["num_aborted_requests_total",] == 1
    assert found["e2e_request_latency_seconds_count",] == 5
    assert found["time_to_first_token_seconds_count",] == 4
    num_tokens = len(server.tokenizer.encode("</think>one two three"))
    assert found["inter_token_latency_seconds_count",] == 2 * num_tokens + num_tokens - 1  # an EOS in the first two
    assert (found["queue_time_seconds_count",], found["queue_time_seconds_sum",]) == (1, 0.2)
    assert found["http_responses_total", "/v1/chat/completions", "200"] == 3
    assert found["http_responses_total", "/v1/chat/completions", "429"] == 1
    assert found["http_responses_total", "other", "404"] == 1


def test_a_stop_string_is_no_abort(server):
    server.say("</think>one two three")
    assert server.chat(stop="two").json()["choices"][0]["finish_reason"] == "stop"
    assert server.engine.aborted
    assert scrape(server)["num_aborted_requests_total",] == 0


@pytest.mark.parametrize(
    ("text", "name", "labels"),
    [
        ("thinking on", "reasoning_not_closed_total", ()),
        ("</think>\n\n<｜DSML｜tool_calls>\n</｜DSML｜tool_calls>", "malformed_outputs_total", ("no_call",)),
    ],
)
def test_what_the_parser_found_wrong_is_counted(server, text, name, labels):
    server.say(text)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    assert server.chat(tools=[tool]).status_code == 200
    assert scrape(server)[name, *labels] == 1


def test_the_frontends_of_a_server_count_together_also_those_that_died(tmp_path):
    code = (
        "from prometheus_client import CollectorRegistry, generate_latest\n"
        "from dsv4serve.obs.metrics import FrontendMetrics\n"
        "metrics = FrontendMetrics()\n"
        "metrics.ttft.observe(0.25)\n"
        "metrics.requests.labels('stop').inc()\n"
        "print([s.value for m in metrics.collect() for s in m.samples\n"
        "       if s.name in ('dsv4serve:requests_total', 'dsv4serve:time_to_first_token_seconds_count')])\n"
    )
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for count in (1.0, 2.0):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str([count, count])


def test_answers_of_several_tokens_share_their_time(server):
    server.engine.answer = ids_answer(server.tokenizer.encode("one two three four"), FinishReason.LENGTH, group=2)
    server.chat()
    assert scrape(server)["inter_token_latency_seconds_count",] == 2
