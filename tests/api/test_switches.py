"""Switches of other engines: how reasoning is shown, who thinks, who shares prefixes, who runs first."""

import pytest
from support.api import events

HEAD = {"reasoning_content": "Why?", "reasoning": "Why?"}


def prompt_of(server):
    return server.tokenizer.decode(server.engine.submitted[-1].prompt_ids)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, {"content": "So.", **HEAD}),
        ({"include_reasoning": True, "separate_reasoning": True, "stream_reasoning": True}, {"content": "So.", **HEAD}),
        ({"stream_reasoning": False}, {"content": "So.", **HEAD}),
        ({"separate_reasoning": False}, {"content": "<think>Why?</think>So.", "reasoning_content": None}),
        ({"include_reasoning": False}, {"content": "So.", "reasoning_content": None}),
        ({"include_reasoning": False, "separate_reasoning": False}, {"content": "So.", "reasoning_content": None}),
    ],
)
def test_how_reasoning_is_shown(server, fields, message):
    server.say("Why?</think>So.")
    answer = server.chat(**fields).json()
    assert answer["choices"][0]["message"] == {"role": "assistant", **message}
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    found = {"content": "", "reasoning_content": ""}
    chunks = events(server.chat(stream=True, **fields))
    for chunk in chunks:
        for name in found:
            found[name] += chunk["choices"][0]["delta"].get(name) or ""
    assert found == {"content": message["content"], "reasoning_content": message["reasoning_content"] or ""}


def test_reasoning_that_is_not_streamed_comes_in_one_piece(server):
    server.say("One. Two. Three.</think>So. And so on.")
    counts = []
    for fields in ({}, {"stream_reasoning": False}):
        chunks = events(server.chat(stream=True, **fields))
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        counts.append([sum(bool(delta.get(name)) for delta in deltas) for name in ("reasoning_content", "content")])
    assert counts[0][0] > counts[1][0] == 1
    assert counts[0][1] == counts[1][1] > 1


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, None),
        ({"reasoning": {"enabled": False}}, False),
        ({"reasoning": {"enabled": True}}, True),
        ({"reasoning": {"effort": "none"}}, False),
        ({"reasoning": {"enabled": False}, "reasoning_effort": "low"}, True),
        ({"reasoning": {"enabled": True}, "chat_template_kwargs": {"thinking": False}}, False),
        ({"reasoning": {"enabled": False}, "thinking": {"type": "enabled"}}, True),
    ],
)
@pytest.mark.parametrize("default", [True, False])
def test_who_thinks(serve, fields, thinks, default):
    server = serve(default_thinking=default)
    assert server.chat(**fields).status_code == 200
    thinks = default if thinks is None else thinks
    assert prompt_of(server).endswith("<think>" if thinks else "</think>")


def test_salts_reach_the_engine(server):
    salts = []
    for fields in (
        {},
        {"cache_salt": "a"},
        {"extra_key": "a"},
        {"cache_salt": "a", "extra_key": "b"},
        {"cache_salt": ""},
    ):
        assert server.chat(**fields).status_code == 200
        assert server.client.post("/v1/completions", json={"prompt": "x", **fields}).status_code == 200
        chat, completion = server.engine.submitted[-2:]
        assert chat.cache_salt == completion.cache_salt
        salts.append(chat.cache_salt)
    assert salts[0] == salts[-1] == ""
    assert len(set(salts)) == 4


@pytest.mark.parametrize(("flipped", "sign"), [(False, 1), (True, -1)])
def test_priority_lower_first_unless_flipped(serve, flipped, sign):
    server = serve(high_priority_first=flipped)
    for priority in (-3, 0, 5):
        assert server.chat(priority=priority).status_code == 200
    assert [request.priority for request in server.engine.submitted] == [-3 * sign, 0, 5 * sign]
