"""OpenAI-shaped message objects -> Message, every field checked, because they come straight from a client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsv4serve.chat.tools import Tool, ToolCall, kind_of, parse_calls, parse_tools
from dsv4serve.types import InvalidRequest

MAX_MESSAGES = 65536

ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")
USER_TASKS = ("action", "query", "authority", "domain", "read_url")
ASSISTANT_TASKS = ("title",)
# What clients echo from earlier answers or add for their own use: like unknown fields it does not reach the prompt.
IGNORED = frozenset({"name", "refusal", "annotations", "id", "status", "object"})
# Part of OpenAI's message, but it would change the prompt: only an empty value is accepted.
MUST_BE_EMPTY = ("function_call", "audio")
# Fields that belong to some roles; elsewhere only an empty value is accepted.
FIELDS_OF = {
    "tool_calls": ("assistant",),
    "prefix": ("assistant",),
    "tool_call_id": ("tool",),
    "tools": ("system", "developer"),
    "task": ("user", "developer", "assistant"),
}
KNOWN = frozenset({"role", "content", "reasoning_content", "reasoning", *IGNORED, *MUST_BE_EMPTY, *FIELDS_OF})


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `role` is system, user, assistant, tool, latest_reminder, or developer in the sense of DeepSeek's
    own search pipeline: a user turn that may bring tools."""

    role: str
    content: str
    reasoning: str = ""  # an assistant's earlier thinking
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""  # of a tool message: the call that it answers
    tools: tuple[Tool, ...] = ()
    prefix: bool = False  # the assistant message that the model is to continue
    task: str = ""  # one of USER_TASKS or ASSISTANT_TASKS


def parse_messages(
    raw: Sequence[Any],
    param: str = "messages",
    *,
    developer_role: str = "system",
    continue_final: bool = False,
    task: str | None = None,
) -> list[Message]:
    """Check a request's messages. Raises InvalidRequest whose `param` is the dotted path of the first bad field.

    `developer_role` "system" reads developer messages as OpenAI's clients mean them, "user" as DeepSeek's encoder does.
    `continue_final` asks for what `prefix: true` on the last message asks for, and `task` for that task of it.
    """
    if not raw:
        raise InvalidRequest("at least one message is needed", param)
    if len(raw) > MAX_MESSAGES:
        raise InvalidRequest(f"{len(raw)} messages; at most {MAX_MESSAGES} are allowed", param)
    last = len(raw) - 1
    if continue_final and isinstance(raw[last], dict):
        if raw[last].get("role") != "assistant":
            raise InvalidRequest("there is nothing to continue: the last message is not the assistant's", param)
        raw = [*raw[:last], {**raw[last], "prefix": True}]
    messages: list[Message] = []
    for index, item in enumerate(raw):
        message = _message(item, f"{param}.{index}", developer_role)
        if message.prefix and index != last:
            raise InvalidRequest("only the last message can be continued", f"{param}.{index}.prefix")
        if messages and messages[-1].task and message.role != "assistant":
            raise InvalidRequest("only the assistant's answer can follow a task", f"{param}.{index - 1}.task")
        messages.append(message)
    if task:
        messages[last] = _with_task(messages[last], task)
    return messages


def unknown_message_fields(raw: Sequence[Any], param: str = "messages") -> list[str]:
    """Dotted names of the fields of messages that mean nothing here."""
    return [
        f"{param}.{index}.{key}"
        for index, item in enumerate(raw)
        if isinstance(item, dict)
        for key in item
        if key not in KNOWN
    ]


def _with_task(message: Message, task: str) -> Message:
    """`message` with a task that stands in the request instead of in it. It is the last one."""
    allowed = {"user": USER_TASKS, "developer": USER_TASKS, "assistant": ASSISTANT_TASKS}.get(message.role, ())
    if task not in allowed:
        tasks = f"tasks of it are {', '.join(allowed)}" if allowed else "it can have none"
        raise InvalidRequest(f"task is {task!r}, but the last message is of role {message.role}: {tasks}", "task")
    if message.prefix or message.task not in ("", task):
        raise InvalidRequest("the last message is a prefix or has another task already", "task")
    return replace(message, task=task)


