"""What generating routes answer, seen by the official client and on the wire."""

import re
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from support.api import MAX_MODEL_LEN, events, ids_answer, wait_for

from dsv4serve.api.generation import derive_seed
from dsv4serve.chat.tokenizer import ControlToken
from dsv4serve.types import FinishReason, RequestOutput

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat_with_the_openai_client(server, client):
    server.say("\nWhy not?\n</think>\n\nHello 🜂 you\n", cached=3)
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=64)
    message = answer.choices[0].message
    assert (message.role, message.content, message.reasoning_content) == ("assistant", "Hello 🜂 you\n", "Why not?")
    assert message.reasoning == message.reasoning_content
    assert answer.choices[0].finish_reason == "stop"
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{24}", answer.id)
    assert (answer.object, answer.model) == ("chat.completion", "demo")
    usage = answer.usage
    num_output = len(server.tokenizer.encode("\nWhy not?\n</think>\n\nHello 🜂 you\n")) + 1
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, num_output, 5 + num_output)
    assert usage.prompt_tokens_details.cached_tokens == 3
    assert usage.completion_tokens_details.reasoning_tokens == len(server.tokenizer.encode("\nWhy not?\n"))
    assert message.model_dump(exclude_none=True)["content"]
    again = client.chat.completions.create(model="demo", messages=[*MESSAGES, message.model_dump(), *MESSAGES])
    assert again.choices[0].finish_reason == "stop"


def test_chat_stream_with_the_openai_client(server, client):
    server.say("Why?</think>Hello 🜂 you", cached=2)
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(model="demo", messages=MESSAGES, stream=True, stream_options=options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    deltas = [chunk.choices[0].delta for chunk in chunks[1:-2]]
    assert "".join(delta.content or "" for delta in deltas) == "Hello 🜂 you"
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Why?"
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == "Why?"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 2
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.parametrize("at_end", [True, False])
def test_usage_so_far_in_every_chunk(server, at_end):
    server.say("Why?</think>Hello you", cached=2)
    options = {"continuous_usage_stats": True, "include_usage": at_end, "include_obfuscation": False}
    chunks = events(server.chat(stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    num_tokens = len(server.tokenizer.encode("Why?</think>Hello you")) + 1
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, num_tokens)
    assert len(set(counts)) > 3
    assert {chunk["usage"]["prompt_tokens_details"]["cached_tokens"] for chunk in chunks} == {2}
    assert (chunks[-1]["choices"] == []) == at_end


def test_completion_with_the_openai_client(server, client):
    server.say(" a</think>\n", finish=FinishReason.LENGTH)
    answer = client.completions.create(model="demo", prompt=["x", "y z"], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {choice.text for choice in answer.choices} == {" a</think>\n"}
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage.prompt_tokens == 1 + len(server.tokenizer.encode("y z"))
    assert answer.usage.completion_tokens == 4 * len(server.tokenizer.encode(" a</think>\n"))
    assert {request.sampling.max_tokens for request in server.engine.submitted} == {16}
    streamed = list(client.completions.create(model="demo", prompt=[5, 6], stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == " a</think>\n"
    assert streamed[-1].choices[0].finish_reason == "length"
    assert server.engine.submitted[-1].prompt_ids == [5, 6]


def test_prompts_are_encoded_in_full_and_get_a_bos_only_when_asked(server):
    prompt = "<｜User｜>x"
    for extra, head in (({}, []), ({"add_special_tokens": True}, [0])):
        server.client.post("/v1/completions", json={"prompt": prompt, **extra})
        assert server.engine.submitted[-1].prompt_ids == head + server.tokenizer.encode(prompt)
    assert server.engine.submitted[0].prompt_ids[0] == 128803


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"chat_template_kwargs": {"thinking": False}, "reasoning_effort": "high"}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "max"}, True),
    ],
)
def test_the_thinking_switch_reaches_prompt_and_parser(server, fields, thinks):
    server.say("text")
    message = server.chat(**fields).json()["choices"][0]["message"]
    assert server.engine.submitted[0].prompt_ids[-1] == (128821 if thinks else 128822)
    assert (message["reasoning_content"], message["content"]) == (("text", "") if thinks else (None, "text"))


