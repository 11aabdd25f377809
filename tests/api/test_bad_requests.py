"""What a client sends wrong is a 400 (or 404, 405, 413) in the OpenAI shape, never a 422 or a dropped connection."""

import contextlib
import json

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv4serve.api.body import parse_body
from dsv4serve.api.schemas import ChatBody, CompletionBody
from dsv4serve.api.strict import IGNORED, NOT_YET
from dsv4serve.types import InvalidRequest

ROUTES = {
    "/v1/completions": b'"prompt": "x"',
    "/v1/chat/completions": b'"messages": [{"role": "user", "content": "x"}]',
}


def error_of(response, status=400):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == status
    assert body["error"]["message"]
    return body["error"]


WRONG = [
    ("temperature", b'"1"'),
    ("temperature", b"true"),
    ("temperature", b"-0.1"),
    ("temperature", b"2.1"),
    ("temperature", b"1e308"),
    ("top_p", b"0"),
    ("top_p", b"1.5"),
    ("top_k", b"1.5"),
    ("top_k", b"-2"),
    ("min_p", b"-1"),
    ("seed", b"-1"),
    ("seed", b"9223372036854775808"),
    ("seed", b"1000000000000000000000000000000"),
    ("n", b"0"),
    ("n", b"129"),
    ("n", b"true"),
    ("n", b"1.0"),
    ("max_tokens", b"0"),
    ("max_tokens", b"-5"),
    ("max_tokens", b"1000000000000000000000000000000"),
    ("max_tokens", b'"10"'),
    ("max_tokens", b"4097"),
    ("max_tokens", b"[]"),
    ("min_tokens", b"-1"),
    ("min_tokens", b"5000"),
    ("stop", b"5"),
    ("stop", b'""'),
    ("stop", b'["a", 1]'),
    ("stop", b"{}"),
    ("stop", b'["a","a","a","a","a","a","a","a","a","a","a","a","a","a","a","a","a"]'),
    ("stream", b'"yes"'),
    ("stream", b"1"),
    ("stream_options", b"{}"),
    ("stream_options", b'"x"'),
    ("ignore_eos", b"0"),
    ("priority", b"1e10"),
    ("priority", b"99999999999"),
    ("request_id", b'"a b"'),
    ("request_id", b'""'),
    ("model", b"7"),
    ("logprobs", b'"1"'),
    ("logprobs", b"1.5"),
    ("best_of", b"2"),
    ("prompt_logprobs", b"1"),
    ("logit_bias", b"[5]"),
    ("frequency_penalty", b"2.1"),
    ("frequency_penalty", b'"1"'),
    ("presence_penalty", b"-2.1"),
    ("repetition_penalty", b"0"),
    ("repetition_penalty", b"2.1"),
    ("repetition_penalty", b"-1"),
    ("bad_words", b'"word"'),
    ("no_stop_trim", b"1"),
    ("return_token_ids", b'"yes"'),
]


@pytest.mark.parametrize("route", ROUTES)
def test_every_wrong_field_is_a_400_that_names_it(server, route):
    for name, value in WRONG:
        response = server.client.post(route, content=b"{%s, %s: %s}" % (ROUTES[route], orjson.dumps(name), value))
        assert error_of(response)["param"] == name, (name, value)
    assert server.engine.submitted == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (b'"stop_token_ids": [1, -1]', "stop_token_ids.1"),
        (b'"stop_token_ids": [129280]', "stop_token_ids.0"),
        (b'"stop_token_ids": [1.5]', "stop_token_ids.0"),
        (b'"stream": true, "stream_options": {"include_usage": 1}', "stream_options.include_usage"),
        (b'"thinking": {"type": "maybe"}', "thinking.type"),
        (b'"chat_template_kwargs": {"thinking": "yes"}', "chat_template_kwargs.thinking"),
        (b'"reasoning_effort": "extreme"', "reasoning_effort"),
        (b'"tools": [{"type": "function"}]', "tools.0.function"),
        (b'"tools": {}', "tools"),
        (b'"tools": [{"function": {"name": "f", "parameters": {"type": 1}}}]', "tools.0.function.parameters.type"),
        (b'"tool_choice": "required"', "tool_choice"),
        (b'"tool_choice": "any"', "tool_choice"),
        (b'"continue_final_message": true', "messages"),
        (b'"add_generation_prompt": false', "add_generation_prompt"),
        (b'"response_format": {"type": "json"}', "response_format"),
        (b'"max_completion_tokens": 0', "max_completion_tokens"),
        (b'"messages": []', "messages"),
        (b'"messages": "hi"', "messages"),
        (b'"messages": [{"role": "function", "content": "x"}]', "messages.0.role"),
    ],
)
def test_wrong_chat_fields(server, fields, param):
    route = "/v1/chat/completions"
    response = server.client.post(route, content=b"{%s, %s}" % (ROUTES[route], fields))
    assert error_of(response)["param"] == param


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (b"null", "prompt"),
        (b"5", "prompt"),
        (b'""', "prompt"),
        (b"[]", "prompt"),
        (b"[[]]", "prompt.0"),
        (b"[true]", "prompt.0"),
        (b'["a", 5]', "prompt.1"),
        (b'[5, "a"]', "prompt"),
        (b"[5, -1]", "prompt.1"),
        (b"[[5], [129280]]", "prompt.1.0"),
        (b"[1e30]", "prompt.0"),
        (b'{"a": 1}', "prompt"),
    ],
)
def test_wrong_prompts(server, prompt, param):
    response = server.client.post("/v1/completions", content=b'{"prompt": %s}' % prompt)
    assert error_of(response)["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "temperature": 1e400}',
        b'{"prompt": "x"} {}',
        b"[" * 100_000,
        b'{"prompt":' * 50_000,
        b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
    ],
)
def test_bodies_that_are_no_json_object(server, body):
    for route in (*ROUTES, "/tokenize", "/detokenize"):
        error_of(server.client.post(route, content=body))


