"""`dsv4serve chat`: with the real processes through pipes and a terminal, with scripted streams for the rest."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from support.server import Server, serve

from dsv4serve.cli.chat import printable
from dsv4serve.cli.conversation import Conversation, ServerError, connect, served_model
from dsv4serve.cli.main import main

KEY = "a-key"
RANDOM = ("--load-format", "dummy", "--log-level", "error")
GREEDY = ("--temperature", "0")  # with these weights greedy answers do not end by themselves
LIMITS = ("--api-key", KEY, "--max-tokens", "6", *GREEDY)
CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": '}}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve(*RANDOM, "--api-key", KEY) as running:
        yield running


def chat(monkeypatch: pytest.MonkeyPatch, typed: str, *flags: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    return main(["chat", *flags])


@pytest.mark.e2e
def test_piped_turns_are_one_conversation(
    server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    typed = f"/think off\n/system Be brief.\n{'one two three ' * 150}\n\nand now?\n/new\nhello\n/exit\nnot sent\n"
    assert chat(monkeypatch, typed, "--url", server.url + "/v1", *LIMITS) == 0
    captured = capfd.readouterr()
    assert captured.out.strip()
    first, second, third = captured.err.splitlines()
    for line in (first, second, third):
        assert line.startswith("6 tokens, ")
        assert "tokens/s, TTFT " in line
        assert line.endswith("prompt tokens cached, cut at the token limit")
    assert "0 of " in first
    cached, _, of = second.split(", ")[3].split()[:3]
    assert 256 <= int(cached) < int(of)
    assert int(third.split(", ")[3].split()[2]) < 20


@pytest.mark.e2e
def test_reasoning_is_not_on_standard_output(
    server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, "/think on\nhi\n", "--url", server.url, *LIMITS) == 0
    captured = capfd.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) > 1


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("typed", "flags", "complaint"),
    [
        ("", [], "HTTP 401"),
        ("", ["--api-key", "wrong"], "--api-key"),
        ("", ["--api-key", KEY, "--model", "other"], "no model 'other'; it has demo"),
        ("hi\n", ["--api-key", KEY, "--temperature", "5"], "HTTP 400: temperature"),
        ("/bogus\n", ["--api-key", KEY], "/help"),
        ("", ["--url", "http://127.0.0.1:1"], "no answer from http://127.0.0.1:1"),
        ("", ["--url", "nowhere"], "nowhere"),
        ("", ["--numerics", "exact"], "--numerics: the server at --url has its own"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    server: Server,
    typed: str,
    flags: list[str],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert chat(monkeypatch, typed, "--url", server.url, *flags) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("dsv4serve: ")
    assert complaint in line


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--port", "9000"], "--port: a private server chooses its own"),
        (["--model", "/no/such/folder"], "/no/such/folder"),
        (["--tools", "/no/such/file"], "/no/such/file"),
    ],
)
def test_wrong_settings_of_a_private_server(
    flags: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, "", *flags) == 2
    assert complaint in capfd.readouterr().err


class PtyChat:
    """`dsv4serve chat` on a pseudo-terminal."""

    def __init__(self, *flags: str) -> None:
        self._master, slave = pty.openpty()
        command = [sys.executable, "-m", "dsv4serve.cli.main", "chat", *flags]
        # The terminal becomes the controlling one of a new session, so that ^C becomes SIGINT; which is ignored where
        # the tests themselves run in the background of a shell.
        take = (
            "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
            "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", take, *command], stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        os.close(slave)
        self.seen = ""

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait_for(self, text: str, more: int = 0) -> None:
        """Read until `text` has come since the last call, and `more` characters after it."""
        deadline = time.monotonic() + 40
        while text not in self.seen or len(self.seen.partition(text)[2]) < more:
            assert time.monotonic() < deadline, f"no {text!r} and {more} characters in {self.seen!r}"
            if select.select([self._master], [], [], 0.5)[0]:
                self.seen += os.read(self._master, 4096).decode(errors="replace")
        self.seen = self.seen.partition(text)[2]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.mark.e2e
def test_in_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_the_private_server() -> None:
    """With one slot the second answer can only come when the server has aborted the first."""
    terminal = PtyChat(*RANDOM, *GREEDY, "--max-running-requests", "1")
    try:
        terminal.wait_for("Ctrl-D ends")
        children = psutil.Process(terminal.process.pid).children(recursive=True)
        assert len(children) == 3  # launcher, engine, frontend
        for turn in ("one", "two"):
            terminal.type(f"/new\n{turn}\n")
            terminal.wait_for(turn, more=40)
            terminal.type("\x03")
            terminal.wait_for("stopped")
            terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
        assert not psutil.wait_procs(children, timeout=10)[1]
    finally:
        terminal.close()


def conversation(*streams: list[dict[str, object]]) -> tuple[Conversation, list[dict[str, object]]]:
    """A conversation whose n-th answer is the n-th list of events, and the bodies it sends."""
    bodies: list[dict[str, object]] = []

    def respond(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        events = streams[len(bodies) - 1]
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        return httpx.Response(200, text="".join(lines) + ("" if "cut" in events[-1] else "data: [DONE]\n\n"))

    client = httpx.Client(base_url="http://scripted", transport=httpx.MockTransport(respond))
    return Conversation(client, "m", [{"type": "function"}], {"max_tokens": 5}), bodies


def delta(finish_reason: str | None = None, **fields: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish_reason}]}


def test_a_tool_call_is_joined_and_its_result_comes_before_the_next_answer() -> None:
    more = {"index": 0, "function": {"arguments": '"Oslo"}'}}
    calls = [delta(tool_calls=[CALL]), delta(tool_calls=[more]), delta("tool_calls")]
    talk, bodies = conversation(calls, [delta("stop", content="Cold.")])
    assert talk.say("Weather in Oslo?")
    with talk.answer() as (answer, pieces):
        assert list(pieces) == [("", "")] * 3
    assert [(call.name, call.arguments) for call in answer.calls.values()] == [("weather", '{"city": "Oslo"}')]
    assert talk.awaited is not None
    assert talk.say("-3 degrees")
    assert talk.awaited is None
    with talk.answer() as (answer, pieces):
        assert list(pieces) == [("", "Cold.")]
    assert [message["role"] for message in bodies[1]["messages"]] == ["user", "assistant", "tool"]
    assert bodies[1]["messages"][2] == {"role": "tool", "tool_call_id": "call_1", "content": "-3 degrees"}
    assert bodies[1]["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"city": "Oslo"}'
    assert bodies[1]["max_tokens"] == 5
    assert "chat_template_kwargs" not in bodies[1]


@pytest.mark.e2e
def test_the_server_takes_a_history_with_a_call_and_its_result(server: Server) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    arguments = {"index": 0, "function": {"arguments": '"Oslo"}'}}
    scripted, _ = conversation([delta(reasoning_content="hm"), delta("tool_calls", tool_calls=[CALL, arguments])])
    scripted.say("Weather in Oslo?")
    with scripted.answer() as (_, pieces):
        list(pieces)
    scripted.say("-3 degrees")
    with connect(server.url, KEY) as client:
        talk = Conversation(client, "demo", [tool], {"max_tokens": 3, "temperature": 0})
        talk.messages = scripted.messages
        with talk.answer() as (answer, pieces):
            list(pieces)
    assert answer.usage["completion_tokens"] == 3


def test_a_failed_turn_leaves_the_history_as_it_was() -> None:
    talk, bodies = conversation(
        [delta("stop", content="one")], [delta(content="tw"), {"error": {"message": "died"}}], [{"cut": True}]
    )
    outcomes = []
    for text in ("first", "second", "third"):
        talk.say(text)
        try:
            with talk.answer() as (_, pieces):
                outcomes.append("".join(content for _, content in pieces))
        except ServerError as error:
            outcomes.append(str(error))
    assert outcomes == ["one", "died", "the server ended the stream before the answer was complete"]
    assert talk.messages == [{"role": "user", "content": "first"}, {"role": "assistant", "content": "one"}]
    assert [message["content"] for message in bodies[2]["messages"]] == ["first", "one", "third"]


def test_an_answer_that_is_left_early_keeps_its_text_but_no_half_call() -> None:
    talk, _ = conversation([delta(content="so far"), delta(tool_calls=[CALL]), delta("stop")])
    talk.say("go")
    with talk.answer() as (answer, pieces):
        next(pieces)
        next(pieces)
    assert talk.messages[1] == {"role": "assistant", "content": "so far"}
    assert talk.awaited is None
    assert answer.summary().endswith("stopped")


def test_the_summary_counts_drafts_where_usage_has_them() -> None:
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"accepted_prediction_tokens": 6, "rejected_prediction_tokens": 2},
    }
    talk, _ = conversation([delta(content="a"), delta("stop", content="b"), {"choices": [], "usage": usage}])
    talk.say("go")
    with talk.answer() as (answer, pieces):
        list(pieces)
    answer.start_s, answer.first_s, answer.last_s = 1.0, 1.25, 3.25
    assert (
        answer.summary() == "11 tokens, 5.0 tokens/s, TTFT 250 ms, 4 of 9 prompt tokens cached, 6 of 8 drafts accepted"
    )


def test_a_server_of_another_kind_is_named(tmp_path: Path) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text="<html>"))
    with (
        httpx.Client(base_url="http://other", transport=transport) as client,
        pytest.raises(ServerError, match="OpenAI"),
    ):
        served_model(client, "")


def test_control_characters_of_a_model_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[31mb\x9b\r\nc\td👩\u200d🚀") == "a[31mb\nc\td👩\u200d🚀"
