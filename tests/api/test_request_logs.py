"""Each line of a request has its id."""

import json
import logging

import pytest
from support.api import wait_for

from dsv4serve.obs.logging import JsonFormatter
from dsv4serve.types import RequestOutput


@pytest.fixture
def lines(monkeypatch):
    """JSON log lines of the server's own loggers."""
    lines = []

    class Collect(logging.Handler):
        def emit(self, record) -> None:
            lines.append(json.loads(self.format(record)))

    handler = Collect()
    handler.setFormatter(JsonFormatter("frontend"))
    logger = logging.getLogger("dsv4serve")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    logging.Logger.manager._clear_cache()  # what level is enabled
    yield lines
    logging.Logger.manager._clear_cache()


@pytest.mark.parametrize("stream", [True, False])
def test_ends_and_failures_have_the_clients_id(server, lines, stream):
    server.say("</think>one two three")
    assert server.chat(rid="mine", stream=stream).status_code == 200
    wait_for(lambda: lines)
    (line,) = lines
    assert (line["request_id"], line["finish_reason"]) == ("mine", "stop")
    assert 0 < line["ttft_s"] <= line["e2e_s"]
    assert line["output_tokens"] == len(server.tokenizer.encode("</think>one two three")) + 1

    def fails(request):
        yield RequestOutput(request_id=request.request_id, token_ids=[5])
        raise RuntimeError("odd")

    server.engine.answer = fails
    server.chat(rid="other", stream=stream)
    wait_for(lambda: len(lines) >= 3)
    assert {line["request_id"] for line in lines[1:]} == {"other"}
    assert "RuntimeError: odd" in "".join(line.get("exception", "") for line in lines)
