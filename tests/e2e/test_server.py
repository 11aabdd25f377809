"""The real processes with the real openai client, on the embedded checkpoint."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest
from support.server import Server, serve, wait_until

pytestmark = pytest.mark.e2e
CHAT = [{"role": "user", "content": "Tell me about the sea."}]


@pytest.fixture(scope="module", params=[1, 3])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with serve("--frontends", str(request.param), "--max-body-bytes", str(8 << 20)) as running:
        yield running
        assert running.stop() == 0
        assert not [line for line in running.log if "Traceback" in line]


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60) as connected:
        yield connected


def post(server: Server, path: str, **kwargs: Any) -> httpx.Response:
    return httpx.post(server.url + path, timeout=60, **kwargs)


def test_models_health_and_tokenize(server: Server, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    assert httpx.get(server.url + "/health").status_code == 200
    assert httpx.get(server.url + "/ready").status_code == 200
    ids = post(server, "/tokenize", json={"prompt": "The sea is wide."}).json()["tokens"]
    assert post(server, "/detokenize", json={"tokens": ids}).json()["text"] == "The sea is wide."


def test_every_frontend_has_the_metrics_of_all(server: Server) -> None:
    body = {"prompt": "The sea", "max_tokens": 4, "ignore_eos": True}
    for _ in range(6):  # a connection each, so that several frontends are met
        assert post(server, "/v1/completions", json=body).status_code == 200
    name = "dsv4serve:time_to_first_token_seconds_count "
    pages = [httpx.get(server.url + "/metrics").text for _ in range(6)]
    counts = {line.removeprefix(name) for page in pages for line in page.splitlines() if line.startswith(name)}
    (count,) = counts
    assert float(count) >= 6
    assert all("dsv4serve:engine_up 1.0" in page for page in pages)
    assert httpx.get(server.url + "/stats").json()["event_loop_lag_s"]["max"] > 0


def test_chat_whole_and_streamed_are_the_same_text(client: openai.OpenAI) -> None:
    """Same seed, same tokens, however they are delivered."""
    settings: dict[str, Any] = {"model": "demo", "messages": CHAT, "max_tokens": 40, "seed": 7}
    settings["extra_body"] = {"thinking": {"type": "disabled"}, "ignore_eos": True}
    whole = client.chat.completions.create(**settings)
    stream = client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert text == whole.choices[0].message.content
    assert reasons == [whole.choices[0].finish_reason] == ["length"]
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 40


def test_the_choices_of_one_prompt_share_its_prefill(server: Server) -> None:
    def num_computed() -> int:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            stats = http.get("/server_info").json()["stats"]
        return int(stats["num_prompt_tokens"])  # cached ones not counted

    before = num_computed()
    prompt = [1000 + index for index in range(700)]
    body = {"model": "demo", "prompt": prompt, "n": 8, "max_tokens": 2, "ignore_eos": True, "temperature": 1}
    answer = post(server, "/v1/completions", json=body)
    assert len(answer.json()["choices"]) == 8
    assert num_computed() - before == 700 + 7 * (700 - 512)  # two pages once, the rest of the third by each


def test_the_second_turn_reuses_the_first(client: openai.OpenAI) -> None:
    long = [{"role": "user", "content": "one two three four five six seven " * 60}]
    settings: dict[str, Any] = {"model": "demo", "messages": long, "max_tokens": 4, "seed": 1}
    first = client.chat.completions.create(**settings)
    again = client.chat.completions.create(**settings)
    assert again.choices[0].message == first.choices[0].message
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens >= 256


def test_n_choices_and_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=["one", "two"], n=2, max_tokens=5, seed=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 20
    # Hot, because at 1 the model is sure of its answer here, and three may be alike.
    chat = client.chat.completions.create(model="demo", messages=CHAT, n=3, max_tokens=40, seed=3, temperature=2)
    assert len({choice.message.model_dump_json() for choice in chat.choices}) > 1


def test_stop_string_cuts_the_text(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": "demo", "prompt": "The", "max_tokens": 60, "seed": 5}
    whole = client.completions.create(**settings, extra_body={"ignore_eos": True}).choices[0].text
    stop = whole[20:23]
    cut = client.completions.create(**settings, stop=stop, extra_body={"ignore_eos": True}).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


async def stream_text(client: openai.AsyncOpenAI, index: int) -> list[str]:
    """Finish reasons of one streamed chat."""
    reasons = []
    stream = await client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": f"Number {index}."}],
        max_tokens=10 + index,
        stream=True,
        seed=index,
        extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        reasons += [choice.finish_reason for choice in chunk.choices if choice.finish_reason]
    return reasons


def test_32_concurrent_streams_end_once_each(server: Server) -> None:
    async def run() -> list[list[str]]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(stream_text(client, index) for index in range(32)))

    assert asyncio.run(run()) == [["length"]] * 32


def test_disconnects_free_what_they_held(server: Server) -> None:
    """Clients that leave in the middle; afterwards everything still works and nothing runs."""

    async def leave(client: httpx.AsyncClient, index: int) -> None:
        body = {
            "model": "demo",
            "prompt": "x" * (50 * index + 1),
            "max_tokens": 5000,
            "stream": True,
            "ignore_eos": True,
        }
        async with client.stream("POST", server.url + "/v1/completions", json=body) as response:
            async for _ in response.aiter_lines():
                return

    async def run() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            await asyncio.gather(*(leave(client, index) for index in range(24)))
            answer = await client.post(
                server.url + "/v1/completions", json={"model": "demo", "prompt": "after", "max_tokens": 3}
            )
            assert answer.status_code == 200

    asyncio.run(run())


MAX = 8192


def test_prompts_at_the_limit(server: Server) -> None:
    fits = post(server, "/v1/completions", json={"model": "demo", "prompt": [5] * (MAX - 1), "max_tokens": 1})
    assert fits.status_code == 200
    assert fits.json()["usage"]["prompt_tokens"] == MAX - 1
    for length in (MAX, MAX + 1):
        long = post(server, "/v1/completions", json={"model": "demo", "prompt": [5] * length, "max_tokens": 1})
        assert long.status_code == 400
        assert str(MAX) in long.json()["error"]["message"]


def test_a_one_megabyte_prompt_is_a_400_and_a_huge_body_a_413(server: Server) -> None:
    text = "word " * 200_000
    answer = post(
        server, "/v1/chat/completions", json={"model": "demo", "messages": [{"role": "user", "content": text}]}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == 400
    assert post(server, "/v1/completions", content=b" " * (9 << 20)).status_code == 413


BAD = [
    b"{",
    b"\xff\xfe",
    b"[]",
    b"null",
    b'{"model": "demo"}',
    b'{"model": "demo", "messages": []}',
    b'{"model": "demo", "messages": "hello"}',
    b'{"model": "demo", "messages": [{"role": "king", "content": "x"}]}',
    b'{"model": "demo", "messages": [{"role": "user", "content": 5}]}',
    *(
        json.dumps({"model": "demo", "messages": CHAT, **bad}).encode()
        for bad in (
            {"max_tokens": -1},
            {"max_tokens": 0},
            {"max_tokens": 10**30},
            {"max_tokens": "5"},
            {"max_tokens": True},
            {"max_tokens": 1.5},
            {"temperature": -0.1},
            {"temperature": 1e300},
            {"top_p": 0},
            {"top_p": 1.1},
            {"n": 0},
            {"n": 10**6},
            {"seed": "abc"},
            {"stop": [""]},
            {"stop": ["x"] * 100},
            {"stream": "yes"},
            {"stream_options": {"include_usage": True}},
            {"logprobs": "yes"},
            {"tool_choice": "required"},
        )
    ),
    b'{"model": "demo", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    b'{"model": "demo", "messages": [{"role": "user", "content": "x"}], "temperature": 1e400}',
    b'{"model": "demo", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
]


@pytest.mark.parametrize("body", BAD, ids=lambda body: body[-60:].decode("latin-1"))
def test_bad_requests_are_400_in_the_openai_shape(server: Server, body: bytes) -> None:
    answer = post(server, "/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == 400
    assert error["message"]


def test_unknown_model_route_and_method(server: Server) -> None:
    assert post(server, "/v1/completions", json={"model": "gpt", "prompt": "x"}).status_code == 404
    assert post(server, "/v1/embeddings", json={}).status_code == 404
    assert httpx.get(server.url + "/v1/completions").status_code == 405


def test_a_killed_frontend_is_replaced(server: Server) -> None:
    victim = server.children("dsv4serve.api.process")[0]
    victim.kill()

    def answered() -> bool:
        try:
            return httpx.get(server.url + "/ready", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    wait_until(lambda: victim.pid not in {child.pid for child in server.children("dsv4serve.api.process")})
    wait_until(answered)
    assert post(server, "/v1/completions", json={"model": "demo", "prompt": "x", "max_tokens": 2}).status_code == 200


def test_a_killed_engine_answers_every_open_request_and_comes_back(server: Server) -> None:
    """Each open stream ends in exactly one error event, then the next engine serves."""

    async def events(client: httpx.AsyncClient, started: asyncio.Event) -> list[str]:
        body = {"model": "demo", "prompt": "x", "max_tokens": 7000, "stream": True, "ignore_eos": True}
        lines = []
        async with client.stream("POST", server.url + "/v1/completions", json=body) as response:
            assert response.status_code == 200
            async for line in data_lines(response):
                started.set()
                lines.append(line)
        return lines

    async def run() -> list[list[str]]:
        async with httpx.AsyncClient(timeout=60) as client:
            starts = [asyncio.Event() for _ in range(8)]
            tasks = [asyncio.create_task(events(client, started)) for started in starts]
            await asyncio.gather(*(started.wait() for started in starts))
            (engine,) = server.children("dsv4serve.engine.process")
            engine.kill()
            return await asyncio.gather(*tasks)

    for lines in asyncio.run(run()):
        assert lines[-1] == "[DONE]"
        assert sum('"error"' in line for line in lines) == 1
        assert json.loads(lines[-2])["error"]["code"] == 500
    wait_until(lambda: httpx.get(server.url + "/ready", timeout=5).status_code == 200)
    assert post(server, "/v1/completions", json={"model": "demo", "prompt": "x", "max_tokens": 2}).status_code == 200


async def data_lines(response: httpx.Response) -> AsyncIterator[str]:
    """The data of each server-sent event."""
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")
