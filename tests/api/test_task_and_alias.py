"""The request field `task`, and names that mean the served model."""

import anthropic
import pytest

from dsv4serve.chat.tokenizer import ControlToken

USER = {"role": "user", "content": "https://a.example"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def prompt_of(server):
    return server.tokenizer.decode(server.engine.submitted[-1].prompt_ids)


@pytest.mark.parametrize(
    ("task", "messages", "end"),
    [
        ("action", [USER], "<｜Assistant｜><think><｜action｜>"),
        ("query", [USER], "https://a.example<｜query｜>"),
        ("authority", [USER], "https://a.example<｜authority｜>"),
        ("domain", [USER], "https://a.example<｜domain｜>"),
        ("read_url", [USER], "https://a.example<｜read_url｜>"),
        ("title", [USER, ASSISTANT], "Hello<｜end▁of▁sentence｜><｜title｜>"),
    ],
)
def test_a_task_of_the_request_is_the_one_of_its_last_message(server, task, messages, end):
    server.say("Search")
    answer = server.chat(messages=messages, task=task, tools=TOOLS).json()
    assert prompt_of(server).endswith(end)
    message = answer["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Search", None)  # no thinking is parsed
    on_message = [*messages[:-1], {**messages[-1], "task": task}]
    before = server.engine.submitted[-1]
    for fields in ({"messages": on_message}, {"messages": on_message, "task": task}):
        server.chat(tools=TOOLS, **fields)
        assert server.engine.submitted[-1].prompt_ids == before.prompt_ids
        assert server.engine.submitted[-1].sampling.banned_token_ids == before.sampling.banned_token_ids
    assert server.tokenizer.control_ids[ControlToken.DSML] in before.sampling.banned_token_ids  # and no calls
    ids = server.client.post("/tokenize", json={"messages": messages, "task": task, "tools": TOOLS}).json()["tokens"]
    assert ids == before.prompt_ids


@pytest.mark.parametrize(
    ("task", "messages"),
    [
        ("title", [USER]),
        ("query", [USER, ASSISTANT]),
        ("query", [USER, {"role": "system", "content": "x"}]),
        ("query", [{**USER, "task": "domain"}]),
        ("title", [USER, {**ASSISTANT, "prefix": True}]),
        ("dream", [USER]),
        (1, [USER]),
    ],
)
def test_a_task_that_does_not_fit_the_last_message_is_refused(server, task, messages):
    answer = server.chat(messages=messages, task=task)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "task")


@pytest.fixture
def aliased(serve):
    return serve(model_alias=("claude-*", "gpt-4o"))


def test_claude_names_reach_the_served_model(aliased):
    aliased.say("</think>Hello")
    with anthropic.Anthropic(base_url=aliased.url, api_key="none", max_retries=0) as client:
        message = client.messages.create(model="claude-x-1", max_tokens=9, messages=[USER])
        count = client.messages.count_tokens(model="claude-y", messages=[USER])
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(model="clade", max_tokens=9, messages=[USER])
    assert (message.model, message.content[0].text) == ("claude-x-1", "Hello")
    assert count.input_tokens == message.usage.input_tokens


def test_an_alias_counts_on_every_route_and_is_echoed(aliased):
    for path, body in (
        ("/v1/chat/completions", {"messages": [USER]}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/responses", {"input": "x"}),
    ):
        for name, status in (("gpt-4o", 200), ("claude-x", 200), ("demo", 200), ("gpt-4", 404), ("CLAUDE-x", 404)):
            answer = aliased.client.post(path, json={"model": name, **body})
            assert answer.status_code == status
            assert status == 404 or answer.json()["model"] == name
        assert aliased.client.post(path, json=body).json()["model"] == "demo"
    assert [card["id"] for card in aliased.client.get("/v1/models").json()["data"]] == ["demo"]
    assert aliased.client.get("/v1/models/gpt-4o").json()["id"] == "gpt-4o"
    assert aliased.client.get("/v1/models/gpt-4").status_code == 404


def test_without_the_setting_no_other_name_is_served(server):
    assert server.chat(model="claude-x-1").status_code == 404
