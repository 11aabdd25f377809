"""What takes long with a long request runs beside the event loop."""

import threading

import pytest

from dsv4serve.api import body, routes_chat, routes_completions, routes_messages, routes_responses

MESSAGES = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
ANTHROPIC = {"messages": MESSAGES, "max_tokens": 5}


@pytest.fixture
def threads(server, monkeypatch):
    """Function -> names of the threads that ran it."""
    found = {}

    def watch(owner, name):
        function = getattr(owner, name)

        def watched(*args, **kwargs):
            found.setdefault(name, set()).add(threading.current_thread().name.split("_")[0])
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(routes_chat, "build_prompt")
    watch(routes_chat, "chat_constraint")
    watch(routes_chat, "client_grammars")
    watch(routes_completions, "body_constraint")
    watch(routes_messages, "chat_body")
    watch(routes_responses, "chat_body")
    watch(server.tokenizer, "encode")
    watch(server.tokenizer, "encode_segments")
    return found


@pytest.mark.parametrize(
    ("path", "body", "functions"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES}, {"build_prompt", "encode_segments", "chat_constraint"}),
        ("/v1/messages", ANTHROPIC, {"chat_body", "build_prompt", "encode_segments", "chat_constraint"}),
        ("/v1/messages/count_tokens", {"messages": MESSAGES}, {"chat_body", "build_prompt", "encode_segments"}),
        ("/v1/responses", {"input": "Hi"}, {"chat_body", "build_prompt", "encode_segments", "chat_constraint"}),
        ("/v1/completions", {"prompt": "Hi"}, {"encode", "body_constraint"}),
        ("/tokenize", {"messages": MESSAGES}, {"build_prompt", "encode_segments"}),
        ("/tokenize", {"prompt": "Hi"}, {"encode"}),
    ],
)
def test_prompts_are_made_in_threads(server, threads, path, body, functions):
    assert server.client.post(path, json=body).status_code == 200
    assert threads == {name: {"tokenize"} for name in functions}


def test_schemas_are_checked_in_threads(server, threads, monkeypatch):
    async def accepts(constraint, vocab_size, fields):
        pass

    monkeypatch.setattr(server.app.state.frontend.grammar_check, "check", accepts)
    assert server.chat(response_format=FORMAT).status_code == 200
    assert threads["chat_constraint"] == threads["client_grammars"] == {"tokenize"}


@pytest.mark.parametrize("large", [False, True])
def test_large_bodies_are_read_in_threads_and_in_pieces(server, monkeypatch, large):
    read = {}

    def watch(owner, name):
        function = getattr(owner, name)

        def watched(*args):
            read[name] = threading.current_thread().name.split("_")[0]
            return function(*args)

        monkeypatch.setattr(owner, name, watched)

    watch(body, "parse_body")
    watch(body.large_json, "loads")
    messages = [{"role": "user", "content": "x"}] * 4 + [{"role": "user", "content": "y" * body.LARGE_BYTES * large}]
    response = server.client.post("/v1/chat/completions", json={"messages": messages})
    assert response.status_code == (400 if large else 200)  # too long for the model
    in_thread = {"parse_body": "tokenize", "loads": "tokenize"}
    assert read == in_thread if large else set(read) == {"parse_body"} and read["parse_body"] != "tokenize"
