"""A body of Anthropic's Messages API -> the same request as a chat body, every block checked."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from dsv4serve.api.body import validate
from dsv4serve.api.schemas import MAX_TOKENS, ChatBody
from dsv4serve.api.strict import Strict
from dsv4serve.chat.tools import kind_of, to_json
from dsv4serve.types import InvalidRequest

THINKING = {"enabled": "enabled", "adaptive": "enabled", "disabled": "disabled"}
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
ROLES = ("user", "assistant", "system")


class CountBody(Strict):
    """POST /v1/messages/count_tokens. What is Any is checked by `chat_body`."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    messages: list[Any]
    system: Any = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    thinking: Any = None
    output_config: Any = None
    cache_control: Any = None  # without effect, as context_management: every prefix is cached, none is edited
    context_management: Any = None


class MessagesBody(CountBody):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = None


def chat_body(body: CountBody) -> ChatBody:
    """The chat request that means the same. Raises InvalidRequest naming what is wrong."""
    messages = [*_system(body.system)]
    for index, message in enumerate(body.messages):
        messages += _message(message, f"messages.{index}")
    last = messages[-1] if messages else {}
    if last.get("role") == "assistant" and not last.get("tool_calls"):
        last["prefix"] = True  # here the model goes on with a last message of its own
    choice = _object(body.tool_choice, "tool_choice")
    thinking = _object(body.thinking, "thinking")
    output = _object(body.output_config, "output_config")
    wanted: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "tools": body.tools and [_tool(tool, f"tools.{index}") for index, tool in enumerate(body.tools)],
        "tool_choice": _tool_choice(choice),
        "parallel_tool_calls": False if choice.get("disable_parallel_tool_use") else None,
        "thinking": _thinking(thinking),
        "thinking_token_budget": thinking.get("budget_tokens"),
        "reasoning_effort": output.get("effort"),
        "response_format": _response_format(_object(output.get("format"), "output_config.format")),
    }
    if isinstance(body, MessagesBody):
        wanted |= body.model_dump(include={"max_tokens", "temperature", "top_p", "top_k", "stream"})
        wanted["stop"] = body.stop_sequences
    return validate({name: value for name, value in wanted.items() if value is not None}, ChatBody)


def _system(raw: Any) -> list[dict[str, Any]]:
    return [] if raw is None else [{"role": "system", "content": _texts(raw, "system")}]


def _message(raw: Any, where: str) -> list[dict[str, Any]]:
    """The chat messages of one message: results of tools stand on their own."""
    if not isinstance(raw, dict):
        raise InvalidRequest(f"expected an object with role and content, got {kind_of(raw)}", where)
    role, content = raw.get("role"), raw.get("content")
    if role not in ROLES:
        raise InvalidRequest(f"role must be one of {', '.join(ROLES)}", f"{where}.role")
    where = f"{where}.content"
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise InvalidRequest(f"expected a string or a list of blocks, got {kind_of(content)}", where)
    if role == "assistant":
        return [_assistant(content, where)]
    messages: list[dict[str, Any]] = []
    for index, block in enumerate(content):
        if isinstance(block, dict) and block.get("type") == "tool_result" and role == "user":
            messages.append(_tool_result(block, f"{where}.{index}"))
        elif messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + _text(block, f"{where}.{index}")
        else:
            messages.append({"role": role, "content": _text(block, f"{where}.{index}")})
    return messages or [{"role": role, "content": ""}]


def _assistant(blocks: list[Any], where: str) -> dict[str, Any]:
    reasoning, texts, calls = [], [], []
    for index, block in enumerate(blocks):
        at = f"{where}.{index}"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "thinking":
            reasoning.append(_string(block, "thinking", at))
        elif kind == "tool_use":
            arguments = block.get("input")
            if not isinstance(arguments, dict):
                raise InvalidRequest(f"expected an object, got {kind_of(arguments)}", f"{at}.input")
            function = {"name": block.get("name"), "arguments": _json(arguments, at)}
            calls.append({"id": _string(block, "id", at), "type": "function", "function": function})
        elif kind == "redacted_thinking":
            raise InvalidRequest("encrypted thinking of another model cannot be read", f"{at}.type")
        else:
            texts.append(_text(block, at))
    return {
        "role": "assistant",
        "content": "\n\n".join(texts),
        "reasoning_content": "\n".join(reasoning),
        "tool_calls": calls,
    }


def _tool_result(block: dict[str, Any], where: str) -> dict[str, Any]:
    content = block.get("content")
    if isinstance(content, list):  # images become a note, see chat.messages: a tool's result is not the client's doing
        parts: Any = [item if isinstance(item, dict) else {"type": "text", "text": item} for item in content]
    else:
        parts = content
    return {"role": "tool", "tool_call_id": _string(block, "tool_use_id", where), "content": parts}


def _texts(raw: Any, where: str) -> str:
    if isinstance(raw, str):
        return raw
    if isinstance(raw, list):
        return "\n\n".join(_text(block, f"{where}.{index}") for index, block in enumerate(raw))
    raise InvalidRequest(f"expected a string or a list of text blocks, got {kind_of(raw)}", where)


def _text(block: Any, where: str) -> str:
    if not isinstance(block, dict):
        raise InvalidRequest(f"expected an object with type and text, got {kind_of(block)}", where)
    if block.get("type") != "text":
        raise InvalidRequest(
            f"a block of type {str(block.get('type'))[:40]!r} cannot stand here; DeepSeek-V4 reads text only",
            f"{where}.type",
        )
    return _string(block, "text", where)


def _tool(raw: Any, where: str) -> dict[str, Any]:
    tool = _object(raw, where)
    if tool.get("type") not in (None, "custom"):
        raise InvalidRequest("only tools of type custom are supported: this server runs none itself", f"{where}.type")
    function = {"name": tool.get("name"), "description": tool.get("description"), "strict": tool.get("strict")}
    function["parameters"] = tool.get("input_schema")
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _tool_choice(choice: dict[str, Any]) -> Any:
    kind = str(choice.get("type"))  # whatever was sent: a list has no hash
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if choice and kind not in CHOICES:
        raise InvalidRequest(f"allowed are {', '.join(CHOICES)} and tool", "tool_choice.type")
    return CHOICES.get(kind)


def _thinking(thinking: dict[str, Any]) -> dict[str, str] | None:
    kind = str(thinking.get("type"))
    if thinking and kind not in THINKING:
        raise InvalidRequest(f"allowed are {', '.join(THINKING)}", "thinking.type")
    return {"type": THINKING[kind]} if thinking else None


def _response_format(format: dict[str, Any]) -> dict[str, Any] | None:
    if not format:
        return None
    if format.get("type") != "json_schema":
        raise InvalidRequest("only json_schema is supported", "output_config.format.type")
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": format.get("schema")}}


def _object(raw: Any, where: str) -> dict[str, Any]:
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise InvalidRequest(f"expected an object, got {kind_of(raw)}", where)
    return raw


def _string(block: dict[str, Any], key: str, where: str) -> str:
    value = block.get(key)
    if not isinstance(value, str):
        raise InvalidRequest(f"expected a string, got {kind_of(value)}", f"{where}.{key}")
    return value


def _json(value: dict[str, Any], where: str) -> str:
    try:
        return to_json(value)
    except RecursionError:
        raise InvalidRequest("the input is nested too deeply", where) from None
