"""Tools, continuation and effort over HTTP, with the official client."""

import json

import openai
import pytest

from dsv4serve.chat.tokenizer import ControlToken
from dsv4serve.types import FinishReason

D = ControlToken.DSML.value
MESSAGES = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALLS = (
    f'Hm.</think>Now.\n\n<{D}tool_calls>\n<{D}invoke name="f">\n'
    f'<{D}parameter name="a" string="true">x "y"</{D}parameter>\n'
    f'<{D}parameter name="b" string="false">[1, 2]</{D}parameter>\n</{D}invoke>\n<{D}invoke name="g">\n</{D}invoke>\n'
    f"</{D}tool_calls>"
)
EXPECTED = [("f", {"a": 'x "y"', "b": [1, 2]}), ("g", {})]


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def prompt_of(server):
    """The prompt of the last request that reached the engine."""
    return server.tokenizer.decode(server.engine.submitted[-1].prompt_ids)


def test_calls_in_a_message_and_their_way_back(server, client):
    server.say(CALLS)
    choice = client.chat.completions.create(model="demo", messages=MESSAGES, tools=TOOLS).choices[0]
    calls = choice.message.tool_calls
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == EXPECTED
    assert (choice.message.content, choice.message.reasoning_content) == ("Now.", "Hm.")
    assert choice.finish_reason == "tool_calls"
    assert len({call.id for call in calls}) == 2
    results = [{"role": "tool", "tool_call_id": call.id, "content": call.function.name} for call in reversed(calls)]
    history = [*MESSAGES, choice.message.model_dump(), *results]
    client.chat.completions.create(model="demo", messages=history, tools=TOOLS)
    results = "<tool_result>f</tool_result>\n\n<tool_result>g</tool_result>"
    sent_back = CALLS.replace(f'name="g">\n</{D}', f'name="g">\n\n</{D}')
    assert prompt_of(server).endswith(
        f"<think>{sent_back}{ControlToken.EOS}{ControlToken.USER}{results}<｜Assistant｜><think>"
    )


@pytest.mark.parametrize("group", [1, 5, 1000])
def test_a_stream_of_calls(server, client, group):
    server.say(CALLS, group=group)
    chunks = list(client.chat.completions.create(model="demo", messages=MESSAGES, tools=TOOLS, stream=True))
    lists = [chunk.choices[0].delta.tool_calls or [] for chunk in chunks]
    assert max(map(len, lists)) <= 4  # of each call the start and one piece
    deltas = [call for calls in lists for call in calls]
    for index, (name, arguments) in enumerate(EXPECTED):
        first, *others = [delta for delta in deltas if delta.index == index]
        assert (first.function.name, first.function.arguments, first.type) == (name, "", "function")
        assert first.id.startswith("call_")
        assert {(other.id, other.function.name) for other in others} == {(None, None)}
        assert json.loads("".join(delta.function.arguments for delta in others)) == arguments
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Now."
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["tool_calls"]


def test_what_follows_the_calls_is_not_generated(server):
    server.say(CALLS + "\nand so on", group=1)
    choice = server.chat(tools=TOOLS).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "Now.")
    assert server.engine.aborted == [server.engine.submitted[0].request_id]


def test_a_call_cut_by_max_tokens_ends_with_length(server):
    server.say(CALLS[: CALLS.index('"y"')], finish=FinishReason.LENGTH)
    choice = server.chat(tools=TOOLS).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": "x '


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_tools_the_prompt_has_none_and_nothing_is_parsed(server, fields):
    server.say(CALLS)
    choice = server.chat(**fields).json()["choices"][0]
    assert "## Tools" not in prompt_of(server)
    assert choice["finish_reason"] == "stop"
    assert "tool_calls" not in choice["message"]


@pytest.mark.parametrize("fields", [{"continue_final_message": True, "add_generation_prompt": False}, {}])
def test_a_prefix_is_continued_and_keeps_its_leading_newlines(server, fields):
    server.say("\nsecond")
    last = {"role": "assistant", "content": "first"} | ({} if fields else {"prefix": True})
    message = server.chat(messages=[*MESSAGES, last], **fields).json()["choices"][0]["message"]
    assert prompt_of(server).endswith(f"{ControlToken.ASSISTANT}<think></think>first")
    assert (message["content"], message["reasoning_content"]) == ("\nsecond", None)


def test_effort_follows_the_contract_of_the_server(serve):
    effort = {"reasoning_effort": "max"}
    for settings, fields, start in (
        ({}, {}, ""),
        ({}, effort, "Reasoning Effort: Absolute"),
        ({"effort_contract": "0731"}, {}, "Reasoning Effort: Absolute"),
        ({"effort_contract": "0731"}, {"chat_template_kwargs": effort}, "Reasoning Effort: Beyond"),
        ({"effort_contract": "0731"}, effort | {"thinking": {"type": "disabled"}}, ""),
    ):
        server = serve(**settings)
        server.chat(**fields)
        prompt = prompt_of(server).removeprefix(ControlToken.BOS)
        assert prompt.startswith(start or ControlToken.USER)


def test_developer_messages_are_system_text_unless_the_server_says_otherwise(serve):
    messages = [{"role": "developer", "content": "d"}, *MESSAGES]
    for settings, start in (({}, "d<｜User｜>Hi"), ({"developer_role": "user"}, "<｜User｜>d<｜User｜>Hi")):
        server = serve(**settings)
        server.chat(messages=messages, thinking={"type": "disabled"})
        assert prompt_of(server).startswith(ControlToken.BOS + start)


def test_tokenize_shows_the_prompt_of_chat_with_tools(server):
    server.chat(tools=TOOLS)
    body = {"messages": MESSAGES, "tools": TOOLS}
    assert server.client.post("/tokenize", json=body).json()["tokens"] == server.engine.submitted[-1].prompt_ids
