"""Messages -> prompt segments, the layout of DeepSeek-V4's own encoder (it ships Python, not a Jinja template).

    BOS [effort] [system] [tools] [format] (USER text ASSISTANT ([THINK reasoning] END_THINK answer [calls] EOS)?)*
    ASSISTANT (THINK | END_THINK)

There is no separator between turns and no role token for system text.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from dsv4serve.chat.messages import Message
from dsv4serve.chat.tokenizer import ControlToken, Segment
from dsv4serve.chat.tools import OPEN_CALLS, Tool, calls_block, tools_block

USER_SIDE = ("user", "tool", "developer")
TASKS = {
    "query": ControlToken.QUERY,
    "authority": ControlToken.AUTHORITY,
    "domain": ControlToken.DOMAIN,
    "read_url": ControlToken.READ_URL,
    "title": ControlToken.TITLE,
}


def resolve_thinking(
    thinking_type: str | None = None,
    thinking: bool | None = None,
    enable_thinking: bool | None = None,
    reasoning_effort: str | None = None,
    reasoning_enabled: bool | None = None,
    *,
    default: bool = True,
) -> bool:
    """The thinking switch from the ways clients say it, strongest first.

    `thinking.type` (enabled, disabled), then chat_template_kwargs.thinking and .enable_thinking, then
    reasoning_effort (none = off, any other = on), then reasoning.enabled, then the server's default (DeepSeek's own API
    thinks). So an explicit off wins over an effort.
    """
    if thinking_type is not None:
        return thinking_type == "enabled"
    for switch in (thinking, enable_thinking):
        if switch is not None:
            return switch
    if reasoning_effort is not None:
        return reasoning_effort != "none"
    return default if reasoning_enabled is None else reasoning_enabled


class OutputStart(StrEnum):
    """Where a prompt leaves the model. The two continuations keep leading newlines of what follows."""

    REASONING = "reasoning"
    CONTENT = "content"
    TOOL_CALLS = "tool_calls"
    REASONING_CONTINUATION = "reasoning_continuation"
    CONTENT_CONTINUATION = "content_continuation"


def output_start(messages: Sequence[Message], thinking: bool, require_call: bool = False) -> OutputStart:
    """Where the prompt that `render` makes of the same arguments leaves the model."""
    turns = [message for message in messages if message.role != "system"]
    if turns and turns[-1].prefix:
        in_reasoning = thinking and _is_open(turns[-1])
        return OutputStart.REASONING_CONTINUATION if in_reasoning else OutputStart.CONTENT_CONTINUATION
    if turns and turns[-1].task:
        return OutputStart.CONTENT
    if require_call and not thinking:
        return OutputStart.TOOL_CALLS
    return OutputStart.REASONING if thinking else OutputStart.CONTENT


def render(
    messages: Sequence[Message],
    thinking: bool,
    *,
    tools: Sequence[Tool] = (),
    effort: str = "",
    response_format: str = "",
    drop_thinking: bool = True,
    require_call: bool = False,
) -> list[Segment]:
    """Segments of the prompt that asks for the next assistant turn, or for the rest of the one with `prefix`.

    `effort` and `response_format` are texts (chat.effort.effort_text, chat.tools.response_format_text). System
    messages are hoisted to the top with their tools; where a message and `tools` define the same name, `tools` wins.
    With `drop_thinking`, and no tools anywhere, the reasoning of assistant turns before the last user turn is left
    out; without `thinking` all of it is. `require_call` opens the calls in the prompt of chat mode.
    """
    system = [message for message in messages if message.role == "system"]
    declared = {tool["name"]: tool for message in system for tool in message.tools}
    declared |= {tool["name"]: tool for tool in tools}
    segments: list[Segment] = [ControlToken.BOS, effort if thinking else ""]
    segments.append("\n\n".join(message.content for message in system if message.content))
    segments += tools_block(declared.values()) if declared else ()
    segments.append(response_format)

    turns = [message for message in messages if message.role != "system"]
    drops = thinking and drop_thinking and not declared and not any(message.tools for message in turns)
    last_user = max((index for index, message in enumerate(turns) if message.role in USER_SIDE), default=-1)
    if drops:  # the official encoder drops earlier developer turns together with the reasoning
        kept = [turn for index, turn in enumerate(turns) if turn.role != "developer" or index >= last_user]
        last_user -= len(turns) - len(kept)
        turns = kept
    task = ""  # of the message before: its answer has neither header nor reasoning
    calls_order: dict[str, int] = {}  # the place of each of the latest calls, by id
    index = 0
    while index < len(turns):
        message = turns[index]
        end = index + 1
        if message.role == "assistant":
            if not task:
                keeps = thinking and not (drops and index < last_user)
                segments += [ControlToken.ASSISTANT, *_opening(message, keeps)]
            segments.append(message.content)
            if message.tool_calls:
                segments += calls_block(message.tool_calls)
                calls_order = {call.id: place for place, call in enumerate(message.tool_calls)}
            if not message.prefix:
                segments.append(ControlToken.EOS)
        elif message.role == "latest_reminder":
            segments += [ControlToken.LATEST_REMINDER, message.content]
        elif message.role == "developer":
            segments += [
                ControlToken.USER,
                *_user_text(message),
                *(tools_block(message.tools) if message.tools else ()),
            ]
        else:
            while end < len(turns) and turns[end].role in ("user", "tool"):
                end += 1
            segments += _user_turn(turns[index:end], calls_order)
        task = turns[end - 1].task
        if task == "action":
            segments += [ControlToken.ASSISTANT, _header_end(thinking), ControlToken.ACTION]
        elif task:
            segments.append(TASKS[task])
        index = end
    if task or (turns and turns[-1].prefix):
        return segments
    segments += [ControlToken.ASSISTANT, _header_end(thinking)]
    return [*segments, *OPEN_CALLS] if require_call and not thinking else segments


def _header_end(thinking: bool) -> ControlToken:
    return ControlToken.THINK if thinking else ControlToken.END_THINK


def _is_open(message: Message) -> bool:
    """Whether a prefix ends inside its reasoning."""
    return bool(message.prefix and message.reasoning and not message.content and not message.tool_calls)


def _opening(message: Message, keeps_reasoning: bool) -> list[Segment]:
    if not keeps_reasoning:
        return [ControlToken.END_THINK]
    opening: list[Segment] = [ControlToken.THINK, message.reasoning]
    return opening if _is_open(message) else [*opening, ControlToken.END_THINK]


def _user_text(message: Message) -> list[Segment]:
    """The text itself; in a read_url task the marker before the URL is a control token, by the task's definition."""
    if message.task != "read_url":
        return [message.content]
    before, marker, url = message.content.rpartition(ControlToken.EXTRACTED_URL)
    return [before, ControlToken.EXTRACTED_URL, url] if marker else [message.content]


def _user_turn(messages: Sequence[Message], calls_order: dict[str, int]) -> list[Segment]:
    """Neighbouring user and tool messages. Results keep the slots of results, in the order of their calls; a result of
    no known call counts as one of the first call."""
    results = iter(
        sorted(
            (message for message in messages if message.role == "tool"),
            key=lambda message: calls_order.get(message.tool_call_id, 0),
        )
    )
    segments: list[Segment] = [ControlToken.USER]
    for place, message in enumerate(messages):
        segments.append("\n\n" if place else "")
        if message.role == "tool":
            segments += ["<tool_result>", next(results).content, "</tool_result>"]
        else:
            segments += _user_text(message)
    return segments
