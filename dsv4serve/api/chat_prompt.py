"""A chat request -> its prompt, with what the answer's parser has to know. The command line renders through it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsv4serve.api.schemas import ChatSwitches, Reasoning, TemplateKwargs
from dsv4serve.chat.effort import effort_text
from dsv4serve.chat.messages import parse_messages
from dsv4serve.chat.render import OutputStart, output_start, render, resolve_thinking
from dsv4serve.chat.tokenizer import Segment
from dsv4serve.chat.tools import Tool, parse_tools, response_format_text
from dsv4serve.config import EffortContract
from dsv4serve.types import InvalidRequest


@dataclass(frozen=True)
class ChatPrompt:
    """What the model reads. `tools` are those that it may call, None when it may call none."""

    segments: list[Segment]
    start: OutputStart
    tools: list[Tool] | None

    @property
    def text(self) -> str:
        """The prompt as one string."""
        return "".join(self.segments)


def build_prompt(
    raw_messages: Sequence[Any],
    switches: ChatSwitches,
    contract: EffortContract,
    developer_role: str,
    default_thinking: bool,
) -> ChatPrompt:
    """The prompt of a request. Raises InvalidRequest naming the field that is wrong."""
    kwargs, reasoning = switches.chat_template_kwargs or TemplateKwargs(), switches.reasoning or Reasoning()
    effort = switches.reasoning_effort or kwargs.reasoning_effort or reasoning.effort
    thinking_type = None if switches.thinking is None else switches.thinking.type
    thinking = resolve_thinking(
        *(thinking_type, kwargs.thinking, kwargs.enable_thinking, effort, reasoning.enabled), default=default_thinking
    )
    messages = parse_messages(
        raw_messages,
        developer_role=developer_role,
        continue_final=bool(switches.continue_final_message),
        task=switches.task,
    )
    tools = parse_tools(switches.tools)
    known = {tool["name"]: tool for message in messages for tool in message.tools} | {t["name"]: t for t in tools}
    choice = _tool_choice(switches.tool_choice, known)
    if choice == "none":
        messages, tools, known = [replace(message, tools=()) for message in messages], [], {}
    require_call = choice == "required"
    segments = render(
        messages,
        thinking,
        tools=tools,
        effort=effort_text(effort, contract),
        response_format=response_format_text(switches.response_format),
        drop_thinking=kwargs.drop_thinking is not False,
        require_call=require_call,
    )
    calls = known and not messages[-1].task  # a task's answer is a few words
    return ChatPrompt(segments, output_start(messages, thinking, require_call), list(known.values()) if calls else None)


def _tool_choice(raw: Any, known: dict[str, Tool]) -> str:
    """none, auto or required; naming one function requires a call too."""
    choice = "auto" if raw is None else raw
    if isinstance(choice, dict) and choice.get("type") == "function":
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or name not in known:
            raise InvalidRequest("the function to call is not among the tools", "tool_choice.function.name")
        choice = "required"
    if choice not in ("none", "auto", "required"):
        raise InvalidRequest("expected none, auto, required or an object that names a function", "tool_choice")
    if choice == "required" and not known:
        raise InvalidRequest("a call is required but there are no tools", "tool_choice")
    return str(choice)