def test_sampling_parameters_arrive(server, tmp_path):
    fields = {"temperature": 0, "top_p": 0.5, "top_k": -1, "min_p": 0.1, "seed": 7, "min_tokens": 2, "ignore_eos": True}
    server.chat(**fields, max_tokens=9, max_completion_tokens=8, stop_token_ids=[5], priority=-3)
    request = server.engine.submitted[0]
    got = request.sampling
    assert (got.temperature, got.top_p, got.top_k, got.min_p, got.seed) == (0, 0.5, 0, 0.1, 7)
    assert (got.min_tokens, got.max_tokens, got.ignore_eos, got.stop_token_ids) == (2, 8, True, (5,))
    assert request.priority == -3
    server.chat()
    got = server.engine.submitted[1].sampling
    assert got.max_tokens == 4096 - len(server.engine.submitted[1].prompt_ids)
    assert (got.temperature, got.top_p, got.top_k, got.min_p) == (1, 1, 0, 0)


def test_defaults_come_from_generation_config(serve, tmp_path):
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.95, "eos_token_id": 1}')
    server = serve()
    server.chat()
    got = server.engine.submitted[0].sampling
    assert (got.temperature, got.top_p) == (0.6, 0.95)


def test_seeds_of_choices(server):
    server.chat(seed=42, n=4)
    seeds = [request.sampling.seed for request in server.engine.submitted]
    assert sorted(seeds) == sorted(derive_seed(42, copy) for copy in range(4))
    assert 42 in seeds
    assert len({derive_seed(base, copy) for base in range(20) for copy in range(20)}) > 380
    assert all(0 <= derive_seed(2**63 - 1, copy) < 2**63 for copy in range(99))
    assert all(request.sampling.is_repeatable for request in server.engine.submitted)
    server.chat()
    server.chat()
    assert not server.engine.submitted[-1].sampling.is_repeatable
    assert server.engine.submitted[-1].sampling.seed != server.engine.submitted[-2].sampling.seed
    assert len({request.request_id for request in server.engine.submitted}) == 6


def test_n_choices_are_streamed_by_index(server):
    texts = ["one a", "two", "three b c"]

    def answer(request):
        index = int(request.request_id.rsplit("-", 1)[1])
        return ids_answer(server.tokenizer.encode("r</think>" + texts[index]), cached=index)(request)

    server.engine.answer = answer
    chunks = events(server.chat(n=3, stream=True, stream_options={"include_usage": True}))
    for index, text in enumerate(texts):
        own = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in own) == text
        assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == ["stop"]
    usage = chunks[-1]["usage"]
    assert usage["completion_tokens"] == sum(len(server.tokenizer.encode("r</think>" + text)) + 1 for text in texts)
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 3
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0  # the first choice's: the prompt counts once


@pytest.mark.parametrize("group", [1, 2, 100])
@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_cuts_counts_and_aborts(server, stream, group):
    server.say("no END yet</think>one two END three four", group=group)
    response = server.chat(
        stop=["END"], stream=stream, **({"stream_options": {"include_usage": True}} if stream else {})
    )
    if stream:
        chunks = events(response)
        content = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])
        usage, last = chunks[-1]["usage"], chunks[-2]["choices"][0]
    else:
        last, usage = response.json()["choices"][0], response.json()["usage"]
        content = last["message"]["content"]
    assert content == "one two "
    assert (last["finish_reason"], last["stop_reason"], last["matched_stop"]) == ("stop", "END", "END")
    assert usage["completion_tokens"] == len(server.tokenizer.encode("no END yet</think>one two END"))
    wait_for(lambda: server.engine.aborted == [server.engine.submitted[0].request_id])


def test_include_stop_str_in_output(server):
    server.say("</think>one END two")
    assert (
        server.chat(stop="END", include_stop_str_in_output=True).json()["choices"][0]["message"]["content"] == "one END"
    )


def test_a_stop_token_counts_but_is_not_shown(server):
    a, b = server.tokenizer.encode("a b")

    def answer(request):
        return [
            RequestOutput(
                request_id=request.request_id, token_ids=[a, b], stop_token_id=b, finish_reason=FinishReason.STOP
            )
        ]

    server.engine.answer = answer
    for include, text in ((False, "a"), (True, "a b")):
        body = {"prompt": "x", "stop_token_ids": [b], "include_stop_str_in_output": include}
        answer = server.client.post("/v1/completions", json=body).json()
        assert answer["choices"][0]["text"] == text
        assert (answer["choices"][0]["stop_reason"], answer["choices"][0]["matched_stop"]) == (b, b)
        assert answer["usage"]["completion_tokens"] == 2


