"""A body of OpenAI's Responses API -> the same request as a chat body. Nothing is stored between requests."""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from pydantic import Field

from dsv4serve.api.body import validate
from dsv4serve.api.schemas import MAX_TOKENS, ChatBody
from dsv4serve.api.strict import Strict
from dsv4serve.chat.tools import kind_of
from dsv4serve.types import InvalidRequest

TEXT_PARTS = ("input_text", "output_text", "text")
# What would need a memory, or a conversation that is cut by the server; only the empty value is accepted.
STATELESS = {
    "previous_response_id": "responses are not stored: send the whole conversation as input",
    "conversation": "conversations are not stored: send the whole conversation as input",
    "store": "responses are not stored: send store false",
    "background": "there are no background responses",
    "prompt": "there are no stored prompts",
    "max_tool_calls": "this server runs no tools itself",
}

# What the answer repeats as it was sent, read by nobody before: it must be possible to write it.
REPEATED = ("text", "tool_choice", "tools")
MOST_NESTED = 250  # levels, about what orjson writes; it reads four times as many


class ResponsesBody(Strict):
    """POST /v1/responses. What is Any is checked by `chat_body`."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    input: Any
    instructions: str | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None  # obfuscation only: without effect, as `include`
    include: list[str] | None = None
    truncation: str | None = None
    previous_response_id: Any = None
    conversation: Any = None
    store: Any = None
    background: Any = None
    prompt: Any = None
    max_tool_calls: Any = None


def chat_body(body: ResponsesBody) -> ChatBody:
    """The chat request that means the same. Raises InvalidRequest naming what is wrong."""
    for name, reason in STATELESS.items():
        if getattr(body, name) not in (None, False):
            raise InvalidRequest(reason, name)
    if body.truncation not in (None, "disabled"):
        raise InvalidRequest("the server cuts no conversation: only disabled is supported", "truncation")
    for name in REPEATED:
        try:
            orjson.dumps({"response": {name: getattr(body, name)}})  # as deep as in an event
        except TypeError:
            raise InvalidRequest(f"nested too deeply; at most {MOST_NESTED} levels are allowed", name) from None
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        messages.append({"role": "user", "content": body.input})
    elif isinstance(body.input, list):
        for index, item in enumerate(body.input):
            _add_item(messages, item, f"input.{index}")
    else:
        raise InvalidRequest(f"expected a string or a list of items, got {kind_of(body.input)}", "input")
    wanted: dict[str, Any] = body.model_dump(
        include={"model", "temperature", "top_p", "stream", "parallel_tool_calls"}, exclude_none=True
    )
    wanted |= {
        "messages": messages,
        "max_tokens": body.max_output_tokens,
        "tools": body.tools and [_tool(tool, f"tools.{index}") for index, tool in enumerate(body.tools)],
        "tool_choice": _tool_choice(body.tool_choice),
        "reasoning_effort": (body.reasoning or {}).get("effort"),
        "response_format": _response_format((body.text or {}).get("format")),
    }
    return validate({name: value for name, value in wanted.items() if value is not None}, ChatBody)


def _add_item(messages: list[dict[str, Any]], item: Any, where: str) -> None:
    """Reasoning, text and calls that follow each other are one assistant message."""
    if not isinstance(item, dict):
        raise InvalidRequest(f"expected an item (an object), got {kind_of(item)}", where)
    kind = item.get("type", "message")
    if kind == "message":
        content = _text(item.get("content"), f"{where}.content")
        if item.get("role") != "assistant":
            messages.append({"role": item.get("role"), "content": content})
            return
        message = _assistant(messages, ("content", "tool_calls"))
        message["content"] = content
    elif kind == "reasoning":
        message = _assistant(messages, ("content", "tool_calls", "reasoning_content"))
        message["reasoning_content"] = _reasoning(item, where)
    elif kind == "function_call":
        message = _assistant(messages, ())
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        message["tool_calls"] = [*message.get("tool_calls", ()), call]
    elif kind == "function_call_output":
        output = item.get("output")
        result = output if isinstance(output, str) else _text(output, f"{where}.output")
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": result})
    else:
        allowed = "message, reasoning, function_call and function_call_output"
        raise InvalidRequest(f"items of type {str(kind)[:40]!r} are not supported; allowed are {allowed}", where)


def _assistant(messages: list[dict[str, Any]], closed_by: tuple[str, ...]) -> dict[str, Any]:
    """The assistant message that an item continues, a new one when the last has one of `closed_by`."""
    if not messages or messages[-1]["role"] != "assistant" or any(messages[-1].get(key) for key in closed_by):
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _reasoning(item: dict[str, Any], where: str) -> str:
    """The text of a reasoning item; only a summary of what another server thought is better than nothing."""
    for key in ("content", "summary"):
        parts = item.get(key) or []
        if not isinstance(parts, list) or not all(
            isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts
        ):
            raise InvalidRequest("expected a list of objects with text", f"{where}.{key}")
        if parts:
            return "\n".join(part["text"] for part in parts)
    return ""


def _text(raw: Any, where: str) -> str:
    if isinstance(raw, str):
        return raw
    if not isinstance(raw, list):
        raise InvalidRequest(f"expected a string or a list of text parts, got {kind_of(raw)}", where)
    texts = []
    for index, part in enumerate(raw):
        if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise InvalidRequest(
                f"expected a part with text and a type of {', '.join(TEXT_PARTS)}; DeepSeek-V4 reads text only",
                f"{where}.{index}",
            )
        texts.append(part["text"])
    return "\n\n".join(texts)


def _tool(raw: Any, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict) or raw.get("type") != "function":
        raise InvalidRequest("only tools of type function are supported: this server runs none itself", where)
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: raw[name] for name in names if raw.get(name) is not None}}


def _tool_choice(raw: Any) -> Any:
    if isinstance(raw, dict) and raw.get("type") == "function":
        return {"type": "function", "function": {"name": raw.get("name")}}
    return raw


def _response_format(raw: Any) -> dict[str, Any] | None:
    if isinstance(raw, dict) and raw.get("type") == "json_schema":
        names = ("name", "schema", "strict", "description")
        return {"type": "json_schema", "json_schema": {name: raw[name] for name in names if name in raw}}
    return raw  # type: ignore[no-any-return]  # checked with the chat body
