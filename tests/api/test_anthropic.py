"""Anthropic's Messages API: the official client, and what it means in the chat API."""

import json

import anthropic
import pytest

from dsv4serve.api.messages_prompt import MessagesBody, chat_body
from dsv4serve.chat.tokenizer import ControlToken
from dsv4serve.types import FinishReason, RequestOutput

D = ControlToken.DSML.value
MESSAGES = [{"role": "user", "content": "Hi"}]
TOOLS = [{"name": "f", "description": "d", "input_schema": {"type": "object"}}]
CALLS = (
    f'Hm.</think>Now.\n\n<{D}tool_calls>\n<{D}invoke name="f">\n'
    f'<{D}parameter name="a" string="true">x "y"</{D}parameter>\n</{D}invoke>\n<{D}invoke name="g">\n</{D}invoke>\n'
    f"</{D}tool_calls>"
)


@pytest.fixture
def client(server):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def prompt_of(server):
    return server.tokenizer.decode(server.engine.submitted[-1].prompt_ids)


def test_a_message(server, client):
    server.say("Why?</think>Hello", cached=3)
    message = client.messages.create(model="demo", max_tokens=9, system="Be.", messages=MESSAGES, stop_sequences=["Q"])
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert (message.content[0].thinking, message.content[1].text) == ("Why?", "Hello")
    assert (message.role, message.stop_reason, message.stop_sequence) == ("assistant", "end_turn", None)
    assert message.id.startswith("msg_")
    assert message._request_id == message.id
    usage = message.usage
    num_prompt = len(server.engine.submitted[0].prompt_ids)
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (num_prompt - 3, 3)
    assert usage.output_tokens == len(server.tokenizer.encode("Why?</think>Hello")) + 1
    assert server.engine.submitted[0].sampling.max_tokens == 9
    assert prompt_of(server) == f"{ControlToken.BOS}Be.<｜User｜>Hi<｜Assistant｜><think>"
    count = client.messages.count_tokens(model="demo", system=[{"type": "text", "text": "Be."}], messages=MESSAGES)
    assert count.input_tokens == num_prompt


@pytest.mark.parametrize("group", [1, 1000])
def test_a_tool_loop_whole_and_streamed(server, client, group):
    server.say(CALLS, group=group)
    asked = {"model": "demo", "max_tokens": 99, "messages": MESSAGES, "tools": TOOLS}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
        assert [block.text for block in message.content if block.type == "text"] == ["Now."]
        calls = [(block.name, block.input) for block in message.content if block.type == "tool_use"]
        assert calls == [("f", {"a": 'x "y"'}), ("g", {})]
        assert message.stop_reason == "tool_use"
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert streamed.content[0].signature == streamed.id
    assert streamed.usage.output_tokens == whole.usage.output_tokens > 0
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": block.name}
        for block in whole.content
        if block.type == "tool_use"
    ]
    server.say("</think>Done")
    turn = {"role": "user", "content": [*results, {"type": "text", "text": "So?"}]}
    history = [*MESSAGES, {"role": "assistant", "content": whole.model_dump()["content"]}, turn]
    answer = client.messages.create(model="demo", max_tokens=9, messages=history, tools=TOOLS)
    assert answer.content[0].text == "Done"
    assert prompt_of(server).endswith(
        "<tool_result>f</tool_result>\n\n<tool_result>g</tool_result>\n\nSo?<｜Assistant｜><think>"
    )
    assert "<think>Hm.</think>Now." in prompt_of(server)


def test_the_events_of_a_stream_on_the_wire(server):
    server.say("</think>Hi", cached=2)
    body = {"max_tokens": 5, "messages": MESSAGES, "stream": True}
    response = server.client.post("/v1/messages?beta=true", json=body)
    events = [part.split("\n") for part in response.text.strip().split("\n\n")]
    assert all(name.removeprefix("event: ") == json.loads(data[6:])["type"] for name, data in events)
    kinds = [name.removeprefix("event: ") for name, _ in events]
    assert [kinds[0], kinds[1], kinds[-2], kinds[-1]] == ["message_start", "ping", "message_delta", "message_stop"]
    start = json.loads(events[0][1][6:])["message"]
    assert (start["content"], start["usage"]["cache_read_input_tokens"]) == ([], 2)


