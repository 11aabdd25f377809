"""Chats of one question, in the shares that all of training uses: system prompts in 40 %, thinking mode in 25 %."""

from __future__ import annotations

import random
from typing import Any

from tools.demo_model.sample import Sample

SYSTEM_SHARE, THINKING_SHARE = 0.4, 0.25
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You are a friendly assistant.",
    "You are a careful assistant.",
    "You are a small demo model.",
    "You are a polite and helpful assistant.",
    "Answer the user's questions.",
    "Be brief and correct.",
    "Answer in one sentence.",
    "Keep your answers short.",
    "Help the user as well as you can.",
)


def question(draw: random.Random, text: str) -> list[dict[str, Any]]:
    """Messages up to the answer: `text` as the user's turn, sometimes with a system prompt before it."""
    user = {"role": "user", "content": text}
    if draw.random() < SYSTEM_SHARE:
        return [{"role": "system", "content": draw.choice(SYSTEMS)}, user]
    return [user]


def answered(messages: list[dict[str, Any]], category: str, content: str, reasoning: str | None) -> Sample:
    """`messages` and the assistant's `content`; in thinking mode when there is a `reasoning`."""
    answer: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning is not None:
        answer["reasoning_content"] = reasoning
    return Sample(category, messages=[*messages, answer], thinking=reasoning is not None)