def test_prompt_lengths_are_named(server):
    error = error_of(server.client.post("/v1/completions", json={"prompt": [5] * 4096}))
    assert "4096" in error["message"]
    error = error_of(server.client.post("/v1/completions", json={"prompt": [5] * 4000, "max_tokens": 97}))
    assert all(number in error["message"] for number in ("4000", "97", "4096"))
    assert error["param"] == "max_tokens"
    assert server.client.post("/v1/completions", json={"prompt": [5] * 4000, "max_tokens": 96}).status_code == 200
    error = error_of(server.chat(messages=[{"role": "user", "content": "word " * 200_000}]))
    assert "4096" in error["message"]


def test_too_large_a_body_is_a_413_with_and_without_a_length(serve):
    server = serve(max_body_bytes=2000)
    body = b'{"prompt": "%s"}' % (b"a" * 3000)
    assert error_of(server.client.post("/v1/completions", content=body), 413)["type"] == "request_too_large"
    assert error_of(server.client.post("/v1/completions", content=iter([body[:1500], body[1500:]])), 413)
    assert server.client.post("/v1/completions", json={"prompt": "a"}).status_code == 200


def test_unknown_routes_methods_and_models(server):
    error_of(server.client.get("/nope"), 404)
    error_of(server.client.get("/v1/chat/completions/"), 404)
    assert error_of(server.client.get("/v1/completions"), 405)
    assert error_of(server.chat(model="gpt-4"), 404)["param"] == "model"
    error_of(server.client.get("/v1/models/gpt-4"), 404)


def test_what_asks_for_nothing_is_accepted(server):
    fields = {name: neutral[-1] for name, neutral in NOT_YET.items()} | {name: {"any": "thing"} for name in IGNORED}
    assert server.chat(**fields).status_code == 200
    fields = dict.fromkeys([*NOT_YET, *IGNORED, "stop", "seed", "max_tokens", "stream_options", "temperature"])
    assert server.chat(**fields).status_code == 200


@pytest.mark.parametrize(
    ("path", "fields", "names"),
    [
        ("/v1/chat/completions", {}, ""),
        ("/v1/chat/completions", {"temprature": 0, "stream": True}, "temprature"),
        ("/v1/chat/completions", {"stream": True, "stream_options": {"foo": 1}}, "stream_options.foo"),
        ("/v1/completions", {"a b\nc": None, "é": []}, "a?b?c, ?"),
        ("/v1/completions", {f"f{n}": n for n in range(30)}, ", ".join(f"f{n}" for n in range(20)) + ", ..."),
        ("/v1/responses", {"input": "x", "stop": "y"}, "stop"),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5, "seed": 1}, "seed"),
        ("/tokenize", {"prompt": "x", "store": True, "promt": 1}, "promt"),
    ],
)
def test_unknown_fields_are_ignored_and_named_in_a_header(server, path, fields, names):
    response = server.client.post(path, json=orjson.loads(b"{%s}" % ROUTES.get(path, b"")) | fields)
    assert response.status_code == 200, response.text
    assert response.headers.get("x-ignored-fields", "") == names


def test_unknown_fields_of_messages_are_ignored_and_named(server):
    response = server.chat(messages=[{"role": "user", "content": "x", "mood": 1, "name": "me"}])
    assert response.status_code == 200
    assert response.headers["x-ignored-fields"] == "messages.0.mood"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from([*CompletionBody.model_fields, *ChatBody.model_fields, *NOT_YET, "x"])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(fields=st.dictionaries(NAMES, JSON, max_size=5), schema=st.sampled_from([CompletionBody, ChatBody]))
def test_any_json_is_either_accepted_or_an_invalid_request(fields, schema):
    raw = json.dumps(fields).encode()
    with contextlib.suppress(InvalidRequest):  # anything else fails the test
        body = parse_body(raw, schema)
        assert {name.split(".")[0] for name in body.unknown_fields()} <= {*fields}
        assert body.n is None or 1 <= body.n <= 128
