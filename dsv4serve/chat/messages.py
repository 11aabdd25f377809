"""OpenAI-shaped message objects -> Message, every field checked, because they come straight from a client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsv4serve.types import InvalidRequest

MAX_MESSAGES = 65536

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
ROLES_TO_COME = ("tool", "function", "latest_reminder")
# What clients echo back from earlier answers or add for their own use: it does not reach the prompt.
IGNORED = frozenset({"name", "refusal", "annotations", "id", "status", "object"})
# Part of OpenAI's message, but it would change the prompt: only an empty value is accepted.
MUST_BE_EMPTY = ("tool_calls", "function_call", "tool_call_id", "audio", "prefix", "task", "tools")


@dataclass(frozen=True)
class Message:
    """One message. `role` is system, user or assistant; `reasoning` is an assistant's earlier thinking."""

    role: str
    content: str
    reasoning: str = ""


def parse_messages(raw: Sequence[Any], param: str = "messages") -> list[Message]:
    """Check a request's messages. Raises InvalidRequest whose `param` is the dotted path of the first bad field."""
    if not raw:
        raise InvalidRequest("at least one message is needed", param)
    if len(raw) > MAX_MESSAGES:
        raise InvalidRequest(f"{len(raw)} messages; at most {MAX_MESSAGES} are allowed", param)
    return [_message(item, f"{param}.{index}") for index, item in enumerate(raw)]


def _message(raw: Any, where: str) -> Message:
    if not isinstance(raw, dict):
        raise InvalidRequest(f"expected an object with role and content, got {_kind(raw)}", where)
    role = _role(raw.get("role"), f"{where}.role")
    for key in MUST_BE_EMPTY:
        if raw.get(key) not in (None, False, [], {}, ""):
            raise InvalidRequest(f"{key} in messages is not supported yet", f"{where}.{key}")
    known = {"role", "content", "reasoning_content", "reasoning", *IGNORED, *MUST_BE_EMPTY}
    for key in raw:
        if key not in known:
            raise InvalidRequest("unknown field of a message", f"{where}.{key}")
    content = _content(raw.get("content"), role, f"{where}.content")
    reasoning = ""
    for key in ("reasoning", "reasoning_content"):  # DeepSeek's own name wins
        value = raw.get(key)
        if value is not None and not isinstance(value, str):
            raise InvalidRequest(f"expected a string or null, got {_kind(value)}", f"{where}.{key}")
        reasoning = value or reasoning
    return Message(role, content, reasoning if role == "assistant" else "")


def _role(value: Any, where: str) -> str:
    if isinstance(value, str):
        if value in ROLES:
            return ROLES[value]
        if value in ROLES_TO_COME:
            raise InvalidRequest(f"role {value!r} is not supported yet; allowed are {', '.join(ROLES)}", where)
    shown = repr(value[:40]) if isinstance(value, str) else _kind(value)
    raise InvalidRequest(f"role is {shown}; allowed are {', '.join(ROLES)}", where)


def _content(value: Any, role: str, where: str) -> str:
    """Text of a content field; text parts are joined by a blank line, as DeepSeek's own API does."""
    if isinstance(value, str):
        return value
    if value is None and role == "assistant":
        return ""
    if isinstance(value, list):
        return "\n\n".join(_part(part, f"{where}.{index}") for index, part in enumerate(value))
    raise InvalidRequest(f"expected a string or a list of text parts, got {_kind(value)}", where)


def _part(value: Any, where: str) -> str:
    if not isinstance(value, dict):
        raise InvalidRequest(f"expected an object with type and text, got {_kind(value)}", where)
    kind = value.get("type")
    if kind != "text":
        shown = repr(kind[:40]) if isinstance(kind, str) else _kind(kind)
        raise InvalidRequest(
            f"content part of type {shown}; DeepSeek-V4 reads text only (type 'text')", f"{where}.type"
        )
    text = value.get("text")
    if not isinstance(text, str):
        raise InvalidRequest(f"expected a string, got {_kind(text)}", f"{where}.text")
    return text


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
