"""The load generator against a small server whose timing and answers are known."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dsv4serve.cli import load
from dsv4serve.cli.main import main

KEY = "a-secret-key"


class FakeServer(BaseHTTPRequestHandler):
    """Streams one chunk a token. `server.misbehave` (one word) makes it fail in that way."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._send(200, "application/json", json.dumps({"data": [{"id": "babble", "vocab_size": 90}]}).encode())

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            server.bodies.append(body)
            server.keys.add(self.headers["authorization"])
            server.open += 1
            server.most_open = max(server.most_open, server.open)
        time.sleep(server.delay_s)
        with server.lock:
            server.open -= 1  # before the answer: whoever has it may send the next request at once
        if server.misbehave == "refuse" and len(server.bodies) > server.healthy:
            self._send(503, "application/json", b'{"error": {"message": "draining"}}')
        else:
            self._send(200, "text/event-stream", b"".join(self._events(body)))

    def _events(self, body):
        broken = self.server.misbehave if len(self.server.bodies) > self.server.healthy else ""
        for index in range(body["max_tokens"]):
            last = index == body["max_tokens"] - 1
            yield self._event({"choices": [{"text": "a", "finish_reason": "length" if last else None}]})
            if broken == "error":
                yield self._event({"error": {"message": "engine died"}})
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        if broken != "uncounted":
            yield self._event({"choices": [], "usage": usage})
        if broken != "cut":
            yield b"data: [DONE]\n\n"

    @staticmethod
    def _event(event):
        return b"data: " + json.dumps(event).encode() + b"\n\n"

    def _send(self, status, kind, body):
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    server.lock, server.bodies, server.keys = threading.Lock(), [], set()
    server.open = server.most_open = 0
    server.delay_s, server.misbehave, server.healthy = 0.0, "", 0
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def bench(server, *more):
    return main(["bench", "--url", server.url, "--input-tokens", "20", "--output-tokens", "5", *map(str, more)])


def test_a_run_sends_what_was_asked_and_writes_one_line(server, tmp_path, capsys, monkeypatch):
    out = tmp_path / "results.jsonl"
    monkeypatch.setattr("sys.argv", ["dsv4serve", "bench", "--api-key", KEY])
    server.delay_s = 0.02
    code = bench(server, "--concurrency", 3, "--api-key", KEY, "--out", out, "--device", "a fake")
    assert code == 0
    assert len(server.bodies) == 6 + 30  # 2 x and 10 x concurrency
    assert server.most_open == 3
    assert server.keys == {f"Bearer {KEY}"}
    for body in server.bodies:
        assert len(body["prompt"]) == 20
        assert all(0 <= token < 90 for token in body["prompt"])
        assert (body["max_tokens"], body["ignore_eos"], body["model"]) == (5, True, "babble")
    assert len({tuple(body["prompt"]) for body in server.bodies}) == 36  # nothing for a prefix cache
    (line,) = out.read_text().splitlines()
    assert KEY not in line
    record = json.loads(line)
    assert record["device"] == "a fake"
    assert record["command"].startswith("dsv4serve bench")
    assert record["settings"]["concurrency"] == 3
    results = record["results"]
    assert (results["num_completed"], results["num_failed"]) == (30, 0)
    assert (results["num_input_tokens"], results["num_output_tokens"]) == (600, 150)
    assert results["ttft_ms"]["p50"] >= 20
    assert set(results["e2e_ms"]) == {"mean", "p50", "p95", "p99"}
    assert "30 completed, 0 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("misbehave", "message"),
    [
        ("refuse", "HTTP 503"),
        ("error", "engine died"),
        ("uncounted", "no usage"),
        ("cut", "without [DONE]"),
    ],
)
def test_a_failure_is_counted_named_and_ends_with_exit_code_1(server, capsys, misbehave, message):
    server.misbehave, server.healthy = misbehave, 4
    assert bench(server, "--num-warmup", 1, "--num-requests", 9) == 1
    shown = capsys.readouterr().out
    assert "3 completed, 6 failed" in shown
    assert message in shown


def test_a_broken_warm_up_measures_nothing(server, capsys):
    server.misbehave = "refuse"
    assert bench(server) == 1
    assert "warm-up request failed: HTTP 503" in capsys.readouterr().err


def test_nobody_there_and_wrong_model_are_one_line(server, capsys):
    assert main(["bench", "--url", "http://127.0.0.1:1"]) == 1
    assert "http://127.0.0.1:1/v1/models" in capsys.readouterr().err
    assert bench(server, "--model", "other") == 1
    assert "serves babble" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--concurrency=0", "--num-warmup=-1", "--random-range-ratio=1.1"])
def test_out_of_range_options_exit_2(option):
    with pytest.raises(SystemExit) as end:
        main(["bench", option])
    assert end.value.code == 2


def test_lengths_stay_in_the_range_and_repeat_with_the_seed():
    settings = load.LoadSettings(
        model="m",
        concurrency=1,
        num_requests=1,
        num_warmup=0,
        input_tokens=100,
        output_tokens=50,
        random_range_ratio=0.8,
        vocab_size=7,
        seed=3,
    )
    bodies = load.request_bodies(settings, 400, "a")
    lengths = {len(json.loads(body)["prompt"]) for body in bodies}
    outputs = {json.loads(body)["max_tokens"] for body in bodies}
    assert (min(lengths), max(lengths)) == (80, 100)
    assert (min(outputs), max(outputs)) == (40, 50)
    assert bodies == load.request_bodies(settings, 400, "a")
    assert bodies != load.request_bodies(settings, 400, "b")


def test_definitions_on_two_requests_with_known_times():
    def record(start, gaps, **more):
        first = start + 0.1
        last = first + sum(gaps)
        return load.RequestRecord(start_s=start, first_s=first, last_s=last, end_s=last, gaps_s=gaps, **more)

    one = record(0.0, [0.01, 0.03], num_input_tokens=8, num_output_tokens=3)
    two = record(0.86, [0.04], num_input_tokens=2, num_output_tokens=2)
    lost = load.RequestRecord(start_s=0.5, end_s=0.6, error="gone")
    results = load.summarize([one, two, lost])
    assert results["duration_s"] == 1.0
    assert results["failures"] == {"gone": 1}
    assert results["output_tokens_per_s"] == 5
    assert results["total_tokens_per_s"] == 15
    assert results["ttft_ms"]["mean"] == 100
    assert results["itl_ms"]["p50"] == 30
    assert results["tpot_ms"] == {"mean": 30, "p50": 30, "p95": 39, "p99": 39.8}
    assert results["interactivity"] == 33.33
    assert results["e2e_ms"]["p50"] == 140


def test_a_bare_closing_chunk_is_no_gap_between_tokens():
    record = load.RequestRecord(start_s=0.0)
    for choice in ({"text": "a"}, {"text": "b"}, {"text": "", "finish_reason": "length"}):
        load._note_chunk(record, choice)
    assert len(record.gaps_s) == 1
