"""Messages -> prompt segments, the layout of DeepSeek-V4's own encoder (it ships Python, not a Jinja template).

    BOS [system] (USER text ASSISTANT ([THINK reasoning] END_THINK answer EOS)?)* ASSISTANT (THINK | END_THINK)

There is no separator between turns and no role token for system text.
"""

from __future__ import annotations

from collections.abc import Sequence

from dsv4serve.chat.messages import Message
from dsv4serve.chat.tokenizer import ControlToken, Segment

DEFAULT_THINKING = True  # as DeepSeek's own API


def resolve_thinking(
    thinking_type: str | None = None,
    thinking: bool | None = None,
    enable_thinking: bool | None = None,
    reasoning_effort: str | None = None,
) -> bool:
    """The thinking switch from the ways clients say it, strongest first.

    `thinking.type` (enabled, disabled), then chat_template_kwargs.thinking and .enable_thinking, then
    reasoning_effort (none = off, any other = on), then the default. So an explicit off wins over an effort.
    """
    if thinking_type is not None:
        return thinking_type == "enabled"
    for switch in (thinking, enable_thinking):
        if switch is not None:
            return switch
    if reasoning_effort is not None:
        return reasoning_effort != "none"
    return DEFAULT_THINKING


def render(messages: Sequence[Message], thinking: bool, drop_thinking: bool = True) -> list[Segment]:
    """Segments of the prompt that asks for the next assistant turn.

    System messages are hoisted to the top; consecutive user messages form one turn. With `drop_thinking` the
    reasoning of assistant turns before the last user turn is left out; without `thinking` all of it is.
    """
    system = [message.content for message in messages if message.role == "system" and message.content]
    turns = [message for message in messages if message.role != "system"]
    last_user = max((i for i, message in enumerate(turns) if message.role == "user"), default=-1)
    segments: list[Segment] = [ControlToken.BOS, "\n\n".join(system)]
    for index, message in enumerate(turns):
        if message.role == "user":
            follows_user = index > 0 and turns[index - 1].role == "user"
            segments += ["\n\n" if follows_user else ControlToken.USER, message.content]
            continue
        segments.append(ControlToken.ASSISTANT)
        if thinking and not (drop_thinking and index < last_user):
            segments += [ControlToken.THINK, message.reasoning]
        segments += [ControlToken.END_THINK, message.content, ControlToken.EOS]
    return [*segments, ControlToken.ASSISTANT, ControlToken.THINK if thinking else ControlToken.END_THINK]