def test_an_abort_by_the_engine_is_a_finish_reason(server):
    server.say("x", finish=FinishReason.ABORT)
    assert server.chat().json()["choices"][0]["finish_reason"] == "abort"


def test_request_ids(server):
    response = server.chat(request_id="my-id_1")
    assert (response.json()["id"], response.headers["x-request-id"]) == ("chatcmpl-my-id_1", "my-id_1")
    server.chat(rid="my-id_1")
    ids = [request.request_id for request in server.engine.submitted]
    assert len(set(ids)) == 2
    assert all("my-id_1" in request_id for request_id in ids)


@pytest.mark.parametrize(
    ("status", "http", "kind"),
    [
        (429, 429, "rate_limit_error"),
        (503, 503, "service_unavailable_error"),
        (400, 400, "invalid_request_error"),
        (None, 500, "server_error"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_rejected_request_is_an_http_error(server, status, http, kind, stream, n):
    def answer(request):
        error = {"error": "secret detail", "error_status": status}
        return [RequestOutput(request_id=request.request_id, finish_reason=FinishReason.ERROR, **error)]

    server.engine.answer = answer
    response = server.chat(stream=stream, n=n)
    assert response.status_code == http
    error = response.json()["error"]
    assert (error["type"], error["code"]) == (kind, http)
    assert ("secret" in error["message"]) == (status is not None)
    assert ("retry-after" in response.headers) == (http in (429, 503))


@pytest.mark.parametrize("n", [1, 2])
def test_a_failure_in_mid_stream_is_an_event_and_then_done(server, n):
    def answer(request):
        start = ids_answer(server.tokenizer.encode("a b"), finish=None)(request)
        error = RequestOutput(request_id=request.request_id, finish_reason=FinishReason.ERROR)
        error.error, error.error_status = "the engine died", 503
        return [*start, error]

    server.engine.answer = answer
    response = server.chat(stream=True, n=n)
    assert response.status_code == 200
    chunks = events(response)
    assert [chunk["error"]["code"] for chunk in chunks if "error" in chunk] == [503]
    assert "error" in chunks[-1]
    with (
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIError, match="the engine died"),
    ):
        list(client.chat.completions.create(model="demo", messages=MESSAGES, stream=True))


def test_an_engine_that_breaks_its_promise_is_an_error_not_a_hang(server):
    server.say("a", finish=None)
    assert server.chat().status_code == 503
    assert "error" in events(server.chat(stream=True))[-1]


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_whose_time_is_over_ends_with_what_it_has(serve, stream):
    body = {"messages": MESSAGES, "stream": stream, "rid": "slow", "thinking": {"type": "disabled"}}
    for settings, headers in (({}, {"X-Request-Timeout": "0.3"}), ({"request_timeout_s": 0.3}, {})):
        server = serve(**settings)
        server.engine.hold = True
        with ThreadPoolExecutor() as pool:
            first = pool.submit(server.client.post, "/v1/chat/completions", json=body, headers=headers)
            wait_for(lambda server=server: server.engine.waiting)
            second = server.client.post("/v1/completions", json={"prompt": "x"}, headers={"X-Request-Id": "slow"})
            assert (second.status_code, second.json()["error"]["param"]) == (400, "request_id")
            response = first.result()
        ends = [chunk["choices"][0] for chunk in events(response)] if stream else response.json()["choices"]
        assert ends[-1]["finish_reason"] == "abort"
        assert "Hello" in response.text
        assert response.headers["x-request-id"] == "slow"
    for headers in {"X-Request-Timeout": "a b"}, {"X-Request-Id": "a b"}, {"X-Request-Timeout": "1_0"}:
        assert server.client.post("/v1/completions", json={"prompt": "x"}, headers=headers).status_code == 400


def test_tokenizer_info_names_the_tokens_that_tokenize_knows(server):
    info = server.client.get("/tokenizer_info").json()
    for name, token in (("bos_token", "BOS"), ("eos_token", "EOS"), ("pad_token", "EOS")):
        tokens = server.client.post("/tokenize", json={"prompt": info[name]}).json()["tokens"]
        assert tokens == [server.tokenizer.control_ids[ControlToken[token]]]
    assert info["model_max_length"] == MAX_MODEL_LEN
