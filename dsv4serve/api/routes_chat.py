"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from dsv4serve.api.body import read_body
from dsv4serve.api.chat_prompt import ChatPrompt, build_prompt
from dsv4serve.api.constraints import chat_constraint, client_grammars
from dsv4serve.api.frontend import Frontend
from dsv4serve.api.generation import Call, Choice, Event, build_call
from dsv4serve.api.logprobs import Token, chat_logprobs
from dsv4serve.api.schemas import ChatBody, ChatSwitches
from dsv4serve.api.streaming import Generated
from dsv4serve.chat.reply import CallDelta, Reply
from dsv4serve.chat.tokenizer import ChatTokenizer
from dsv4serve.types import Constraint

router = APIRouter()


class ChatShape:
    """Choices with messages. Reasoning goes out under both names that clients read."""

    name, chunk_name = "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer: ChatTokenizer, body: ChatBody) -> None:
        self._tokenizer = tokenizer
        self._has_logprobs, self._has_ids = bool(body.logprobs), bool(body.return_token_ids)

    def opening(self, choice: Choice) -> dict[str, Any]:
        """The role chunk."""
        chunk = _chunk(choice, {"role": "assistant", "content": ""})
        return chunk | {"prompt_token_ids": choice.request.prompt_ids} if self._has_ids else chunk

    def pieces(self, event: Event) -> list[dict[str, Any]]:
        """At most one chunk of reasoning, one of content, one of tool calls. What was asked about tokens goes with the
        first of them."""
        delta, parts = event.delta, []
        if delta.reasoning:
            parts.append(_chunk(event.choice, {"reasoning_content": delta.reasoning, "reasoning": delta.reasoning}))
        if delta.content:
            parts.append(_chunk(event.choice, {"content": delta.content}))
        if delta.calls:
            parts.append(_chunk(event.choice, {"tool_calls": _call_deltas(delta.calls)}))
        if event.tokens:
            parts = parts or [_chunk(event.choice, {})]
            parts[0] |= self._about(event.tokens)
        return parts

    def closing(self, choice: Choice) -> dict[str, Any]:
        """The finish chunk."""
        return _chunk(choice, {}) | _end(choice)

    def whole(self, choice: Choice, reply: Reply) -> dict[str, Any]:
        """The message."""
        reasoning, calls = reply.reasoning, reply.tool_calls
        message: dict[str, Any] = {
            "role": "assistant",
            "content": reply.content,
            "reasoning_content": reasoning or None,
        }
        if reasoning:
            message["reasoning"] = reasoning
        if calls:
            message["tool_calls"] = calls
        about = self._about(choice.tokens)
        if self._has_ids:
            about["prompt_token_ids"] = choice.request.prompt_ids
        return {"index": choice.index, "message": message, "logprobs": None} | about | _end(choice)

    def _about(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The fields that describe tokens, as far as they were asked for."""
        about: dict[str, Any] = {}
        if self._has_logprobs:
            about["logprobs"] = chat_logprobs(self._tokenizer, tokens)
        if self._has_ids:
            about["token_ids"] = [token.id for token in tokens]
        return about


@router.post("/v1/chat/completions")
async def chat_completions(http: Request) -> Response:
    """Messages in, the assistant's next turn out, whole or as server-sent events."""
    frontend: Frontend = http.app.state.frontend
    body = await read_body(http, ChatBody, frontend.config.max_body_bytes)
    call = await chat_call(frontend, body, "chatcmpl-", http.headers)
    return Generated(frontend, call, ChatShape(frontend.tokenizer, body), bool(body.stream), body.stream_options)


async def chat_call(frontend: Frontend, body: ChatBody, prefix: str, headers: Mapping[str, str]) -> Call:
    """The call that answers `body`, whose response id starts with `prefix`. Raises InvalidRequest."""
    frontend.check_model(body.model)
    info = frontend.ready_info()

    def work() -> tuple[ChatPrompt, list[int], Constraint | None, list[str]]:
        prompt, ids = chat_ids(frontend, body.messages, body, info.max_model_len)
        constraint = chat_constraint(body, prompt, frontend.tokenizer)
        return prompt, ids, constraint, [] if constraint is None else client_grammars(body)

    prompt, ids, constraint, fields = await frontend.in_thread(work)
    if constraint is not None and fields:
        await frontend.grammar_check.check(constraint, info.vocab_size, fields)
    limit = body.max_completion_tokens or body.max_tokens
    start, tools = prompt.start, prompt.tools
    return build_call(
        *(frontend, info, body, [ids], limit),
        prefix=prefix,
        start=start,
        tools=tools,
        headers=headers,
        constraint=constraint,
    )


def chat_ids(
    frontend: Frontend, messages: Sequence[Any], switches: ChatSwitches, limit: int | None
) -> tuple[ChatPrompt, list[int]]:
    """The prompt of `messages` and its ids. To be called off the event loop.

    Raises InvalidRequest for wrong messages, and without tokenising for texts that cannot fit `limit` tokens.
    """
    config = frontend.config
    prompt = build_prompt(messages, switches, frontend.effort_contract, config.developer_role, config.default_thinking)
    if limit is not None:
        frontend.check_length(frontend.tokenizer.min_tokens(prompt.text), limit, at_least=True)
    return prompt, frontend.tokenizer.encode_segments(prompt.segments)


def _call_deltas(calls: Sequence[CallDelta]) -> list[dict[str, Any]]:
    """The starts of calls, and between them the pieces of each call's arguments as one."""
    deltas: list[dict[str, Any]] = []
    for call in calls:
        if call.id is not None:
            function = {"name": call.name, "arguments": call.arguments}
            deltas.append({"index": call.index, "id": call.id, "type": "function", "function": function})
        elif deltas and deltas[-1]["index"] == call.index and "id" not in deltas[-1]:
            deltas[-1]["function"]["arguments"] += call.arguments
        else:
            deltas.append({"index": call.index, "function": {"arguments": call.arguments}})
    return deltas


def _chunk(choice: Choice, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}


def _end(choice: Choice) -> dict[str, Any]:
    return {
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        "matched_stop": choice.matched_stop,
    }