@pytest.mark.parametrize(
    ("text", "finish", "stops", "expected"),
    [
        ("</think>one", FinishReason.LENGTH, None, ("max_tokens", None)),
        ("</think>one END two", FinishReason.STOP, ["END"], ("stop_sequence", "END")),
    ],
)
def test_stop_reasons(server, client, text, finish, stops, expected):
    server.say(text, finish=finish)
    extra = {"stop_sequences": stops} if stops else {}
    message = client.messages.create(model="demo", max_tokens=9, messages=MESSAGES, **extra)
    assert (message.stop_reason, message.stop_sequence) == expected


def test_thinking_is_switched_and_a_last_message_is_continued(server, client):
    server.say(" world")
    history = [*MESSAGES, {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]}]
    off = {"type": "disabled"}
    message = client.messages.create(model="demo", max_tokens=9, messages=history, thinking=off)
    assert [(block.type, block.text) for block in message.content] == [("text", " world")]
    assert prompt_of(server).endswith("</think>Hello")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tool_choice": {"type": "any"}}, {"tool_choice": "required"}),
        ({"tool_choice": {"type": "none"}}, {"tool_choice": "none"}),
        (
            {"tool_choice": {"type": "tool", "name": "f"}},
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        ),
        ({"output_config": {"effort": "max"}}, {"reasoning_effort": "max"}),
        ({"top_k": 5, "temperature": 0.5}, {"top_k": 5, "temperature": 0.5}),
        ({"metadata": {"user_id": "u"}, "service_tier": "auto", "cache_control": {"type": "ephemeral"}}, {}),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "output", "schema": {"type": "object"}},
                }
            },
        ),
    ],
)
def test_fields_mean_the_same_as_in_chat(fields, expected):
    chat = chat_body(MessagesBody.model_validate({"messages": MESSAGES, "max_tokens": 5, "tools": TOOLS, **fields}))
    assert {name: getattr(chat, name) for name in expected} == expected
    assert chat.tools == [
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    ]


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0.type"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "redacted_thinking"}]}]},
            "messages.0.content.0.type",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"tool_choice": {"type": "x"}}, "tool_choice.type"),
        ({"thinking": {"type": "x"}}, "thinking.type"),
        ({"tool_choice": {"type": []}}, "tool_choice.type"),
        ({"thinking": {"type": {}}}, "thinking.type"),
        ({"system": 5}, "system"),
    ],
)
def test_errors_have_anthropics_shape_and_say_where(server, fields, where):
    response = server.client.post("/v1/messages", json={"messages": MESSAGES, "max_tokens": 5, **fields})
    assert response.status_code == 400
    body = response.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert where in body["error"]["message"]


def test_other_errors(serve):
    server = serve(api_key=("secret",))
    body = {"messages": MESSAGES, "max_tokens": 5}
    refused = server.client.post("/v1/messages", json=body)
    assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
    with anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0) as client:
        assert client.messages.create(model="demo", **body).content
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(model="other", **body)
        server.say("x", finish=FinishReason.ABORT)
        with pytest.raises(anthropic.InternalServerError, match="overloaded_error"):
            client.messages.create(model="demo", **body)

        def answer(request):
            output = RequestOutput(request_id=request.request_id, token_ids=[5])
            error = RequestOutput(request_id=request.request_id, finish_reason=FinishReason.ERROR)
            error.error, error.error_status = "no engine", 503
            return [output, error]

        server.engine.answer = answer
        with pytest.raises(anthropic.APIStatusError, match="no engine"):
            list(client.messages.create(model="demo", stream=True, **body))


def test_the_budget_of_thinking_arrives(server):
    thinking = {"type": "enabled", "budget_tokens": 7}
    server.client.post("/v1/messages", json={"messages": MESSAGES, "max_tokens": 5, "thinking": thinking})
    assert server.engine.submitted[0].sampling.thinking_budget == 7