def _message(raw: Any, where: str, developer_role: str) -> Message:
    if not isinstance(raw, dict):
        raise InvalidRequest(f"expected an object with role and content, got {kind_of(raw)}", where)
    role = raw.get("role")
    if role not in ROLES:
        shown = repr(role[:40]) if isinstance(role, str) else kind_of(role)
        raise InvalidRequest(f"role is {shown}; allowed are {', '.join(ROLES)}", f"{where}.role")
    for key in raw:
        if raw[key] in (None, False, [], {}, ""):
            continue
        if key in MUST_BE_EMPTY:
            raise InvalidRequest(f"{key} in messages is not supported", f"{where}.{key}")
        if key in FIELDS_OF and role not in FIELDS_OF[key]:
            raise InvalidRequest(f"only messages of {' and '.join(FIELDS_OF[key])} have {key}", f"{where}.{key}")
    content = _content(raw.get("content"), role, f"{where}.content")
    if role == "user":  # by far the most frequent, together with assistant: nothing more to look at
        return Message(role, content, task=_task(raw, USER_TASKS, where))
    if role == "assistant":
        return Message(
            role,
            content,
            _text(raw, "reasoning_content", where) or _text(raw, "reasoning", where),  # DeepSeek's own name wins
            parse_calls(raw.get("tool_calls"), f"{where}.tool_calls"),
            prefix=_flag(raw, "prefix", where),
            task=_task(raw, ASSISTANT_TASKS, where),
        )
    if role == "tool":
        return Message(role, content, tool_call_id=_text(raw, "tool_call_id", where))
    return Message(
        developer_role if role == "developer" and developer_role == "system" else role,
        content,
        tools=tuple(parse_tools(raw.get("tools"), f"{where}.tools")),
        task=_task(raw, USER_TASKS if (role, developer_role) == ("developer", "user") else (), where),
    )


def _text(raw: dict[str, Any], key: str, where: str) -> str:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise InvalidRequest(f"expected a string or null, got {kind_of(value)}", f"{where}.{key}")
    return value or ""


def _flag(raw: dict[str, Any], key: str, where: str) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(f"expected a boolean, got {kind_of(value)}", f"{where}.{key}")
    return bool(value)


def _task(raw: dict[str, Any], allowed: Sequence[str], where: str) -> str:
    task = _text(raw, "task", where)
    if task and task not in allowed:
        raise InvalidRequest(f"task is {task[:40]!r}; allowed here are {', '.join(allowed) or 'none'}", f"{where}.task")
    return task


def _content(value: Any, role: str, where: str) -> str:
    """Text of a content field; text parts are joined by a blank line, as DeepSeek's own API does."""
    if isinstance(value, str):
        return value
    if value is None and role in ("assistant", "tool"):
        return ""
    if isinstance(value, list):
        return "\n\n".join(_part(part, role, f"{where}.{index}") for index, part in enumerate(value))
    raise InvalidRequest(f"expected a string or a list of text parts, got {kind_of(value)}", where)


def _part(value: Any, role: str, where: str) -> str:
    if not isinstance(value, dict):
        raise InvalidRequest(f"expected an object with type and text, got {kind_of(value)}", where)
    kind = value.get("type")
    if kind != "text":
        if role == "tool" and isinstance(kind, str):  # a tool's result is not the client's to change
            return f"[Unsupported {kind}]"
        shown = repr(kind[:40]) if isinstance(kind, str) else kind_of(kind)
        raise InvalidRequest(
            f"content part of type {shown}; DeepSeek-V4 reads text only (type 'text')", f"{where}.type"
        )
    text = value.get("text")
    if not isinstance(text, str):
        raise InvalidRequest(f"expected a string, got {kind_of(text)}", f"{where}.text")
    return text
