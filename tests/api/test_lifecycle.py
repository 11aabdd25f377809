"""Keys, probes, disconnects, drain: what surrounds a request."""

import asyncio
import json
import socket
import threading

import httpx
import pytest
from support.api import events, ids_answer, wait_for

from dsv4serve.api.auth import ApiKeys
from dsv4serve.api.generation_config import read_generation_config
from dsv4serve.config import EngineConfig
from dsv4serve.types import CheckpointError, ConfigError, FinishReason


def test_probes_and_models(server):
    assert server.client.get("/health").status_code == 200
    assert server.client.get("/ready").status_code == 200
    assert server.client.get("/version").json()["version"]
    (card,) = server.client.get("/v1/models").json()["data"]
    assert card == server.client.get("/v1/models/demo").json()
    assert (card["id"], card["object"], card["max_model_len"], card["vocab_size"]) == ("demo", "model", 4096, 129280)


def test_without_an_engine_requests_are_503_and_probes_say_so(server):
    server.engine.is_ready = server.engine.alive = False
    server.engine.info = None
    assert server.client.get("/health").status_code == 503
    assert server.client.get("/ready").status_code == 503
    response = server.chat()
    assert response.status_code == 503
    assert response.headers["retry-after"]
    assert server.client.get("/v1/models").status_code == 200
    assert server.client.post("/tokenize", json={"prompt": "x"}).json()["max_model_len"] is None


def test_an_engine_that_is_ready_but_stuck_fails_health_only(server):
    server.engine.alive = False
    assert server.client.get("/health").status_code == 503
    assert server.client.get("/ready").status_code == 200


def test_api_keys(serve):
    server = serve(api_key=("first", "sécond"))
    for header in (
        None,
        "",
        "Bearer",
        "Bearer wrong",
        "Basic first",
        "first",
        "Bearer firstX",
        "Bearer firs",
    ):
        headers = {} if header is None else {"Authorization": header}
        response = server.client.get("/v1/models", headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["type"] == "authentication_error"
    for header in (b"Bearer first", b"bearer first", "Bearer sécond".encode()):
        assert server.client.get("/v1/models", headers={"Authorization": header}).status_code == 200
    assert server.client.get("/health").status_code == 200
    assert server.client.get("/ready").status_code == 200
    assert server.client.post("/tokenize", json={"prompt": "x"}).status_code == 401
    assert server.client.get("/nope").status_code == 401


def test_an_empty_key_opens_nothing():
    for header in (b"", b"Bearer", b"Bearer "):
        assert not ApiKeys([""]).accepts({b"authorization": header, b"x-api-key": b""})
        assert ApiKeys([]).accepts(header)


def test_tokenize_and_detokenize(server):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "<think>🜂"}]
    for switches in ({}, {"reasoning_effort": "none"}):
        tokens = server.client.post("/tokenize", json={"messages": messages, **switches}).json()
        server.chat(messages=messages, **switches)
        assert tokens["tokens"] == server.engine.submitted[-1].prompt_ids
        assert tokens["count"] == len(tokens["tokens"])
        assert tokens["max_model_len"] == 4096
    text = server.client.post("/detokenize", json={"tokens": tokens["tokens"]}).json()["text"]
    assert text == "<｜begin▁of▁sentence｜>S<｜User｜><think>🜂<｜Assistant｜></think>"
    body = {"tokens": tokens["tokens"], "skip_special_tokens": True}
    assert server.client.post("/detokenize", json=body).json()["text"] == text.removeprefix("<｜begin▁of▁sentence｜>")
    body = {"prompt": "a<think>", "add_special_tokens": True}
    assert server.client.post("/tokenize", json=body).json()["tokens"] == [0, *server.tokenizer.encode("a<think>")]
    assert server.client.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []
    for body in ({}, {"prompt": "a", "messages": messages}, {"prompt": 5}):
        assert server.client.post("/tokenize", json=body).status_code == 400
    for body in ({}, {"tokens": "a"}, {"tokens": [-1]}, {"tokens": [True]}):
        assert server.client.post("/detokenize", json=body).status_code == 400


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_disconnect_aborts_every_choice(server, stream, n):
    server.engine.hold = True
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as connection:
        body = b'{"stream": %s, "n": %d, "prompt": "x"}' % (b"true" if stream else b"false", n)
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        connection.sendall(head + body)
        wait_for(lambda: len(server.engine.waiting) == n)
    wait_for(lambda: len(server.engine.aborted) == n)
    assert sorted(server.engine.aborted) == sorted(request.request_id for request in server.engine.submitted)
    frontend = server.app.state.frontend
    wait_for(lambda: frontend.num_active == 0 and not frontend.running)


def test_a_disconnect_before_the_body_is_complete_leaves_nothing_behind(server):
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        wait_for(lambda: server.app.state.frontend.num_active == 1)
    wait_for(lambda: server.app.state.frontend.num_active == 0)
    assert server.engine.submitted == []


class Background:
    """A chat call in a thread."""

    def __init__(self, server, **fields) -> None:
        self.response: httpx.Response | None = None
        self._thread = threading.Thread(target=self._run, args=(server, fields))
        self._thread.start()

    def _run(self, server, fields) -> None:
        self.response = server.chat(**fields)

    def result(self) -> httpx.Response:
        self._thread.join(20)
        assert self.response is not None
        return self.response


def release(server) -> None:
    server.engine.hold = False
    for event in server.engine.waiting.values():
        server.server.servers[0].get_loop().call_soon_threadsafe(event.set)


