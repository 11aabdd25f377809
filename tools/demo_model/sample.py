"""What a data builder produces: training samples, and probes that check what the trained model answers.

A builder is a module with two functions:

    def samples(draw: random.Random) -> Iterator[Sample]    endless, at training seeds
    def probes(draw: random.Random) -> Iterator[Probe]      endless, at held-out seeds

All randomness comes from `draw`, so that a seed fixes the data. A builder never renders a prompt: chats are messages as
the API takes them, and the project's own encoder renders them, in training as in serving.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One training document: raw text, or a chat whose last message is the assistant's answer to learn.

    Exactly one of `text` and `messages` is given. Chat messages are OpenAI-shaped dicts (role, content,
    reasoning_content, tool_calls, tool_call_id); `tools` are OpenAI function tools. In chat mode (`thinking` False)
    and with tools every assistant message is learnt; else only the last, because earlier reasoning is not rendered.
    """

    category: str
    text: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    thinking: bool = False
    effort: str = ""  # text of a reasoning effort, in thinking mode


@dataclass(frozen=True)
class Answer:
    """What came back for a probe, as the API's message has it. `tool_calls` are (name, arguments as a JSON string)."""

    content: str
    reasoning: str
    tool_calls: list[tuple[str, str]]
    finish_reason: str


@dataclass(frozen=True)
class Probe:
    """One question with its check: `check` gives a truth for each measure, e.g. {"valid": True, "arguments": False}.

    `messages` end with the user's turn. `category` names the line of the result table (e.g. "sums, 3 digits").
    """

    category: str
    messages: list[dict[str, Any]]
    check: Callable[[Answer], dict[str, bool]]
    tools: list[dict[str, Any]] = field(default_factory=list)
    thinking: bool = False
    max_tokens: int = 200
