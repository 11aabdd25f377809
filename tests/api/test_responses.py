"""OpenAI's Responses API, seen by the official client."""

import json

import openai
import pytest

from dsv4serve.chat.tokenizer import ControlToken
from dsv4serve.types import FinishReason, RequestOutput

D = ControlToken.DSML.value
TOOLS = [{"type": "function", "name": "f", "parameters": {"type": "object"}}]
CALLS = (
    f'Hm.</think>Now.\n\n<{D}tool_calls>\n<{D}invoke name="f">\n'
    f'<{D}parameter name="a" string="true">x "y"</{D}parameter>\n</{D}invoke>\n<{D}invoke name="g">\n</{D}invoke>\n'
    f"</{D}tool_calls>"
)


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def prompt_of(server):
    return server.tokenizer.decode(server.engine.submitted[-1].prompt_ids)


def test_a_response(server, client):
    server.say("Why?</think>Hello", cached=2)
    response = client.responses.create(model="demo", input="Hi", instructions="Be.", max_output_tokens=9, store=False)
    assert response.output_text == "Hello"
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output[0].content[0].text == "Why?"
    assert (response.status, response.incomplete_details) == ("completed", None)
    assert response.usage.input_tokens_details.cached_tokens == 2
    assert response.usage.output_tokens_details.reasoning_tokens == len(server.tokenizer.encode("Why?"))
    assert prompt_of(server) == f"{ControlToken.BOS}Be.<｜User｜>Hi<｜Assistant｜><think>"


@pytest.mark.parametrize("group", [1, 1000])
def test_a_tool_loop_whole_and_streamed(server, client, group):
    server.say(CALLS, group=group)
    whole = client.responses.create(model="demo", input="Hi", tools=TOOLS)
    with client.responses.stream(model="demo", input="Hi", tools=TOOLS) as stream:
        events = list(stream)
        streamed = stream.get_final_response()
    raw = list(client.responses.create(model="demo", input="Hi", tools=TOOLS, stream=True))
    assert [event.sequence_number for event in raw] == list(range(len(raw)))
    assert (raw[0].type, raw[-1].type) == ("response.created", "response.completed")
    done = [event.item for event in raw if event.type == "response.output_item.done"]
    assert [item.type for item in done] == [item.type for item in whole.output]
    for response in (whole, streamed):
        assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
        calls = [(item.name, json.loads(item.arguments)) for item in response.output if item.type == "function_call"]
        assert calls == [("f", {"a": 'x "y"'}), ("g", {})]
        assert response.output_text == "Now."
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == "Now."
    items = [item.model_dump(exclude_none=True) for item in whole.output]
    outputs = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": item["name"]}
        for item in items
        if item["type"] == "function_call"
    ]
    client.responses.create(model="demo", input=[{"role": "user", "content": "Hi"}, *items, *outputs], tools=TOOLS)
    assert "<think>Hm.</think>Now." in prompt_of(server)
    assert prompt_of(server).endswith(
        "<tool_result>f</tool_result>\n\n<tool_result>g</tool_result><｜Assistant｜><think>"
    )


def test_other_ends(server, client):
    server.say("</think>one", finish=FinishReason.LENGTH)
    response = client.responses.create(model="demo", input="Hi")
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    last = list(client.responses.create(model="demo", input="Hi", stream=True))[-1]
    assert (last.type, last.response.output[0].status) == ("response.incomplete", "incomplete")
    server.say("</think>one", finish=FinishReason.ABORT)
    assert client.responses.create(model="demo", input="Hi").status == "cancelled"

    def answer(request):
        output = RequestOutput(request_id=request.request_id, token_ids=[5])
        error = RequestOutput(request_id=request.request_id, finish_reason=FinishReason.ERROR)
        error.error, error.error_status = "no engine", 503
        return [output, error]

    server.engine.answer = answer
    last = list(client.responses.create(model="demo", input="Hi", stream=True))[-1]
    assert (last.type, last.response.error.message) == ("response.failed", "no engine")


def nested(levels):
    value = {}
    for _ in range(levels - 1):
        value = {"x": value}
    return value


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["text", "tools"])
def test_what_the_answer_repeats_is_nested_as_deep_as_was_sent(server, name, stream):
    server.say("</think>Hello")
    value = {"x": nested(240)} if name == "text" else [TOOLS[0] | {"x": nested(240)}]
    response = server.client.post("/v1/responses", json={"input": "Hi", name: value, "stream": stream})
    assert response.status_code == 200
    last = response.text.split("data: ")[-1] if stream else response.text
    assert (json.loads(last)["response"] if stream else json.loads(last))[name] == value


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "web_search_call"}]}, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        # The answer repeats these, and nothing can write them.
        ({"text": {"x": nested(300)}}, "text"),
        ({"tools": [TOOLS[0] | {"x": nested(300)}]}, "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "f", "x": nested(300)}}, "tool_choice"),
    ],
)
def test_what_is_not_supported_is_a_400(server, fields, param):
    response = server.client.post("/v1/responses", json={"input": "Hi", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