def test_a_drain_finishes_what_runs_and_refuses_what_is_new(serve):
    server = serve()
    server.say("</think>one two three")
    server.engine.hold = True
    calls = [Background(server, stream=True), Background(server)]
    wait_for(lambda: len(server.engine.waiting) == 2)
    server.server.handle_exit(15, None)
    refused = httpx.post(server.url + "/v1/completions", json={"prompt": "x"})
    assert refused.status_code == 503
    assert refused.headers["connection"] == "close"
    assert refused.json()["error"]["code"] == 503
    assert httpx.get(server.url + "/ready").status_code == 503
    assert httpx.get(server.url + "/health").status_code == 200
    assert server.thread.is_alive()
    release(server)
    content = "".join(c["choices"][0]["delta"].get("content", "") for c in events(calls[0].result()))
    assert content == calls[1].result().json()["choices"][0]["message"]["content"] == "one two three"
    server.thread.join(10)
    assert not server.thread.is_alive()
    assert len(server.engine.submitted) == 2


@pytest.mark.parametrize("how", ["second signal", "timeout"])
def test_a_second_signal_or_the_timeout_aborts_with_a_proper_end(serve, how):
    server = serve(drain_timeout_s=60.0 if how == "second signal" else 0.2)
    server.say("</think>one two three")
    server.engine.hold = True
    calls = [Background(server, stream=True), Background(server, stream=True, n=2), Background(server)]
    wait_for(lambda: len(server.engine.waiting) == 4)
    server.server.handle_exit(15, None)
    if how == "second signal":
        server.server.handle_exit(15, None)
    for call, n in zip(calls[:2], (1, 2), strict=True):
        ends = [c["choices"][0]["finish_reason"] for c in events(call.result()) if c["choices"][0]["finish_reason"]]
        assert ends == ["abort"] * n
    assert calls[2].result().json()["choices"][0]["finish_reason"] == "abort"
    server.thread.join(10)
    assert not server.thread.is_alive()


def test_an_idle_server_drains_at_once(serve):
    server = serve()
    server.client.get("/health")
    server.server.handle_exit(15, None)
    server.thread.join(10)
    assert not server.thread.is_alive()


def test_every_one_of_many_concurrent_streams_has_exactly_one_end(server):
    text = "r</think>" + "word " * 20
    server.say(text)

    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            bodies = [
                {"messages": [{"role": "user", "content": str(i)}], "stream": i % 2 == 0, "n": 1 + i % 3}
                for i in range(32)
            ]
            return await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))

    for index, response in enumerate(asyncio.run(run())):
        n = 1 + index % 3
        if index % 2 == 0:
            choices = [chunk["choices"][0] for chunk in events(response)]
            assert sum(choice["finish_reason"] is not None for choice in choices) == n
            content = "".join(c["delta"].get("content", "") for c in choices if c["index"] == n - 1)
        else:
            choices = response.json()["choices"]
            assert len(choices) == n
            content = choices[-1]["message"]["content"]
        assert content == "word " * 20
    frontend = server.app.state.frontend
    wait_for(lambda: frontend.num_active == 0 and not frontend.running)
    assert server.engine.aborted == []


def test_a_long_prompt_does_not_block_the_event_loop(server):
    """The probe answers while megabytes are tokenised in a thread (the answer is a 400: too long)."""
    server.engine.answer = ids_answer([5], finish=FinishReason.LENGTH)
    text = "x y " * 250_000
    results = []
    call = threading.Thread(
        target=lambda: results.append(server.client.post("/tokenize", json={"prompt": text}, timeout=60))
    )
    call.start()
    while call.is_alive():
        assert httpx.get(server.url + "/health", timeout=5).status_code == 200
    assert results[0].json()["count"] == len(server.tokenizer.encode(text))


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"temperature": "hot"}', '{"temperature": -1}', '{"top_p": 0}', '{"top_p": true}']
)
def test_a_wrong_generation_config_is_named(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        read_generation_config(tmp_path)


def test_keys_come_from_files_too(serve, tmp_path):
    path = tmp_path / "keys"
    path.write_text("one\ntwo\n")
    server = serve(api_key_file=(path,), api_key=("three",), admin_api_key="boss")
    for key in ("one", "two", "three", "boss"):
        for headers in ({"Authorization": f"Bearer {key}"}, {"x-api-key": key}):
            assert server.client.get("/v1/models", headers=headers).status_code == 200
    assert server.client.get("/v1/models", headers={"x-api-key": "one\ntwo".replace("\n", "")}).status_code == 401
    path.write_text("\n")
    with pytest.raises(ConfigError, match="no key"):
        EngineConfig(api_key_file=(path,)).read_api_keys()
    assert "three" not in repr(server.app.state.frontend.config)
    assert "boss" not in repr(server.app.state.frontend.config)


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 2}, {"n": 2, "stream": True}])
def test_an_id_is_free_before_the_client_has_the_end_of_the_answer(server, fields):
    """A client that sends its next request at once may use the id again; the server may clean up later."""
    frontend, free = server.app.state.frontend, []
    body = json.dumps({"prompt": "Hi", "rid": "mine", **fields}).encode()
    arriving = [{"type": "http.request", "body": body}]

    async def receive():
        return arriving.pop() if arriving else await asyncio.Event().wait()

    async def send(message):
        if message["type"] == "http.response.body" and not message.get("more_body"):
            with frontend.open_call("mine"):
                free.append(True)

    path = "/v1/completions"
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    asyncio.run(server.app(scope | {"headers": [(b"content-type", b"application/json")]}, receive, send))
    assert free == [True]
